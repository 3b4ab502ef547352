"""Folders that AutoGPTQ made, completed so that transformers, gptqmodel, vLLM and this project read them: gptq_model-4bit-128g.safetensors under the name
that is looked for, and what quantize_config.json says in config.json too."""

from pathlib import Path
from typing import Any

from src.core.errors import BadData, WrongKind
from src.core.files import read_json, write_json
from src.models import safetensors_io

WEIGHTS = "gptq_model*.safetensors"
SETTINGS = "quantize_config.json"
KEPT = ("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential")


def is_one(folder: Path) -> bool:
    """Whether something is left to complete."""
    if not (folder / SETTINGS).is_file() or not any(folder.glob("*.safetensors")):
        return False
    config = folder / "config.json"
    return any(folder.glob(WEIGHTS)) or not config.is_file() or "quantization_config" not in read_json(config)


def steps(source: Path, folder: Path) -> list[str]:
    """What `complete` would do, in words. Raises BadData where the tensors are not what quantize_config.json says, WrongKind where the folder is in a form
    that cannot be completed."""
    settings = read_json(folder / SETTINGS)
    weights = sorted(folder.glob(WEIGHTS))
    if settings.get("is_marlin_format") or settings.get("checkpoint_format", "gptq") not in ("gptq", "gptq_v2"):
        raise WrongKind(
            f"its tensors are in {settings.get('checkpoint_format') or 'Marlin'}'s form, which is one GPU kernel's own",
            where=str(folder),
            fix="take the folder as it was before it was repacked",
        )
    if len(weights) > 1:
        raise WrongKind(f"{len(weights)} files named {WEIGHTS}: which is the model?", where=str(folder), fix="leave one of them there")
    if weights and any(folder.glob("model*.safetensors")):
        raise WrongKind(f"both {weights[0].name} and model.safetensors are there", where=str(folder), fix="leave one of them there")
    _check(folder, settings)
    own = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    found = [f"rename {weights[0].name} to model.safetensors"] if weights else []
    found += [f"copy config.json of {source}"] if own is None else []
    return found + (["write into config.json what quantize_config.json says"] if own is None or "quantization_config" not in own else [])


def complete(source: Path, folder: Path) -> None:
    """Do it; again after a kill. source: the model that was quantized."""
    settings = read_json(folder / SETTINGS)
    block: dict[str, Any] = {"quant_method": "gptq", "checkpoint_format": settings.get("checkpoint_format", "gptq")}
    block |= {name: settings[name] for name in KEPT if name in settings}
    config = folder / "config.json"
    own = read_json(config if config.is_file() else source / "config.json")
    write_json(config, own | {"quantization_config": own.get("quantization_config") or block})
    write_json(folder / SETTINGS, settings | block | ({"model_file_base_name": "model"} if "model_file_base_name" in settings else {}))
    for weights in folder.glob(WEIGHTS):
        weights.rename(folder / "model.safetensors")


def _check(folder: Path, settings: dict) -> None:
    from src.models import gptq

    stored = [each for each in gptq.matrices(safetensors_io.entries(folder, "*.safetensors")).values() if isinstance(each, gptq.Stored)]
    if not stored:
        raise BadData("it has no quantized matrix", where=str(folder), fix="give a folder that AutoGPTQ made")
    for each in stored:
        group = settings.get("group_size")
        said = gptq.Nearest(settings.get("bits") or 0, -1 if group in (None, -1, each.shape[1]) else group)
        if each.form != said:
            raise BadData(
                f"{each.name} has {each.form.bits} bits in groups of {each.form.group}, and {SETTINGS} says {said.bits} in groups of {said.group}",
                where=str(folder),
                fix="take weights and quantize_config.json of one and the same model",
            )
