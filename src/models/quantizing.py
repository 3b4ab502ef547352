"""A model quantized a layer at a time, by whatever method, and what was written read back and held to its source the same way.

A finished layer is a file, so a run that was killed goes on behind the last.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.pytorch_utils import Conv1D

from src.core.artifact import Artifact
from src.core.errors import ProofFailed, WrongKind, using
from src.core.files import read_json
from src.core.log import progress, ticks
from src.core.processes import silenced
from src.models import awq, awq_layers, bnb, by_layer, complete, gptq, gptq_layers, loading, packed, safetensors_io, seen
from src.models.by_layer import ByLayer, Pass
from src.models.folder import trust_of
from src.models.layers import LINEAR, flat, linear_of, outputs_first

VOCABULARY = 64
"""rows of the vocabulary that a model of one layer has"""
How = Callable[[str], Any] | awq.Settings
"""how each matrix is quantized, by its name: gptq.Settings, or what has `round`, which needs no rows; or how a layer is"""
COMPARED = 256
"""tokens that matrices are compared at"""
OUTLIER, OUTLIER_OUTPUT = 2.5, 4.0
"""times what rounding to the nearest changes of a matrix's outputs, and of one of them that is mostly wrong, from which on it is another fault; on
SmolLM2-135M GPTQ comes to at most 0.8, and 2.4"""
ALIKE = 0.01
"""of an output's weights, how far those that are rounded alike each time may be from what they were to be; another processor may round one otherwise"""
OTHER = 0.1
"""share of a layer's weights that may be in no linear layer"""


def quantize(model: ByLayer, rows: list[list[int]], how: How, folder: Path, head: gptq.Settings | None = None) -> list[float]:
    """Quantize every linear layer inside the model's layers; the tensors of layer N go into layer-N.safetensors in `folder`.

    rows: token ids to calibrate on, which rounding to the nearest needs none of. head: how an output layer of its own is quantized, into
    layer-head.safetensors; None: it is not. Returns the loss of each group of matrices, per token. Raises WrongKind for layers that are mostly something
    else, ProofFailed where the rows' activations are no numbers.
    """
    folder.mkdir(exist_ok=True)
    with model.held("embedding"):
        passes = [model.start([rows[i] for i in group]) for group in model.batches(rows)] if rows else []
    losses: list[float] = []
    with ticks(len(model.layers), "quantizing layers") as tick:
        for number in range(len(model.layers)):
            file = folder / f"layer-{number:05d}.safetensors"
            with model.held(number), torch.no_grad():
                left = passes
                if file.is_file():
                    tick()
                else:
                    tensors, found, left = _quantize_layer(model, number, passes, how, tick)
                    _keep(tensors, found, file)
                losses += _take(model, number, file)
                model.through(number, left)
    if head and not (file := folder / "layer-head.safetensors").is_file():
        with model.held("head"), torch.no_grad():
            tensors, loss = gptq_layers.quantize_head(model, passes, head)
        _keep(tensors, [loss], file)
    return losses + (_losses(file) if head else [])


def _keep(tensors: dict[str, torch.Tensor], losses: list[float], file: Path) -> None:
    save_file(tensors, partial := file.with_suffix(".partial"), {"losses": " ".join(map(repr, losses))})
    partial.rename(file)


def _losses(file: Path) -> list[float]:
    with safetensors_io.opened(file) as stored:
        return [float(text) for text in stored.metadata()["losses"].split()]


def _quantize_layer(
    model: ByLayer, number: int, passes: list[Pass], how: How, tick: Callable[[float], None]
) -> tuple[dict[str, torch.Tensor], list[float], list[Pass]]:
    """(a layer's tensors, the losses of its groups, the passes that have not gone on behind it). tick: called with shares of the layer, one in sum."""
    names = {module: name for name, module in model.names(number)}
    linear = linear_of(model, number)
    inside = sum(module.weight.numel() for module in linear)
    largest = max(
        ((p.numel(), name) for name, p in model.layers[number].named_parameters() if not _is_of(name, model.layers[number])),
        default=(0, ""),
    )
    if largest[0] > OTHER * (inside + largest[0]):
        raise WrongKind(
            f"GPTQ quantizes linear layers, and {largest[1]} of layer {number} is none, with {largest[0] / (inside + largest[0]):.0%} of its weights",
        )
    if isinstance(how, awq.Settings):
        return *awq_layers.quantize_layer(model, number, passes, how, tick), passes
    if passes:
        return gptq_layers.quantize_layer(model, number, passes, how, tick)
    rounded = {}
    for module in linear:
        rounded[names[module]] = how(names[module]).round(outputs_first(module))
        tick(module.weight.numel() / inside)
    tensors = {f"{name}.{suffix}": t.cpu() for name, made in rounded.items() for suffix, t in made.tensors.items()}
    return tensors, [made.loss for made in rounded.values()], passes


def _take(model: ByLayer, number: int, file: Path) -> list[float]:
    """Put into a layer that is held what its file says; returns the file's losses."""
    stored = packed.matrices(safetensors_io.entries(file.parent, file.name))
    for place in model.places.tensors[number]:
        if found := stored.get(place.full):
            into = outputs_first(place.module) if place.name == "weight" else place.module.get_parameter(place.name)
            into.data.copy_(safetensors_io.load(found) if isinstance(found, safetensors_io.Entry) else found())
    return _losses(file)


def _is_of(name: str, layer: nn.Module) -> bool:
    return isinstance(layer.get_submodule(name.rpartition(".")[0]), LINEAR)


# ---- reading back


def read_back(start: Artifact, source: Path, layers: Path, out: Path, rows: list, at) -> tuple:
    """(token ids of aux_files' probes, what the quantized model says at `rows`), from the folder `out` alone but for the code and the shape of the model
    it was made from. Made to run in a fresh process.

    source: whose tensors are the folder's where they were not quantized. layers: see `compare`. at: see seen.observe. Raises ProofFailed, naming the tensor, as `compare` does.
    """
    model = opened(start, out)
    compare(model, start.path, source, layers, out, [row.input_ids for row in rows])
    return complete.token_ids(out, trust_of(start)), seen.observe(seen.by_layer(model, "proof"), rows, at)


def opened(start: Artifact, out: Path) -> ByLayer:
    """The quantized model in `out`. start: what it was made from."""
    model = by_layer.need(replace(start, kind="model"))
    stored = packed.matrices(safetensors_io.entries(out))
    conv = turned(model)

    def tensor(name: str) -> torch.Tensor:
        # Some folders leave out how the model's own names begin.
        found = stored[next(each for each in stored if name == each or name.endswith(f".{each}"))]
        if isinstance(found, safetensors_io.Entry):
            return safetensors_io.load_wide(found)
        return found().T if name in conv else found()

    model.take(tensor)
    return model


def compare(model: ByLayer, start: Path, source: Path, layers: Path, out: Path, rows: list[list[int]]) -> None:
    """Hold every tensor of the folder `out` to what it was made from. model: it, opened. layers: `quantize`'s files, which say what AWQ scaled, and by what.
    rows: token ids to compare matrices at.

    Raises ProofFailed where an output of a matrix is further from what it was than rounding explains, where a matrix of bitsandbytes' is not what the
    source's becomes, and where another tensor is not the source's, bit for bit.
    """
    as_stored, made = safetensors_io.entries(source), packed.matrices(safetensors_io.entries(out))
    if missing := sorted(as_stored.keys() ^ made.keys()):
        raise ProofFailed(f"{missing[0]} is in one of the folder and what it was made from alone", where=str(out))
    scaled = safetensors_io.entries(layers, "layer-*.safetensors")
    for name, found in made.items():
        if isinstance(found, safetensors_io.Entry) and not torch.equal(*map(_bits, _as_made(name, as_stored, scaled, found))):
            raise ProofFailed(f"{name}, which is not quantized, is not the source's", where=str(out))
    with model.held("embedding"):
        each = model.start([row[: COMPARED // len(rows[:4])] for row in rows[:4]])
    exact = safetensors_io.entries(start)
    for number in progress(range(len(model.layers)), "comparing layers"):
        with model.held(number):
            inputs = _inputs(model, number, each)
            for name, module in model.names(number):
                if not isinstance(matrix := made.get(f"{name}.weight"), packed.Packed):
                    continue
                weight = safetensors_io.load_wide(exact[f"{name}.weight"])
                weight = weight.T.contiguous() if isinstance(module, Conv1D) else weight
                if isinstance(matrix, bnb.Stored):
                    _hold_alike(name, matrix.form.round(weight).weight, outputs_first(module), out)
                elif module in inputs:
                    _hold(name, _scaled(weight, name, scaled), outputs_first(module), inputs[module], matrix.form, out)
    if (head := model.own_head) and isinstance(matrix := made.get(f"{head}.weight"), packed.Packed):
        with model.held("head"):
            weight, rounded = safetensors_io.load(exact[f"{head}.weight"]), model.model.get_output_embeddings().weight.data
            _hold(head, weight, rounded, model.into_head(flat(each.hidden, each)), matrix.form, out)


def _as_made(name: str, source: dict, scaled: dict, found: safetensors_io.Entry) -> tuple[torch.Tensor, torch.Tensor]:
    """(a tensor, what it was to be): the source's, or a norm that AWQ scaled, in the source's dtype."""
    ours, stored = safetensors_io.load(found), safetensors_io.load(source[name])
    return ours, safetensors_io.load(scaled[name]).to(stored.dtype) if name in scaled else stored


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _scaled(weight: torch.Tensor, name: str, scaled: dict[str, safetensors_io.Entry]) -> torch.Tensor:
    """What AWQ rounded of a weight, fp32 (out, in)."""
    of = {suffix: safetensors_io.load(scaled[full]) for suffix in awq.SCALED if (full := f"{name}.{suffix}") in scaled}
    inputs, outputs = (of.get(suffix) for suffix in awq.SCALED)
    weight = weight if inputs is None else weight * inputs
    return weight if outputs is None else weight * outputs[:, None]


def _hold_alike(name: str, meant: torch.Tensor, found: torch.Tensor, out: Path) -> None:
    """Raises ProofFailed where an output's weights, (out, in), are not those that they were to be."""
    off = (found - meant).norm(dim=1) / meant.norm(dim=1).clamp_(min=1e-30)
    if not float(off.max()) <= ALIKE:
        raise ProofFailed(f"output {int(off.argmax())} of {name} is {float(off.max()):.0%} off what its weights become", where=str(out))


def _hold(
    name: str, weight: torch.Tensor, rounded: torch.Tensor, inputs: torch.Tensor, form: gptq.Nearest | awq.Settings, out: Path
) -> None:
    """Raises ProofFailed where outputs are further from what they were on `inputs`, (tokens, in), than rounding to the nearest takes them."""
    found = []
    for was, became in zip(weight.split(gptq.ROWS), rounded.split(gptq.ROWS)):
        was = was.float()
        found.append(torch.stack([(inputs @ each.T).norm(dim=0) for each in (became - was, form.round(was).weight - was, was)]))
    moved, explained, said = torch.cat(found, dim=1)
    whole = float(moved.norm() / explained.norm())
    times = moved / explained.clamp_(min=explained.mean() / 10)
    times[moved < said / 2] = 0
    if not (whole <= OUTLIER and float(times.max()) <= OUTLIER_OUTPUT):
        what, far = (name, whole) if not whole <= OUTLIER else (f"output {int(times.argmax())} of {name}", float(times.max()))
        raise ProofFailed(
            f"what {what} gives is {far:.1f} times as far from what it was as rounding to {form.bits} bits takes it", where=str(out)
        )


def _inputs(model: ByLayer, number: int, each: Pass) -> dict[nn.Module, torch.Tensor]:
    """What a pass gives each of a layer's matrices that it calls, fp32 (tokens, in), padding left out; the pass goes on behind the layer."""
    found: dict[nn.Module, torch.Tensor] = {}

    def note(module, given) -> None:
        found[module] = flat(given[0], each)

    hooks = [module.register_forward_pre_hook(note) for module in linear_of(model, number)]
    model.through(number, [each])
    for hook in hooks:
        hook.remove()
    return found


def turned(model: ByLayer) -> set[str]:
    """Names of the weights that are stored as (in, out)."""
    return {f"{name}.weight" for number in range(len(model.layers)) for name, module in model.names(number) if isinstance(module, Conv1D)}


def check_first_layer(start: Artifact, out: Path, scratch: Path) -> None:
    """Load the folder's first layer with the kernels that will run it, and run it beside ours. Made to run in a fresh process.

    scratch: an empty folder to use. Raises ProofFailed where they differ.
    """
    torch._dynamo.config.disable = True  # gptqmodel has what unpacks 3 bits compiled, half a minute for what runs in a millisecond
    model = opened(start, out)
    write_first_layer(model, out, scratch)
    block = read_json(out / "config.json")["quantization_config"]
    with using("what was quantized", out, fix=()), silenced():
        theirs = loading.load_with_kernels(scratch, torch.float32)
    row = list(range(64))
    with model.held("embedding"):
        each = model.start([row])
    args, kwargs = each.calls[0]
    with torch.no_grad():
        with silenced():
            there = theirs.get_submodule(f"{model.places.name}.0")(each.hidden, *args, **kwargs)
        with model.held(0):
            here = model.call(0, each)
        there = there[0] if isinstance(there, tuple) else there
        error = float((here - there).norm() / (here - each.hidden).norm())
        if block.get("lm_head"):
            given = model.into_head(here[0])
            with model.held("head"):
                ours = given @ model.model.get_output_embeddings().weight[:VOCABULARY].T
            with silenced():
                said = theirs.get_submodule(model.own_head)(given)
            error = max(error, float((ours - said).norm() / ours.norm()))
    if not error < (5e-2 if block.get("load_in_8bit") else 2e-2):  # int8 kernels round what comes in too
        raise ProofFailed(f"its kernels make of the first layer something else than it holds: {error:.1%} of what it adds", where=str(out))


def write_first_layer(model: ByLayer, out: Path, folder: Path) -> None:
    """A model of the first of a folder's layers and a few rows of its vocabulary, byte for byte."""
    config = AutoConfig.from_pretrained(out, local_files_only=True)
    text = config.get_text_config()
    text.num_hidden_layers, text.vocab_size, text.pad_token_id = 1, VOCABULARY, None
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:1]
    config.save_pretrained(folder)
    words = Tokenizer(WordLevel({str(i): i for i in range(VOCABULARY)}, "0"))  # gptqmodel asks for a tokenizer of the model's size
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="0").save_pretrained(folder)
    later = re.compile(rf"(^|\.){re.escape(model.places.name.rpartition('.')[2])}\.[1-9]\d*\.")
    ends = {place.full for what in ("embedding", "head") for place in model.places.tensors.get(what, ())}
    kept, cut, stored = {}, {}, safetensors_io.entries(out)
    for name, entry in stored.items():
        module, _, suffix = name.rpartition(".")
        if later.search(name):
            continue
        if any(name == end or end.endswith(f".{name}") for end in ends):
            entry = replace(entry, shape=(VOCABULARY, *entry.shape[1:]))
        elif f"{module}.weight" in ends and suffix in ("qweight", "scales", "qzeros"):  # outputs last, of zero points several to a word
            columns = VOCABULARY * entry.shape[1] // stored[f"{module}.scales"].shape[1]
            entry, cut[name] = replace(entry, shape=(entry.shape[0], columns)), safetensors_io.load(entry)[:, :columns].contiguous()
        kept[name] = entry
    safetensors_io.write(folder, list(kept.values()), lambda name: cut.get(name, kept[name]), safetensors_io.parse_size("5GB"))
