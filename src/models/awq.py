"""AWQ's matrices (Lin et al. 2023, arXiv:2306.00978) as they are stored: each group of weights with a scale and a zero point.

The layout is AutoAWQ's for GEMM kernels, which transformers and vLLM read: for a matrix of (out, in) weights in 4 bits `qweight`, int32 (in, out / 8);
`qzeros`, int32 (groups, out / 8); `scales`, fp16 (groups, out). A weight is (q - zero) x scale.
"""

from dataclasses import dataclass

import torch

from src.models import gptq
from src.models.matrix import Packed

SUFFIXES = ("qweight", "qzeros", "scales")
SCALED = "scaled_inputs", "scaled_outputs"
"""of a matrix in the file of a layer that was quantized, fp32 (in,) and (out,): what its weights were multiplied by before they were rounded"""
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""which of eight outputs lies in each four bits of a word, from the lowest"""


@dataclass(frozen=True)
class Settings:
    """group: inputs that share a scale and a zero point, -1 for all."""

    group: int
    bits = 4

    def round(self, weight: torch.Tensor) -> gptq.Quantized:
        """weight: fp32 (out, in); what it becomes where nothing is scaled or cut."""
        return gptq.with_loss({}, made_of(*rounded(weight, self.group)), weight)


def pack(values: torch.Tensor) -> torch.Tensor:
    """uint8 (n, m) of 4 bits each as int32 (n, m / 8)."""
    words = torch.zeros(len(values), values.shape[1] // 8, dtype=torch.int32, device=values.device)
    for i, at in enumerate(ORDER):
        words |= values[:, at::8].int() << (4 * i)
    return words


def unpack(words: torch.Tensor) -> torch.Tensor:
    """`pack` undone."""
    values = torch.empty(len(words), words.shape[1] * 8, dtype=torch.uint8, device=words.device)
    for i, at in enumerate(ORDER):
        values[:, at::8] = (words >> (4 * i) & 15).to(torch.uint8)
    return values


def rounded(weight: torch.Tensor, group: int, cut: torch.Tensor | float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(values, fp32; scales, fp16; zero points, fp32) of fp32 weights (out, in): (out, groups, in a group), and (out, groups, 1) twice.

    cut: share of the range that is kept, of all groups or (out, groups, 1).
    """
    groups = weight.reshape(len(weight), -1, weight.shape[1] if group == -1 else group)
    high, low = groups.amax(2, keepdim=True) * cut, groups.amin(2, keepdim=True) * cut
    scales = ((high - low) / 15).clamp_(2**-14, 65504).half()
    zeros = (-low / scales.float()).round_().clamp_(0, 15)
    return (groups / scales.float()).round_().add_(zeros).clamp_(0, 15), scales, zeros


def made_of(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The weights, fp32 (out, in)."""
    return ((values - zeros) * scales.float()).flatten(1)


class Stored(Packed):
    @property
    def shape(self) -> tuple[int, int]:
        width, words = self.parts["qweight"].shape
        return 8 * words, width

    @property
    def form(self) -> Settings:
        return Settings(self.shape[1] // self.parts["scales"].shape[0])

    def widen(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        words, zeros, scales = (tensors[suffix] for suffix in SUFFIXES)
        values = unpack(words).view(len(scales), -1, scales.shape[1]).float()
        return values.sub_(unpack(zeros)[:, None]).mul_(scales[:, None].float()).flatten(0, 1).T.contiguous()


def matrices(entries: dict) -> dict:
    """{name: where it is stored}, AWQ's matrices under the names of their weights: those that have no order of inputs."""
    found = dict(entries)
    for name in entries:
        module = name.removesuffix(".qweight")
        if name != module and f"{module}.g_idx" not in entries and all(f"{module}.{suffix}" in entries for suffix in SUFFIXES):
            stored = Stored(f"{module}.weight", {suffix: found.pop(f"{module}.{suffix}") for suffix in SUFFIXES})
            found[stored.name] = stored
    return found
