"""A layer quantized with GPTQ: its matrices in the order they are called, those that share an input together, each calibrated on what the ones before it make
of the rows once they are quantized.
"""

import contextlib
import itertools
from collections.abc import Callable

import torch
from torch import nn

from src.core.errors import ProofFailed
from src.core.log import warn
from src.models import gptq
from src.models.by_layer import ByLayer, Pass, Reached
from src.models.layers import flat, inputs_together, linear_of, outputs_first
from src.models.waiting import waiting

HELD = 512 << 20
"""bytes of what passes hold that wait within a layer; the others begin anew at each of its groups"""


def quantize_layer(
    model: ByLayer, number: int, passes: list[Pass], how: Callable[[str], gptq.Settings], tick: Callable[[float], None]
) -> tuple[dict[str, torch.Tensor], list[float], list[Pass]]:
    """({name: tensor} of a layer's matrices; the loss of each group of them, per token; passes that have not gone on behind the layer). The layer has to be
    held; its weights change.

    how: by a matrix's name. tick: called with each group's share of the work. Raises ProofFailed where activations are no numbers.
    """
    groups, left = inputs_together(model, number, passes[0]), set[nn.Module]()
    works = [_work(group) for group in groups]
    many = _together(model, number, passes)
    tensors: dict[str, torch.Tensor] = {}
    losses = []
    with waiting(model, number, passes[:many], [group[0] for group in groups], left) as waits:
        for group, work in zip(groups, works):
            hessian = gptq.Hessian(outputs_first(group[0]).shape[1], model.device)
            for at, each in enumerate(passes):
                if at < many and (inputs := waits[at].at(group[0])) is not None:
                    hessian.add(flat(inputs, each))
                else:
                    _add_inputs(model, number, group[0], each, hessian)
            found, loss = _quantize_group(model, number, group, hessian, how)
            tensors |= found
            losses.append(loss)
            left.add(group[0])
            tick(work / sum(works))
        for each, one in zip(passes, waits):
            each.hidden = one.end()
    return tensors, losses, passes[many:]


def _work(group: list[nn.Module]) -> int:
    """About what a group of matrices takes beside the others of a layer: a factor of its width, and its outputs' rounding."""
    width = outputs_first(group[0]).shape[1]
    return width**2 * (width + 2 * sum(len(outputs_first(module)) for module in group))


def _together(model: ByLayer, number: int, passes: list[Pass]) -> int:
    """How many of the passes may wait within a layer: each holds what it adds to, norms of it, and its widest matrix's input."""
    widest = max(outputs_first(module).shape[1] for module in linear_of(model, number))
    bytes_ = itertools.accumulate(4 * each.ids.numel() * (3 * model.width + widest) for each in passes)
    return sum(so_far <= HELD for so_far in bytes_)


def _quantize_group(
    model: ByLayer, number: int, group: list[nn.Module], hessian: gptq.Hessian, how: Callable[[str], gptq.Settings]
) -> tuple[dict[str, torch.Tensor], float]:
    """The same of matrices that share an input; uses their Hessian up."""
    names = {module: name for name, module in model.names(number)}
    own = how(names[group[0]])
    order, factor, ever = _factored(names[group[0]], hessian, own)
    tensors: dict[str, torch.Tensor] = {}
    loss = 0.0
    for some in _joined(group):
        weights = [outputs_first(module) for module in some]
        made = gptq.quantize(torch.cat(weights) if len(some) > 1 else weights[0], order, factor, ever, own)
        loss += made.loss
        ends = list(itertools.accumulate(map(len, weights)))
        for module, weight, end in zip(some, weights, ends):
            begin = end - len(weight)
            tensors |= {f"{names[module]}.{suffix}": t for suffix, t in made.part(begin, end, own.bits).items()}
            weight.copy_(made.weight[begin:end])
    return tensors, loss / max(hessian.tokens, 1)


def _joined(group: list[nn.Module]) -> list[list[nn.Module]]:
    """The matrices of a group, those that are rounded together in one list: of few outputs all take as long as one."""
    lists: list[list[nn.Module]] = [[]]
    for module in group:
        if lists[-1] and sum(len(outputs_first(each)) for each in (*lists[-1], module)) > gptq.ROWS:
            lists.append([])
        lists[-1].append(module)
    return lists


def quantize_head(model: ByLayer, passes: list[Pass], own: gptq.Settings) -> tuple[dict[str, torch.Tensor], float]:
    """({name: tensor} of the output layer, its loss per token). The output layer has to be held, and the passes to be through the last layer."""
    name = model.own_head
    assert name is not None
    weight = model.model.get_output_embeddings().weight.data
    hessian = gptq.Hessian(weight.shape[1], model.device)
    for each in passes:
        hessian.add(model.into_head(flat(each.hidden, each)))
    order, factor, ever = _factored(name, hessian, own)
    # Some of the outputs at a time: a vocabulary's fp32 weights would be more than a layer's.
    parts = [gptq.quantize(some.float(), order, factor, ever, own).without_weight() for some in weight.split(gptq.ROWS)]
    made = gptq.Quantized.joined(parts)
    return {f"{name}.{suffix}": t for suffix, t in made.part(0, len(weight), own.bits).items()}, made.loss / max(hessian.tokens, 1)


def _factored(name: str, hessian: gptq.Hessian, own: gptq.Settings) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(order, factor, which inputs were ever not zero) of what came into the matrix `name`; uses the Hessian up."""
    hessian.close()
    if not hessian.tokens:
        warn(f"no calibration row reaches {name}: its weights are rounded to the nearest")
        hessian.sum.fill_diagonal_(1)
    ever = hessian.sum.diagonal() != 0
    try:
        order = hessian.order(own)
        return order, hessian.factor(order, own.damp), ever
    except gptq.NotPositive:
        raise ProofFailed(f"what comes into {name} on the calibration rows is no number, or nothing that GPTQ can use") from None


def _add_inputs(model: ByLayer, number: int, module: nn.Module, each: Pass, hessian: gptq.Hessian) -> None:
    """Add what a pass gives to a matrix, padding left out; the pass ends there."""

    def add(module, given) -> None:
        hessian.add(flat(given[0], each))
        raise Reached

    hook = module.register_forward_pre_hook(add)
    with contextlib.suppress(Reached):
        model.call(number, each)
    hook.remove()
