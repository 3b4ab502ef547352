"""The exact sum behind a merge that stored it in 16 bits, for what rounds once more: quantizers and board compilers.

A merge knows its adapter and its base. While both are where they were, the sum is made anew in fp32, in a folder that is removed when the work is done.
"""

import shutil
import time
from dataclasses import replace
from pathlib import Path

from src.core import artifact
from src.core.artifact import Artifact
from src.core.errors import NO_SPACE, NoRoom, UserError
from src.core.files import HashCache
from src.core.log import duration, say, size, warn
from src.models import merging, safetensors_io
from src.sizing.shape import ModelShape

FOLDER = ".exact"
"""Folder inside an unfinished bundle with the exact sum. Hidden, so it is no content."""
ROLES = {"adapter": "exact_adapter", "model": "exact_base"}
"""role of a merge's parent -> its role under what is made from the exact sum"""


def parents(model: Artifact, wanted: str, cache: HashCache) -> dict[str, Artifact]:
    """{"exact_adapter", "exact_base"} of a model that is a rounded merge; empty for every other, and where wanted=stored declines.

    Where one of the two is no longer what it was, that is said, and the weights are taken as they are stored. cache: see artifact.outside.
    """
    if (
        wanted == "stored"
        or model.stage != "merge"
        or not any(e.dtype in ("BF16", "F16") for e in safetensors_io.entries(model.path).values())
    ):
        return {}
    found = {}
    for role, name in ROLES.items():
        record = model.parent(role)
        if record is None:
            raise RuntimeError(f"{model.path}: a merge has a parent '{role}'")
        path = model.path_of(record)
        try:
            found[name] = artifact.open_any(path, cache)
            same = found[name].key == record["key"]
        except UserError:  # gone, damaged, or another thing by now
            same = False
        if not same:
            warn(
                f"{model.path} is a rounded merge, and {path} is no longer the {'base' if role == 'model' else role} it was made from: takes the "
                "rounded weights instead of the exact sum"
            )
            return {}
    return found


def cost(inputs: dict[str, Artifact], at: Path) -> list[str]:
    """A line of the plan: what the exact sum takes; none where there is none to make, or where an unfinished bundle has it. Raises NoRoom where the
    disk of `at`, its folder, has not that much."""
    if not (need := size_to_write(inputs, at)):
        return []
    there = next(path for path in at.absolute().parents if path.is_dir())
    if (free := shutil.disk_usage(there).free) < need:
        raise NoRoom(
            f"the exact sum of adapter and base takes {size(need)} of disk while this works, {size(free)} are free",
            where=str(there),
            fix=[*NO_SPACE, "weights=stored takes the merge as it was rounded"],
        )
    return [
        f"from the exact sum of {inputs[ROLES['adapter']].path} and its base: {size(need)} of disk in fp32 while this works; "
        "weights=stored takes the merge as it was rounded"
    ]


def size_to_write(inputs: dict[str, Artifact], at: Path) -> int:
    """Bytes of the exact sum that is still to be made at `at`."""
    if ROLES["adapter"] not in inputs or at.is_dir():
        return 0
    written, _ = merging.plan(inputs[ROLES["adapter"]], inputs[ROLES["model"]].path, "float32")
    return sum(entry.size for entry in written)


def shape(model: ModelShape, inputs: dict[str, Artifact]) -> ModelShape:
    """The model's shape in the dtype that the work starts from."""
    return replace(model, dtype="float32") if ROLES["adapter"] in inputs else model


def folder(inputs: dict[str, Artifact], at: Path) -> Path:
    """Where the weights lie that the work starts from: the exact sum's folder `at`, or the model's own."""
    return at if ROLES["adapter"] in inputs else inputs["model"].path


def write(inputs: dict[str, Artifact], at: Path) -> Artifact:
    """The model among the inputs with its exact weights: a complete folder in fp32 at `at`, taken as it is where it was made before; the model
    itself where there are none."""
    model = inputs["model"]
    if ROLES["adapter"] not in inputs:
        return model
    if not at.is_dir():
        adapter, base = inputs[ROLES["adapter"]], inputs[ROLES["model"]].path
        partial = at.with_name(f"{at.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        begun = time.monotonic()
        written, changes = merging.plan(adapter, base, "float32")
        safetensors_io.write(partial, written, merging.merged_tensors(adapter, base, written, changes), safetensors_io.parse_size("5GB"))
        merging.add_files(adapter, base, partial, written)
        partial.rename(at)
        say(f"the exact sum of adapter and base, made anew in fp32: {duration(time.monotonic() - begun)}")
    return replace(model, path=at)
