"""AWQ (Lin et al. 2023, arXiv:2306.00978): the inputs of a matrix that are large are scaled up before it is rounded, and what makes them is scaled down; then
each group's largest weights are cut where that rounds the others better.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from src.core.errors import WrongKind
from src.models import awq
from src.models.awq import Settings, made_of, pack, rounded
from src.models.by_layer import ByLayer, Pass
from src.models.layers import flat, inputs_together, outputs_first

POWERS = [i / 10 for i in range(10)]
"""of the inputs' mean sizes that are tried as scales"""
CUTS = [1 - 0.05 * i for i in range(11)]
"""shares of a group's range that are tried"""
SEEN, ROWS = 256, 1024
"""tokens that scales and cuts are tried on; outputs that go together"""
MAKERS = {"down_proj": "up_proj", "o_proj": "v_proj"}
"""matrices whose outputs are another's inputs, each times what does not depend on it"""


def quantize_layer(
    model: ByLayer, number: int, passes: list[Pass], how: Settings, tick: Callable[[float], None]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """({name: tensor} of a layer's matrices of norms and biases that were scaled, and beside them by what their inputs and outputs were (awq.SCALED); the squared
    error of each group's outputs a token). The layer has to be held; its weights change.

    tick: called with shares of the work. Raises WrongKind for a layer in which more than those matrices depends on a norm.
    """
    names = {module: name for name, module in model.names(number)}
    groups = inputs_together(model, number, passes[0])
    seen = _inputs(model, number, passes, [group[0] for group in groups])
    before = model.call(number, passes[0])
    twice = 2 * sum(module.weight.numel() for group in groups for module in group)  # scales are one half of the work, cuts the other
    tensors: dict[str, torch.Tensor] = {}
    losses = []
    for group in groups:
        sizes, inputs = seen[group[0]]
        scales = _scales(group, sizes, inputs, how.group)
        if maker := _scale_down(model, number, passes[0], group[0], scales, names):
            for module in group:
                outputs_first(module).mul_(scales)
                tensors[f"{names[module]}.{awq.SCALED[0]}"] = scales.clone()
            inputs = inputs / scales
            if outputs_first(maker).dim() == 1:
                tensors[f"{names[maker]}.weight"] = maker.weight.data
            else:
                tensors[f"{names[maker]}.{awq.SCALED[1]}"] = 1 / scales
            if getattr(maker, "bias", None) is not None:
                tensors[f"{names[maker]}.bias"] = maker.bias.data
        seen[group[0]] = (sizes, inputs)
        tick(sum(module.weight.numel() for module in group) / twice)
    if not torch.allclose(model.call(number, passes[0]), before, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
        raise WrongKind(
            f"AWQ scales what comes into a matrix, and layer {number} uses that elsewhere too", fix="quantizer=gptq_int4 scales nothing"
        )
    for group in groups:
        _, inputs = seen[group[0]]
        loss = 0.0
        for module in group:
            weight = outputs_first(module)
            # Queries and keys meet in a product, which their largest weights carry.
            cut = 1.0 if names[module].endswith(("q_proj", "k_proj", "qkv_proj")) else _cuts(weight, inputs, how.group)
            values, scales, zeros = rounded(weight, how.group, cut)
            became = made_of(values, scales, zeros)
            loss += float((inputs @ (became - weight).T).square_().sum()) / len(inputs)
            tensors |= {f"{names[module]}.{suffix}": t for suffix, t in _packed(values, scales, zeros).items()}
            tick(module.weight.numel() / twice)
        losses.append(loss)
    return {name: t.cpu().contiguous() for name, t in tensors.items()}, losses


def _packed(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "qweight": pack(values.flatten(1).T.to(torch.uint8)),
        "qzeros": pack(zeros[:, :, 0].T.to(torch.uint8)),
        "scales": scales[:, :, 0].T,
    }


def _inputs(
    model: ByLayer, number: int, passes: list[Pass], modules: list[nn.Module]
) -> dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """(mean sizes, fp32 (in,); up to SEEN of the tokens, fp32 (tokens, in)) of what comes into each module."""
    sums: dict[nn.Module, torch.Tensor] = {}
    kept: dict[nn.Module, list[torch.Tensor]] = {module: [] for module in modules}
    counts = dict.fromkeys(modules, 0)

    def note(module, given, each) -> None:
        inputs = flat(given[0], each)
        sums[module] = sums.get(module, 0) + inputs.abs().sum(0)
        counts[module] += len(inputs)
        kept[module].append(inputs[:: max(1, len(inputs) * len(passes) // SEEN)].clone())

    for each in passes:
        hooks = [module.register_forward_pre_hook(lambda module, given, each=each: note(module, given, each)) for module in modules]
        model.call(number, each)
        for hook in hooks:
            hook.remove()
    width = {module: outputs_first(module).shape[1] for module in modules}
    return {
        m: (sums[m] / counts[m], torch.cat(kept[m])[:SEEN]) if counts[m] else (torch.ones(width[m]), torch.zeros(1, width[m]))
        for m in modules
    }


def _scales(group: list[nn.Module], sizes: torch.Tensor, inputs: torch.Tensor, size: int) -> torch.Tensor:
    """The scales of a group's inputs, fp32 (in,), with which rounding moves its outputs least."""
    best, least = torch.ones_like(sizes), float("inf")
    for power in POWERS:
        scales = sizes.clamp(min=1e-4).pow(power)
        scales /= (scales.max() * scales.min()).sqrt()
        error = 0.0
        for weight in map(outputs_first, group):
            became = made_of(*rounded(weight * scales, size)).div_(scales)
            error += float((inputs @ became.sub_(weight).T).square_().sum())
        if error < least:
            best, least = scales, error
    return best


def _cuts(weight: torch.Tensor, inputs: torch.Tensor, size: int) -> torch.Tensor:
    """The share of each group's range, fp32 (out, groups, 1), with which rounding moves its part of the outputs least."""
    groups = weight.shape[1] // (weight.shape[1] if size == -1 else size)
    by_group = inputs.view(len(inputs), groups, -1).transpose(0, 1)
    found = []
    for rows in weight.split(ROWS):
        best, least = torch.ones(len(rows), groups, 1), torch.full((len(rows), groups, 1), torch.inf)
        for cut in CUTS:
            moved = (made_of(*rounded(rows, size, cut)) - rows).view(len(rows), groups, -1).permute(1, 2, 0)
            error = (by_group @ moved).square_().sum(1).T[:, :, None]
            best = torch.where(error < least, cut, best)
            least = torch.minimum(error, least)
        found.append(best)
    return torch.cat(found)


def _scale_down(model: ByLayer, number: int, each: Pass, module: nn.Module, scales: torch.Tensor, names: dict) -> Any:
    """Have what makes a module's input give it divided by the scales; returns it, or None where nothing in the layer can be so changed."""
    before, outputs = _watched(model, number, each, module)
    for maker in _makers(module, before, outputs, names):
        weight, bias = maker.weight.data, getattr(maker, "bias", None)
        kept = [t.clone() for t in (weight, *([] if bias is None else [bias.data]))]
        for shift in (0.0, 1.0) if weight.dim() == 1 else (0.0,):  # norms that multiply by 1 + weight
            weight.copy_(((kept[0] + shift) / scales - shift) if weight.dim() == 1 else kept[0] / scales[:, None])
            if bias is not None:
                bias.data.copy_(kept[1] / scales)
            after, _ = _watched(model, number, each, module)
            if torch.allclose(after * scales, before, rtol=1e-3, atol=1e-4 * float(before.abs().max())):
                return maker
        weight.copy_(kept[0])
        if bias is not None:
            bias.data.copy_(kept[1])
    return None


def _watched(model: ByLayer, number: int, each: Pass, module: nn.Module) -> tuple[torch.Tensor, dict[Any, torch.Tensor]]:
    """(what comes into the module, what every module of the layer with a weight gave before) in a pass through the layer."""
    found: dict[Any, torch.Tensor] = {}
    given: list[torch.Tensor] = []
    hooks = [
        m.register_forward_hook(lambda m, _, out: found.setdefault(m, out)) for m in model.layers[number].modules() if hasattr(m, "weight")
    ]
    hooks.append(module.register_forward_pre_hook(lambda m, inputs: given.append(inputs[0])))
    model.call(number, each)
    for hook in hooks:
        hook.remove()
    return given[0], found


def _makers(module: nn.Module, given: torch.Tensor, outputs: dict, names: dict) -> Iterable[Any]:
    """A norm that gives what comes into a module, or a matrix that is a factor of it."""
    yield from (maker for maker, out in outputs.items() if out is given and maker.weight.dim() == 1)
    path, _, own = names[module].rpartition(".")
    by_name = {name: each for each, name in names.items()}
    maker = by_name.get(f"{path}.{MAKERS.get(own)}")
    if maker in outputs and isinstance(maker, nn.Linear) and len(maker.weight) == given.shape[-1]:
        yield maker
