"""How fast a board decodes and answers: a roofline over what the board's YAML says of it.

Decoding reads every weight once per token, so memory bandwidth bounds it; a prompt's chunk reuses each weight for all its tokens, so arithmetic
does. Where the two meet is the batch beyond which more sequences cost time (Williams et al. 2009, doi:10.1145/1498765.1498785).
"""

from dataclasses import dataclass
from math import ceil

from src.core.log import size
from src.settings.targets import Board
from src.sizing.budget import Format, Quantity, head_bytes, kv_cache_bytes, layer_bytes
from src.sizing.shape import ModelShape


@dataclass(frozen=True)
class Speed:
    """What a board is expected to do; None in each value where its figures are not known."""

    decode: Quantity
    tokens_per_second: Quantity
    first_token: Quantity
    best_batch: Quantity


def speed(shape: ModelShape, form: Format, board: Board | None, context: int, prompt: int) -> Speed:
    """context: tokens the KV cache holds (or has room for, where graphs are static); prompt: tokens before the first answer."""
    missing = _missing(board)
    if missing:
        unknown = lambda name, unit: Quantity(name, None, unit, f"the target's YAML has no {missing}")
        return Speed(
            unknown("decode", "ms"), unknown("speed", "tokens/s"), unknown("first token", "ms"), unknown("best batch", "sequences")
        )
    ms = decode_ms(shape, form, board, context)
    per_layer = layer_bytes(shape, form) / shape.layers
    kv, head = kv_cache_bytes(shape, form, context), head_bytes(shape, form)
    decode = Quantity(
        "decode",
        ms,
        "ms",
        f"{shape.layers} layers x ({board.layer_ms:g} ms + {size(per_layer)} / {board.bandwidth:g} GB/s) + "
        f"(output layer {size(head)} + KV cache {size(kv)}) / {board.bandwidth:g} GB/s",
    )
    chunks = ceil(prompt / form.chunk)
    giga = 2 * shape.matrix_params * form.chunk / 1e9
    attention = attention_ops(shape, prompt, form.chunk) / 1e9
    first = Quantity(
        "first token",
        first_token_ms(shape, form, board, prompt),
        "ms",
        f"{chunks} chunk{'s' * (chunks != 1)} x ({shape.layers} layers x {board.prefill_layer_ms:g} ms + {giga:,.0f} GOP / {board.tera_ops:g} TOP/s) + "
        f"attention {attention:,.3g} GOP / {board.tera_ops:g} TOP/s + output layer {size(head)} / {board.bandwidth:g} GB/s",
    )
    moved = layer_bytes(shape, form) + head
    turn = Quantity(
        "best batch",
        moved * board.tera_ops * 1e12 / (2 * (shape.matrix_params + shape.embedding) * board.bandwidth * 1e9),
        "sequences",
        f"weights {size(moved)} / {board.bandwidth:g} GB/s over {2 * (shape.matrix_params + shape.embedding) / 1e9:,.3g} GOP per token / {board.tera_ops:g} TOP/s",
    )
    return Speed(decode, Quantity("speed", 1000 / ms, "tokens/s", f"1,000 / {ms:.1f} ms"), first, turn)


def _missing(board: Board | None) -> str:
    if board is None:
        return "board"
    return ", ".join(name for name in ("bandwidth", "layer_ms", "prefill_layer_ms", "tera_ops") if getattr(board, name) is None)


def decode_ms(shape: ModelShape, form: Format, board: Board, context: int, batch: int = 1) -> float:
    """Milliseconds for one token of each of `batch` sequences: the slower of reading weights and caches, and of the arithmetic."""
    moved = layer_bytes(shape, form) + head_bytes(shape, form) + batch * kv_cache_bytes(shape, form, context)
    operations = 2 * batch * (shape.matrix_params + shape.embedding)
    return shape.layers * board.layer_ms + max(moved / board.bandwidth / 1e6, operations / board.tera_ops / 1e9)


def first_token_ms(shape: ModelShape, form: Format, board: Board, prompt: int) -> float:
    """Milliseconds until the first token: whole chunks through all layers, attention to what came before, the output layer once."""
    chunks = ceil(prompt / form.chunk)
    operations = 2 * shape.matrix_params * chunks * form.chunk + attention_ops(shape, prompt, form.chunk)
    layers = chunks * shape.layers * board.prefill_layer_ms
    return layers + operations / board.tera_ops / 1e9 + head_bytes(shape, form) / board.bandwidth / 1e6


def attention_ops(shape: ModelShape, prompt: int, chunk: int) -> int:
    """Operations of q k^T and of its product with v, each chunk against itself and all chunks before it."""
    chunks = ceil(prompt / chunk)
    pairs = chunk * chunk * chunks * (chunks + 1) // 2
    return 4 * pairs * shape.heads * shape.head_dim * shape.attending
