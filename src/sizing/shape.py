"""The shape of a model, from its config.json alone: sizes, parameter counts, KV cache. No weights, no torch, milliseconds.

What each family calls its sizes is in families.py, which matrices its layers hold in decoder.py.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class Matrix(NamedTuple):
    """A linear layer's weight of shape (rows, columns) = (output features, input features)."""

    name: str
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True)
class Layer:
    """One decoder layer.

    kind: full, sliding or linear attention.
    matrices: its linear layers, fused ones as the checkpoint stores them.
    vectors: values in norms, biases and everything else that quantizers leave alone.
    kv_values: keys and values this layer keeps per token; 0 where it keeps none or uses another layer's.
    window: tokens whose keys and values it keeps at most; None: all.
    state: values kept per sequence whatever its length, in linear attention.
    """

    kind: str
    matrices: tuple[Matrix, ...]
    vectors: int
    kv_values: int
    window: int | None = None
    state: int = 0

    @cached_property
    def matrix_params(self) -> int:
        return sum(m.size for m in self.matrices)

    @property
    def params(self) -> int:
        return self.matrix_params + self.vectors


@dataclass(frozen=True)
class Quantization:
    """config.json's quantization_config. group_size: weights that share a scale, -1: a whole column; None: not said."""

    method: str
    bits: int | None
    group_size: int | None
    symmetric: bool | None
    act_order: bool | None


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only language model; of a vision-language model, its text part.

    model_type: config.json's, or its text_config's.
    intermediate: width of the MLP. kv_heads, head_dim: of full-attention layers.
    vocab: rows of the embedding table by config.json; a checkpoint may hold more.
    max_positions: longest context by the model's own word; None: not said.
    scales_logits: logits are scaled or capped behind the output layer.
    extra_embedding: values in further token tables (Gemma 4's per-layer embeddings).
    outside: values outside layers and token tables: final norm, head bias, projections.
    notes: what was assumed or left out, one sentence each.
    """

    model_type: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int | None
    qkv_bias: bool
    qk_norm: bool
    scales_logits: bool
    dtype: str | None
    quantization: Quantization | None
    stack: tuple[Layer, ...]
    extra_embedding: int
    outside: int
    notes: tuple[str, ...]

    @property
    def layers(self) -> int:
        return len(self.stack)

    @property
    def embedding(self) -> int:
        """Values in the token embedding table, vocab x hidden."""
        return self.vocab * self.hidden

    @property
    def head(self) -> int:
        """Values the output layer has of its own: 0 where it is the embedding table."""
        return 0 if self.tied else self.vocab * self.hidden

    @cached_property
    def layer_params(self) -> int:
        return sum(layer.params for layer in self.stack)

    @cached_property
    def matrix_params(self) -> int:
        """Values in the layers' matrices: what quantizers quantize and most of what a token is multiplied with."""
        return sum(layer.matrix_params for layer in self.stack)

    @property
    def params(self) -> int:
        """All parameters, as transformers' num_parameters() counts them."""
        return self.layer_params + self.embedding + self.extra_embedding + self.head + self.outside

    @cached_property
    def kv_values(self) -> int:
        """Keys and values kept per token: 2 x layers x KV heads x head dimension where all layers are alike."""
        return sum(layer.kv_values for layer in self.stack)

    @cached_property
    def attending(self) -> int:
        """Layers that keep a KV cache of their own."""
        return sum(layer.kv_values > 0 for layer in self.stack)

    def kv_bytes_per_token(self, width: float = 2) -> int:
        """Bytes of KV cache per token while no sliding window is full; width: bytes per value."""
        return round(width * self.kv_values)

    def kv_bytes(self, context: int, width: float = 2, *, windows: bool = True) -> int:
        """Bytes of KV cache and recurrent state of one sequence of `context` tokens; width: bytes per value.

        windows: a layer with a sliding window keeps no more than the window; False where all of the context is allotted in every layer.
        """

        def kept(layer: Layer) -> int:
            return context if layer.window is None or not windows else min(context, layer.window)

        return round(width * sum(layer.kv_values * kept(layer) + layer.state for layer in self.stack))
