"""Files that transformers 5 writes, made readable for transformers 4, which Mobilint's compiler scripts and model zoo are pinned to (4.57.1).

transformers 4 reads a rope base at the top of config.json only: without it a model whose base is not 10,000 would be compiled wrong without a word.
"""

import json
import os
import shutil
from pathlib import Path

from src.core.artifact import MANIFEST
from src.core.files import read_json
from src.core.log import say, size
from src.deploy.vendor import whole


def lend_model(source: Path, work: Path) -> None:
    """Put the model into work/model, where an interpreter and a container both see it, also from a hub's cache of symbolic links.

    Weights are hard links, or copies on another disk; JSON files are copies, with what transformers 4 needs beside what transformers 5 writes.
    """
    model, copied = work / "model", 0
    model.mkdir(exist_ok=True)
    for stale in [file for file in model.iterdir() if not (source / file.name).is_file()]:
        stale.unlink()  # of other weights that an unfinished bundle began with
    for file in sorted(source.iterdir()):
        if not file.is_file() or file.name.startswith(".") or file.name == MANIFEST:
            continue
        copy = model / file.name
        if copy.exists() and copy.stat().st_size == file.stat().st_size and file.suffix != ".json":
            continue
        with whole(copy) as partial:
            partial.unlink(missing_ok=True)
            if file.suffix == ".json":
                shutil.copyfile(file, partial)
                continue
            try:
                os.link(file.resolve(), partial)
            except OSError:  # another disk, or a file system without links
                shutil.copyfile(file, partial)
                copied += file.stat().st_size
    adapt(model, read_json(source / "config.json"))
    if copied:
        say(f"copied {size(copied)} of the model for the compiler, since it lies on another disk")


def adapt(folder: Path, config: dict, tokenizer_class: str | None = None) -> None:
    """Write `config` as the folder's config.json, and its tokenizer_config.json, so that both generations of transformers read the same."""
    _write(folder / "config.json", model_config(config))
    file = folder / "tokenizer_config.json"
    tokenizer = tokenizer_config(read_json(file) if file.is_file() else {})
    _write(file, tokenizer | ({"tokenizer_class": tokenizer_class} if tokenizer_class else {}))


def model_config(config: dict) -> dict:
    """config.json with rope_theta, rope_scaling and torch_dtype beside transformers 5's rope_parameters and dtype."""
    config, rope = dict(config), config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]  # where both are there, transformers 5 takes this one
        if rope.get("rope_type", "default") != "default" and config.get("rope_scaling") is None:
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if dtype := config.get("dtype") or config.get("torch_dtype"):
        config["dtype"] = config["torch_dtype"] = dtype
    return config


def tokenizer_config(config: dict) -> dict:
    """tokenizer_config.json with the class name and the form of extra special tokens that transformers 4 knows."""
    config = dict(config)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    return config


def _write(path: Path, value: dict) -> None:
    with whole(path) as file:
        file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
