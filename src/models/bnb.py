"""Matrices as bitsandbytes stores them, made and read one at a time: NF4 (Dettmers et al. 2023, arXiv:2305.14314), 4 bits in blocks of 64 along a matrix's
rows, and int8 by output (Dettmers et al. 2022, arXiv:2208.07339), whose kernels round activations too: see `round_inputs`.
"""

import json
from dataclasses import dataclass

import torch

from src.core.errors import BadData, using
from src.core.processes import import_quietly
from src.models import gptq, safetensors_io
from src.models.matrix import Packed

STATE = "weight.quant_state.bitsandbytes__nf4"
SCALES = "SCB"


@dataclass(frozen=True)
class Nf4:
    """double_quant: scales in 8 bits, with a scale for each 256 of them."""

    double_quant: bool

    def round(self, weight: torch.Tensor) -> gptq.Quantized:
        """weight: fp32 (out, in)."""
        import_quietly("bitsandbytes")
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(weight.contiguous(), quant_type="nf4", compress_statistics=self.double_quant)
        tensors = {"weight": packed} | {f"weight.{name}": t.contiguous() for name, t in state.as_dict(packed=True).items()}
        return gptq.with_loss(tensors, dequantize_4bit(packed, state), weight)


@dataclass(frozen=True)
class Int8:
    """A scale for each output: its largest weight is 127."""

    def round(self, weight: torch.Tensor) -> gptq.Quantized:
        """weight: fp32 (out, in)."""
        largest = weight.abs().amax(1)
        values = (weight * (127 / largest.clamp(min=1e-30))[:, None]).round_().to(torch.int8)
        tensors = {"weight": values, SCALES: largest, "weight_format": torch.zeros((), dtype=torch.uint8)}
        return gptq.with_loss(tensors, values * (largest / 127)[:, None], weight)


class Stored(Packed):
    @property
    def shape(self) -> tuple[int, int]:
        if STATE not in self.parts:
            out, width = self.parts["weight"].shape
            return out, width
        with using(f"the quantized matrix {self.name}", self.parts["weight"].file):
            out, width = json.loads(safetensors_io.load(self.parts[STATE]).numpy().tobytes())["shape"]
        return out, width

    @property
    def form(self) -> Nf4 | Int8:
        return Nf4("weight.nested_absmax" in self.parts) if STATE in self.parts else Int8()

    def widen(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        if STATE not in tensors:
            return tensors["weight"] * (tensors[SCALES].float() / 127)[:, None]
        import_quietly("bitsandbytes")
        from bitsandbytes.functional import QuantState, dequantize_4bit

        packed = tensors.pop("weight")
        state = QuantState.from_dict({suffix.removeprefix("weight."): t for suffix, t in tensors.items()}, device=packed.device)
        return dequantize_4bit(packed, state).float()


def matrices(entries: dict) -> dict:
    """{name: where it is stored}, those of bitsandbytes' under the names of their weights, with all that belongs to them."""
    found = dict(entries)
    for name in entries:
        suffix = next((each for each in (STATE, SCALES) if name.endswith(f".{each}")), None)
        module = name.removesuffix(f".{suffix}")
        if suffix and f"{module}.weight" in entries:
            parts = [f"{module}.{each}" for each in ("weight", "weight_format", SCALES) if f"{module}.{each}" in entries]
            parts += [each for each in entries if each.startswith(f"{module}.weight.")]
            stored = Stored(f"{module}.weight", {each.removeprefix(f"{module}."): entries[each] for each in parts})
            for each in parts:
                del found[each]
            found[stored.name] = stored
    return found


def round_inputs(model: torch.nn.Module, entries: dict, config: dict) -> None:
    """Have the layers whose matrices are int8 take what they are given as bitsandbytes' kernels do outside of training, which compute with int8 on both sides:
    an evaluation of the weights alone would miss most of what is lost. config: the folder's quantization_config. Raises BadData where its threshold is none."""
    names = [each.name for each in entries.values() if isinstance(each, Stored) and isinstance(each.form, Int8)]
    threshold = config.get("llm_int8_threshold", 6.0)
    if names and not (isinstance(threshold, int | float) and threshold >= 0):
        raise BadData(f"quantization_config.llm_int8_threshold is {threshold!r}, no number from 0 on", where="config.json")

    def before(layer, given):
        return None if layer.training else (rounded(given[0], threshold), *given[1:])

    for name in names:
        model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(before)


def rounded(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """x (..., tokens, in), by way of fp16, in int8 by token, its largest value 127, but for the columns in which a value of the row reaches the threshold: those
    stay, and such values do not count as a token's largest (section 3 of the paper; 0: none stay). The kernels look for such columns in all rows they are
    given at once; here each row, with its padding, is taken as if it were alone."""
    half = x.half().float()
    outliers = half.abs() >= threshold if threshold else torch.zeros_like(x, dtype=torch.bool)
    scale = half.masked_fill(outliers, 0).abs().amax(-1, keepdim=True).div_(127).clamp_(min=1e-30)
    return torch.where(outliers.any(-2, keepdim=True), x, half.div_(scale).round_().mul_(scale))
