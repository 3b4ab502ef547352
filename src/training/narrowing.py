"""From the weights that were trained to those that are saved, before the last validation: what it measures is what the result holds.

Where a process trains in 16 bits, DeepSpeed keeps fp32 masters that collect what is too small for a step of the weights themselves; without DeepSpeed
what is trained is fp32. So an exact weight always exists, and it, not its nearest neighbour, is what gets saved.
"""

import torch

from src import rounding
from src.adapters import folded_name
from src.config import Tuner
from src.log import say
from src.modeling import whole
from src.training.trainer import ChatTrainer


def settle(run: ChatTrainer, dtype: str, tuner: Tuner) -> dict:
    """Make the trainer's model, or what it will save of it, the values that a save in `dtype` holds; all processes take part.

    Returns the validation of the narrowed model, see ChatTrainer.validate; empty where nothing was narrowed or there are no validation rows.
    """
    if getattr(torch, dtype).itemsize >= 4:
        run.masters = masters(run.model)
        return {}
    onto_grid(run.model, getattr(torch, dtype), tuner.rounding)
    found = run.validate() if len(run.validation) else {}
    if found:
        say(f"  as saved, {dtype} by {tuner.rounding} rounding: validation loss {found['loss']:.4f}")
    return found


def onto_grid(model, dtype: torch.dtype, how: str) -> None:
    """Bring every trained weight, in place and on all processes alike, to a value that `dtype` holds; how: see rounding.narrow."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exact = master(parameter)
            with torch.no_grad(), whole([parameter]):
                value = parameter.detach() if exact is None else exact.view(parameter.shape)
                parameter.copy_(rounding.narrow(value.float().clone(), dtype, folded_name(name), rounding=how))


def masters(model) -> dict[str, torch.Tensor]:
    """{name: fp32 value on the CPU} of the trained weights that this process holds in 16 bits; all processes take part in making it."""
    found = {}
    for name, parameter in model.named_parameters():
        exact = master(parameter) if parameter.requires_grad else None
        if exact is not None:
            found[name] = exact.detach().float().cpu().view(getattr(parameter, "ds_shape", parameter.shape))
    return found


def master(parameter) -> torch.Tensor | None:
    """DeepSpeed's fp32 value of a parameter that is held in 16 bits, whole; None of one that is its own master."""
    if parameter.dtype.itemsize >= 4:
        return None
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter)
