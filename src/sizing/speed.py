"""How fast a board decodes and answers: a roofline over what the board's YAML says of it.

Decoding reads every weight once per token, so memory bandwidth bounds it; a prompt's chunk reuses each weight for all its tokens, so arithmetic
does. Where the two meet is the batch beyond which more sequences cost time (Williams et al. 2009, doi:10.1145/1498765.1498785).
"""

from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

from src.core.log import size
from src.settings.targets import Board
from src.sizing.budget import Format, Quantity, four_bit, head_bytes, kv_cache_bytes, layer_bytes
from src.sizing.shape import ModelShape

NEEDED = ("bandwidth", "layer_ms", "prefill_layer_ms", "tera_ops")
"""figures of a board without which its speed is not known"""


@dataclass(frozen=True)
class Rates:
    """The figures of a `Board` that its speed follows from, in its units; those it leaves out stand at what they default to.

    onchip: tokens of a chunk computed at the full rate, None for all. kv_copy: None where nothing is copied.
    """

    bandwidth: float
    bandwidth_4bit: float
    kv_bandwidth: float
    layer_ms: float
    prefill_layer_ms: float
    tera_ops: float
    tera_ops_4bit: float
    attention: float
    onchip: int | None
    spilled: float
    kv_copy: float | None


def rates_of(board: Board | None) -> Rates | None:
    """None where one of them is not known."""
    if board is None or board.bandwidth is None or board.layer_ms is None or board.prefill_layer_ms is None or board.tera_ops is None:
        return None
    return Rates(
        bandwidth=board.bandwidth,
        bandwidth_4bit=board.bandwidth_4bit or board.bandwidth,
        kv_bandwidth=board.kv_bandwidth or board.bandwidth,
        layer_ms=board.layer_ms,
        prefill_layer_ms=board.prefill_layer_ms,
        tera_ops=board.tera_ops,
        tera_ops_4bit=board.tera_ops_4bit or board.tera_ops,
        attention=board.attention_tera_ops or board.tera_ops,
        onchip=board.onchip_tokens,
        spilled=board.spilled_tera_ops or board.tera_ops,
        kv_copy=board.kv_copy,
    )


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
    lacking = ", ".join(name for name in NEEDED if getattr(board, name) is None) if board else "board"
    return [f"{name}: not known: the target's YAML has no {lacking}" for name in ("decode", "speed", "first token", "best batch")]


def speed(shape: ModelShape, form: Format, rates: Rates, context: int, prompt: int) -> Speed:
    """context: tokens the KV cache holds (or has room for, where graphs are static); prompt: tokens before the first answer."""
    ms, first_ms = decode_ms(shape, form, rates, context), first_token_ms(shape, form, rates, prompt)
    kv, head, (narrow, _) = kv_cache_bytes(shape, form, context), head_bytes(shape, form), four_bit(shape, form)
    wide = layer_bytes(shape, form) - narrow
    layers = [f"{size(part)} / {rate:g} GB/s" for part, rate in ((wide, rates.bandwidth), (narrow, rates.bandwidth_4bit)) if part]
    rest = f"(output layer {size(head)} + KV cache {size(kv)}) / {rates.bandwidth:g} GB/s"
    if rates.kv_bandwidth != rates.bandwidth:
        rest = f"output layer {size(head)} / {rates.bandwidth:g} GB/s + KV cache {size(kv)} / {rates.kv_bandwidth:g} GB/s"
    decode = Quantity("decode", ms, "ms", f"{shape.layers} layers x {rates.layer_ms:g} ms + layers {' + '.join(layers)} + {rest}")
    first = Quantity("first token", first_ms, "ms", _first_token_words(shape, form, rates, prompt))
    moved, operations = layer_bytes(shape, form) + head, 2 * (shape.matrix_params + shape.embedding)
    read = _read_ms(shape, form, rates)
    turn = Quantity(
        "best batch",
        read * rates.tera_ops * 1e9 / operations,
        "sequences",
        f"weights {size(moved)} read in {read:.1f} ms over {operations / 1e9:,.3g} GOP per token / {rates.tera_ops:g} TOP/s",
    )
    return Speed(decode, Quantity("speed", 1000 / ms, "tokens/s", f"1,000 / {ms:.1f} ms"), first, turn)


def _read_ms(shape: ModelShape, form: Format, rates: Rates) -> float:
    """Milliseconds to read all weights once."""
    narrow, _ = four_bit(shape, form)
    wide = layer_bytes(shape, form) + head_bytes(shape, form) - narrow
    return (wide / rates.bandwidth + narrow / rates.bandwidth_4bit) / 1e6


def decode_ms(shape: ModelShape, form: Format, rates: Rates, context: int, batch: int = 1) -> float:
    """Milliseconds for one token of each of `batch` sequences: the slower of reading weights and caches, and of the arithmetic."""
    read = _read_ms(shape, form, rates) + batch * kv_cache_bytes(shape, form, context) / rates.kv_bandwidth / 1e6
    operations = 2 * batch * (shape.matrix_params + shape.embedding)
    return shape.layers * rates.layer_ms + max(read, operations / rates.tera_ops / 1e9)


def first_token_ms(shape: ModelShape, form: Format, rates: Rates, prompt: int) -> float:
    """Milliseconds until the first token: whole chunks through all layers, attention to what came before, the output layer once."""
    chunks = ceil(prompt / form.chunk)
    full = min(form.chunk, rates.onchip or form.chunk)
    _, narrow = four_bit(shape, form)
    products = 2 * full * ((shape.matrix_params - narrow) / rates.tera_ops + narrow / rates.tera_ops_4bit)
    products += 2 * (form.chunk - full) * shape.matrix_params / rates.spilled
    attention = attention_ops(shape, prompt, form.chunk) / rates.attention
    copied = copied_bytes(shape, form, prompt) / rates.kv_copy / 1e6 if rates.kv_copy else 0.0
    layers = chunks * shape.layers * rates.prefill_layer_ms
    return layers + (chunks * products + attention) / 1e9 + copied + head_bytes(shape, form) / rates.bandwidth / 1e6


def _first_token_words(shape: ModelShape, form: Format, rates: Rates, prompt: int) -> str:
    chunks = ceil(prompt / form.chunk)
    full = min(form.chunk, rates.onchip or form.chunk)
    _, narrow = four_bit(shape, form)
    giga = lambda params, tokens: f"{2 * params * tokens / 1e9:,.0f} GOP"
    terms = [f"{shape.layers} layers x {rates.prefill_layer_ms:g} ms"] if rates.prefill_layer_ms else []
    parts = ((shape.matrix_params - narrow, rates.tera_ops), (narrow, rates.tera_ops_4bit))
    terms += [f"{giga(params, full)} / {rate:g} TOP/s" for params, rate in parts if params]
    if full < form.chunk:
        terms.append(f"beyond {full} tokens {giga(shape.matrix_params, form.chunk - full)} / {rates.spilled:g} TOP/s")
    attention = f"attention {attention_ops(shape, prompt, form.chunk) / 1e9:,.3g} GOP / {rates.attention:g} TOP/s"
    copied = f"keys and values {size(copied_bytes(shape, form, prompt))} / {rates.kv_copy:g} GB/s + " if rates.kv_copy else ""
    head = f"output layer {size(head_bytes(shape, form))} / {rates.bandwidth:g} GB/s"
    return f"{chunks} chunk{'s' * (chunks != 1)} x ({' + '.join(terms)}) + {attention} + {copied}{head}"


def attention_ops(shape: ModelShape, prompt: int, chunk: int) -> int:
    """Operations of q k^T and of its product with v, each chunk against itself and all chunks before it."""
    chunks = ceil(prompt / chunk)
    pairs = chunk * chunk * chunks * (chunks + 1) // 2
    return 4 * pairs * shape.heads * shape.head_dim * shape.attending


def copied_bytes(shape: ModelShape, form: Format, prompt: int) -> int:
    """Bytes of keys and values that a host hands to the chunks of a prompt: each gets its own and those of all chunks before it."""
    chunks = ceil(prompt / form.chunk)
    return shape.kv_bytes_per_token(form.kv) * form.chunk * chunks * (chunks + 1) // 2
