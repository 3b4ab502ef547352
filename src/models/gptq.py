"""GPTQ (Frantar et al. 2022, arXiv:2210.17323): a matrix's weights rounded one input at a time, each rounding's error taken up by the inputs to come.
Beside it, in the same layout, plain rounding to the nearest.

The layout is AutoGPTQ's, which gptqmodel, transformers, vLLM and Pulsar2 read: for a matrix of (out, in) weights of 3, 4 or 8 bits `qweight`, int32 (in x
bits / 32, out); `scales`, fp16 (groups, out); `qzeros`, int32 (groups, out x bits / 32), each zero point less one; `g_idx`, int32 (in,), the group of
each input. Symmetric: the zero point is half the range.
"""

from dataclasses import dataclass

import torch

from src.models import safetensors_io
from src.models.cholesky import factor_of_inverse
from src.models.matrix import Packed
from src.sizing.budget import filling

BLOCK = 128
"""inputs whose errors are gathered before the rest of the matrix takes them up"""
ROWS = 4096
"""outputs that are rounded together: they do not depend on each other, so memory is theirs alone"""
GATHERED, STRIP = 32 << 20, 128
"""bytes of inputs that are added to a Hessian together; its rows that are summed together, from the diagonal on, the rest being their mirror image"""
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""shares of a group's largest weight that its scale is tried for"""
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class Settings:
    """bits: 3, 4 or 8. group: inputs that share a scale, -1 for all. damp: share of the Hessian's mean diagonal added to it. act_order: the inputs that
    matter most first, whatever their group; else groups and the inputs in each by that order, which keeps groups together."""

    bits: int
    group: int
    damp: float
    act_order: bool


@dataclass(frozen=True)
class Nearest:
    """bits, group: as in Settings."""

    bits: int
    group: int

    def round(self, weight: torch.Tensor) -> "Quantized":
        """weight: fp32 (out, in)."""
        return nearest(weight, self)


class NotPositive(Exception):
    """A Hessian that no damping makes invertible."""


class Hessian:
    """Sum of x x^T over the inputs of a matrix, fp32 (in, in), whole once `close` has been called."""

    def __init__(self, width: int, device: torch.device | str = "cpu"):
        self.sum, self.tokens = torch.zeros(width, width, device=device), 0
        self._some: list[torch.Tensor] = []

    def add(self, inputs: torch.Tensor) -> None:
        """inputs: (..., in), left as they are until the sum is closed."""
        self._some.append(inputs.reshape(-1, inputs.shape[-1]).float())
        self.tokens += len(self._some[-1])
        if 4 * len(self.sum) * sum(map(len, self._some)) >= GATHERED:
            self._sum_up()

    def close(self) -> None:
        """Sum up what is left, and have the sum symmetric."""
        self._sum_up()
        for begin in range(0, len(self.sum), STRIP):
            self.sum[begin + STRIP :, begin : begin + STRIP] = self.sum[begin : begin + STRIP, begin + STRIP :].T

    def _sum_up(self) -> None:
        rows = torch.cat(self._some) if self._some else self.sum[:0]
        self._some.clear()
        for begin in range(0, len(self.sum), STRIP):
            self.sum[begin : begin + STRIP, begin:].addmm_(rows[:, begin : begin + STRIP].T, rows[:, begin:])

    def order(self, how: Settings) -> torch.Tensor:
        """The inputs in the order they are rounded in, int64 (in,)."""
        diagonal = self.sum.diagonal()
        if how.act_order:
            return diagonal.argsort(dim=0, descending=True, stable=True)
        groups = diagonal.view(-1, len(diagonal) if how.group == -1 else how.group)
        within = groups.argsort(dim=1, descending=True, stable=True)
        among = groups.amax(1).argsort(dim=0, descending=True, stable=True)
        return (within + torch.arange(len(groups), device=groups.device)[:, None] * groups.shape[1])[among].flatten()

    def factor(self, order: torch.Tensor, damp: float) -> torch.Tensor:
        """Upper Cholesky factor of the damped inverse in that order, fp32 (in, in), in the sum's own memory. Raises NotPositive."""
        strips = range(0, len(self.sum), STRIP)
        for begin in strips:
            self.sum[begin : begin + STRIP] = self.sum[begin : begin + STRIP, order]
        for begin in strips:
            self.sum[:, begin : begin + STRIP] = self.sum[order, begin : begin + STRIP]
        diagonal = self.sum.diagonal()
        diagonal[diagonal == 0] = 1
        step = float(diagonal.mean())
        while damp < 1:
            diagonal.add_(damp * step)
            if factor_of_inverse(self.sum):
                return self.sum
            diagonal.sub_(damp * step)
            damp = max(2 * damp, 0.01)
        raise NotPositive


@dataclass(frozen=True)
class Quantized:
    """tensors: {suffix: tensor}, see the module. weight: what they say, fp32 (out, in). loss: the squared error of the outputs, half of its sum over
    the tokens of the Hessian."""

    tensors: dict[str, torch.Tensor]
    weight: torch.Tensor
    loss: float

    def without_weight(self) -> "Quantized":
        return Quantized(self.tensors, torch.empty(0), self.loss)

    @classmethod
    def joined(cls, parts: list["Quantized"]) -> "Quantized":
        """Of outputs that were quantized apart, with one order of inputs; their weight is left out."""
        tensors = {name: torch.cat([part.tensors[name] for part in parts], dim=1) for name in ("qweight", "scales", "qzeros")}
        return cls(tensors | {"g_idx": parts[0].tensors["g_idx"]}, torch.empty(0), sum(part.loss for part in parts))

    def part(self, begin: int, end: int, bits: int) -> dict[str, torch.Tensor]:
        """The tensors of some of the outputs, which are whole words."""
        cut = {"qweight": (begin, end), "scales": (begin, end), "qzeros": (begin * bits // 32, end * bits // 32)}
        return {name: t[:, slice(*cut[name])].cpu().contiguous() if name in cut else t.cpu().clone() for name, t in self.tensors.items()}


def quantize(weight: torch.Tensor, order: torch.Tensor, factor: torch.Tensor, seen: torch.Tensor, how: Settings) -> Quantized:
    """weight: fp32 (out, in), left as it is. order, factor: of its inputs' Hessian. seen: bool (in,), the inputs that were ever not zero."""
    outputs, width = weight.shape
    group = width if how.group == -1 else how.group
    there = weight.device
    of_input = (torch.arange(width, device=there) if how.act_order else order) // group
    values = torch.empty(width, outputs, dtype=torch.uint8, device=there)
    scales = torch.empty(-(-width // group), outputs, dtype=torch.float16, device=there)
    loss = 0.0
    for rows in torch.arange(outputs).split(ROWS):
        at = slice(int(rows[0]), int(rows[-1]) + 1)
        left = (weight[at] * seen).T[order].contiguous()
        loss += _round(left, factor, of_input.tolist(), values[:, at], scales[:, at], group, how.bits)
    g_idx = torch.empty(width, dtype=torch.int32, device=there)
    g_idx[order] = of_input.int()
    back = torch.empty_like(order)
    back[order] = torch.arange(width, device=there)
    return _packed(values[back], scales, g_idx, how.bits, loss)


def nearest(weight: torch.Tensor, how: Nearest) -> Quantized:
    """weight: fp32 (out, in), each rounded to the nearest of its group's values; the same layout. The loss is that of the weights, no input being known."""
    outputs, width = weight.shape
    groups = weight.reshape(outputs, -1, width if how.group == -1 else how.group)
    scales = _scales(groups.abs().amax(2), how.bits)
    half = 1 << (how.bits - 1)
    rounded = (groups / scales.float()[:, :, None]).round_().clamp_(-half, half - 1)
    values = (rounded + half).view(outputs, width).T.to(torch.uint8)
    g_idx = (torch.arange(width, device=weight.device) // groups.shape[2]).int()
    made = _packed(values, scales.T.contiguous(), g_idx, how.bits, 0.0)
    return with_loss(made.tensors, made.weight, weight)


def with_loss(tensors: dict[str, torch.Tensor], became: torch.Tensor, weight: torch.Tensor) -> Quantized:
    """What was rounded with no input known: its loss is that of a weight, half of the mean squared error."""
    return Quantized(tensors, became, float((became - weight).square_().mean()) / 2)


def _best_scales(weights: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 scales (out,) of a group's weights, fp32 (in, out): those of SHRUNK with the least squared error, which cut the largest weights to round all others
    finer."""
    half, largest = 1 << (bits - 1), weights.abs().amax(0)
    found, least = _scales(largest, bits), torch.full_like(largest, torch.inf)
    for share in SHRUNK:
        scales = _scales(largest * share, bits)
        wide = scales.float()
        error = (weights / wide).round_().clamp_(-half, half - 1).mul_(wide).sub_(weights).square_().sum(0)
        found = torch.where(error < least, scales, found)
        least = torch.minimum(error, least)
    return found


def _scales(largest: torch.Tensor, bits: int) -> torch.Tensor:
    """fp16 scales of groups whose largest weights are these."""
    scales = largest * (2 / ((1 << bits) - 1))
    scales[scales == 0] = 2 / ((1 << bits) - 1)
    return scales.clamp_(2**-24, 65504).half()


def _packed(values, scales, g_idx, bits: int, loss: float) -> Quantized:
    """Of values, uint8 (in, out), scales, fp16 (groups, out), and the inputs' groups."""
    half = 1 << (bits - 1)
    zeros = torch.full(scales.shape, half - 1, dtype=torch.uint8, device=scales.device)
    tensors = {"qweight": pack(values, bits), "qzeros": pack(zeros.T, bits).T.contiguous(), "scales": scales, "g_idx": g_idx}
    return Quantized(tensors, _widened(values, scales, g_idx, half), loss)


def _round(left, factor, of_input: list[int], values, scales, group: int, bits: int) -> float:
    """Round `left`, fp32 (in, out) in order, into `values` and `scales`; returns its loss. left is used up."""
    half, block, loss = 1 << (bits - 1), group if group <= 256 else BLOCK, 0.0
    for begin in range(0, len(left), block):
        end = min(begin + block, len(left))
        errors = left.new_empty(end - begin, left.shape[1])
        for i in range(begin, end):
            if i % group == 0:
                scales[of_input[i]] = _best_scales(left[i : i + group], bits)
                scale = scales[of_input[i]].float()
            rounded = (left[i] / scale).round_().clamp_(-half, half - 1)
            values[i] = rounded + half
            error = errors[i - begin]
            torch.addcmul(left[i], rounded, scale, value=-1, out=error).div_(factor[i, i])
            left[i + 1 : end].addr_(factor[i, i + 1 : end], error, alpha=-1)
        left[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
        loss += float(errors.square_().sum()) / 2
    return loss


def pack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 (n, m) of `bits` each as int32 (n x bits / 32, m): value k of a column in the bits from k x bits on, lowest first; of 3 bits, two of 32 values
    lie in two words."""
    each = filling(bits)
    words = torch.zeros(len(values) * bits // 32, values.shape[1], dtype=torch.int32, device=values.device)
    for i in range(each):
        word, at = divmod(i * bits, 32)
        some = values[i::each].int()
        words[word :: each * bits // 32] |= some << at
        if at + bits > 32:
            words[word + 1 :: each * bits // 32] |= some >> (32 - at)
    return words


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """`pack` undone."""
    each, mask = filling(bits), (1 << bits) - 1
    count = each * bits // 32
    values = torch.empty(len(words) // count * each, words.shape[1], dtype=torch.uint8, device=words.device)
    for i in range(each):
        word, at = divmod(i * bits, 32)
        found = words[word::count] >> at  # of a negative word the sign comes in from above, and is masked
        if at + bits > 32:
            found = found & ((1 << (32 - at)) - 1) | words[word + 1 :: count] << (32 - at)
        values[i::each] = (found & mask).to(torch.uint8)
    return values


class Stored(Packed):
    @property
    def shape(self) -> tuple[int, int]:
        return self.parts["qweight"].shape[1], self.parts["g_idx"].shape[0]

    @property
    def form(self) -> Nearest:
        width, groups = self.shape[1], self.parts["scales"].shape[0]
        return Nearest(32 * self.parts["qweight"].shape[0] // width, width // groups if groups > 1 else -1)

    def widen(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return widen(tensors)


def matrices(entries: dict[str, safetensors_io.Entry]) -> dict[str, safetensors_io.Entry | Stored]:
    """{name: where it is stored} of a folder's tensors, the quantized ones under the names that their weights would have."""
    found: dict[str, safetensors_io.Entry | Stored] = {}
    for name, entry in entries.items():
        module, _, suffix = name.rpartition(".")
        if suffix not in SUFFIXES or not all(f"{module}.{each}" in entries for each in SUFFIXES):
            found[name] = entry
        elif suffix == "qweight":
            found[f"{module}.weight"] = Stored(f"{module}.weight", {each: entries[f"{module}.{each}"] for each in SUFFIXES})
    return found


def widen(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The weights that a matrix's tensors say, fp32 (out, in). Raises ValueError where they are not of 3, 4 or 8 bits, or not symmetric, or a group is none."""
    words, g_idx = tensors["qweight"], tensors["g_idx"]
    bits = 32 * len(words) // max(len(g_idx), 1)
    half = 1 << (bits - 1)
    if bits not in (3, 4, 8) or not bool((unpack(tensors["qzeros"].T.contiguous(), bits) == half - 1).all()):
        raise ValueError(f"{bits} bits, or not symmetric")
    if bool((g_idx < 0).any()):
        raise ValueError("a group below the first")
    return _widened(unpack(words, bits), tensors["scales"], g_idx, half)


def _widened(values, scales, g_idx, half: int) -> torch.Tensor:
    """fp32 (out, in), some of the outputs at a time."""
    wide, group = torch.empty(values.shape[::-1], device=values.device), g_idx.long()
    for at in range(0, len(wide), ROWS):
        some = slice(at, at + ROWS)
        wide[some] = (values[:, some].float() - half).mul_(scales[:, some].float()[group]).T
    return wide
