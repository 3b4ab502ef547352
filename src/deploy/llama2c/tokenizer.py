"""A Hugging Face tokenizer in run.c's terms, and llama2.c's tokenizer.bin.

Formats: tokenizer.json of the `tokenizers` library; tokenizer.py of karpathy/llama2.c.
"""

import json
import re
import struct
import unicodedata
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from src.core.errors import BadData, WrongKind
from src.deploy.byte_level import SPLITS, steps_of, symbol_bytes

# The names in SPLITS that run.c knows.
KNOWN_SPLITS = ("gpt2", "llama3", "qwen2")


@dataclass
class Tokenizer:
    """What run.c needs to know to encode as a Hugging Face tokenizer does."""

    pieces: dict[int, str]
    """id -> piece as in tokenizer.json, added tokens included."""
    merges: list[tuple[int, int, int]]
    """(left id, right id, merged id), best first."""
    added: list[dict]
    byte_level: bool = False
    nfc: bool = False
    """Text is brought into Unicode's normalization form C first."""
    split: str = "none"
    prefix: str = "never"
    prefix_unless_space: bool = False
    whole_words: bool = False
    fuse_unk: bool = False
    unk: int | None = None


def read_tokenizer(spec: dict, where: str) -> Tokenizer:
    """Translate a tokenizer.json. Raises WrongKind naming the first part that run.c does not have."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise _unknown(f"a {model.get('type')} model", where)
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _unknown(f"{key} {model[key]!r}", where)
    try:
        vocab = model["vocab"]
        pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
        merges = [(vocab[left], vocab[right], vocab[left + right]) for left, right in pairs]
    except (KeyError, ValueError, TypeError) as fault:
        raise BadData(f"tokenizer.json is damaged: its vocabulary and merges do not fit together ({fault})", where=where) from None
    found = Tokenizer(
        pieces={id: piece for piece, id in vocab.items()} | {token["id"]: token["content"] for token in spec["added_tokens"]},
        merges=merges,
        added=spec["added_tokens"],
        whole_words=bool(model.get("ignore_merges")),
        fuse_unk=bool(model.get("fuse_unk")),
        unk=vocab.get(model.get("unk_token")),
    )
    normalizers = steps_of(spec.get("normalizer"), "normalizers")
    steps = steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    for token in found.added:
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                raise _unknown(f"the added token {token['content']!r} with {key}", where)
        if token.get("normalized") and normalizers:
            raise _unknown(f"the added token {token['content']!r} with normalized=true beside a normalizer", where)
    if any(step["type"] == "ByteLevel" for step in steps):
        _read_byte_level(found, normalizers, steps, where)
    else:
        _read_sentencepiece(found, normalizers, steps, where)
        if " " in vocab and "▁" in vocab:
            raise _unknown("both ' ' and '▁' as pieces", where)
        if not model.get("byte_fallback") and "<0x0A>" in vocab:
            raise _unknown("byte pieces but no byte_fallback", where)
    return found


def _unknown(what: str, where: str) -> WrongKind:
    return WrongKind(f"the tokenizer has {what}, which run.c does not have", where=where, fix="target=openvino_cpu")


def _read_byte_level(found: Tokenizer, normalizers: list[dict], steps: list[dict], where: str) -> None:
    """Set how a byte-level tokenizer, as GPT-2's, cuts its words."""
    found.nfc = normalizers == [{"type": "NFC"}]
    if normalizers and not found.nfc:
        raise _unknown(f"the normalizer {normalizers[0]['type']} before a byte-level model", where)
    split = _byte_level_split(steps)
    if split is None:
        raise _unknown(f"the pre-tokenizer {json.dumps(steps)[:200]}", where)
    found.byte_level, found.split = True, split


def _byte_level_split(steps: list[dict]) -> str | None:
    """run.c's name for how a byte-level tokenizer cuts its words, or None."""
    *before, last = steps
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return "gpt2"
        return "digits_gpt2" if before == [{"type": "Digits", "individual_digits": True}] else None
    if len(before) != 1 or before[0]["type"] != "Split" or before[0]["behavior"] != "Isolated" or before[0].get("invert"):
        return None
    split = SPLITS.get(before[0]["pattern"].get("Regex"))
    return split if split in KNOWN_SPLITS else None


def _read_sentencepiece(found: Tokenizer, normalizers: list[dict], steps: list[dict], where: str) -> None:
    """Set how a tokenizer converted from sentencepiece treats spaces."""
    if found.whole_words:
        raise _unknown("ignore_merges in a sentencepiece model", where)
    replaces = False
    for step in normalizers:
        if step == {"type": "Prepend", "prepend": "▁"}:
            found.prefix = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        else:
            raise _unknown(f"the normalizer {step['type']}", where)
    if len(steps) > 1 or (steps and (steps[0]["type"] != "Metaspace" or steps[0]["replacement"] != "▁")):
        raise _unknown(f"the pre-tokenizer {json.dumps(steps)[:200]}", where)
    if steps:
        if found.prefix == "always":
            raise _unknown("both a Prepend normalizer and a Metaspace pre-tokenizer", where)
        replaces = True
        found.prefix = steps[0].get("prepend_scheme", "always")
        found.prefix_unless_space = True
        found.split = "spaces" if steps[0].get("split", True) else "none"
    if not replaces:
        raise _unknown("no rule that turns spaces into ▁", where)


@cache
def unicode_ranges(category: str) -> str:
    r"""Code points of \p{category} as "41-5a 61-7a", from the regex engine of `tokenizers` itself: Python's Unicode is older."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    runs = Split(Regex(rf"\p{{{category}}}+"), "removed", invert=True).pre_tokenize_str(every)
    return " ".join(f"{ord(run[0]):x}-{ord(run[-1]):x}" for run, _ in runs)


@cache
def canonical() -> tuple[str, str]:
    """What run.c normalizes by: ("c0=41+300 212b=c5 958=915.93c", "300-314=e6"), characters that are equal to others, `+` where the two become one again, and
    classes of combining marks. As the normalizers of `tokenizers` have it, whose Unicode is older or newer than Python's; Hangul follows from a rule."""
    from tokenizers.normalizers import NFC, NFD

    nfc, nfd = NFC().normalize_str, NFD().normalize_str
    equal, marks = [], list[tuple[int, int, int]]()
    for code in (*range(0xC0, 0xAC00), *range(0xF900, 0x110000)):
        char = chr(code)
        parts = unicodedata.decomposition(char)
        if parts and not parts.startswith("<") and nfd(char) == unicodedata.normalize("NFD", char):
            equal.append(f"{code:x}=" + ("+" if nfc(char) == char else ".").join(f"{int(part, 16):x}" for part in parts.split()))
        if kind := unicodedata.combining(char):
            before, after = ("\u0301", char) if kind == 1 else (char, "\u0334")  # classes 230 and 1
            if nfd(f"a{before}{after}") == f"a{before}{after}":
                continue  # a mark of a later Unicode
            if marks and marks[-1][1:] == (code - 1, kind):
                marks[-1] = (marks[-1][0], code, kind)
            else:
                marks.append((code, code, kind))
    return " ".join(equal), " ".join(f"{low:x}-{high:x}={kind:x}" for low, high, kind in marks)


def write_tokenizer(tokenizer: Tokenizer, vocab: int, bos: int | None, eos: int | None, path: Path) -> None:
    """tokenizer.bin: uint32 longest piece, then for each of `vocab` ids a float32 score, int32 length and its bytes.

    Pieces score 0, -1, -2, ... in the order in which merges first make them; those that no merge makes follow in id order,
    and byte, special and unused ids score 0. That gives a converted sentencepiece model its own scores back. BOS and EOS
    are written with newlines around them, as llama2.c has it.
    """
    ranks: dict[int, int] = {}
    for _, _, merged in tokenizer.merges:
        ranks.setdefault(merged, len(ranks))
    symbols = symbol_bytes()
    special = {token["id"] for token in tokenizer.added}
    entries, unmade = [], len(ranks)
    for id in range(vocab):
        piece, score = tokenizer.pieces.get(id, ""), 0.0
        if not piece or id in special:
            raw = (f"\n{piece}\n" if id in (bos, eos) and not tokenizer.byte_level else piece).encode()
        elif re.fullmatch("<0x[0-9A-F]{2}>", piece) and not tokenizer.byte_level:
            raw = piece.encode()
        else:
            raw = bytes(symbols[c] for c in piece) if tokenizer.byte_level else piece.replace("▁", " ").encode()
            score = -float(ranks.get(id, unmade))
            unmade += id not in ranks
        entries.append((score, raw))
    with path.open("wb") as file:
        file.write(struct.pack("<I", max(len(raw) for _, raw in entries)))
        for score, raw in entries:
            file.write(struct.pack("<fi", score, len(raw)) + raw)
