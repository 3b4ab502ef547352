"""A layer quantized with GPTQ: its matrices in the order they are called, those that share an input together, each calibrated on what the ones before it make
of the rows once they are quantized.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import nn

from src.core.errors import ProofFailed
from src.core.log import warn
from src.models import gptq
from src.models.by_layer import ByLayer, Pass, Reached
from src.models.layers import flat, inputs_together, outputs_first


def quantize_layer(
    model: ByLayer, number: int, passes: list[Pass], how: Callable[[str], gptq.Settings]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """({name: tensor} of a layer's matrices; the loss of each group of them, per token). The layer has to be held; its weights change.

    how: by a matrix's name. Raises ProofFailed where activations are no numbers.
    """
    names = {module: name for name, module in model.names(number)}
    tensors: dict[str, torch.Tensor] = {}
    losses = []
    for group in inputs_together(model, number, passes[0]):
        own = how(names[group[0]])
        hessian = gptq.Hessian(outputs_first(group[0]).shape[1], model.device)
        for each in passes:
            _add_inputs(model, number, group[0], each, hessian)
        if not hessian.tokens:
            warn(f"no calibration row reaches {names[group[0]]}: its weights are rounded to the nearest")
            hessian.sum.fill_diagonal_(1)
        ever = hessian.sum.diagonal() != 0
        try:
            order = hessian.order(own)
            factor = hessian.factor(order, own.damp)
        except gptq.NotPositive:
            raise ProofFailed(
                f"what comes into {names[group[0]]} on the calibration rows is no number, or nothing that GPTQ can use"
            ) from None
        made = gptq.quantize(torch.cat([outputs_first(module) for module in group]), order, factor, ever, own)
        losses.append(made.loss / max(hessian.tokens, 1))
        at = 0
        for module in group:
            outputs = len(outputs_first(module))
            tensors |= {f"{names[module]}.{suffix}": t for suffix, t in made.part(at, at + outputs, own.bits).items()}
            outputs_first(module).copy_(made.weight[at : at + outputs])
            at += outputs
        del made, factor  # before the next Hessian is there
    return tensors, losses


def _add_inputs(model: ByLayer, number: int, module: nn.Module, each: Pass, hessian: gptq.Hessian) -> None:
    """Add what a pass gives to a matrix, padding left out; the pass ends there."""

    def add(module, given) -> None:
        hessian.add(flat(given[0], each))
        raise Reached

    hook = module.register_forward_pre_hook(add)
    with contextlib.suppress(Reached):
        model.call(number, each)
    hook.remove()
