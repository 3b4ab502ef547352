"""A model folder's tensors as those of a GGUF: under llama.cpp's names, in its layout, quantized piece by piece as they stream from the shards.

Never more than a piece of a tensor is in memory. Rounding is the gguf package's, which is llama.cpp's reference; to 16-bit floats it is the stochastic one of
models/rounding.py, as the nearest would undo much of a small update of weights that lay on a 16-bit grid.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import AGAIN, BadData, WrongKind
from src.core.log import progress
from src.deploy.gguf import families
from src.models import rounding, safetensors_io
from src.models.safetensors_io import Entry

PIECE = 1 << 22
"""values of a tensor that are read and rounded at a time"""
ALIGNMENT = 32
"""bytes that each tensor's data begins at a multiple of; GGUF's default"""
LEFT_OUT = ".rotary_emb.inv_freq"
"""buffers that old checkpoints hold and every program computes"""
FLOATS = ("f32", "f16", "bf16")
F16_MAX = 65504.0


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file. name: llama.cpp's. kind: its type, as settings call it. shape: (rows, columns), or (values,).

    source: where its values are stored, or they themselves. head: rows of a head whose halves are interleaved, 0: as stored. plus: added to each value;
    times: what each is multiplied by.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    source: Entry | np.ndarray
    head: int = 0
    plus: float = 0.0
    times: float = 1.0

    @property
    def nbytes(self) -> int:
        import gguf

        block, size = gguf.GGML_QUANT_SIZES[ggml_type(self.kind)]
        return int(np.prod(self.shape)) // block * size


def ggml_type(kind: str) -> Any:
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def plan(model: Path, config: Any, weight_type: str) -> list[Tensor]:
    """The tensors of a file whose matrices are of `weight_type`, in the folder's order. config: transformers', of the model.

    Vectors are fp32, as llama.cpp computes with them. Below 8 bits the output layer, which may be the embedding table, is q8_0; a matrix whose rows do
    not divide into blocks stays in 16 bits. Raises WrongKind for a tensor that this architecture of llama.cpp has no place for.
    """
    import gguf

    names = gguf.get_tensor_name_map(families.architecture(config.model_type), config.num_hidden_layers)
    entries = safetensors_io.entries(model)
    head, tied = families.head_dim(config), config.tie_word_embeddings or "lm_head.weight" not in entries
    made = [Tensor(name, "f32", (len(values),), np.array(values, np.float32)) for name, values in families.made_tensors(config).items()]
    for name, entry in entries.items():
        if name.endswith(LEFT_OUT) or (name == "lm_head.weight" and tied):
            continue
        found = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise WrongKind(
                f"'{name}' has no place in llama.cpp's {families.GGUF[config.model_type]}",
                where=str(entry.file),
                fix="target=openvino_cpu",
            )
        if entry.dtype not in safetensors_io.NAME.values():
            raise WrongKind(f"'{name}' is stored as {entry.dtype}, not as floats of 16 or more bits", where=str(entry.file))
        last = found == ("token_embd.weight" if tied else "output.weight")
        turned = config.model_type in families.INTERLEAVED and found.rpartition(".")[0].endswith(("attn_q", "attn_k"))
        plus = float(config.model_type in families.PLUS_ONE and found.endswith("norm.weight"))
        made.append(Tensor(found, kind_of(entry.shape, weight_type, last=last), entry.shape, entry, head * turned, plus))
    return made


def kind_of(shape: tuple[int, ...], weight_type: str, *, last: bool) -> str:
    """The type of a tensor of this shape in a file of `weight_type`. last: it is the output layer."""
    if len(shape) == 1:
        return "f32"
    if weight_type in FLOATS:
        return weight_type
    return "f16" if shape[-1] % 32 else "q8_0" if last else weight_type


def exact_type(model: Path) -> str:
    """The narrowest type of floats that holds a folder's matrices as they are."""
    dtypes = {entry.dtype for entry in safetensors_io.entries(model).values() if len(entry.shape) > 1}
    return "bf16" if dtypes == {"BF16"} else "f16" if dtypes == {"F16"} else "f32"


def write(path: Path, arch: Any, describe: Callable[[Any], None], tensors: list[Tensor]) -> None:
    """The file: the gguf package writes its head, with what `describe` adds to its GGUFWriter, the data follow piece by piece."""
    import gguf

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    describe(writer)
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, ggml_type(tensor.kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        for tensor in progress(tensors, "tensors"):
            file.write(bytes(-file.tell() % ALIGNMENT))
            begin, done = file.tell(), 0
            for piece in pieces(tensor):
                file.write(rounded(piece, tensor, done).tobytes())
                done += piece.size
            assert file.tell() - begin == tensor.nbytes
        file.write(bytes(-file.tell() % ALIGNMENT))


def rounded(values: np.ndarray, tensor: Tensor, start: int = 0) -> np.ndarray:
    """fp32 values as the tensor's type holds them. start: position of the first in the tensor. Raises BadData for those it cannot hold."""
    import torch
    from gguf import quants

    largest = float(np.abs(values).max(initial=0))
    if not np.isfinite(largest):
        raise BadData(f"'{tensor.name}' holds values that are no numbers", where=_where(tensor), fix=AGAIN)
    if largest > F16_MAX and tensor.kind not in ("f32", "bf16"):
        raise BadData(
            f"'{tensor.name}' holds {largest:.3g}, beyond what 16-bit floats and scales of {tensor.kind} can",
            where=_where(tensor),
            fix="target.weight_type=bf16",
        )
    if dtype := {"f16": torch.float16, "bf16": torch.bfloat16}.get(tensor.kind):
        exact = torch.from_numpy(np.ascontiguousarray(values, np.float32))
        return rounding.narrow(exact, dtype, tensor.name, start=start).view(torch.int16).numpy()
    return quants.quantize(values, ggml_type(tensor.kind))


def _where(tensor: Tensor) -> str:
    return str(tensor.source.file) if isinstance(tensor.source, Entry) else ""


def pieces(tensor: Tensor) -> Iterator[np.ndarray]:
    """A tensor's values in llama.cpp's layout, fp32, whole rows at a time and whole heads where they are interleaved."""
    if isinstance(tensor.source, np.ndarray):
        yield tensor.source
        return
    rows, width = (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) > 1 else (1, tensor.shape[0])
    if tensor.head and len(tensor.shape) == 1:  # a bias: a value stands for a row
        rows, width = width, 1
    step = max(1, PIECE // width)
    step = max(tensor.head, step // tensor.head * tensor.head) if tensor.head else step
    for begin in range(0, rows, step):
        values = _read(tensor.source, begin * width, min(step, rows - begin) * width)
        if tensor.head:
            # (heads, halves, half, width) -> (heads, half, halves, width)
            values = values.reshape(-1, 2, tensor.head // 2, width).swapaxes(1, 2)
        if tensor.plus:
            values = values + np.float32(tensor.plus)
        if tensor.times != 1:
            values = values * np.float32(tensor.times)
        yield values.reshape((-1, width) if len(tensor.shape) > 1 else -1)


def _read(entry: Entry, at: int, count: int) -> np.ndarray:
    """`count` of a stored tensor's values from `at` on, fp32 (of fp64 the nearest)."""
    width = safetensors_io.ITEM[entry.dtype]
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start + at * width)
        data = bytearray(count * width)
        view = memoryview(data)
        while view:
            if not (got := file.readinto(view)):
                raise BadData(f"'{entry.name}' ends before its header says", where=str(entry.file), fix=AGAIN)
            view = view[got:]
    if entry.dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F16": np.float16, "F32": np.float32, "F64": np.float64}[entry.dtype]).astype(np.float32)
