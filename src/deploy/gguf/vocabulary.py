"""A Hugging Face tokenizer as a GGUF's metadata, and that metadata read back into a tokenizer, which tells whether it says the same.

llama.cpp knows how text is cut before byte-level BPE by a name of its own, one a published model, which its converter finds by the hash of a test text's
ids. What counts is what stands behind a name: expressions, and whether whole words go before merges. So a name is chosen here by those, from
tokenizer.json, and a cut that no name stands for is refused. Sources: llama.cpp's src/llama-vocab.cpp (2026-10), tokenizer.json of the tokenizers library.
"""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from src.chat import encoding
from src.core.errors import UserError, WrongKind
from src.deploy.byte_level import SPLITS, steps_of
from src.models.generation import stop_ids

CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+{0}|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*{0}|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How words are cut: those that byte_level knows, and two that tell capitals from small letters. Sources: Mistral-Nemo's and GPT-4o's tokenizer.json.
CUTS = SPLITS | {
    CASED.replace("{0}", "") + r"\p{N}" + REST: "tekken",
    CASED.replace("{0}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?") + r"\p{N}{1,3}" + REST: "gpt4o",
}


class Cut(NamedTuple):
    """What stands behind a name: how words are cut, whether digits are cut apart first, whether a word that is a piece is taken whole (ignore_merges)."""

    words: str
    digits: bool
    whole: bool


# Where several names stand for the same, the one of the family that is met most.
NAMES = {
    Cut("gpt2", digits=False, whole=False): "gpt-2",
    Cut("gpt2", digits=True, whole=False): "smollm",
    Cut("llama3", digits=False, whole=True): "llama-bpe",
    Cut("llama3", digits=False, whole=False): "dbrx",
    Cut("qwen2", digits=False, whole=False): "qwen2",
    Cut("qwen3_5", digits=False, whole=False): "qwen35",
    Cut("tekken", digits=False, whole=True): "tekken",
    Cut("gpt4o", digits=False, whole=False): "gpt-4o",
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""types of tokens, by GGUF's numbers"""
PHI3 = "phi-3"
"""in a model's name: llama.cpp then takes the white space behind its control tokens for theirs"""


@dataclass
class Vocabulary:
    """What a GGUF says of a tokenizer.

    model: gpt2 (byte-level BPE) or llama (sentencepiece). pre: how it cuts words. tokens, types: of every id. scores: of sentencepiece pieces, merges: of BPE.
    prefix: what stands before a text: "always" a space, "unless" it begins with one, "first" alone at the very beginning and unless there is one, "never".
    special: {"bos", "eos", "eot", "eom", "unk", "pad": id}. add_bos, add_eos: what is put around a prompt. template: of chats.
    strips: control tokens swallow the white space behind them. notes: what a user should know, a sentence each.
    """

    model: str
    pre: str
    tokens: list[str] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    prefix: str = "never"
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    template: str | None = None
    strips: bool = False
    notes: list[str] = field(default_factory=list)

    def as_given(self, text: str) -> str:
        """A plain text as llama.cpp has to be given it for the ids that transformers makes of it: a program puts a space before a text's first word always or
        never, a tokenizer may where there is none."""
        if self.prefix == "unless" and text.startswith(" "):
            return text[1:]
        return f" {text}" if self.prefix == "first" and not text.startswith((" ", *self._control())) else text

    def _control(self) -> tuple[str, ...]:
        return tuple(token for token, kind in zip(self.tokens, self.types) if kind in (CONTROL, USER_DEFINED))


def read(spec: dict[str, Any], where: str) -> Vocabulary:
    """The kind of a tokenizer and how it cuts text, by its tokenizer.json; no tokens yet. Raises WrongKind naming what llama.cpp has no name for."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"is a {model.get('type')} model", where)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"has {key} {model[key]!r}", where)
    normalizers = steps_of(spec.get("normalizer"), "normalizers")
    steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    composes = [step["type"] for step in normalizers] == ["NFC"]
    flagged = [token for token in spec["added_tokens"] if token.get("lstrip") or token.get("single_word")]
    if flagged:
        raise _unknown(f"has an added token {flagged[0]['content']!r} that depends on what is around it", where)
    if any(step["type"] == "ByteLevel" for step in steps):
        if normalizers and not composes:
            raise _unknown(f"has the normalizer {normalizers[0]['type']} before byte-level BPE", where)
        found = Vocabulary("gpt2", _name(steps, bool(model.get("ignore_merges")), where))
        if composes:
            found.notes.append(
                "llama.cpp does not compose letters with their accents (NFC) as the tokenizer does: give it composed text, as nearly all is"
            )
    else:
        if not model.get("byte_fallback"):
            raise _unknown("has no byte_fallback and is not byte-level", where)
        found = Vocabulary("llama", "default", prefix=_prefix(normalizers, steps, where))
    # llama.cpp has this as a rule for models of this name alone, the three excepted.
    strips = {token["content"] for token in spec["added_tokens"] if token.get("rstrip")}
    special = {token["content"] for token in spec["added_tokens"] if token["special"]} | {"</s>"}
    if strips and strips != special - {"<unk>", "<s>", "<|endoftext|>"}:
        raise _unknown(f"has added tokens that swallow white space: {', '.join(sorted(strips)[:4])}", where)
    found.strips = bool(strips)
    return found


def _unknown(what: str, where: str) -> WrongKind:
    return WrongKind(f"the tokenizer {what}, which llama.cpp has no name for", where=where, fix="target=openvino_cpu")


def _name(steps: list[dict], whole: bool, where: str) -> str:
    """llama.cpp's name for how a byte-level tokenizer cuts words."""
    *before, last = steps
    digits = before[:1] == [{"type": "Digits", "individual_digits": True}]
    before = before[digits:]
    words = "gpt2" if not before and last.get("use_regex", True) else None
    if len(before) == 1 and before[0]["type"] == "Split" and before[0]["behavior"] == "Isolated" and not before[0].get("invert"):
        words = None if last.get("use_regex", True) else CUTS.get(before[0]["pattern"].get("Regex"))
    name = NAMES.get(Cut(words, digits, whole)) if words and last["type"] == "ByteLevel" and not last.get("add_prefix_space") else None
    if name is None:
        raise _unknown(f"cuts words by {json.dumps(steps)[:300]}" + (" and takes whole words first" if whole else ""), where)
    return name


def _prefix(normalizers: list[dict], steps: list[dict], where: str) -> str:
    """See Vocabulary."""
    prefix, replaces = "never", False
    for step in normalizers:
        if step == {"type": "Prepend", "prepend": "▁"}:
            prefix = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        else:
            raise _unknown(f"has the normalizer {step['type']}", where)
    for step in steps:
        if step["type"] == "Metaspace" and step["replacement"] == "▁" and prefix == "never":
            prefix, replaces = {"always": "unless"}.get(step["prepend_scheme"], step["prepend_scheme"]), True
        # Gemma's: after the replacement there is no space left to cut at.
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and replaces):
            raise _unknown(f"has the pre-tokenizer {json.dumps(steps)[:200]}", where)
    if not replaces:
        raise _unknown("has no rule that turns spaces into ▁", where)
    return prefix


def of(tokenizer: Any, model: Path, rows: int) -> Vocabulary:
    """What a GGUF says of a tokenizer, for a model of so many rows of vocabulary. Raises WrongKind as `read`, and where tokens have the same text."""
    if not tokenizer.is_fast:
        raise _unknown("has no tokenizer.json", str(model))
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    found = read(spec, str(model))
    vocab, added = spec["model"]["vocab"], {token["id"]: token for token in spec["added_tokens"]}
    pieces = {id: piece for piece, id in vocab.items()}
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in spec["model"]["merges"]]
    for id in range(rows):
        if id in added:
            text, kind = added[id]["content"], CONTROL if added[id]["special"] else USER_DEFINED
            if kind == USER_DEFINED and found.model == "llama":
                text = text.replace("▁", " ")
        else:
            text, kind = pieces.get(id, f"[PAD{id}]"), NORMAL if id in pieces else UNUSED
            if found.model == "llama" and len(text) == 6 and text.startswith("<0x"):
                kind = BYTE
        if id == tokenizer.unk_token_id and found.model == "llama":
            kind = UNKNOWN
        found.tokens.append(text)
        found.types.append(kind)
    if len(set(found.tokens)) < rows:
        twice = next(text for i, text in enumerate(found.tokens) if text in found.tokens[:i])
        raise _unknown(f"has two tokens {twice!r}", str(model))
    if found.model == "gpt2":
        found.merges = [" ".join(pair) for pair in pairs]
    else:
        # A piece's score is when the first of its merges comes; pieces that none makes come last, and are made of nothing but themselves.
        ranks: dict[str, int] = {}
        for left, right in pairs:
            ranks.setdefault(left + right, len(ranks))
        found.scores = [
            -float(ranks.get(text, len(ranks) + id)) if kind == NORMAL else 0.0
            for id, (text, kind) in enumerate(zip(found.tokens, found.types))
        ]
    _around(found, tokenizer)
    _stops(found, tokenizer, model)
    return found


def _around(found: Vocabulary, tokenizer: Any) -> None:
    """Set what is put around a prompt. llama.cpp puts it around a chat too, which transformers does not: there its template says it all."""
    bare, full = (tokenizer("a", add_special_tokens=flag).input_ids for flag in (False, True))
    at = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    before, behind = full[:at], full[at + len(bare) :]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if before not in ([], [bos]) or behind not in ([], [eos]):
        raise _unknown(
            f"puts {tokenizer.convert_ids_to_tokens(before)} before a text and {tokenizer.convert_ids_to_tokens(behind)} behind", ""
        )
    found.template = str(tokenizer.chat_template) if tokenizer.chat_template else None
    found.add_bos, found.add_eos = before == [bos], behind == [eos] and not found.template
    if found.template:
        text = encoding.render(tokenizer, [{"role": "user", "content": "a"}], prompt=True)
        if found.add_bos and not text.startswith(tokenizer.bos_token):
            found.add_bos = False
            found.notes.append(f"prompts do not begin with {tokenizer.bos_token}: its chats do not, and llama.cpp begins all texts alike")


def _stops(found: Vocabulary, tokenizer: Any, model: Path) -> None:
    """Set the special ids. A turn's end is eot where it is not eos; llama.cpp has room for three that end an answer."""
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if found.template:
        with contextlib.suppress(UserError):  # a template whose turns end with plain text
            ends = [*ends, encoding.turn_end(tokenizer)]
    ends = list(dict.fromkeys([*ends, *sorted(stop_ids(model, tokenizer))]))
    ends = [id for id in ends if id is not None and id < len(found.tokens)]
    found.special = dict(zip(("eos", "eot", "eom"), ends))
    for name in ("bos", "unk", "pad"):
        if (id := getattr(tokenizer, f"{name}_token_id")) is not None and id < len(found.tokens):
            found.special[name] = id
    for id in ends:  # that a program hides, as transformers does
        found.types[id] = CONTROL
    if len(ends) > 3:
        found.notes.append(
            f"a GGUF names three tokens that end a turn: {', '.join(found.tokens[id] for id in ends[3:])} are left to llama.cpp's own list"
        )


def describe(found: Vocabulary, writer: Any) -> None:
    """Put it into a gguf.GGUFWriter."""
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.merges:
        writer.add_token_merges(found.merges)
    if found.scores:
        writer.add_token_scores(found.scores)
    for name, id in found.special.items():
        getattr(writer, f"add_{name}_token_id")(id)
    writer.add_add_bos_token(found.add_bos)
    writer.add_add_eos_token(found.add_eos)
    writer.add_add_space_prefix(found.prefix in ("always", "unless"))
    if found.template:
        writer.add_chat_template(found.template)


# ---- read back


def tokenizer_in(fields: dict[str, Any]) -> Any:
    """A tokenizers.Tokenizer that does what a GGUF's metadata, {key: value}, say by llama.cpp's rules, where it is not here to ask."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    def get(name: str) -> Any:
        return fields.get(f"tokenizer.ggml.{name}")

    tokens, types = get("tokens"), get("token_type")
    vocab = {token: id for id, token in enumerate(tokens)}
    if get("model") == "gpt2":
        cut = next(cut for cut, name in NAMES.items() if name == get("pre"))
        words = next(pattern for pattern, name in CUTS.items() if name == cut.words)
        pairs = [tuple(merge.split(" ")) for merge in get("merges")]
        made = Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut.whole))
        made.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated")] if cut.digits else []),
                pre_tokenizers.Split(Regex(words), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    else:
        scores, plain = get("scores"), {token for token, kind in zip(tokens, types) if kind == NORMAL}
        # llama.cpp joins the two neighbours whose piece has the best score, whatever they are.
        joins = [(-scores[vocab[t]], t[:i], t[i:]) for t in plain for i in range(1, len(t)) if t[:i] in plain and t[i:] in plain]
        pairs = [(left, right) for _, left, right in sorted(joins, key=lambda join: (join[0], len(join[1])))]
        unknown = next((token for token, kind in zip(tokens, types) if kind == UNKNOWN), None)
        made = Tokenizer(models.BPE(vocab, pairs, byte_fallback=True, fuse_unk=True, unk_token=unknown))
        prepended = [normalizers.Prepend("▁")] if get("add_space_prefix") else []
        made.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    apart = [
        AddedToken(t, normalized=False, special=kind != USER_DEFINED)
        for t, kind in zip(tokens, types)
        if kind in (CONTROL, USER_DEFINED, UNKNOWN)
    ]
    made.add_tokens(apart)
    return made


def fields_of(file: Path) -> dict[str, Any]:
    """{key: value} of a GGUF's metadata, read by the gguf package."""
    import gguf

    return {name: each.contents() for name, each in gguf.GGUFReader(file).fields.items()}
