"""How much each input of a linear layer matters: its mean square over calibration rows, which quantizers weigh their errors by (llama.cpp's imatrix)."""

from collections import defaultdict
from typing import Any

import numpy as np
import torch

from src.core.log import progress
from src.models.by_layer import ByLayer
from src.models.layers import flat, linear_of


def of_inputs(model: ByLayer, rows: list[list[int]]) -> dict[str, np.ndarray]:
    """{name of a weight inside the model's layers: mean squares of what it multiplies, fp32 (columns,)} over rows of token ids."""
    found: dict[str, np.ndarray] = {}
    with model.held("embedding"):
        passes = [model.start([rows[i] for i in group]) for group in model.batches(rows)]
    tokens = sum(map(len, rows))
    for number in progress(range(len(model.layers)), "importance of inputs"):
        sums: dict[Any, torch.Tensor | float] = defaultdict(float)
        with model.held(number):
            names = {module: name for name, module in model.names(number)}
            for each in passes:

                def note(module, given, each=each) -> None:
                    sums[module] += flat(given[0], each).double().square().sum(0)

                hooks = [module.register_forward_pre_hook(note) for module in linear_of(model, number)]
                model.through(number, [each])
                for hook in hooks:
                    hook.remove()
        found |= {f"{names[module]}.weight": (total / tokens).float().numpy() for module, total in sums.items()}  # type: ignore[union-attr]
    return found
