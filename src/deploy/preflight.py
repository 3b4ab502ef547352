"""What can be known in seconds before a compile of hours: whether the folder is what its config says, and whether host and board have the room."""

import os
import re
import shutil
from pathlib import Path

from src.core.errors import NO_SPACE, BadData, ConfigError, NoRoom, WrongKind
from src.core.files import read_json
from src.core.log import size
from src.models import safetensors_io
from src.sizing import budget, takes
from src.sizing.shape import ModelShape

OTHER_TOWERS = re.compile(r"vision|visual|audio|image|mtp")


def check_headers(model_dir: Path, shape: ModelShape, embedding: safetensors_io.Entry) -> list[str]:
    """config.json against the safetensors headers: layers, hidden size, vocabulary rows. Returns what is worth saying; raises BadData with every fault."""
    entries = safetensors_io.entries(model_dir)
    found = {int(m[1]) for name in entries if not OTHER_TOWERS.search(name) and (m := re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name))}
    rows, columns = embedding.shape
    faults, notes = [], []
    if missing := sorted(set(range(shape.layers)) - found):
        faults.append(f"config.json says {shape.layers} layers; the weights lack {', '.join(map(str, missing[:8]))}")
    if extra := sorted(found - set(range(shape.layers))):
        faults.append(f"config.json says {shape.layers} layers; the weights also have {', '.join(map(str, extra[:8]))}")
    if columns != shape.hidden:
        faults.append(f"config.json says hidden_size {shape.hidden}; '{embedding.name}' is {columns} wide")
    head = entries.get("lm_head.weight")
    if head is None and not shape.tied and not any("output" in name or "head" in name for name in entries):
        faults.append("config.json says tie_word_embeddings=false; there is no output layer in the weights")
    if head is not None and head.shape[0] != rows:
        faults.append(f"the output layer has {head.shape[0]} rows, the embedding table {rows}")
    if (largest := largest_id(model_dir)) >= rows:
        faults.append(f"the tokenizer has id {largest}, the embedding table {rows} rows")
    if faults:
        raise BadData(
            "the folder's parts do not belong together:\n" + "\n".join(f"  - {fault}" for fault in faults),
            where=str(model_dir),
            fix="take config.json, tokenizer and weights of one and the same model",
        )
    if rows != shape.vocab:
        notes.append(f"vocabulary: {rows} rows in the weights, {shape.vocab} in config.json; the weights count")
    return notes


def largest_id(model_dir: Path) -> int:
    """Largest token id in tokenizer.json; -1 where there is none such file."""
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        return -1
    spec = read_json(file)
    vocab = spec.get("model", {}).get("vocab", {})
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return max([-1, *ids, *(token["id"] for token in spec.get("added_tokens", []))])


def gptq_block(model_dir: Path) -> dict | None:
    """{"bits", "group_size"} of a symmetric GPTQ int4 or int8 model; None for a plain one. Raises WrongKind for every other quantization."""
    block = read_json(model_dir / "config.json").get("quantization_config")
    if block is None:
        if (model_dir / "quantize_config.json").is_file() or any(name.endswith(".qweight") for name in safetensors_io.entries(model_dir)):
            raise WrongKind(
                "an AutoGPTQ folder: its config.json has no quantization_config, where compilers look for it",
                where=str(model_dir),
                fix=takes.UNQUANTIZED,
            )
        return None
    return takes.gptq_block({"quantization_config": block}, where=str(model_dir / "config.json"))


def equal_layers(shape: ModelShape) -> bool:
    """Whether all decoder layers have the same kind and matrices."""
    return len({(layer.kind, layer.matrices) for layer in shape.stack}) == 1


def check_fit(shape: ModelShape, target) -> list[str]:
    """Weights, KV cache and embedding against the board's memory, as lines. Raises ConfigError where the board is known and they do not fit."""
    fit = budget.board_fit(shape, target)
    if fit.fits is False:
        raise ConfigError(
            "the model does not fit the board:\n" + "\n".join(f"  {line}" for line in fit.lines),
            where=f"configs/target/{target.name}.yaml",
            fix=way_words(budget.ways(shape, target)),
        )
    return fit.lines


def way_words(ways: list[list[str]]) -> list[str]:
    return [" ".join(way) + (" if your board has so much" if way[0].startswith("target.board.") else "") for way in ways]


def check_room(folder: Path, shape: ModelShape, target, also: int = 0) -> list[str]:
    """Disk and memory of this host against an estimate, as lines. Raises NoRoom for the disk; too little memory, which swap can mend, is said.

    also: bytes of disk taken beside the compile's own.
    """
    ram, disk, lines = budget.host_needs(shape, target)
    disk += also
    there = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < disk:
        raise NoRoom(
            f"the compile takes about {size(disk)} of disk, {size(free)} are free",
            where=str(there),
            fix=NO_SPACE,
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    lines.append(f"this machine has {size(memory)} of memory, {size(free)} of disk free")
    if memory < ram:
        lines.append("warning: that memory may not do; a compile that runs out of it is killed (exit code 137)")
    return lines
