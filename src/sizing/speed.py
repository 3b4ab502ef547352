"""How fast a board decodes and answers: a roofline over what the board's YAML says of it.

Decoding reads every weight once per token, so memory bandwidth bounds it; a prompt's chunk reuses each weight for all its tokens, so arithmetic
does. Where the two meet is the batch beyond which more sequences cost time (Williams et al. 2009, doi:10.1145/1498765.1498785).
"""

from dataclasses import dataclass, fields
from math import ceil
from typing import NamedTuple

from src.core.log import size
from src.settings.targets import Board
from src.sizing.budget import Format, Quantity, head_bytes, kv_cache_bytes, layer_bytes
from src.sizing.shape import ModelShape


@dataclass(frozen=True)
class Rates:
    """The figures of a `Board` that its speed follows from, in its units, all of them known."""

    bandwidth: float
    layer_ms: float
    prefill_layer_ms: float
    tera_ops: float


def rates_of(board: Board | None) -> Rates | None:
    """None where one of them is not known."""
    return None if board is None or _missing(board) else Rates(**{f.name: getattr(board, f.name) for f in fields(Rates)})


def _missing(board: Board) -> list[str]:
    return [f.name for f in fields(Rates) if getattr(board, f.name) is None]


class Speed(NamedTuple):
    """What a board is expected to do."""

    decode: Quantity
    tokens_per_second: Quantity
    first_token: Quantity
    best_batch: Quantity


def speed_lines(shape: ModelShape, form: Format, board: Board | None, context: int, prompt: int) -> list[str]:
    """The figures of `speed`, or of each why it is not known."""
    if rates := rates_of(board):
        return [str(quantity) for quantity in speed(shape, form, rates, context, prompt)]
    lacking = ", ".join(_missing(board)) if board else "board"
    return [f"{name}: not known: the target's YAML has no {lacking}" for name in ("decode", "speed", "first token", "best batch")]


def speed(shape: ModelShape, form: Format, rates: Rates, context: int, prompt: int) -> Speed:
    """context: tokens the KV cache holds (or has room for, where graphs are static); prompt: tokens before the first answer."""
    ms = decode_ms(shape, form, rates, context)
    per_layer = layer_bytes(shape, form) / shape.layers
    kv, head = kv_cache_bytes(shape, form, context), head_bytes(shape, form)
    decode = Quantity(
        "decode",
        ms,
        "ms",
        f"{shape.layers} layers x ({rates.layer_ms:g} ms + {size(per_layer)} / {rates.bandwidth:g} GB/s) + "
        f"(output layer {size(head)} + KV cache {size(kv)}) / {rates.bandwidth:g} GB/s",
    )
    chunks = ceil(prompt / form.chunk)
    giga = 2 * shape.matrix_params * form.chunk / 1e9
    attention = attention_ops(shape, prompt, form.chunk) / 1e9
    first = Quantity(
        "first token",
        first_token_ms(shape, form, rates, prompt),
        "ms",
        f"{chunks} chunk{'s' * (chunks != 1)} x ({shape.layers} layers x {rates.prefill_layer_ms:g} ms + {giga:,.0f} GOP / {rates.tera_ops:g} TOP/s) + "
        f"attention {attention:,.3g} GOP / {rates.tera_ops:g} TOP/s + output layer {size(head)} / {rates.bandwidth:g} GB/s",
    )
    moved = layer_bytes(shape, form) + head
    turn = Quantity(
        "best batch",
        moved * rates.tera_ops * 1e12 / (2 * (shape.matrix_params + shape.embedding) * rates.bandwidth * 1e9),
        "sequences",
        f"weights {size(moved)} / {rates.bandwidth:g} GB/s over {2 * (shape.matrix_params + shape.embedding) / 1e9:,.3g} GOP per token / {rates.tera_ops:g} TOP/s",
    )
    return Speed(decode, Quantity("speed", 1000 / ms, "tokens/s", f"1,000 / {ms:.1f} ms"), first, turn)


def decode_ms(shape: ModelShape, form: Format, rates: Rates, context: int, batch: int = 1) -> float:
    """Milliseconds for one token of each of `batch` sequences: the slower of reading weights and caches, and of the arithmetic."""
    moved = layer_bytes(shape, form) + head_bytes(shape, form) + batch * kv_cache_bytes(shape, form, context)
    operations = 2 * batch * (shape.matrix_params + shape.embedding)
    return shape.layers * rates.layer_ms + max(moved / rates.bandwidth / 1e6, operations / rates.tera_ops / 1e9)


def first_token_ms(shape: ModelShape, form: Format, rates: Rates, prompt: int) -> float:
    """Milliseconds until the first token: whole chunks through all layers, attention to what came before, the output layer once."""
    chunks = ceil(prompt / form.chunk)
    operations = 2 * shape.matrix_params * chunks * form.chunk + attention_ops(shape, prompt, form.chunk)
    layers = chunks * shape.layers * rates.prefill_layer_ms
    return layers + operations / rates.tera_ops / 1e9 + head_bytes(shape, form) / rates.bandwidth / 1e6


def attention_ops(shape: ModelShape, prompt: int, chunk: int) -> int:
    """Operations of q k^T and of its product with v, each chunk against itself and all chunks before it."""
    chunks = ceil(prompt / chunk)
    pairs = chunk * chunk * chunks * (chunks + 1) // 2
    return 4 * pairs * shape.heads * shape.head_dim * shape.attending
