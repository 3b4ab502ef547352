"""README.md of what is made, which the hub shows as its card: a head of metadata for programs, and a text for people (card_text.py).

The head is that of https://huggingface.co/docs/hub/model-cards and dataset-cards. Every line follows from settings, parents and figures: no day, no
duration, no path of this machine, so that equal work has an equal card. What is not known (a licence, a language) is left out of the head, never guessed.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from src.core import card_text
from src.core.artifact import Artifact
from src.core.descent import TAKES, Descent, hub_id, is_of_records
from src.core.files import flatten
from src.core.log import shown

NAME = "README.md"
KINDS = ("dataset", "adapter", "model", "quantized", "bundle")
"""kinds of artifacts that have a card"""
OWN_TEXT = ("deploy", "distill")
"""stages that write a README.md of their own, which gets the head above it and where it comes from below"""
SPLITS = {"train": "train", "validation": "val", "calibration": "calib"}
"""the hub's name of a split -> ours"""
SIZES = {"n<1K": 1e3, "1K<n<10K": 1e4, "10K<n<100K": 1e5, "100K<n<1M": 1e6, "1M<n<10M": 1e7, "10M<n<100M": 1e8, "100M<n<1B": 1e9}
"""the hub's name of a dataset's size -> records that it stays below"""
LIBRARIES = {"peft": "peft", "transformers": "transformers", "gguf": "gguf", "gguf_lora": "gguf", "openvino": "openvino"}
"""kind of what is made -> the library of the hub that reads it; it knows none for the other bundles"""
FLOATS = ("fp32", "f32", "bf16", "fp16", "f16")
LICENCE = ("license", "license_name", "license_link")
LICENCE_TEXTS = {"apache-2.0": ("Apache License", "Version 2.0"), "mit": ("MIT License", "Permission is hereby granted")}
"""the hub's name of a licence -> words that its text begins with"""
HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?")


def write(
    out: Path, stage: str, kind: str, key: str, settings: dict[str, Any], inputs: dict[str, Artifact], metrics: dict[str, Any]
) -> None:
    """README.md of the folder `out`, about to be sealed; a report and answers have none."""
    if kind not in KINDS:
        return
    descent, flat = Descent(stage, kind, key, settings, inputs), flatten(settings)
    licence = _inherited(stage, flat, inputs)
    own = out / NAME if stage in OWN_TEXT and (out / NAME).is_file() else None
    text = _below_head(own.read_text("utf-8", errors="replace")) if own else card_text.of(out, descent, flat, metrics)
    if kind == "dataset":
        head = _of_dataset(out, descent, flat, inputs, metrics, licence)
    else:
        head = _of_model(descent, flat, inputs, metrics, licence)
    top = yaml.safe_dump(head, sort_keys=False, allow_unicode=True, width=10**6)
    ends = card_text.ends(descent, licence)
    (out / NAME).write_text(shown(f"---\n{top}---\n\n{text.rstrip()}\n\n{ends}\n"), encoding="utf-8", errors="replace")


def _below_head(text: str) -> str:
    return text[4:].partition("\n---\n")[2].lstrip("\n") if text.startswith("---\n") else text


def head(folder: Path) -> dict[str, Any]:
    """What the card of a folder says in its head; empty where it has none, or none that can be read."""
    return _head_of(folder / NAME) or _head_of(aside(folder))


def _head_of(file: Path) -> dict[str, Any]:
    text = file.read_text("utf-8", errors="replace") if file.is_file() else ""
    try:
        found = yaml.safe_load(text[4:].partition("\n---")[0]) if text.startswith("---\n") else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def aside(folder: Path) -> Path:
    """Where the card of a model in the hub's cache is kept: beside its files, whose names and hashes are in the key of all that is made from it."""
    return folder.parents[1] / "boardwalk" / folder.name / NAME if hub_id(folder) else folder / NAME


def licence_of(folder: Path) -> dict[str, str]:
    """{license, and for one of its own license_name and license_link} by a folder's card, or by a licence's text in it that is known; else empty."""
    said = {name: value for name, value in head(folder).items() if name in LICENCE and isinstance(value, str)}
    if "license_link" in said and "://" not in said["license_link"]:  # a file beside the card, which does not go along
        file = said.pop("license_link")
        said |= {"license_link": f"https://huggingface.co/{known}/blob/main/{file}"} if (known := hub_id(folder)) else {}
    if said:
        return said
    texts = [folder / name for name in ("LICENSE", "LICENSE.txt", "LICENSE.md")]
    begins = next((file.read_text("utf-8", errors="replace")[:2000] for file in texts if file.is_file()), "")
    return next(({"license": name} for name, words in LICENCE_TEXTS.items() if all(word in begins for word in words)), {})


def _inherited(stage: str, flat: dict[str, Any], inputs: dict[str, Artifact]) -> dict[str, str]:
    """The licence of what it was made from: of a model its base's, of a dataset that of all its sources where they have one and the same."""
    if stage == "distill":
        return {"license": "other", "license_name": name} if (name := flat.get("teacher.licence")) else {}
    if stage == "data":
        said = [licence_of(folder) for folder in _sources(inputs)]
        return said[0] if said and all(one == said[0] for one in said) else {}
    return licence_of(inputs["model"].path) if "model" in inputs else {}


def _sources(inputs: dict[str, Artifact]) -> list[Path]:
    """Of a dataset's sources the folders, whose cards tell of them; a file has none, unless it is of the hub."""
    paths = [a.path for role, a in inputs.items() if is_of_records(role)]
    return [path.parent if path.is_file() and hub_id(path) else path for path in paths]


def _languages(folders: list[Path]) -> dict[str, list[str]]:
    said = [head(folder).get("language") for folder in folders]
    found = dict.fromkeys(one for some in said for one in (some if isinstance(some, list) else [some]) if isinstance(one, str))
    return {"language": list(found)} if found else {}


def _of_dataset(
    out: Path, descent: Descent, flat: dict[str, Any], inputs: dict[str, Artifact], metrics: dict[str, Any], licence: dict[str, str]
) -> dict[str, Any]:
    recipe = flat.get("recipe.name")
    files = {split: out / f"{ours}.jsonl" for split, ours in SPLITS.items()}
    there = [{"split": split, "path": file.name} for split, file in files.items() if file.is_file() and file.stat().st_size]
    configs: list[dict[str, Any]] = [{"config_name": "default", "default": True, "data_files": there}]
    if (out / "preference.jsonl").is_file():
        configs.append({"config_name": "preference", "data_files": [{"split": "train", "path": "preference.jsonl"}]})
    count = sum(metrics.get(f"{ours}_rows") or 0 for ours in SPLITS.values())
    return {
        "pretty_name": f"Distilled by {recipe}" if recipe else f"Conversations of {', '.join(descent.data_names())}",
        **_languages(_sources(inputs)),
        **licence,
        "task_categories": ["text-generation"],
        **({"size_categories": [next((name for name, limit in SIZES.items() if count < limit), "n>1B")]} if count else {}),
        "tags": ["boardwalk", "conversational", *(["synthetic", "distillation"] if recipe else [])],
        "configs": configs,
    }


def _of_model(
    descent: Descent, flat: dict[str, Any], inputs: dict[str, Artifact], metrics: dict[str, Any], licence: dict[str, str]
) -> dict[str, Any]:
    base, kind, stage = descent.base(), descent.made["kind"], descent.made["stage"]
    said: dict[str, Any] = {}
    if base and HUB_NAME.fullmatch(base):
        said |= {"base_model": base, "base_model_relation": _relation(kind, flat)}
    if data := list(dict.fromkeys(known for parent in descent.data() if (known := hub_id(Path(parent["path"]))))):
        said["datasets"] = data
    said |= _languages([a.path for role, a in inputs.items() if role in TAKES[stage] and (a.manifest or a.kind == "file")])
    library = {"adapter": "peft", "bundle": flat.get("target.kind")}.get(kind, "transformers")
    if library in LIBRARIES:
        said["library_name"] = LIBRARIES[library]
    kinds = [flat.get(name) for name in ("quantizer.kind", "target.kind", "target.name")]
    how = ("dora" if flat.get("tuner.dora") else "lora") if kind == "adapter" else None
    said |= licence | {"pipeline_tag": "text-generation", "tags": list(dict.fromkeys(filter(None, ("boardwalk", stage, how, *kinds))))}
    if figures := _figures(stage, metrics):
        names = descent.data_names() or ["held-out rows"]
        held_out = {"name": f"held-out rows of {', '.join(names)}", "type": names[0]}
        results = [{"task": {"type": "text-generation"}, "dataset": held_out, "metrics": figures}]
        said["model-index"] = [{"name": card_text.title(descent), "results": results}]
    return said


def _relation(kind: str, flat: dict[str, Any]) -> str:
    """What the hub calls it. An adapter that went into its base is a finetune there: a `merge` is of two models or more."""
    if kind == "adapter" or flat.get("target.kind") == "gguf_lora":
        return "adapter"
    if kind == "bundle":
        weights = str(flat.get("target.weight_type") or flat.get("target.format"))
        return "finetune" if any(word in weights for word in FLOATS) else "quantized"
    return "quantized" if kind == "quantized" else "finetune"


def _figures(stage: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The proof's own figures in the form of a model-index: the loss of these very files, and what they lost."""
    found = {"loss": metrics.get("loss_after", metrics.get("val_loss")), "kl": metrics.get("kl")}
    words = {"loss": "loss on held-out rows, nats a token", "kl": f"KL divergence from {card_text.against(stage)}, nats a token"}
    return [{"type": name, "name": words[name], "value": round(float(value), 4)} for name, value in found.items() if value is not None]
