"""A model quantized with GPTQ a layer at a time, and what was written read back the same way.

Within a layer the matrices go in the order they are called, those that share an input together, each calibrated on what the ones before it make of the
rows once they are quantized. A finished layer is a file, so a run that was killed goes on behind the last.
"""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from src.core.artifact import Artifact
from src.core.errors import ProofFailed, WrongKind, using
from src.core.log import progress, warn
from src.core.processes import silenced
from src.models import by_layer, complete, gptq, loading, safetensors_io, seen
from src.models.by_layer import ByLayer, Pass, Reached
from src.models.folder import trust_of

LINEAR = (nn.Linear, Conv1D)
VOCABULARY = 64
"""rows of the vocabulary that a model of one layer has"""
OTHER = 0.1
"""share of a layer's weights that may be in no linear layer"""


def quantize(model: ByLayer, rows: list[list[int]], how: gptq.Settings | gptq.Nearest, folder: Path) -> list[float]:
    """Quantize every linear layer inside the model's layers; the tensors of layer N go into layer-N.safetensors in `folder`.

    rows: token ids to calibrate on, which rounding to the nearest needs none of. Returns the loss of each group of matrices, per token. Raises WrongKind
    for layers that are mostly something else, ProofFailed where the rows' activations are no numbers.
    """
    folder.mkdir(exist_ok=True)
    with model.held("embedding"):
        passes = [model.start([rows[i] for i in group]) for group in model.batches(rows)] if rows else []
    losses: list[float] = []
    for number in progress(range(len(model.layers)), "quantizing layers"):
        file = folder / f"layer-{number:05d}.safetensors"
        with model.held(number), torch.no_grad():
            if not file.is_file():
                tensors, found = _quantize_layer(model, number, passes, how)
                save_file(tensors, partial := file.with_suffix(".partial"), {"losses": " ".join(map(repr, found))})
                partial.rename(file)
            losses += _take(model, number, file)
            model.through(number, passes)
    return losses


def _quantize_layer(
    model: ByLayer, number: int, passes: list[Pass], how: gptq.Settings | gptq.Nearest
) -> tuple[dict[str, torch.Tensor], list[float]]:
    names = {module: name for name, module in model.names(number)}
    linear: list[Any] = [module for module in model.layers[number].modules() if isinstance(module, LINEAR)]
    inside = sum(module.weight.numel() for module in linear)
    largest = max(
        ((p.numel(), name) for name, p in model.layers[number].named_parameters() if not _is_of(name, model.layers[number])),
        default=(0, ""),
    )
    if largest[0] > OTHER * (inside + largest[0]):
        raise WrongKind(
            f"GPTQ quantizes linear layers, and {largest[1]} of layer {number} is none, with {largest[0] / (inside + largest[0]):.0%} of its weights",
        )
    tensors: dict[str, torch.Tensor] = {}
    losses = []
    if isinstance(how, gptq.Nearest):
        for module in linear:
            made = gptq.nearest(_outputs_first(module), how)
            tensors |= {f"{names[module]}.{suffix}": t for suffix, t in made.part(0, len(made.weight), how.bits).items()}
            losses.append(made.loss / made.weight.numel())
        return tensors, losses
    for group in _groups(model, number, passes[0], linear):
        hessian = gptq.Hessian(_outputs_first(group[0]).shape[1], model.device)
        for each in passes:
            _add_inputs(model, number, group[0], each, hessian)
        if not hessian.tokens:
            warn(f"no calibration row reaches {names[group[0]]}: its weights are rounded to the nearest")
            hessian.sum.fill_diagonal_(1)
        ever = hessian.sum.diagonal() != 0
        try:
            order = hessian.order(how)
            factor = hessian.factor(order, how.damp)
        except gptq.NotPositive:
            raise ProofFailed(
                f"what comes into {names[group[0]]} on the calibration rows is no number, or nothing that GPTQ can use"
            ) from None
        made = gptq.quantize(torch.cat([_outputs_first(module) for module in group]), order, factor, ever, how)
        losses.append(made.loss / max(hessian.tokens, 1))
        at = 0
        for module in group:
            outputs = len(_outputs_first(module))
            tensors |= {f"{names[module]}.{suffix}": t for suffix, t in made.part(at, at + outputs, how.bits).items()}
            _outputs_first(module).copy_(made.weight[at : at + outputs])
            at += outputs
        del made, factor  # before the next Hessian is there
    return tensors, losses


def _groups(model: ByLayer, number: int, each: Pass, linear: list[nn.Module]) -> list[list[nn.Module]]:
    """The layer's matrices as a pass calls them, those with one input together; in the end each that it does not call."""
    called: list[tuple[torch.Tensor, list[nn.Module]]] = []

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


def _add_inputs(model: ByLayer, number: int, module: nn.Module, each: Pass, hessian: gptq.Hessian) -> None:
    """Add what a pass gives to a matrix, padding left out; the pass ends there."""

    def add(module, given) -> None:
        inputs = given[0]
        hessian.add(inputs[each.mask.bool()] if each.mask is not None and inputs.shape[:2] == each.mask.shape else inputs)
        raise Reached

    hook = module.register_forward_pre_hook(add)
    with contextlib.suppress(Reached):
        model.call(number, each)
    hook.remove()


def _take(model: ByLayer, number: int, file: Path) -> list[float]:
    """Put into a layer that is held what its file says; returns the file's losses."""
    tensors = load_file(file)
    for name, module in model.names(number):
        if f"{name}.qweight" in tensors:
            _outputs_first(module).copy_(gptq.widen({suffix: tensors[f"{name}.{suffix}"] for suffix in gptq.SUFFIXES}))
    with safetensors_io.opened(file) as stored:
        return [float(text) for text in stored.metadata()["losses"].split()]


def _outputs_first(module: Any) -> torch.Tensor:
    """A linear layer's weight as (out, in)."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def _is_of(name: str, layer: nn.Module) -> bool:
    return isinstance(layer.get_submodule(name.rpartition(".")[0]), LINEAR)


# ---- reading back


def read_back(start: Artifact, out: Path, rows: list, at) -> tuple:
    """(token ids of aux_files' probes, what the quantized model says at `rows`), from the folder `out` alone but for the code and the shape of the model
    it was made from. Made to run in a fresh process. at: see seen.observe."""
    model = opened(start, out)
    return complete.token_ids(out, trust_of(start)), seen.observe(seen.by_layer(model, "proof"), rows, at)


def opened(start: Artifact, out: Path) -> ByLayer:
    """The quantized model in `out`. start: what it was made from."""
    model = by_layer.need(replace(start, kind="model"))
    stored = gptq.matrices(safetensors_io.entries(out))
    turned = {name for number in range(len(model.layers)) for name, module in model.names(number) if isinstance(module, Conv1D)}

    def tensor(name: str) -> torch.Tensor:
        # Some folders leave out how the model's own names begin.
        found = stored[next(each for each in stored if name == each or name.endswith(f".{each}"))]
        if isinstance(found, safetensors_io.Entry):
            return safetensors_io.load_wide(found)
        return found().T if name.removesuffix(".weight") in turned else found()

    model.take(tensor)
    return model


def check_first_layer(start: Artifact, out: Path, scratch: Path) -> None:
    """Load the folder's first layer with transformers, whose kernels gptqmodel brings, and run it beside ours. Made to run in a fresh process.

    scratch: an empty folder to use. Raises ProofFailed where they differ.
    """
    model = opened(start, out)
    write_first_layer(model, out, scratch)
    loading.prepare_gptq()
    with using("what was quantized", out, fix=()), silenced():
        theirs = AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32, local_files_only=True, use_safetensors=True).eval()
    row = list(range(64))
    with model.held("embedding"):
        each = model.start([row])
    args, kwargs = each.calls[0]
    with torch.no_grad():
        there = theirs.get_submodule(f"{model.places.name}.0")(each.hidden, *args, **kwargs)
        with model.held(0):
            here = model.call(0, each)
    there = there[0] if isinstance(there, tuple) else there
    error = float((here - there).norm() / (here - each.hidden).norm())
    if not error < 2e-2:
        raise ProofFailed(
            f"transformers makes of the first layer something else than it holds: {error:.1%} of what it adds", where=str(out)
        )


def write_first_layer(model: ByLayer, out: Path, folder: Path) -> None:
    """A model of the first of a folder's layers and a few rows of its vocabulary, byte for byte."""
    config = AutoConfig.from_pretrained(out, local_files_only=True)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, VOCABULARY, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    config.save_pretrained(folder)
    later = re.compile(rf"(^|\.){re.escape(model.places.name.rpartition('.')[2])}\.[1-9]\d*\.")
    ends = {place.full for what in ("embedding", "head") for place in model.places.tensors.get(what, ())}
    kept = {}
    for name, entry in safetensors_io.entries(out).items():
        if not later.search(name):
            table = any(name == end or end.endswith(f".{name}") for end in ends)
            kept[name] = replace(entry, shape=(VOCABULARY, *entry.shape[1:])) if table else entry
    safetensors_io.write(folder, list(kept.values()), kept.__getitem__, safetensors_io.parse_size("5GB"))
