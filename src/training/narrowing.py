"""From the weights that were trained to those that are saved, before the last validation: what it measures is what the result holds.

An exact weight always exists. Without DeepSpeed what is trained is fp32; with it, what trains in 16 bits has fp32 masters. But a forward pass in 16
bits sees them rounded to the nearest, so it does not see what is too small for a step, and neither does a loss that it computes (docs/fidelity.md).
"""

from collections.abc import Iterator

import torch

from src.core.log import say, warn
from src.models import rounding
from src.models.adapter_files import folded_name
from src.models.vocabulary import whole
from src.training.trainer import ChatTrainer


def settle(run: ChatTrainer, dtype: str, how: str, precision: str) -> dict:
    """Make the trainer's model what a save in `dtype` holds, and what it computes with show it; all processes take part.

    how: see rounding.narrow. precision: fp32, bf16 or fp16, of the forward passes. Where they have 16 bits and the save is of another type, the exact weights are put aside for
    the save, and the model gets their stochastic rounding. Returns the validation of the model as it is then, see ChatTrainer.validate; empty where
    nothing was narrowed or there are no validation rows.
    """
    computed = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}[precision]
    if dtype == computed == "float32":
        return {}
    grid = dtype if computed == "float32" else computed
    if grid != dtype:
        run.masters = masters(run.model, kept=run.args.should_save)
    if computed != "float32" and grid == dtype and how == "nearest":
        warn(
            f"tuner.rounding=nearest loses updates below half a step of {dtype}, and passes in {computed} do not see it, so no figure here shows it"
        )
    onto_grid(run.model, getattr(torch, grid), how if grid == dtype else "stochastic")
    found = run.validate() if len(run.validation) else {}
    if found:
        words = f" by {how} rounding" if grid == dtype else f", computed in {computed}"
        say(f"  as saved, {dtype}{words}: validation loss {found['loss']:.4f}")
    return found


def onto_grid(model, dtype: torch.dtype, how: str) -> None:
    """Bring every trained weight, in place and on all processes alike, to a value that `dtype` holds; how: see rounding.narrow."""
    for name, parameter, exact in exact_values(model):
        parameter.copy_(rounding.narrow(exact.clone(), dtype, folded_name(name), rounding=how))


def masters(model, *, kept: bool) -> dict[str, torch.Tensor]:
    """{name: fp32 value on the CPU} of all trained weights; all processes take part in making it, those that save have it `kept`."""
    return {name: exact.cpu().clone() for name, _, exact in exact_values(model) if kept}


def exact_values(model) -> Iterator[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    """(name, parameter, its exact fp32 value) of every trained weight; under ZeRO-3 each is whole, and may be changed, while its turn lasts."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exact = master(parameter)
            with torch.no_grad(), whole([parameter]):
                yield name, parameter, (parameter.detach() if exact is None else exact.view(parameter.shape)).float()


def master(parameter) -> torch.Tensor | None:
    """DeepSpeed's fp32 value of a parameter that is held in 16 bits, whole; None of one that is its own master."""
    if parameter.dtype.itemsize >= 4:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
