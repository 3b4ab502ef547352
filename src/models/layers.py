"""The linear layers inside a model's layers, however they store their weights."""

from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from src.models.by_layer import ByLayer, Pass

LINEAR = (nn.Linear, Conv1D)


def linear_of(model: ByLayer, number: int) -> list[Any]:
    return [module for module in model.layers[number].modules() if isinstance(module, LINEAR)]


def outputs_first(module: Any) -> torch.Tensor:
    """A linear layer's weight as (out, in)."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def inputs_together(model: ByLayer, number: int, each: Pass) -> list[list[Any]]:
    """A layer's matrices as a pass calls them, those with one input together; in the end each that it does not call."""
    linear = linear_of(model, number)
    called: list[tuple[torch.Tensor, list[Any]]] = []

    def note(module, given) -> None:
        if any(module in modules for _, modules in called):  # it is used twice: calibrated on its first inputs
            return
        if called and called[-1][0] is given[0]:
            called[-1][1].append(module)
        else:
            called.append((given[0], [module]))

    hooks = [module.register_forward_pre_hook(note) for module in linear]
    model.call(number, each)
    for hook in hooks:
        hook.remove()
    groups = [modules for _, modules in called]
    return groups + [[module] for module in linear if not any(module in group for group in groups)]


def flat(inputs: torch.Tensor, each: Pass) -> torch.Tensor:
    """What a module is given in a pass, (tokens, width), padding left out."""
    if each.mask is not None and inputs.shape[:2] == each.mask.shape:
        return inputs[each.mask.bool()]
    return inputs.reshape(-1, inputs.shape[-1])
