"""Decoder layers by their matrices: Llama's, with the biases, norms and fusions that set families apart, and those that are built otherwise."""

from collections.abc import Callable
from dataclasses import dataclass, field

from src.core.errors import AGAIN, BadData
from src.sizing.shape import Layer, Matrix

LARGEST = 2**40


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
    layer: Callable[["Family", Sizes, int], Layer] | None = None
    outside: Callable[[Sizes], tuple[int, int]] | None = None
    note: str = ""


def plain_layer(family: Family, s: Sizes, index: int) -> Layer:
    """Attention and MLP in Llama's manner, with the family's biases and norms."""
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    vectors = family.norms * s.hidden * (2 if family.norm_bias else 1) + (2 * s.head_dim if family.qk_norm else 0)
    vectors += (q + 2 * kv if s.flag(family.qkv_bias) else 0) + (s.hidden if s.flag(family.out_bias) else 0)
    vectors += (family.mlp - 1) * s.intermediate + s.hidden if s.flag(family.mlp_bias) else 0
    attention: tuple[Matrix, ...] = (Matrix("q", q, s.hidden), Matrix("k", kv, s.hidden), Matrix("v", kv, s.hidden))
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
        attention = (Matrix("q", 2 * q, s.hidden), Matrix("k", kv, s.hidden), Matrix("v", kv, s.hidden), Matrix("o", s.hidden, q))
        return Layer("full", (*attention, *mlp(s, s.intermediate)), 2 * s.hidden + 2 * s.head_dim, 2 * kv)
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
