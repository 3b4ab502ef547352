"""deploy target=llama2c: a Llama model folder becomes the files of karpathy/llama2.c and a C program that runs them.

The bundle is model.bin, tokenizer.bin (both readable by stock llama2.c), runtime.cfg (what those formats cannot say:
rope base, stop ids, BPE merges, chat template), run.c, Makefile, the compiled `run` and a README.
Formats: karpathy/llama2.c export.py, tokenizer.py, run.c and runq.c. Settings: `format`, one of fp32_v0, fp32_v1 and
int8_v2, and `group_size`, the int8 values that share one scale.
"""

import json
import re
import shutil
import struct
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from src.errors import BadData, MissingInput, MissingTool, ProofFailed, WrongKind
from src.log import say, size, warn
from src.modeling import load_model, load_tokenizer

SOURCES = Path(__file__).parents[2] / "assets" / "llama2c"
MAGIC = 0x616B3432
VERSIONS = {"fp32_v0": 0, "fp32_v1": 1, "int8_v2": 2}
SMALLEST_GROUP = 4  # below this the fp32 scales weigh as much as the values, and lose their 4-byte alignment
DTYPES = {"F64", "F32", "F16", "BF16"}

# The order in which every version of model.bin stores a layer's matrices.
MATRICES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}

# The regular expressions that run.c knows, by its name for them. Sources: GPT-2's encoder.py, Llama 3's and Qwen2's tokenizer.json.
SPLITS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": "gpt2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "llama3",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+": "qwen2",
}

PROBES = (
    "",
    "Hello, world!",
    "Once upon a time, there was a little girl named Lily.",
    " leading space",
    "trailing  ",
    "two  and   three    spaces",
    "line one\nline two\n\n\nline five\r\n\tindented",
    " \n \n  x",
    "12 345 6789 10000000 3.14159 1,024",
    "It's they're I'LL we've 'quoted' don't",
    "(a+b)*c == \"d\" && e[0] != '#'; // ...!?",
    "안녕하세요, 만나서 반갑습니다. 오늘 날씨가 좋네요!",
    "你好,世界。这是一个测试。",
    "naïve café — “quotes” … № ½ ٣",
    "🙂👩‍👩‍👧 emoji 🇰🇷!",
    "a\u00a0b\u3000c\u2581d",
    "x" * 40 + " " * 17 + "y",
)
GREEDY_PROBES = ("", "Once upon a time", "The answer to 2 + 2 is", "안녕하세요")
CONVERSATIONS = (
    ("user", "Hello!"),
    ("system", "Be brief.", "user", "What is 2 + 2?\nExplain."),
    ("user", "  안녕하세요  ", "assistant", "네, 안녕하세요! 🙂\n", "user", "1234 apples"),
    ("system", "You are a poet.\n", "user", "Hi", "assistant", " Ho ", "user", "你好", "assistant", "a  b", "user", "bye's"),
)


# --- what the folder holds ---


@dataclass
class Shape:
    """What config.json says of the model, in llama2.c's words."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    context: int
    theta: float
    eps: float
    shared: bool
    """The classifier is the embedding."""

    @property
    def head(self) -> int:
        return self.dim // self.heads

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name in the checkpoint -> shape, for every tensor that is exported."""
        kv = self.kv_heads * self.head
        rows = {"wq": self.dim, "wk": kv, "wv": kv, "wo": self.dim, "w1": self.hidden, "w2": self.dim, "w3": self.hidden}
        names = {"model.embed_tokens.weight": (self.vocab, self.dim), "model.norm.weight": (self.dim,)}
        for layer in range(self.layers):
            names[f"model.layers.{layer}.input_layernorm.weight"] = (self.dim,)
            names[f"model.layers.{layer}.post_attention_layernorm.weight"] = (self.dim,)
            for key, name in MATRICES.items():
                names[f"model.layers.{layer}.{name}.weight"] = (rows[key], self.hidden if key == "w2" else self.dim)
        if not self.shared:
            names["lm_head.weight"] = (self.vocab, self.dim)
        return names


def check(model_dir: Path, settings) -> None:
    """Refuse in milliseconds what this target cannot carry; reads config.json, safetensors headers and tokenizer.json.

    Raises MissingInput, BadData or WrongKind.
    """
    shape = read_shape(model_dir)
    _check_tensors(model_dir, shape)
    if settings.format == "int8_v2":
        group_size(shape, settings.group_size)
    if (model_dir / "tokenizer.json").is_file():
        read_tokenizer(_read_json(model_dir / "tokenizer.json"), str(model_dir / "tokenizer.json"))
    elif not (model_dir / "tokenizer.model").is_file():
        raise MissingInput("the model folder has no tokenizer.json", where=str(model_dir))


def read_shape(model_dir: Path) -> Shape:
    """The model's sizes from config.json. Raises WrongKind where llama2.c's formats or run.c cannot express the model."""
    path = model_dir / "config.json"
    config = _read_json(path)

    def refuse(what: str, fix: str) -> None:
        raise WrongKind(what, where=str(path), fix=fix)

    kind = config.get("model_type")
    if kind != "llama":
        refuse(
            f"target=llama2c takes Llama-architecture models only; this one is '{kind}'",
            "choose a target for this architecture; target=openvino_cpu is planned for any of them",
        )
    if config.get("quantization_config"):
        refuse("the model is already quantized", "deploy the merged model instead; format=int8_v2 quantizes it here")
    rope = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or {}
    rope_type = scaling.get("rope_type") or scaling.get("type") or rope.get("rope_type") or "default"
    if rope_type != "default":
        refuse(f"rope scaling '{rope_type}' is unknown to llama2.c", "take a model without rope scaling")
    if config.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act is '{config['hidden_act']}'; llama2.c has silu only", "take a model with silu")
    try:
        heads = config["num_attention_heads"]
        shape = Shape(
            dim=config["hidden_size"],
            hidden=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            vocab=config["vocab_size"],
            context=config["max_position_embeddings"],
            theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
            eps=float(config.get("rms_norm_eps", 1e-6)),
            shared=bool(config.get("tie_word_embeddings", False)),
        )
    except KeyError as missing:
        raise BadData(f"config.json does not say {missing}", where=str(path)) from None
    if shape.dim % heads or heads % shape.kv_heads or shape.head % 2:
        refuse(f"{heads} heads and {shape.kv_heads} KV heads do not divide hidden_size {shape.dim} into even heads", "take another model")
    head = config.get("head_dim") or shape.head
    if head != shape.head:
        refuse(f"head_dim {head} is not hidden_size / num_attention_heads = {shape.head}, as llama2.c has it", "take another model")
    return shape


def _check_tensors(model_dir: Path, shape: Shape) -> None:
    headers = {}
    for path in _shards(model_dir):
        headers |= _read_header(path)
    for name, wanted in shape.tensors().items():
        if name not in headers:
            raise BadData(f"the checkpoint has no tensor {name}", where=str(model_dir))
        if tuple(headers[name]["shape"]) != wanted:
            raise BadData(f"{name} has shape {headers[name]['shape']}; config.json asks for {list(wanted)}", where=str(model_dir))
        if headers[name]["dtype"] not in DTYPES:
            raise WrongKind(f"{name} has dtype {headers[name]['dtype']}", where=str(model_dir), fix="deploy the merged model instead")
    biases = [name for name in headers if name.endswith("_proj.bias")]
    if biases:
        raise WrongKind(
            f"the model has biases ({biases[0]} and {len(biases) - 1} more); llama2.c has none",
            where=str(model_dir),
            fix="take a model without attention_bias and mlp_bias",
        )


def group_size(shape: Shape, wanted: int) -> int:
    """The int8 group: `wanted`, halved until it divides the rows of every matrix. Raises WrongKind below 4."""
    group = wanted
    while group >= SMALLEST_GROUP and (shape.dim % group or shape.hidden % group):
        group //= 2
    if group < SMALLEST_GROUP:
        raise WrongKind(
            f"no group size from {wanted} down to {SMALLEST_GROUP} divides both hidden_size {shape.dim} and intermediate_size {shape.hidden}",
            fix="format=fp32_v1",
        )
    return group


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput(f"the model folder has no {path.name}", where=str(path)) from None
    except ValueError as fault:
        raise BadData(f"{path.name} is not JSON: {fault}", where=str(path)) from None


def _shards(model_dir: Path) -> list[Path]:
    shards = sorted(model_dir.glob("*.safetensors"))
    if not shards:
        raise MissingInput("the model folder has no *.safetensors", where=str(model_dir))
    return shards


def _read_header(path: Path) -> dict[str, dict]:
    """Name -> {dtype, shape, data_offsets} of a safetensors file, which starts with the header's length as uint64."""
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        raw = file.read(length) if length <= path.stat().st_size else b""
    try:
        header = json.loads(raw)
    except ValueError:
        raise BadData("the safetensors header is damaged", where=str(path)) from None
    header.pop("__metadata__", None)
    ends = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + ends != path.stat().st_size:
        raise BadData(f"the file has {path.stat().st_size} bytes, its header asks for {8 + length + ends}", where=str(path))
    return header


# --- the tokenizer ---


@dataclass
class Tokenizer:
    """What run.c needs to know to encode as a Hugging Face tokenizer does."""

    pieces: dict[int, str]
    """id -> piece as in tokenizer.json, added tokens included."""
    merges: list[tuple[int, int, int]]
    """(left id, right id, merged id), best first."""
    added: list[dict]
    byte_level: bool = False
    split: str = "none"
    prefix: str = "never"
    prefix_unless_space: bool = False
    whole_words: bool = False
    fuse_unk: bool = False
    unk: int | None = None
    ranges: dict[str, str] = field(default_factory=dict)


def read_tokenizer(spec: dict, where: str) -> Tokenizer:
    """Translate a tokenizer.json. Raises WrongKind naming the first part that run.c does not have."""

    def refuse(what: str) -> None:
        raise WrongKind(f"the tokenizer has {what}, which run.c does not have", where=where, fix="take a model with a Llama tokenizer")

    model = spec["model"]
    if model.get("type") != "BPE":
        refuse(f"a {model.get('type')} model")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            refuse(f"{key} {model[key]!r}")
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
    normalizers = _steps(spec.get("normalizer"), "normalizers")
    steps = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    for token in found.added:
        for key in ("single_word", "lstrip", "rstrip"):
            if token.get(key):
                refuse(f"the added token {token['content']!r} with {key}")
        if token.get("normalized") and normalizers:
            refuse(f"the added token {token['content']!r} with normalized=true beside a normalizer")

    if any(step["type"] == "ByteLevel" for step in steps):
        if normalizers:
            refuse(f"the normalizer {normalizers[0]['type']} before a byte-level model")
        found.byte_level = True
        found.split = _byte_level_split(steps) or refuse(f"the pre-tokenizer {json.dumps(steps)[:200]}")
        return found

    if found.whole_words:
        refuse("ignore_merges in a sentencepiece model")
    replaces = False
    for step in normalizers:
        if step == {"type": "Prepend", "prepend": "▁"}:
            found.prefix = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁":
            replaces = True
        else:
            refuse(f"the normalizer {step['type']}")
    if len(steps) > 1 or (steps and (steps[0]["type"] != "Metaspace" or steps[0]["replacement"] != "▁")):
        refuse(f"the pre-tokenizer {json.dumps(steps)[:200]}")
    if steps:
        if found.prefix == "always":
            refuse("both a Prepend normalizer and a Metaspace pre-tokenizer")
        replaces = True
        found.prefix = steps[0].get("prepend_scheme", "always")
        found.prefix_unless_space = True
        found.split = "spaces" if steps[0].get("split", True) else "none"
    if not replaces:
        refuse("no rule that turns spaces into ▁")
    if " " in vocab and "▁" in vocab:
        refuse("both ' ' and '▁' as pieces")
    if not model.get("byte_fallback") and "<0x0A>" in vocab:
        refuse("byte pieces but no byte_fallback")
    return found


def _steps(step: dict | None, key: str) -> list[dict]:
    return [] if step is None else step[key] if step["type"] == "Sequence" else [step]


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
    return SPLITS.get(before[0]["pattern"].get("Regex"))


@cache
def _unicode_ranges(category: str) -> str:
    r"""Code points of \p{category} as "41-5a 61-7a", from the regex engine of `tokenizers` itself: Python's Unicode is older."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000)]))
    runs = Split(Regex(rf"\p{{{category}}}+"), "removed", invert=True).pre_tokenize_str(every)
    return " ".join(f"{ord(run[0]):x}-{ord(run[-1]):x}" for run, _ in runs)


def _byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in -> byte, as in its encoder.py: printable Latin-1 stands for itself, the rest from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


def write_tokenizer(tokenizer: Tokenizer, vocab: int, bos: int | None, eos: int | None, path: Path) -> None:
    """tokenizer.bin: uint32 longest piece, then for each of `vocab` ids a float32 score, int32 length and its bytes.

    Pieces score 0, -1, -2, ... in the order in which merges first make them; those that no merge makes follow in id order,
    and byte, special and unused ids score 0. That gives a converted sentencepiece model its own scores back. BOS and EOS
    are written with newlines around them, as llama2.c has it.
    """
    ranks: dict[int, int] = {}
    for _, _, merged in tokenizer.merges:
        ranks.setdefault(merged, len(ranks))
    symbols = _byte_symbols()
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


# --- the chat template ---


@dataclass
class ChatPieces:
    """What the template puts around the texts of a conversation.

    open | system_open + system + system_close, then user, then (answer + assistant + next + user)*, then generate.
    """

    open: str
    answer: str
    generate: str
    next: str
    system_open: str | None = None
    system_close: str | None = None
    trim: frozenset[str] = frozenset()
    """Roles whose text the template strips of white space."""

    def render(self, messages: list[dict]) -> str:
        texts = [m["content"].strip() if m["role"] in self.trim else m["content"] for m in messages]
        if messages[0]["role"] == "system":
            out, texts = self.system_open + texts[0] + self.system_close, texts[1:]
        else:
            out = self.open
        for i, text in enumerate(texts):
            out += ("" if i == 0 else self.answer if i % 2 else self.next) + text
        return out + self.generate


def messages_of(conversation: tuple[str, ...]) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(conversation[::2], conversation[1::2], strict=True)]


def find_chat(tokenizer) -> tuple[ChatPieces | None, str]:
    """Derive the pieces from renderings of the template and prove them on CONVERSATIONS. Returns (pieces or None, why none)."""
    if not tokenizer.chat_template:
        return None, "its tokenizer has no chat template"
    from jinja2 import TemplateError

    def render(*conversation: str) -> str:
        return tokenizer.apply_chat_template(messages_of(conversation), tokenize=False, add_generation_prompt=True)

    def cut(text: str, *marks: str) -> list[str]:
        parts = []
        for mark in marks:
            part, found, text = text.partition(mark)
            if not found:
                raise ValueError(f"the template drops or changes {mark!r}")
            parts.append(part)
        return [*parts, text]

    try:
        opening, generate = cut(render("user", "Qu1"), "Qu1")
        _, answer, between, again = cut(render("user", "Qu1", "assistant", "Qa1", "user", "Qu2"), "Qu1", "Qa1", "Qu2")
        pieces = ChatPieces(opening, answer, generate, between)
        if again != generate:
            return None, "the template ends a second turn otherwise than the first"
    except (TemplateError, ValueError, TypeError) as fault:
        return None, str(fault)
    try:
        pieces.system_open, pieces.system_close, _ = cut(render("system", "Qs1", "user", "Qu1"), "Qs1", "Qu1")
    except (TemplateError, ValueError, TypeError):
        pass  # Gemma's and early Mistral's templates refuse a system role, and serve without

    texts = {
        "user": ("user", " \nQ \n"),
        "assistant": ("user", "Q", "assistant", " \nQ \n", "user", "Q"),
        "system": ("system", " \nQ \n", "user", "Q"),
    }
    if pieces.system_open is None:
        del texts["system"]
    pieces.trim = frozenset(role for role, talk in texts.items() if " \nQ \n" not in render(*talk))
    for conversation in CONVERSATIONS:
        messages = messages_of(conversation)
        if messages[0]["role"] == "system" and pieces.system_open is None:
            continue
        if pieces.render(messages) != render(*conversation):
            return None, "the template is not made of fixed pieces around the texts"
    return pieces, ""


# --- writing ---


def build(model_dir: Path, out: Path, settings) -> dict:
    """Write the bundle into the existing folder `out`, compile it and prove it against transformers.

    Returns numbers for the manifest: bytes, group size, ids and tokens compared, tokens per second.
    Raises what `check` raises, MissingTool without a compiler, ProofFailed where the program and transformers disagree.
    """
    check(model_dir, settings)
    shape = read_shape(model_dir)
    hf = load_tokenizer(model_dir)
    # transformers may rebuild the pipeline by the tokenizer's class, so what it runs counts, not tokenizer.json.
    tokenizer = read_tokenizer(json.loads(hf.backend_tokenizer.to_str()), str(model_dir))
    if max(tokenizer.pieces) >= shape.vocab:
        raise WrongKind(
            f"the tokenizer has id {max(tokenizer.pieces)}, the model {shape.vocab} tokens",
            where=str(model_dir),
            fix="resize the embeddings",
        )
    if tokenizer.byte_level:
        tokenizer.ranges = {"letters": _unicode_ranges("L"), "numbers": _unicode_ranges("N")}
    stops = stop_ids(model_dir, hf)
    pieces, why = find_chat(hf)
    if pieces is None:
        warn(f"the bundle has no chat mode: {why}")

    group = group_size(shape, settings.group_size) if settings.format == "int8_v2" else 0
    if group and group != settings.group_size:
        say(f"int8 groups of {group}: {settings.group_size} does not divide rows of {shape.dim} and {shape.hidden}")
    write_model(model_dir, shape, VERSIONS[settings.format], group, out / "model.bin")
    write_tokenizer(tokenizer, shape.vocab, hf.bos_token_id, hf.eos_token_id, out / "tokenizer.bin")
    write_runtime(shape, tokenizer, hf, stops, pieces, why, out / "runtime.cfg")
    for name in ("run.c", "Makefile"):
        shutil.copyfile(SOURCES / name, out / name)
    (out / "README.md").write_text(_readme(shape, settings.format, group, pieces, why), encoding="utf-8")
    _compile(out)

    metrics = {
        "format": settings.format,
        "group_size": group,
        "model_bytes": (out / "model.bin").stat().st_size,
        "chat": pieces is not None,
    }
    metrics |= prove_ids(out, hf, pieces)
    metrics |= prove_text(model_dir, out, hf, stops, exact=group == 0)
    say(f"llama2c: model.bin {size(metrics['model_bytes'])}, {metrics['tokens_per_second']:.1f} tokens/s on one core here")
    return metrics


def write_model(model_dir: Path, shape: Shape, version: int, group: int, path: Path) -> None:
    """model.bin of llama2.c's version 0, 1 (fp32) or 2 (int8 in groups), one tensor in memory at a time."""
    import torch
    from safetensors import safe_open

    with ExitStack() as stack, path.open("wb") as file:
        shards = [stack.enter_context(safe_open(shard, framework="pt")) for shard in _shards(model_dir)]
        holder = {name: shard for shard in shards for name in shard.keys()}

        def floats(*names: str) -> None:
            for name in names:
                holder[name].get_tensor(name).float().contiguous().numpy().tofile(file)

        def matrix(name: str, heads: int = 0) -> None:
            weight = holder[name].get_tensor(name).float()
            if heads:
                weight = interleave(weight, heads)
            if version == 2:
                values, scales = quantize(weight, group)
                values.numpy().tofile(file)
                scales.numpy().tofile(file)
            else:
                weight.contiguous().numpy().tofile(file)

        layers = [f"model.layers.{i}." for i in range(shape.layers)]
        attention_norms = [layer + "input_layernorm.weight" for layer in layers]
        ffn_norms = [layer + "post_attention_layernorm.weight" for layer in layers]
        vocab = shape.vocab if shape.shared or version > 0 else -shape.vocab
        params = struct.pack("<7i", shape.dim, shape.hidden, shape.layers, shape.heads, shape.kv_heads, vocab, shape.context)
        if version == 0:
            file.write(params)
            matrix("model.embed_tokens.weight")
            floats(*attention_norms)
        else:
            header = struct.pack("<Ii", MAGIC, version) + params + struct.pack("<B", shape.shared)
            header += struct.pack("<i", group) if version == 2 else b""
            file.write(header.ljust(256, b"\0"))
            floats(*attention_norms, *ffn_norms, "model.norm.weight")
            matrix("model.embed_tokens.weight")
        for key, name in MATRICES.items():
            if version == 0 and key == "w1":
                floats(*ffn_norms)
            for layer in layers:
                matrix(f"{layer}{name}.weight", {"wq": shape.heads, "wk": shape.kv_heads}.get(key, 0))
        if version == 0:
            floats("model.norm.weight")
            turns = 1.0 / shape.theta ** (torch.arange(0, shape.head, 2).float() / shape.head)
            angles = torch.outer(torch.arange(shape.context).float(), turns)
            angles.cos().numpy().tofile(file)
            angles.sin().numpy().tofile(file)
        if not shape.shared:
            matrix("lm_head.weight")


def interleave(weight, heads: int):
    """Rows of a query or key projection (heads * head_dim, dim) from Hugging Face's order to llama2.c's.

    Rope turns rows i and i + head_dim / 2 together in the one, rows 2i and 2i + 1 in the other.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def quantize(weight, group: int):
    """Symmetric int8: (values of the weight's size, fp32 scales of one per group). scale = largest / 127."""
    import torch

    groups = weight.reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127.0
    values = torch.round(groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return values.to(torch.int8), scales


def stop_ids(model_dir: Path, hf) -> list[int]:
    """Ids that end an answer: generation_config.json's (config.json's without one) and the tokenizer's eos."""
    path = model_dir / "generation_config.json"
    stop = _read_json(path if path.is_file() else model_dir / "config.json").get("eos_token_id")
    ids = stop if isinstance(stop, list) else [] if stop is None else [stop]
    return sorted({*ids, *([] if hf.eos_token_id is None else [hf.eos_token_id])})


def write_runtime(shape: Shape, tokenizer: Tokenizer, hf, stops: list[int], pieces: ChatPieces | None, why: str, path: Path) -> None:
    r"""runtime.cfg: the line "llama2c-runtime 1", then "key value" lines, then "end".

    Text runs to the end of its line with \n \t \r \\ and \xHH as escapes. `special id hidden text` and
    `merge left right merged` repeat, best merge first.
    """
    begin = _begin_ids(hf)
    lines = ["llama2c-runtime 1", f"rope_theta {shape.theta:.9g}", f"norm_eps {shape.eps:.9g}"]
    lines += [f"begin {' '.join(map(str, begin))}", f"stop {' '.join(map(str, stops))}"]
    if tokenizer.unk is not None:
        lines.append(f"unk {tokenizer.unk}")
    for key in ("byte_level", "fuse_unk", "whole_words", "prefix_unless_space"):
        lines.append(f"{key} {int(getattr(tokenizer, key))}")
    lines += [f"split {tokenizer.split}", f"prefix {tokenizer.prefix}", f"strip_space {int(_strips_space(tokenizer, hf))}"]
    lines += [f"{key} {ranges}" for key, ranges in tokenizer.ranges.items()]
    lines += [f"special {token['id']} {int(token['special'])} {escape(token['content'])}" for token in tokenizer.added]
    if pieces is None:
        lines.append(f"chat_unavailable {escape(why)}")
    else:
        lines.append(f"chat_system {int(pieces.system_open is not None)}")
        lines += [
            f"chat_trim_{name} {int(role in pieces.trim)}"
            for name, role in (("system", "system"), ("user", "user"), ("answer", "assistant"))
        ]
        for key in ("system_open", "system_close", "open", "answer", "generate", "next"):
            lines.append(f"chat_{key} {escape(getattr(pieces, key) or '')}")
    lines.append(f"merges {len(tokenizer.merges)}")
    lines += [f"merge {left} {right} {merged}" for left, right, merged in tokenizer.merges]
    path.write_text("\n".join([*lines, "end"]) + "\n", encoding="utf-8", newline="\n")


def escape(text: str) -> str:
    """Text on one line, as runtime.cfg and `run --ids -m chat` read it."""
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
    return "".join(known.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 32 else c) for c in text)


def _begin_ids(hf) -> list[int]:
    """Ids that the tokenizer puts before a raw text. Raises WrongKind where it puts any after it."""
    plain, full = hf("x", add_special_tokens=False)["input_ids"], hf("x")["input_ids"]
    begin = full[: len(full) - len(plain)]
    if full != begin + plain:
        raise WrongKind("the tokenizer adds tokens after the text", fix="set add_eos_token to false in tokenizer_config.json")
    return begin


def _strips_space(tokenizer: Tokenizer, hf) -> bool:
    """Whether decoding drops the space in front of a text's first word."""
    if tokenizer.byte_level:
        return False
    spaced = next((id for id, piece in tokenizer.pieces.items() if piece.startswith("▁") and piece.strip("▁")), None)
    return spaced is not None and not hf.decode([spaced]).startswith(" ")


def _readme(shape: Shape, format: str, group: int, pieces: ChatPieces | None, why: str) -> str:
    weights = f"int8 in groups of {group}" if group else "fp32"
    chat = "./run model.bin -m chat                          # talk to it; -y sets a system text" if pieces else f"# no chat mode: {why}"
    return f"""# A Llama model for llama2.c

{shape.layers} layers of {shape.dim}, vocabulary {shape.vocab}, context {shape.context}; {weights} (format {format}).
`model.bin` and `tokenizer.bin` are karpathy/llama2.c's formats; `runtime.cfg` holds what they cannot say.

Copy this folder to the board and build there (a C compiler and make are all it takes):

    make -B         # one core; `make omp` for all (OMP_WAIT_POLICY=passive where other programs want them too)
    ./run model.bin -i "Once upon a time" -t 0 -n 100
    {chat}

`run` in this folder was built for the machine that made the bundle. To cross compile instead: `make -B CC=aarch64-linux-gnu-gcc`.
`./run --help` lists the options. The tokenizer and runtime.cfg are looked for beside model.bin.
"""


# --- proving ---


def _compile(out: Path) -> None:
    if not shutil.which("make") or not shutil.which("cc"):
        raise MissingTool("building the llama2c program takes make and a C compiler", fix="apt-get install build-essential")
    argv = ["make", "-B", "-C", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise ProofFailed(f"run.c does not compile here:\n{done.stderr[-1000:]}", where=" ".join(argv))


def run(out: Path, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run the bundle's program. Raises ProofFailed where it fails."""
    argv = [str(out / "run"), str(out / "model.bin"), *options]
    done = subprocess.run(argv, input=stdin, capture_output=True)
    if done.returncode:
        raise ProofFailed(
            f"the program failed with exit code {done.returncode}: {done.stderr[-500:].decode(errors='replace').strip()}",
            where=" ".join(argv),
        )
    return done


def _ids(done: subprocess.CompletedProcess) -> list[int]:
    return [int(id) for id in done.stdout.split()]


def prove_ids(out: Path, hf, pieces: ChatPieces | None) -> dict:
    """The C encoder gives the Hugging Face tokenizer's ids for PROBES, and for CONVERSATIONS where there is a chat mode."""
    checked = 0
    for text in PROBES:
        checked += _same_ids(_ids(run(out, "--ids", "-i", text)), hf(text)["input_ids"], text)
    talks = 0
    for conversation in CONVERSATIONS if pieces else ():
        messages = messages_of(conversation)
        rest = messages
        options = ["--ids", "-m", "chat"]
        if messages[0]["role"] == "system":
            if pieces.system_open is None:
                continue
            options += ["-y", messages[0]["content"]]
            rest = messages[1:]
        lines = "".join(escape(m["content"]) + "\n" for m in rest[1:])
        ours = _ids(run(out, *options, "-i", rest[0]["content"], stdin=lines.encode()))
        theirs = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        checked += _same_ids(ours, theirs, str(messages))
        talks += 1
    return {"probes": len(PROBES), "conversations": talks, "ids_checked": checked}


def _same_ids(ours: list[int], theirs: list[int], text: str) -> int:
    if ours != theirs:
        raise ProofFailed(f"the C tokenizer gives {ours[:40]}, transformers {list(theirs)[:40]}", where=f"the text {text[:200]!r}")
    return len(ours)


def prove_text(model_dir: Path, out: Path, hf, stops: list[int], exact: bool, tokens: int = 64) -> dict:
    """The program's greedy text against transformers in fp32: is each token the likeliest after the ones before it?

    One pass of transformers over the finished text tells, since greedy texts part at the first token that is not.
    exact: raise ProofFailed at such a token unless transformers holds the two as good as equal. Else (int8) the agreement is
    a result, and only one below a half, which no rounding explains, raises.
    """
    import torch

    model = load_model(model_dir, dtype="float32").eval()
    context = model.config.max_position_embeddings
    prompts = equal = agreed = made = ties = 0
    speed = 0.0
    for prompt in GREEDY_PROBES:
        ids = hf(prompt)["input_ids"]
        if not 0 < len(ids) < context:
            continue
        total = min(len(ids) + tokens, context)
        done = run(out, "-t", "0", "-n", str(total - 1), "--answer-ids", "-i", prompt)
        ours = _ids(done)
        if not ours or (len(ids) + len(ours) < total and ours[-1] not in stops):
            raise ProofFailed(f"the program stopped after {len(ours)} tokens", where=f"the prompt {prompt!r}")
        with torch.inference_mode():
            logits = model(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :]
        theirs = logits.argmax(-1).tolist()
        wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        for i in wrong if exact else ():
            if logits[i, theirs[i]] - logits[i, ours[i]] > 1e-4 * logits[i].std():
                raise ProofFailed(f"token {i} of the greedy text is {ours[i]}, transformers' {theirs[i]}", where=f"the prompt {prompt!r}")
        prompts += 1
        equal += not wrong
        ties += len(wrong) if exact else 0
        agreed += len(ours) - len(wrong)
        made += len(ours)
        speed = max(speed, float(re.search(rb"answer: .* ([\d.]+) tok/s", done.stderr)[1]))
    if agreed < 0.5 * made:
        raise ProofFailed(f"transformers agrees with {agreed} of the program's {made} tokens", where=str(out))
    return {
        "prompts": prompts,
        "prompts_equal": equal,
        "ties": ties,
        "greedy_tokens": made,
        "greedy_agreement": round(agreed / made, 4) if made else None,
        "tokens_per_second": speed,
    }
