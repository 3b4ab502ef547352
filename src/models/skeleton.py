"""A model without its weights, and where its folder has each of them: for those that are brought one by one rather than as transformers loads them."""

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from src.core.errors import BadData
from src.models import bnb, devices, held, packed, safetensors_io

Stored = dict[str, safetensors_io.Entry | packed.Packed]
HOLES = 64 << 20
"""bytes of fp32 forms after which what they leave is given back: between what is kept it does not fit the next"""


def build(config: Any) -> Any:
    """transformers' causal model of a configuration, its parameters on the meta device and its buffers as they begin."""
    with init_empty_weights(include_buffers=False):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model


def stored_as_named(model: Any, entries: Stored) -> bool:
    """Whether a folder holds a model's tensors under the names and in the shapes that they have in it, and no others."""
    named = list(model.named_parameters(remove_duplicate=False))
    known = {name: tuple(t.shape) for name, t in (*named, *model.named_buffers())}
    stored = {parameter for name, parameter in named if name in entries}
    return (
        stored == {p for _, p in named} and entries.keys() <= known.keys() and all(entries[name].shape == known[name] for name in entries)
    )


def fill_buffers(model: Any, entries: Stored) -> None:
    """Give a model the buffers that its folder has."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if isinstance(entry := entries.get(name), safetensors_io.Entry):
                buffer.copy_(safetensors_io.load(entry))


def widened(path: Path) -> Any:
    """A quantized model with its matrices in fp16, a rounding of 2^-12 at most, and the rest as it is stored or in fp32, for `held` to compute from.

    gptqmodel's kernels for CPUs keep 4 bytes a weight and compute 4 bits in bf16: twice the memory, and further from what the folder says.
    None where the folder's names, or its first matrix, are not as `packed` knows them. Raises BadData where another matrix is damaged.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    quantized = config.quantization_config
    del config.quantization_config
    model, entries = build(config), packed.matrices(safetensors_io.entries(path))
    first = next((entry for entry in entries.values() if isinstance(entry, packed.Packed)), None)
    if first is None or not stored_as_named(model, entries) or not _known(first):
        return None
    stored = {parameter: name for name, parameter in model.named_parameters(remove_duplicate=False) if name in entries}
    made: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
    left = 0
    for module in model.modules():
        for own, empty in module._parameters.items():
            if empty is None:
                continue
            if empty not in made:
                entry = entries[stored[empty]]
                wide = entry().half() if isinstance(entry, packed.Packed) else safetensors_io.load(entry)
                left += 4 * wide.numel() * isinstance(entry, packed.Packed)
                if left > HOLES:
                    devices.trim()
                    left = 0
                if type(module) not in held.KINDS or own != "weight":
                    wide = wide.float()
                made[empty] = torch.nn.Parameter(wide, requires_grad=False)
            module._parameters[own] = made[empty]
    devices.trim()
    fill_buffers(model, entries)
    bnb.round_inputs(model, entries, quantized)
    if (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def _known(matrix: packed.Packed) -> bool:
    try:
        return bool(matrix().numel())
    except BadData:
        return False
