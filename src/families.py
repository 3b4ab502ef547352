"""What each family of models calls its sizes in config.json, and which matrices its layers hold.

Llama's layer is the rule (Touvron et al. 2023, arXiv:2302.13971): q, k, v, o, gate, up, down, two RMS norms. `FAMILIES` says where a family
differs, by its modelling code in transformers or, for those that bring their code along, in their hub repository.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from src.errors import BadData, WrongKind
from src.shape import Layer, Matrix, ModelShape, Quantization

NAMES = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab": "vocab_size",
    "max_positions": "max_position_embeddings",
}
INNER = ("text_config", "llm_config", "language_config")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
ENCODERS = ("is_encoder_decoder", "encoder_layers", "num_encoder_layers")
KINDS = {"full_attention": "full", "sliding_attention": "sliding", "linear_attention": "linear"}
LARGEST = 2**40
AGAIN = "copy config.json again from the model's repository"


@dataclass(frozen=True)
class Sizes:
    """The sizes every family has, and its config.json's text part for those that only some have."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    kinds: tuple[str, ...]
    window: int | None
    config: dict
    where: str

    def get(self, key: str, default: int | None = None) -> int:
        """A further size: a whole number from 0 on. Raises BadData where it is missing without a default, or anything else."""
        value = self.config.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < LARGEST:
            raise BadData(f"'{key}' should be a whole number, not {value!r}"[:200], where=self.where, fix=AGAIN)
        return value

    def flag(self, rule: bool | str) -> bool:
        """A constant, or what config.json says under the key `rule`."""
        return rule if isinstance(rule, bool) else bool(self.config.get(rule))


@dataclass(frozen=True)
class Family:
    """How a family differs from Llama. A bias is a constant, or the config key that decides it.

    names: our name of a size -> the family's. defaults: what its config.json may leave out, by transformers' config class.
    norms: norms of the hidden width per layer; norm_bias: they have a bias too. qk_norm: one norm of the head's width each for q and k.
    tied: its default for tie_word_embeddings. head_bias: its output layer has one.
    fused: which matrices are one in its checkpoints, qkv or gate_up. mlp: matrices of the MLP, 3 gated or 2. mlp_share: real width of the MLP over what config.json says.
    full_every: attention is full in every so many layers and slides in those between; 0: it always slides; None: never.
    full_below: config key of the layer from which attention slides, where `use_sliding_window` is set.
    layer: (family, sizes, index) -> Layer, for layers that are built otherwise. outside: (sizes) -> (further token tables, values outside layers).
    note: what is worth knowing of every model of the family.
    """

    names: dict[str, str] = field(default_factory=dict)
    defaults: dict[str, object] = field(default_factory=dict)
    qkv_bias: bool | str = "attention_bias"
    out_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    head_bias: bool = False
    norms: int = 2
    norm_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    fused: tuple[str, ...] = ()
    mlp: int = 3
    mlp_share: float = 1
    full_every: int | None = None
    full_below: str | None = None
    layer: Callable | None = None
    outside: Callable | None = None
    note: str = ""


def shape_of(config: dict, where: str) -> ModelShape:
    """The shape that a parsed config.json describes; `where` names it in errors. Raises BadData or WrongKind as read_shape does."""
    outer, notes = config, []
    if inner := next((key for key in INNER if isinstance(config.get(key), dict)), None):
        config = {key: outer[key] for key in ("tie_word_embeddings", "torch_dtype", "dtype") if key in outer} | config[inner]
        notes.append(f"only the language model of this {outer.get('model_type')} is counted ({inner}), not what sees or hears")
    name, family = _family(config, where, notes)
    config = _with_defaults(config, family, notes)
    sizes = _sizes(config, family, where)
    build = family.layer or plain_layer
    tables, outside = family.outside(sizes) if family.outside else (0, 0)
    norm = sizes.hidden * (2 if family.norm_bias else 1)
    tied = config.get("tie_word_embeddings")
    longest = family.names.get("max_positions", NAMES["max_positions"])
    return ModelShape(
        model_type=name,
        hidden=sizes.hidden,
        intermediate=sizes.intermediate,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        vocab=sizes.vocab,
        tied=family.tied if tied is None else bool(tied),
        max_positions=sizes.get(longest) if config.get(longest) is not None else None,
        qkv_bias=sizes.flag(family.qkv_bias),
        qk_norm=family.qk_norm,
        dtype=_dtype(config),
        quantization=_quantization(outer),
        stack=tuple(build(family, sizes, index) for index in range(sizes.layers)),
        extra_embedding=tables,
        outside=norm + outside + (sizes.vocab if family.head_bias else 0),
        notes=(*notes, *([family.note] if family.note else [])),
    )


def _family(config: dict, where: str, notes: list[str]) -> tuple[str, Family]:
    name = config.get("model_type")
    if name is None and (name := _by_class(config)):
        notes.append(f"config.json names no model_type; by its architectures it is {name}")
    if not isinstance(name, str):
        raise BadData("config.json names no model_type", where=where, fix=AGAIN)
    if any(config.get(key) for key in EXPERTS):
        raise WrongKind(f"'{name}' is a mixture of experts; the planner knows dense models only", where=where, fix="give a dense model")
    if any(config.get(key) for key in ENCODERS):
        raise WrongKind(f"'{name}' is not a decoder-only language model", where=where, fix="give a decoder-only language model")
    if name not in FAMILIES:
        notes.append(f"the family '{name}' is not in src/families.py: its layers are counted as if they were Llama's")
    return name, FAMILIES.get(name, Family())


def _by_class(config: dict) -> str | None:
    """minicpm3 of architectures ["MiniCPM3ForCausalLM"]; None where that names no family here."""
    classes = config.get("architectures")
    name = str(classes[0]).removesuffix("ForCausalLM").lower() if isinstance(classes, list) and classes else ""
    return name if name in FAMILIES else None


def _with_defaults(config: dict, family: Family, notes: list[str]) -> dict:
    left_out = {key: value for key, value in family.defaults.items() if config.get(key) is None}
    if left_out:
        notes.append("config.json leaves to its family's defaults: " + ", ".join(f"{key} {value}" for key, value in left_out.items()))
    return config | left_out


def _sizes(config: dict, family: Family, where: str) -> Sizes:
    names = NAMES | family.names
    read = Sizes(0, 0, 0, 0, 0, 0, 0, (), None, config, where).get
    layers, hidden, heads = (read(names[size]) for size in ("layers", "hidden", "heads"))
    if not 0 < layers <= 1000 or not hidden or not heads:
        raise BadData(f"{layers} layers of width {hidden} with {heads} heads is no model", where=where, fix=AGAIN)
    head_dim = read(names["head_dim"], hidden // heads)
    window = read("sliding_window") if config.get("sliding_window") is not None else None
    return Sizes(
        layers=layers,
        hidden=hidden,
        intermediate=int(read(names["intermediate"]) * family.mlp_share),
        heads=heads,
        kv_heads=read(names["kv_heads"], heads),
        head_dim=head_dim,
        vocab=read(names["vocab"]),
        kinds=_kinds(config, family, layers, window, where),
        window=window,
        config=config,
        where=where,
    )


def _kinds(config: dict, family: Family, layers: int, window: int | None, where: str) -> tuple[str, ...]:
    """full, sliding or linear for each layer: as config.json lists them, or by the family's pattern."""
    listed = config.get("layer_types")
    if listed is not None:
        if not isinstance(listed, list) or len(listed) != layers or not all(isinstance(kind, str) and kind in KINDS for kind in listed):
            raise BadData(f"layer_types should list {layers} of {', '.join(KINDS)}", where=where, fix=AGAIN)
        return tuple(KINDS[kind] for kind in listed)
    if family.full_below:
        first = config.get(family.full_below, layers) if config.get("use_sliding_window") and window else layers
        return tuple("full" if i < first else "sliding" for i in range(layers))
    between, every = (
        ("linear", config.get("full_attention_interval") or 4) if family.layer is hybrid_layer else ("sliding", family.full_every)
    )
    if every is None or (between == "sliding" and not window):
        return ("full",) * layers
    every = config.get("sliding_window_pattern") or every
    return tuple("full" if isinstance(every, int) and every and (i + 1) % every == 0 else between for i in range(layers))


def _dtype(config: dict) -> str | None:
    named = config.get("dtype") or config.get("torch_dtype")
    flagged = next((name for key, name in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")) if config.get(key)), None)
    return named if isinstance(named, str) else flagged


def _quantization(config: dict) -> Quantization | None:
    block = config.get("quantization_config")
    if not isinstance(block, dict):
        return None
    bits = block.get("bits") or (4 if block.get("load_in_4bit") else 8 if block.get("load_in_8bit") else None)
    return Quantization(str(block.get("quant_method", "unknown")), bits, block.get("group_size"), block.get("sym"), block.get("desc_act"))


# ---- layers


def plain_layer(family: Family, s: Sizes, index: int) -> Layer:
    """Attention and MLP in Llama's manner, with the family's biases and norms."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    vectors = family.norms * s.hidden * (2 if family.norm_bias else 1) + (2 * s.head_dim if family.qk_norm else 0)
    vectors += (q + 2 * kv if s.flag(family.qkv_bias) else 0) + (s.hidden if s.flag(family.out_bias) else 0)
    vectors += (family.mlp - 1) * s.intermediate + s.hidden if s.flag(family.mlp_bias) else 0
    attention = (Matrix("q", q, s.hidden), Matrix("k", kv, s.hidden), Matrix("v", kv, s.hidden))
    if "qkv" in family.fused:
        attention = (Matrix("qkv", q + 2 * kv, s.hidden),)
    matrices = (*attention, Matrix("o", s.hidden, q), *mlp(s, s.intermediate, family.mlp, fused="gate_up" in family.fused))
    kind = s.kinds[index]
    return Layer(kind, matrices, vectors, 2 * kv, s.window if kind == "sliding" else None)


def mlp(s: Sizes, width: int, count: int = 3, *, fused: bool = False) -> tuple[Matrix, ...]:
    if fused:
        return (Matrix("gate_up", 2 * width, s.hidden), Matrix("down", s.hidden, width))
    gate = (Matrix("gate", width, s.hidden),) if count == 3 else ()
    return (*gate, Matrix("up", width, s.hidden), Matrix("down", s.hidden, width))


def latent_layer(family: Family, s: Sizes, index: int) -> Layer:
    """Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) as in MiniCPM3: low-rank q, one latent for keys and values."""
    nope, rope, latent, rank = (s.get(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "kv_lora_rank", "q_lora_rank"))
    value = s.get("v_head_dim", s.hidden // s.heads)
    matrices = (
        Matrix("q_a", rank, s.hidden),
        Matrix("q_b", s.heads * (nope + rope), rank),
        Matrix("kv_a", latent + rope, s.hidden),
        Matrix("kv_b", s.heads * (nope + value), latent),
        Matrix("o", s.hidden, s.heads * value),
    )
    vectors = 2 * s.hidden + rank + latent + (rank + latent + rope + s.hidden if s.flag("attention_bias") else 0)
    return Layer("full", (*matrices, *mlp(s, s.intermediate)), vectors, s.heads * (nope + rope + value))


def hybrid_layer(family: Family, s: Sizes, index: int) -> Layer:
    """Qwen3.5: gated attention every so many layers, gated delta nets (arXiv:2412.06464) between, which keep a state and no KV cache."""
    if s.kinds[index] == "full":
        q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
        matrices = (Matrix("q", 2 * q, s.hidden), Matrix("k", kv, s.hidden), Matrix("v", kv, s.hidden), Matrix("o", s.hidden, q))
        return Layer("full", (*matrices, *mlp(s, s.intermediate)), 2 * s.hidden + 2 * s.head_dim, 2 * kv)
    keys, values = s.get("linear_num_key_heads", 16), s.get("linear_num_value_heads", 32)
    key_dim, value_dim, kernel = s.get("linear_key_head_dim", 128), s.get("linear_value_head_dim", 128), s.get("linear_conv_kernel_dim", 4)
    mixed, out = 2 * keys * key_dim + values * value_dim, values * value_dim
    matrices = (
        Matrix("in_qkv", mixed, s.hidden),
        Matrix("in_z", out, s.hidden),
        Matrix("in_b", values, s.hidden),
        Matrix("in_a", values, s.hidden),
        Matrix("out", s.hidden, out),
    )
    vectors = 2 * s.hidden + mixed * kernel + 2 * values + value_dim
    return Layer("linear", (*matrices, *mlp(s, s.intermediate)), vectors, 0, state=values * key_dim * value_dim + mixed * kernel)


def gemma4_layer(family: Family, s: Sizes, index: int) -> Layer:
    """Gemma 4: wider heads where attention is full, and last layers that use the keys and values of earlier ones."""
    kind, shares = s.kinds[index], index >= s.layers - s.get("num_kv_shared_layers", 0)
    head_dim = s.get("global_head_dim", 512) if kind == "full" else s.head_dim
    same = kind == "full" and s.flag("attention_k_eq_v")
    heads = s.get("num_global_key_value_heads", s.kv_heads) if same else s.kv_heads
    kv, q, per_layer = heads * head_dim, s.heads * head_dim, s.get("hidden_size_per_layer_input", 256)
    projections = () if shares else (Matrix("k", kv, s.hidden),) if same else (Matrix("k", kv, s.hidden), Matrix("v", kv, s.hidden))
    gates = (Matrix("per_layer_gate", per_layer, s.hidden), Matrix("per_layer_projection", s.hidden, per_layer)) if per_layer else ()
    width = s.intermediate * (2 if shares and s.flag("use_double_wide_mlp") else 1)
    vectors = (4 + bool(per_layer)) * s.hidden + head_dim * (1 if shares else 2)
    matrices = (Matrix("q", q, s.hidden), *projections, Matrix("o", s.hidden, q), *mlp(s, width), *gates)
    return Layer(kind, matrices, vectors, 0 if shares else 2 * kv, s.window if kind == "sliding" else None)


def gemma4_outside(s: Sizes) -> tuple[int, int]:
    """The table of per-layer embeddings, and their projection with its norm."""
    width = s.get("hidden_size_per_layer_input", 256)
    return s.get("vocab_size_per_layer_input", 262144) * s.layers * width, s.hidden * s.layers * width + width


# ---- families

QWEN2 = Family(qkv_bias=True, out_bias=False, mlp_bias=False, full_below="max_window_layers")
QWEN3 = Family(mlp_bias=False, qk_norm=True, full_below="max_window_layers")
FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False, mlp_bias=False, full_every=0),
    "qwen": Family(
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        fused=("qkv",),
        mlp_share=0.5,
        note="Qwen-1's intermediate_size is twice the width of its MLP, and is halved here",
    ),
    "qwen2": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_vl_text": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen3": QWEN3,
    "qwen3_vl_text": Family(mlp_bias=False, qk_norm=True),
    "phi": Family(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, norms=1, norm_bias=True, mlp=2),
    "phi3": Family(qkv_bias=False, out_bias=False, mlp_bias=False, fused=("qkv", "gate_up"), full_every=0),
    "gemma": Family(defaults={"head_dim": 256}, mlp_bias=False, tied=True),
    "gemma2": Family(defaults={"head_dim": 256, "sliding_window": 4096}, mlp_bias=False, norms=4, tied=True, full_every=2),
    "gemma3_text": Family(
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        mlp_bias=False,
        norms=4,
        qk_norm=True,
        tied=True,
        full_every=6,
    ),
    "gemma4_text": Family(
        defaults={"head_dim": 256, "sliding_window": 512},
        tied=True,
        qk_norm=True,
        full_every=6,
        layer=gemma4_layer,
        outside=gemma4_outside,
    ),
    "qwen3_5_text": Family(
        defaults={"head_dim": 256},
        qk_norm=True,
        layer=hybrid_layer,
        note="linear-attention layers keep a state of fixed size instead of a KV cache; the multi-token prediction head is not counted",
    ),
    "minicpm": Family(qkv_bias=False, out_bias=False, mlp_bias=False, tied=True),
    "minicpm3": Family(
        tied=True,
        layer=latent_layer,
        note="latent attention: keys and values are counted expanded, as transformers caches them; a runtime that caches the latent needs less",
    ),
    "baichuan": Family(fused=("qkv",), qkv_bias=False, out_bias=False, mlp_bias=False),
    "internlm2": Family(fused=("qkv",), qkv_bias="bias", out_bias="bias", mlp_bias=False),
    "smollm3": Family(tied=True),
    "granite": Family(),
    "glm": Family(defaults={"head_dim": 128, "attention_bias": True}, out_bias=False, mlp_bias=False, fused=("gate_up",)),
    "glm4": Family(defaults={"head_dim": 128, "attention_bias": True}, out_bias=False, mlp_bias=False, fused=("gate_up",), norms=4),
    "chatglm": Family(
        names={
            "layers": "num_layers",
            "intermediate": "ffn_hidden_size",
            "kv_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "vocab": "padded_vocab_size",
            "max_positions": "seq_length",
        },
        qkv_bias="add_qkv_bias",
        out_bias="add_bias_linear",
        mlp_bias="add_bias_linear",
        fused=("qkv", "gate_up"),
    ),
    "exaone": Family(names={"layers": "num_layers"}, qkv_bias=False, out_bias=False, mlp_bias=False),
    "exaone4": Family(qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True, full_every=4),
    "cohere2": Family(defaults={"sliding_window": 4096}, mlp_bias=False, norms=1, tied=True, full_every=4),
    "hunyuan_v1_dense": Family(mlp_bias=False, qk_norm=True),
    "starcoder2": Family(
        defaults={"use_bias": True},
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        tied=True,
        mlp=2,
        full_every=0,
    ),
}
