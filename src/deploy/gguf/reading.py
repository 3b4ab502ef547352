"""A GGUF read back by the gguf package, as transformers would have its tensors: what the file's numbers are, where llama.cpp is not here to compute with them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from src.core.errors import ProofFailed
from src.deploy.gguf.weights import Tensor
from src.models import safetensors_io
from src.models.safetensors_io import Entry

ROUNDING = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 0.02, "q5_1": 0.1, "q5_0": 0.1, "q4_1": 0.2, "q4_0": 0.2}
"""relative L2 distance from its source that rounding to a type explains, several times what it comes to for weights as models have them"""


def tensors(file: Path, plan: list[Tensor]) -> Callable[[str], Any]:
    """tensor(name) -> fp32 torch tensor of a checkpoint's name, from a file whose tensors `plan` lists. A name that the file lacks is an output layer that
    is the embedding table."""
    import gguf
    import torch

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    planned = {tensor.source.name: tensor for tensor in plan if isinstance(tensor.source, Entry)}

    def tensor(name: str) -> Any:
        one = planned[name]
        found = stored[one.name]
        values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(one.shape)
        return torch.from_numpy(apart(values, one.head) - np.float32(one.plus))

    return tensor


def apart(values: np.ndarray, head: int) -> np.ndarray:
    """Rows of llama.cpp's interleaved heads in transformers' order: the even ones of a head, then the odd ones."""
    if not head:
        return values
    order = np.arange(len(values)).reshape(-1, head)
    return values[np.concatenate([order[:, 0::2], order[:, 1::2]], axis=1).reshape(-1)]


def check(file: Path, plan: list[Tensor]) -> None:
    """Raises ProofFailed for a tensor of the file that is further from its source than rounding to its type explains."""
    read = tensors(file, plan)
    for one in plan:
        if isinstance(one.source, Entry):
            source = safetensors_io.load_wide(one.source)
            off = float((read(one.source.name) - source).norm() / source.norm().clamp(min=1e-30))
            if not off <= ROUNDING.get(one.kind, 1.0):
                raise ProofFailed(
                    f"'{one.name}' is {off:.1%} away from '{one.source.name}', which {one.kind} does not explain", where=str(file)
                )
