"""What a model needs: bytes of its weights by type, of its KV cache, of a board's memory, of the host that compiles it.

Every figure that is known comes as a `Quantity`: a value with the equation it is from. A board's figures are in configs/target.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, get_args

from src.core.log import size
from src.settings.targets import Axera, Board, Gguf, GgufLora, Llama2c, LlamaCpp, Mobilint, Openvino, Target
from src.sizing import takes
from src.sizing.shape import Matrix, ModelShape

GIB = 2**30
FLOATS = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8_e4m3": 1.0, "fp8_e5m2": 1.0}
LONGEST = 2**20

# AXERA: a layer's file holds the weights once and the code of every subgraph, one to decode and one for each prefill chunk. Bytes of code per
# subgraph and unit of hidden width: SmolLM2-135M (2 subgraphs) in s4, s8 and fp16 (onnxsim PR #1240), Qwen3-0.6B's layers of 26 MiB (17 of them).
GRAPH_BYTES = 700
# AXERA's rule for device memory: the engine adds about 30 % to the layers' files for KV cache and buffers, growing with context (ax-llm
# docs/configuration.md), and 15 % to the output layer's (the factor in its MemGuard.hpp).
ENGINE_SHARE = 0.30
POST_FACTOR = 1.15


@dataclass(frozen=True)
class Quantity:
    """A figure with its equation. value: in `unit`."""

    name: str
    value: float
    unit: str
    equation: str

    def __str__(self) -> str:
        shown = size(self.value) if self.unit == "B" else f"{self.value:,.4g} {self.unit}".strip()
        return f"{self.name} = {self.equation} = {shown}" if self.equation else f"{self.name} = {shown}"


@dataclass(frozen=True)
class Format:
    """How a target stores a model: widths in bytes per value, scales of groups included.

    static: its graphs have fixed shapes, so that each token reads the whole KV cache. apart: the embedding table stays in the host's memory.
    """

    name: str
    weight: Callable[[Matrix], float]
    head: float
    kv: float
    embedding: float
    static: bool
    apart: bool
    context: int
    prompt: int
    chunk: int


def quantized(bits: int, group: int | None = None, scale: float = 2.0) -> float:
    """Bytes per weight of `bits`, with a scale of `scale` bytes for every `group` weights (None or -1: a share that does not count)."""
    return bits / 8 + (scale / group if group and group > 0 else 0.0)


def bits_with_scale(bits: int, group: int) -> float:
    """Bits of a GPTQ weight with its share of a 16-bit scale and of a zero point; group -1: of a whole column, whose share does not count."""
    return bits + ((16 + bits) / group if group > 0 else 0.0)


def filling(bits: int) -> int:
    """Weights of so many bits that fill 32-bit words to the last bit."""
    return 32 // math.gcd(bits, 32)


def format_of(shape: ModelShape, target: Target) -> Format:
    """What the target makes of the model's weights, and the lengths it is built for. A kind not in FORMATS counts in 16 bit."""
    return FORMATS.get(type(target), _sixteen_bit)(shape, target)


def _sixteen_bit(shape: ModelShape, target: Target) -> Format:
    longest = shape.max_positions or LONGEST
    return Format("bf16", lambda m: 2.0, 2.0, 2, 2.0, False, False, longest, longest - 1, 1)


def _axera(shape: ModelShape, target: Axera) -> Format:
    """Weights and output layer of the types asked for, activations and KV cache 16 bit, embedding in bf16 on the host."""
    name = axera_weights(shape, target.weight_type)
    group = shape.quantization.group_size if shape.quantization else None
    width = FLOATS.get(name) or quantized(int(name[1:]), group)
    kv = 4 if target.hidden_type == "fp32" else 2
    head = FLOATS.get(target.post_weight_type, 1.0)
    return Format(name, lambda m: width, head, kv, 2.0, True, True, target.context_len, target.prompt_len, target.prefill_chunk)


def _mobilint(shape: ModelShape, target: Mobilint) -> Format:
    """Weights and output layer by bits; chunks of 128 tokens and a 16-bit KV cache are assumed; the embedding stays in fp32 on the host."""
    bits, value = {"w8": (8, 8), "w4v8": (4, 8), "w4": (4, 4)}[target.weight_type]
    context = target.context_len
    width = lambda m: (value if m.name == "v" else bits) / 8
    return Format(target.weight_type, width, bits / 8, 2, 4.0, False, True, context, context - 1, 128)


def _openvino(shape: ModelShape, target: Openvino) -> Format:
    """Embedding and output layer stay in int8 where the rest is int4, as optimum-intel's exporter does. A CPU keeps keys and values in
    8 bits with an fp32 scale and zero point for each token and head; for an NPU 16 bits are assumed."""
    width = quantized(4, takes.openvino_group(shape, target)[0]) if target.weight_type == "int4" else 1.0
    static = target.device == "NPU"
    kv = 2.0 if static else 1 + 8 / shape.head_dim
    return Format(
        target.weight_type, lambda m: width, 1.0, kv, 1.0, static, False, target.context_len, target.prompt_len, target.prompt_len
    )


def _llama2c(shape: ModelShape, target: Llama2c) -> Format:
    """All in fp32, or in integers with an fp32 scale per group, those of embedding and output layer of 8 bits at least; the KV cache is fp32 (run.c)."""
    _, bits = takes.llama2c_form(target.format)
    group = (shape.quantization and shape.quantization.group_size) or target.group_size
    width, outer = (quantized(b, group, 4.0) if bits < 32 else 4.0 for b in (bits, max(bits, 8)))
    longest = shape.max_positions or LONGEST
    return Format(target.format, lambda m: width, outer, 4, outer, False, False, longest, longest - 1, 1)


def _gguf(shape: ModelShape, target: Gguf | GgufLora) -> Format:
    """llama.cpp's blocks of 32 or 256 weights with their scales. Below 8 bits the output layer, which may be the embedding table, has more; an _m gives values
    and the MLP's way out more bits in half of the layers."""
    kind, by_quantizer = target.weight_type, takes.by_llama_cpp(target)
    usual, more = GGUF_BYTES[kind]

    def whole(width: float, columns: int) -> float:
        return GGUF_NARROW.get(width, width) if columns % 256 else width

    def width(m: Matrix) -> float:
        one, other = whole(usual, m.columns), whole(more, m.columns)
        return (one + other) / 2 if m.name in ("v", "down") else one

    head = max(whole(usual, shape.hidden), whole(GGUF_BYTES["q6_k" if by_quantizer else "q8_0"][0], shape.hidden))
    table = head if shape.tied else whole(usual, shape.hidden)
    context = min(target.context_len, shape.max_positions or LONGEST)
    kv = GGUF_BYTES[target.kv_cache][0]
    return Format(kind, width, head, kv, table, False, False, context, context - 1, 512)


Q2, Q3, IQ4, Q4, Q5, Q6 = (size / 256 for size in (84, 110, 136, 144, 176, 210))
# Type of weights -> bytes per weight, and of those that get more. Sources: ggml-common.h's block_*, the mixtures of llama-quant.cpp.
GGUF_BYTES = {
    **{kind: (width, width) for kind, width in (("f32", 4.0), ("f16", 2.0), ("bf16", 2.0))},
    **{kind: (size / 32, size / 32) for kind, size in (("q8_0", 34), ("q5_1", 24), ("q5_0", 22), ("q4_1", 20), ("q4_0", 18))},
    **{"q6_k": (Q6, Q6), "q5_k_m": (Q5, Q6), "q5_k_s": (Q5, Q5), "q4_k_m": (Q4, Q6), "q4_k_s": (Q4, Q4)},
    **{"iq4_xs": (IQ4, IQ4), "q3_k_m": (Q3, Q5), "q3_k_s": (Q3, Q3), "q2_k": (Q2, Q3)},
}
GGUF_NARROW = {Q2: 18 / 32, Q3: 18 / 32, IQ4: 18 / 32, Q4: 22 / 32, Q5: 24 / 32, Q6: 34 / 32}
"""bytes per weight of a type in blocks of 256 -> of what its quantizer takes for rows that 256 does not divide"""


FORMATS: dict[type[Target], Callable[[ModelShape, Any], Format]] = {
    Axera: _axera,
    Mobilint: _mobilint,
    Openvino: _openvino,
    Llama2c: _llama2c,
    Gguf: _gguf,
    GgufLora: _gguf,
}
"""each function takes the settings it stands under"""


def axera_weights(shape: ModelShape, weight_type: str) -> str:
    """The type llm_build gives the weights: the one asked for, or with auto a GPTQ model's own and s8 for all else."""
    if weight_type != "auto":
        return weight_type
    return f"s{shape.quantization.bits}" if shape.quantization and shape.quantization.bits in (4, 8) else "s8"


def layer_bytes(shape: ModelShape, form: Format) -> int:
    """Bytes of all layers' weights; norms and biases in 16 bit, or in the weights' float type."""
    plain = max(2.0, form.weight(Matrix("norm", 1, 1)))
    return round(sum(sum(m.size * form.weight(m) for m in layer.matrices) + layer.vectors * plain for layer in shape.stack))


def four_bit(shape: ModelShape, form: Format) -> tuple[int, int]:
    """(bytes, values) of the layers' matrices that are stored in 4 bit; scales of their groups included."""
    found = [(m.size * form.weight(m), m.size) for layer in shape.stack for m in layer.matrices if form.weight(m) < 1]
    return round(sum(size for size, _ in found)), sum(count for _, count in found)


def head_bytes(shape: ModelShape, form: Format) -> int:
    """Bytes of the output layer. NPUs hold one of their own also where the model shares it with the embedding."""
    return round(shape.embedding * form.head) if form.apart or not shape.tied else 0


def embedding_bytes(shape: ModelShape, form: Format) -> int:
    return round((shape.embedding + shape.extra_embedding) * form.embedding)


def kv_cache_bytes(shape: ModelShape, form: Format, context: int) -> int:
    """Bytes of a sequence's KV cache as a board allots it: for the whole context in every layer that keeps one, whatever its window."""
    return shape.kv_bytes(context, form.kv, windows=False)


def graph_bytes(shape: ModelShape, form: Format, prompt: int) -> int:
    """Code in AXERA's layer files: a subgraph to decode and one for each chunk of the prompt."""
    return shape.layers * GRAPH_BYTES * shape.hidden * (1 + ceil(prompt / form.chunk))


@dataclass(frozen=True)
class Fit:
    """Whether a model fits a target.

    parts, host_parts: bytes by part, in the device's memory and in the host's beside it. available, host_available: bytes there are; None: not known.
    fits: None where the device's memory is not known. lines: the sum in words. longest, longest_prompt: tokens that fit, None where not known.
    """

    parts: dict[str, int]
    available: int | None
    host_parts: dict[str, int]
    host_available: int | None
    fits: bool | None
    longest: int | None
    longest_prompt: int | None
    lines: list[str]

    @property
    def needed(self) -> int:
        return sum(self.parts.values())

    @property
    def host_needed(self) -> int:
        return sum(self.host_parts.values())


def device_parts(shape: ModelShape, target: Target, form: Format, context: int, prompt: int, batch: int = 1) -> dict[str, int]:
    """Bytes of the device's memory by part, for `batch` sequences of `context` tokens."""
    kv = batch * kv_cache_bytes(shape, form, context)
    layers, head = layer_bytes(shape, form), head_bytes(shape, form)
    if isinstance(target, Axera):
        files = layers + graph_bytes(shape, form, prompt)
        engine = round(ENGINE_SHARE * files)
        return {"layers": files, "KV cache": kv, "buffers": max(engine - kv, 0), "output layer": round(POST_FACTOR * head)}
    rest = {} if form.apart else {"embedding": embedding_bytes(shape, form)}
    return {"layers": layers, "KV cache": kv, "output layer": head, **rest}


def board_of(target: Target) -> Board | None:
    """The device the target describes; None where it describes none."""
    return getattr(target, "board", None)


def board_fit(shape: ModelShape, target: Target) -> Fit:
    """Whether the model fits the target's memory at the target's own context length, and how long a context and prompt would."""
    form = format_of(shape, target)
    board = board_of(target)
    context, prompt = form.context, form.prompt
    parts = device_parts(shape, target, form, context, prompt)
    available = round(board.npu_memory * GIB) if board and board.npu_memory else None
    host_parts = {"embedding": embedding_bytes(shape, form)} if form.apart else {}
    host_available = round(board.host_memory * GIB) if board and board.host_memory else None
    needed, host_needed = sum(parts.values()), sum(host_parts.values())
    host_fits = host_available is None or host_needed <= host_available
    lines = [f"memory = {' + '.join(f'{name} {size(count)}' for name, count in parts.items())} = {size(needed)} for {context:,} tokens"]
    if board is None:
        lines.append("no board is described")
    elif available is None:
        lines.append("the device's memory is not known: set target.board.npu_memory to have this checked")
    else:
        lines.append(
            f"{'fits' if needed <= available else 'does NOT fit'} in {size(available)} (target.board.npu_memory={board.npu_memory:g})"
        )
    if board and host_parts and host_available is not None:
        verdict = "fits" if host_fits else "does NOT fit"
        lines.append(
            f"embedding table {size(host_needed)}: {verdict} in the host's {size(host_available)} (target.board.host_memory={board.host_memory:g})"
        )
    longest = longest_prompt = None
    if available is not None:
        longest = longest_context(shape, target, form, available, prompt)
        longest_prompt = longest_chunks(shape, target, form, available, longest)
    fits = None if available is None else needed <= available and host_fits
    return Fit(parts, available, host_parts, host_available, fits, longest, longest_prompt, lines)


def ways(shape: ModelShape, target: Target) -> list[list[str]]:
    """Settings with which a model fits that does not, each a list of overrides: narrower weights, the widest first; lengths that leave the weights room;
    last, memory that the board would have to have. Empty where it fits, or where the board's memory is not known."""
    fit = board_fit(shape, target)
    if fit.fits is not False:
        return []
    weights = [{}, *_narrower(shape, target)]
    found = [change for change in weights[1:] if board_fit(shape, target.model_copy(update=change)).fits]
    shorter = (
        {**change, **lengths}
        for change in weights
        if change not in found and (lengths := _shorter(shape, target.model_copy(update=change)))
    )
    found += [change for change in [next(shorter, None)] if change]
    more = {}
    if fit.available is not None and fit.needed > fit.available:
        more["npu_memory"] = fit.needed
    if fit.host_available is not None and fit.host_needed > fit.host_available:
        more["host_memory"] = fit.host_needed
    overrides = [[f"target.{key}={value}" for key, value in change.items()] for change in found]
    return [*overrides, [f"target.board.{key}={ceil(10 * count / GIB) / 10:g}" for key, count in more.items()]]


def _narrower(shape: ModelShape, target: Target) -> list[dict[str, Any]]:
    """Types of weights that take less than the target's own, the widest first and one of each width; none where the model is quantized already."""
    field = type(target).model_fields.get("weight_type")
    if field is None or shape.quantization:
        return []
    width = lambda change: layer_bytes(shape, format_of(shape, target.model_copy(update=change)))
    types = [{"weight_type": name} for name in get_args(field.annotation) if name != "auto"]
    found = {width(change): change for change in reversed(types) if width(change) < width({})}
    return [found[count] for count in sorted(found, reverse=True)]


def _shorter(shape: ModelShape, target: Target) -> dict[str, Any]:
    """A prompt of one chunk, and the longest context that then fits; empty where that leaves no answer, or the target has no such lengths."""
    if not isinstance(target, Axera):
        return {}
    lengths = {"prompt_len": target.prefill_chunk}
    longest = board_fit(shape, target.model_copy(update=lengths)).longest or 0
    context = min(longest // target.prefill_chunk * target.prefill_chunk, target.context_len)
    return {**lengths, "context_len": context} if context > target.prefill_chunk else {}


def longest_context(shape: ModelShape, target: Target, form: Format, available: int, prompt: int) -> int:
    """Tokens of prompt and answer for which `available` bytes are enough, within the model's own limit; 0: not even one."""
    return _largest(
        shape.max_positions or LONGEST, lambda n: sum(device_parts(shape, target, form, n, min(prompt, n)).values()) <= available
    )


def longest_chunks(shape: ModelShape, target: Target, form: Format, available: int, context: int) -> int:
    """Tokens of the longest prompt, in whole chunks and below `context`; each further chunk is code in the layers' files."""
    chunks = max(context - 1, 0) // form.chunk
    return form.chunk * _largest(chunks, lambda n: sum(device_parts(shape, target, form, context, n * form.chunk).values()) <= available)


def largest_batch(shape: ModelShape, target: Target, form: Format, available: int, context: int, prompt: int) -> int:
    """Sequences of `context` tokens whose caches fit beside the weights."""
    return _largest(2**16, lambda n: sum(device_parts(shape, target, form, context, prompt, n).values()) <= available)


def _largest(top: int, holds: Callable[[int], bool]) -> int:
    """The largest n in 1..top for which a condition holds that, once false, stays false; 0: for none."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def host_needs(shape: ModelShape, target: Target) -> tuple[int, int, list[str]]:
    """(bytes of memory, bytes of disk, lines that say why) for the machine that makes the bundle. Estimates: no vendor publishes a rule.

    AXERA's documents ask for more than 32 GB for large models and compile a 0.6B model with --parallel 8 on a host of 32 GB.
    """
    form = format_of(shape, target)
    bundle = layer_bytes(shape, form) + head_bytes(shape, form) + embedding_bytes(shape, form)
    tool, stored = 4 * GIB, (4 if shape.dtype == "float32" else 2) * shape.params
    if isinstance(target, Axera):
        bundle += graph_bytes(shape, form, form.prompt)
        workers = target.parallel * 12 * max(layer.params for layer in shape.stack)
        ram = tool + 4 * shape.params + max(workers, 12 * shape.embedding)
        how = (
            f"tool {size(tool)} + model in fp32 {size(4 * shape.params)} + the larger of parallel {target.parallel} x 3 fp32 copies of a layer "
            f"({size(workers)}) and 3 of the output layer ({size(12 * shape.embedding)})"
        )
    elif isinstance(target, Llama2c):
        ram, how = 4 * shape.params + GIB // 2, f"model in fp32 {size(4 * shape.params)} + {size(GIB // 2)}"
    elif isinstance(target, LlamaCpp):
        # Layer by layer in fp32 for the importance matrix and the proof; the quantizer holds a tensor, and maps the file it reads.
        ram, how = (
            GIB + 8 * max(shape.embedding, *(layer.params for layer in shape.stack)),
            f"{size(GIB)} + the largest of layers and embedding in fp32, twice",
        )
    elif isinstance(target, Openvino):
        # Measured with optimum-intel 2.2.0: 0.60 GB for 3.3M parameters in fp32, 2.36 GB for 494M in bf16 (0.99 GB), which it first writes uncompressed.
        ram, how = GIB + 2 * stored, f"exporter {size(GIB)} + model as it is stored twice {size(2 * stored)}"
    else:
        ram = tool + 2 * stored + 4 * shape.embedding
        how = f"tool {size(tool)} + model as it is stored twice {size(2 * stored)} + embedding in fp32 {size(4 * shape.embedding)}"
    disk = round(1.1 * bundle)
    if isinstance(target, Openvino) or (isinstance(target, LlamaCpp) and takes.by_llama_cpp(target)):
        disk += stored
    if isinstance(target, Mobilint):
        # Calibration files; embedding.pt and the raw table it is made from.
        disk += 4 * target.samples * target.lengths()[1] * shape.hidden + 8 * shape.embedding
    return ram, disk, [f"host memory, estimated: {how} = {size(ram)}", f"disk, estimated: {size(disk)}"]
