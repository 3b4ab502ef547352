r"""A checkpoint's sizes and tensors, and model.bin made of them: a file that assets/llama2c/run.c runs.

Versions 0 and 1 (fp32) and 2 (int8) are those of karpathy/llama2.c: its export.py writes them, its run.c and runq.c read them. Version 3 is ours, for
what these cannot hold. It is little endian; a tensor begins at the next multiple of 64 bytes, zeros before it:

    offset  type      version 3's header of 256 bytes; the rest is zero
    0       uint32    0x616b3432, as in versions 1 and 2
    4       int32     3
    8       int32[7]  dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len, as in versions 1 and 2
    36      int32     1 where the output layer is the embedding, else 0
    40      int32     head_dim, which need not be dim / n_heads
    44      int32     bits of the layers' matrices: 32, 8 or 4
    48      int32     group: integers that share a scale; 0 for fp32
    52      int32     biases: 1 of q, k and v, plus 2 of the output projection, plus 4 of the MLP
    56      int32     1 where queries and keys are normed by head, else 0
    60      float32   epsilon of the norms
    64      float32   what cosines and sines are multiplied by (YaRN; else 1)

    tensors fp32 (head_dim / 2) radians by which a pair turns for each position, the scaling of the rotary embedding in them;
            the final norm; the embedding; for each layer its two norms, q's and k's norms, q, k, v, o, w1 (gate), w2 (down), w3 (up), each with its
            bias behind it; the output layer where it is not the embedding. Norms and biases are fp32.

A matrix of 8 bits is its int8 values row by row, then an fp32 scale for each group of them, as in version 2. One of 4 bits has 64 values of a row in 32
bytes, values i and i + 32 in the low and the high half of byte i, 8 added to each, then its scales; embedding and output layer have 8 bits beside it. Rows of
q and k, and what belongs to them, are in llama2.c's order (`interleave`).
"""

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from src.core.errors import BadData, MissingInput, WrongKind
from src.core.files import read_json
from src.models.safetensors_io import ITEM, Entry, entries, load, load_wide
from src.sizing import numerics, takes

if TYPE_CHECKING:
    from src.models import gptq

MAGIC = 0x616B3432
HEADER = 256
ALIGNMENT = 64
"""bytes at whose multiples a tensor of version 3 begins"""
BLOCK = 1 << 22
"""weights of a matrix that are made and written at a time"""
SMALLEST_GROUP = 4  # below this the fp32 scales weigh as much as the values, and lose their 4-byte alignment
DTYPES = {"F64", "F32", "F16", "BF16"}

EMBEDDING, FINAL_NORM, CLASSIFIER = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
NORMS = ("input_layernorm", "post_attention_layernorm")
HEAD_NORMS = {"self_attn.q_norm": "wq", "self_attn.k_norm": "wk"}
# The order in which every version stores a layer's matrices.
MATRICES = {
    "wq": "self_attn.q_proj",
    "wk": "self_attn.k_proj",
    "wv": "self_attn.v_proj",
    "wo": "self_attn.o_proj",
    "w1": "mlp.gate_proj",
    "w2": "mlp.down_proj",
    "w3": "mlp.up_proj",
}
BIAS_BITS = {"wq": 1, "wk": 1, "wv": 1, "wo": 2, "w1": 4, "w2": 4, "w3": 4}
FREQUENCIES, ROPE_TABLES = "frequencies", "cosines and sines"
"""what stands in a file and in no checkpoint: of version 3, and of version 0, which does not need it"""


class Part(NamedTuple):
    """A tensor of the file, in its order. heads: whose rows are turned, see `interleave`; 0: none."""

    name: str
    shape: tuple[int, ...]
    bits: int = 32
    heads: int = 0


@dataclass(frozen=True)
class Form:
    """How a file holds its weights. group: integers that share a scale; 0 for fp32."""

    version: int
    bits: int
    group: int = 0

    def size(self, part: Part) -> int:
        """Bytes of a tensor, its scales among them."""
        count = math.prod(part.shape)
        return count * part.bits // 8 + (4 * count // self.group if part.bits < 32 else 0)


@dataclass
class Shape:
    """What config.json says of the model, in llama2.c's words. biases: as in version 3's header."""

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
    head: int
    biases: int = 0
    head_norms: bool = False
    gptq_group: int = 0
    """Of a GPTQ model, whose integers are kept as they are; 0: it is none."""

    @property
    def widths(self) -> tuple[int, ...]:
        """The lengths of its matrices' rows."""
        return self.dim, self.hidden, self.heads * self.head

    def matrix(self, key: str, layer: int) -> Part:
        query, kv = self.heads * self.head, self.kv_heads * self.head
        rows = {"wq": query, "wk": kv, "wv": kv, "wo": self.dim, "w1": self.hidden, "w2": self.dim, "w3": self.hidden}[key]
        columns = {"wo": query, "w2": self.hidden}.get(key, self.dim)
        turned = {"wq": self.heads, "wk": self.kv_heads}.get(key, 0)
        return Part(f"model.layers.{layer}.{MATRICES[key]}.weight", (rows, columns), heads=turned)

    def norm(self, which: int, layer: int) -> Part:
        return Part(f"model.layers.{layer}.{NORMS[which]}.weight", (self.dim,))

    def layer(self, layer: int) -> Iterator[Part]:
        """A layer's tensors in version 3's order."""
        yield from (self.norm(0, layer), self.norm(1, layer))
        if self.head_norms:
            yield from (Part(f"model.layers.{layer}.{name}.weight", (self.head,), heads=1) for name in HEAD_NORMS)
        for key in MATRICES:
            yield (matrix := self.matrix(key, layer))
            if self.biases & BIAS_BITS[key]:
                yield Part(matrix.name.replace(".weight", ".bias"), matrix.shape[:1], heads=matrix.heads)


def layout(shape: Shape, form: Form) -> Iterator[Part]:
    """The file's tensors in their order, behind its header."""
    outer = 8 if form.bits == 4 else form.bits
    embedding = Part(EMBEDDING, (shape.vocab, shape.dim), outer)
    final, layers = Part(FINAL_NORM, (shape.dim,)), range(shape.layers)
    norms = [[shape.norm(which, layer) for layer in layers] for which in (0, 1)]
    if form.version == 3:
        yield from (Part(FREQUENCIES, (shape.head // 2,)), final, embedding)
        for layer in layers:
            yield from (part._replace(bits=form.bits) if len(part.shape) == 2 else part for part in shape.layer(layer))
    else:
        yield from (embedding, *norms[0]) if form.version == 0 else (*norms[0], *norms[1], final, embedding)
        for key in MATRICES:
            if form.version == 0 and key == "w1":
                yield from norms[1]
            yield from (shape.matrix(key, layer)._replace(bits=form.bits) for layer in layers)
        if form.version == 0:
            yield from (final, Part(ROPE_TABLES, (2, shape.context, shape.head // 2)))
    if not shape.shared:
        yield embedding._replace(name=CLASSIFIER)


def read_shape(model_dir: Path, format: str) -> Shape:
    """The model's sizes from config.json. Raises WrongKind where the format or run.c cannot express the model."""
    path = model_dir / "config.json"
    config = read_json(path)
    sizes = takes.llama2c(config, format, where=str(path))
    rope = config.get("rope_parameters") or {}
    assert sizes.max_positions is not None
    return Shape(
        dim=sizes.hidden,
        hidden=sizes.intermediate,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        vocab=sizes.vocab,
        context=min([sizes.max_positions, *(layer.window for layer in sizes.stack if layer.window)]),
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        shared=sizes.tied,
        head=sizes.head_dim,
        biases=takes.llama2c_biases(config, sizes),
        head_norms=sizes.qk_norm,
        gptq_group=(sizes.quantization.group_size or 0) if sizes.quantization else 0,
    )


def sources(model_dir: Path, shape: Shape) -> "dict[str, Entry | gptq.Stored]":
    """Where each tensor is stored, by its name: by GPTQ's a matrix of integers."""
    found = entries(model_dir)
    if not shape.gptq_group:
        return dict(found)
    from src.models import gptq

    return gptq.matrices(found)


def check_tensors(model_dir: Path, shape: Shape) -> None:
    """The checkpoint has every tensor that is exported, in its shape, and no other bias. Reads the safetensors headers alone."""
    found = sources(model_dir, shape)
    if not found:
        raise MissingInput("the model folder has no tensors in *.safetensors", where=str(model_dir))
    wanted = {part.name: part.shape for part in layout(shape, Form(3, 32)) if part.name != FREQUENCIES}
    for name, sizes in wanted.items():
        if name not in found:
            raise BadData(f"the checkpoint has no tensor {name}", where=str(model_dir))
        entry = found[name]
        if entry.shape != sizes:
            raise BadData(f"{name} has shape {list(entry.shape)}; config.json asks for {list(sizes)}", where=str(model_dir))
        if isinstance(entry, Entry) and entry.dtype not in DTYPES:
            raise WrongKind(f"{name} has dtype {entry.dtype}", where=str(model_dir), fix=takes.UNQUANTIZED)
    biases = [name for name in found if name.endswith("_proj.bias") and name not in wanted]
    if biases:
        raise WrongKind(
            f"the model has biases ({biases[0]} and {len(biases) - 1} more) that its config.json does not tell of",
            where=str(model_dir),
            fix="target=openvino_cpu",
        )


def form_of(shape: Shape, format: str, wanted: int) -> Form:
    """The form of a format such as int8_v2. Its group is `wanted`, halved until it divides the rows of every matrix. Raises WrongKind where none does."""
    version, bits = takes.llama2c_form(format)
    if bits == 32:
        return Form(version, bits)
    wanted = shape.gptq_group or wanted
    widths, group = shape.widths, takes.llama2c_group(wanted, *shape.widths)
    blocks = bits == 4 and any(width % 64 for width in widths)
    least = 32 if bits == 4 else SMALLEST_GROUP
    if shape.gptq_group and (shape.gptq_group < 0 or group != shape.gptq_group):
        raise WrongKind(
            f"a scale for each {'row' if shape.gptq_group < 0 else shape.gptq_group} of its weights: run.c takes groups that divide every row",
            fix=[takes.UNQUANTIZED, "quantize that one with quantizer.group_size=64"],
        )
    if group < least or blocks:
        raise WrongKind(
            f"no group size from {wanted} down to {least} divides rows of {', '.join(map(str, dict.fromkeys(widths)))}"
            + " into blocks of 64" * blocks,
            fix=[
                *[f"target.format=int8_v{version}"] * (bits == 4 and group >= SMALLEST_GROUP),
                f"target.format=fp32_v{3 if version == 3 else 1}",
            ],
        )
    return Form(version, bits, group)


def header(shape: Shape, form: Form, scale: float) -> bytes:
    """What stands before the tensors. scale: of version 3, what cosines and sines are multiplied by."""
    vocab = shape.vocab if shape.shared or form.version > 0 else -shape.vocab
    sizes = struct.pack("<7i", shape.dim, shape.hidden, shape.layers, shape.heads, shape.kv_heads, vocab, shape.context)
    if form.version == 0:
        return sizes
    start = struct.pack("<Ii", MAGIC, form.version) + sizes
    if form.version == 3:
        more = (shape.shared, shape.head, form.bits, form.group, shape.biases, shape.head_norms, shape.eps, scale)
        start += struct.pack("<6i2f", *more)
    else:
        start += struct.pack("<B", shape.shared) + (struct.pack("<i", form.group) if form.version == 2 else b"")
    return start.ljust(HEADER, b"\0")


def write_model(model_dir: Path, shape: Shape, form: Form, path: Path) -> None:
    """model.bin, BLOCK weights in memory at a time."""
    found = sources(model_dir, shape)
    frequencies, scale = rope_of(model_dir) if form.version == 3 else (None, 1.0)
    with path.open("wb") as file:

        def put(*tensors) -> None:
            for tensor in tensors:
                tensor.contiguous().numpy().tofile(file)

        file.write(header(shape, form, scale))
        for part in layout(shape, form):
            if form.version == 3:
                file.write(bytes(-file.tell() % ALIGNMENT))
            if part.name == FREQUENCIES:
                put(frequencies)
            elif part.name == ROPE_TABLES:
                put(*rope_tables(shape))
            elif not isinstance(source := found[part.name], Entry):
                put(*_kept(source, part, form))
            elif len(part.shape) == 1:
                vector = load_wide(source)
                put(interleave(vector, part.heads) if part.heads else vector)
            else:
                scales = []
                for block in blocks(source, whole=bool(part.heads)):
                    rows = interleave(block, part.heads) if part.heads else block
                    values, *of_groups = quantize(rows, part.bits, form.group) if part.bits < 32 else [rows]
                    put(values)
                    scales += of_groups
                put(*scales)


def blocks(entry: Entry, *, whole: bool) -> Iterator:
    """The rows of a matrix in fp32, so many at a time that they have about BLOCK weights, or all at once."""
    rows, width = entry.shape
    step = rows if whole else max(1, BLOCK // width)
    for begin in range(0, rows, step):
        some = replace(entry, shape=(min(step, rows - begin), width), start=entry.start + begin * width * ITEM[entry.dtype])
        yield load_wide(some)


def _kept(stored: "gptq.Stored", part: Part, form: Form) -> tuple:
    """(values as the file has them, fp32 scales) of a GPTQ matrix, none rounded again. Raises BadData where its columns are not in order."""
    import torch

    from src.models import gptq

    tensors = {suffix: load(entry) for suffix, entry in stored.parts.items()}
    if not torch.equal(tensors["g_idx"].long(), torch.arange(stored.shape[1]) // form.group):
        raise BadData(
            f"the columns of {part.name} are not in groups of {form.group}", where=str(stored.parts["g_idx"].file), fix=takes.UNQUANTIZED
        )
    values = (gptq.unpack(tensors["qweight"], form.bits).short() - (1 << (form.bits - 1))).to(torch.int8).T.contiguous()
    scales = tensors["scales"].float().T.contiguous()
    if part.heads:
        values, scales = interleave(values, part.heads), interleave(scales, part.heads)
    return pack(values.view(-1)) if form.bits == 4 else values, scales


def reader_of(path: Path, shape: Shape, form: Form) -> Callable[[str], Any]:
    """A function from a weight's name in the checkpoint to its fp32 tensor as the program computes with it: integers times their scales."""
    import numpy as np
    import torch

    places: dict[str, tuple[Part, int]] = {}
    at = len(header(shape, form, 1.0))
    for part in layout(shape, form):
        at += -at % ALIGNMENT if form.version == 3 else 0
        places[part.name] = part, at
        at += form.size(part)

    def read(name: str):
        part, start = places[name]
        count = math.prod(part.shape)
        stored = lambda dtype, count, start: torch.from_numpy(np.fromfile(path, dtype, count, offset=start))
        if part.bits == 32:
            weight = stored(np.float32, count, start)
        else:
            packed = stored(np.uint8 if part.bits == 4 else np.int8, count * part.bits // 8, start)
            values = unpack(packed) if part.bits == 4 else packed
            scales = stored(np.float32, count // form.group, start + len(packed))
            weight = values.view(-1, form.group) * scales[:, None]
        weight = weight.view(part.shape)
        return separate(weight, part.heads) if part.heads else weight

    return read


def rope_of(model_dir: Path) -> tuple[Any, float]:
    """(fp32 (head_dim / 2) radians by which a pair turns for each position, what cosines and sines are multiplied by), as transformers has them."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    plain = LlamaRotaryEmbedding.compute_default_rope_parameters
    frequencies, scale = ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"], plain)(config)
    return frequencies.float(), float(scale)


def rope_tables(shape: Shape) -> tuple:
    """Cosine and sine of every position's angles, (context, head / 2) each, as version 0 stores them."""
    import torch

    turns = 1.0 / shape.theta ** (torch.arange(0, shape.head, 2).float() / shape.head)
    angles = torch.outer(torch.arange(shape.context).float(), turns)
    return angles.cos(), angles.sin()


def interleave(weight, heads: int):
    """Rows of a query or key projection (heads * head_dim, dim), or a vector by such rows, from Hugging Face's order to llama2.c's.

    Rope turns rows i and i + head_dim / 2 together in the one, rows 2i and 2i + 1 in the other.
    """
    return weight.reshape(heads, 2, -1, weight[0].numel()).transpose(1, 2).reshape(weight.shape)


def separate(weight, heads: int):
    """`interleave` undone."""
    return weight.reshape(heads, -1, 2, weight[0].numel()).transpose(1, 2).reshape(weight.shape)


def quantize(weight, bits: int, group: int) -> tuple:
    """(values as they are stored, fp32 scales of one per group) of whole rows."""
    import torch

    from src.models import on_board

    levels, scales = on_board.integers(weight, numerics.llama2c_integers(bits, group))
    values = levels.to(torch.int8).view(-1)
    return pack(values) if bits == 4 else values, scales.view(-1)


def pack(values):
    """Integers from -8 to 7, 64 in 32 bytes."""
    import torch

    low, high = (values + 8).view(-1, 2, 32).to(torch.uint8).unbind(1)
    return (low | high << 4).view(-1)


def unpack(packed):
    """`pack` undone."""
    import torch

    halves = packed.view(-1, 32)
    return (torch.stack([halves & 15, halves >> 4], 1).to(torch.int8) - 8).view(-1)
