"""A quantized matrix in a folder, whatever packed it."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from src.core.errors import using
from src.models import safetensors_io


@dataclass(frozen=True)
class Packed(ABC):
    """name: that its weight would have. parts: {suffix: entry}."""

    name: str
    parts: dict[str, safetensors_io.Entry]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """Of the weight, (out, in)."""

    @property
    @abstractmethod
    def form(self) -> Any:
        """What rounds a weight to as many bits with nothing else done to it: round(weight) -> gptq.Quantized."""

    @abstractmethod
    def widen(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The weight, fp32 (out, in), that its tensors say, by suffix."""

    def __call__(self) -> torch.Tensor:
        """The weight, fp32 (out, in). Raises BadData where its tensors do not belong together, or are in another form than `widen` knows."""
        with using(f"the quantized matrix {self.name}", next(iter(self.parts.values())).file):
            return self.widen({suffix: safetensors_io.load(entry) for suffix, entry in self.parts.items()})
