"""A Llama checkpoint's sizes and tensors, and llama2.c's model.bin made of them.

Formats: export.py of karpathy/llama2.c, read by its run.c (versions 0 and 1, fp32) and runq.c (version 2, int8).
"""

import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.core.errors import BadData, MissingInput, WrongKind
from src.core.files import read_json
from src.models.safetensors_io import ITEM, Entry, entries, load_wide
from src.sizing import takes

MAGIC = 0x616B3432
BLOCK = 1 << 22
"""weights of a matrix that are made and written at a time"""
VERSIONS = {"fp32_v0": 0, "fp32_v1": 1, "int8_v2": 2}
SMALLEST_GROUP = 4  # below this the fp32 scales weigh as much as the values, and lose their 4-byte alignment
DTYPES = {"F64", "F32", "F16", "BF16"}

EMBEDDING, FINAL_NORM, CLASSIFIER = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
ATTENTION_NORM, FFN_NORM = "input_layernorm", "post_attention_layernorm"
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

    def each_layer(self, part: str) -> list[str]:
        """The names of one part's weight, such as mlp.up_proj, layer by layer."""
        return [f"model.layers.{layer}.{part}.weight" for layer in range(self.layers)]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name in the checkpoint -> shape, for every tensor that is exported."""
        kv = self.kv_heads * self.head
        rows = {"wq": self.dim, "wk": kv, "wv": kv, "wo": self.dim, "w1": self.hidden, "w2": self.dim, "w3": self.hidden}
        found = {EMBEDDING: (self.vocab, self.dim), FINAL_NORM: (self.dim,)}
        found |= dict.fromkeys(self.each_layer(ATTENTION_NORM) + self.each_layer(FFN_NORM), (self.dim,))
        for key, part in MATRICES.items():
            found |= dict.fromkeys(self.each_layer(part), (rows[key], self.hidden if key == "w2" else self.dim))
        return found if self.shared else found | {CLASSIFIER: (self.vocab, self.dim)}


def read_shape(model_dir: Path) -> Shape:
    """The model's sizes from config.json. Raises WrongKind where llama2.c's formats or run.c cannot express the model."""
    path = model_dir / "config.json"
    config = read_json(path)
    sizes = takes.llama2c(config, where=str(path))
    rope = config.get("rope_parameters") or {}
    assert sizes.max_positions is not None
    heads = sizes.heads
    return Shape(
        dim=sizes.hidden,
        hidden=sizes.intermediate,
        layers=sizes.layers,
        heads=heads,
        kv_heads=sizes.kv_heads,
        vocab=sizes.vocab,
        context=sizes.max_positions,
        theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0),
        eps=float(config.get("rms_norm_eps", 1e-6)),
        shared=sizes.tied,
    )


def check_tensors(model_dir: Path, shape: Shape) -> None:
    """The checkpoint has every tensor that is exported, in its shape, and no bias. Reads the safetensors headers alone."""
    found = entries(model_dir)
    if not found:
        raise MissingInput("the model folder has no tensors in *.safetensors", where=str(model_dir))
    for name, wanted in shape.tensors().items():
        if name not in found:
            raise BadData(f"the checkpoint has no tensor {name}", where=str(model_dir))
        entry = found[name]
        if entry.shape != wanted:
            raise BadData(f"{name} has shape {list(entry.shape)}; config.json asks for {list(wanted)}", where=str(entry.file))
        if entry.dtype not in DTYPES:
            raise WrongKind(f"{name} has dtype {entry.dtype}", where=str(entry.file), fix=takes.UNQUANTIZED)
    biases = [name for name in found if name.endswith("_proj.bias")]
    if biases:
        raise WrongKind(
            f"the model has biases ({biases[0]} and {len(biases) - 1} more); llama2.c has none",
            where=str(model_dir),
            fix="target=openvino_cpu",
        )


def group_size(shape: Shape, wanted: int) -> int:
    """The int8 group: `wanted`, halved until it divides the rows of every matrix. Raises WrongKind below 4."""
    group = takes.llama2c_group(wanted, shape.dim, shape.hidden)
    if group < SMALLEST_GROUP:
        raise WrongKind(
            f"no group size from {wanted} down to {SMALLEST_GROUP} divides both "
            f"hidden_size {shape.dim} and intermediate_size {shape.hidden}",
            fix="target.format=fp32_v1",
        )
    return group


def write_model(model_dir: Path, shape: Shape, version: int, group: int, path: Path) -> None:
    """model.bin of llama2.c's version 0, 1 (fp32) or 2 (int8 in groups), BLOCK weights in memory at a time."""
    found = entries(model_dir)
    with path.open("wb") as file:

        def weight(name: str):
            return load_wide(found[name])

        def put(*tensors) -> None:
            for tensor in tensors:
                tensor.contiguous().numpy().tofile(file)

        def matrix(name: str, heads: int = 0) -> None:
            scales = []
            for block in blocks(found[name], whole=bool(heads)):
                rows = interleave(block, heads) if heads else block
                values, *of_groups = quantize(rows, group) if version == 2 else [rows]
                put(values)
                scales += of_groups
            put(*scales)

        vocab = shape.vocab if shape.shared or version > 0 else -shape.vocab
        params = struct.pack("<7i", shape.dim, shape.hidden, shape.layers, shape.heads, shape.kv_heads, vocab, shape.context)
        if version == 0:
            file.write(params)
            matrix(EMBEDDING)
            put(*map(weight, shape.each_layer(ATTENTION_NORM)))
        else:
            header = struct.pack("<Ii", MAGIC, version) + params + struct.pack("<B", shape.shared)
            header += struct.pack("<i", group) if version == 2 else b""
            file.write(header.ljust(256, b"\0"))
            put(*map(weight, [*shape.each_layer(ATTENTION_NORM), *shape.each_layer(FFN_NORM), FINAL_NORM]))
            matrix(EMBEDDING)
        for key, part in MATRICES.items():
            if version == 0 and key == "w1":
                put(*map(weight, shape.each_layer(FFN_NORM)))
            for name in shape.each_layer(part):
                matrix(name, {"wq": shape.heads, "wk": shape.kv_heads}.get(key, 0))
        if version == 0:
            put(weight(FINAL_NORM), *rope_tables(shape))
        if not shape.shared:
            matrix(CLASSIFIER)


def blocks(entry: Entry, *, whole: bool) -> Iterator:
    """The rows of a matrix in fp32, so many at a time that they have about BLOCK weights, or all at once."""
    rows, width = entry.shape
    step = rows if whole else max(1, BLOCK // width)
    for begin in range(0, rows, step):
        some = replace(entry, shape=(min(step, rows - begin), width), start=entry.start + begin * width * ITEM[entry.dtype])
        yield load_wide(some)


def reader_of(path: Path, shape: Shape) -> Callable[[str], Any]:
    """A function from a weight's name in the checkpoint to its fp32 tensor as the program computes with it: int8 values times their scales."""
    import numpy as np
    import torch

    with open(path, "rb") as file:
        header = file.read(256)
    version = struct.unpack("<Ii", header[:8])[1] if struct.unpack("<I", header[:4])[0] == MAGIC else 0
    group = struct.unpack("<i", header[37:41])[0] if version == 2 else 0
    shapes, at = shape.tensors(), 256 if version else 28
    places: dict[str, tuple[int, int, bool]] = {}

    def put(names: Iterable[str], heads: int = 0, quantized: bool = True) -> None:
        nonlocal at
        for name in names:
            count, packed = math.prod(shapes[name]), bool(group and quantized)
            places[name] = (at, heads, packed)
            at += count + count // group * 4 if packed else 4 * count

    norms = [shape.each_layer(ATTENTION_NORM), shape.each_layer(FFN_NORM)]
    if version:
        put([*norms[0], *norms[1], FINAL_NORM], quantized=False)
        put([EMBEDDING])
    else:
        put([EMBEDDING, *norms[0]])
    for key, part in MATRICES.items():
        if not version and key == "w1":
            put(norms[1])
        put(shape.each_layer(part), {"wq": shape.heads, "wk": shape.kv_heads}.get(key, 0))
    if not version:
        put([FINAL_NORM])
        at += 4 * shape.context * shape.head  # the tables of cosines and sines
    if not shape.shared:
        put([CLASSIFIER])

    def read(name: str):
        start, heads, packed = places[name]
        count = math.prod(shapes[name])
        if packed:
            values = torch.from_numpy(np.fromfile(path, np.int8, count, offset=start)).view(-1, group)
            weight = values * torch.from_numpy(np.fromfile(path, np.float32, count // group, offset=start + count))[:, None]
        else:
            weight = torch.from_numpy(np.fromfile(path, np.float32, count, offset=start))
        weight = weight.view(shapes[name])
        return separate(weight, heads) if heads else weight

    return read


def rope_tables(shape: Shape) -> tuple:
    """Cosine and sine of every position's angles, (context, head / 2) each, as version 0 stores them."""
    import torch

    turns = 1.0 / shape.theta ** (torch.arange(0, shape.head, 2).float() / shape.head)
    angles = torch.outer(torch.arange(shape.context).float(), turns)
    return angles.cos(), angles.sin()


def interleave(weight, heads: int):
    """Rows of a query or key projection (heads * head_dim, dim) from Hugging Face's order to llama2.c's.

    Rope turns rows i and i + head_dim / 2 together in the one, rows 2i and 2i + 1 in the other.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def separate(weight, heads: int):
    """`interleave` undone."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def quantize(weight, group: int) -> tuple:
    """Symmetric int8: (values of the weight's size, fp32 scales of one per group). scale = largest / 127."""
    import torch

    groups = weight.reshape(-1, group)
    scales = groups.abs().amax(dim=1) / 127.0
    values = torch.round(groups / scales.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return values.to(torch.int8), scales
