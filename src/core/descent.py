"""Where a result comes from, by manifests alone: the stages it went through, the model and the data it began with, and what others know these by."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.core.artifact import Artifact, ancestors_of

TAKES = {
    "finetune": ("dataset", "model"),
    "cpt": ("text", "model"),
    "pretrain": ("text",),
    "merge": ("adapter", "model"),
    "quantize": ("model",),
    "deploy": ("model",),
}
"""stage -> roles of what its result is or learnt from; other inputs calibrate, teach or describe"""
NO_RECORDS = ("unseen", "teacher", "judge", "recipe")
"""beginnings of roles of a dataset's inputs that are not its records"""

Record = dict[str, Any]
"""what a manifest says of an artifact (stage, kind, settings, parents), or of a parent (role, key, kind, stage, path, files)"""


def hub_id(path: Path) -> str | None:
    """people/name of a folder in the hub's cache, or of a file in it; None elsewhere."""
    for part in path.parts:
        if part.startswith(("models--", "datasets--")) and part.count("--") in (1, 2):
            return "/".join(part.split("--")[1:])
    return None


def name_of(path: Path) -> str:
    """What others may know a file or folder by: its name on the hub, else its own without the way to it."""
    return hub_id(path) or path.name


def is_of_records(role: str) -> bool:
    """Whether a dataset's input of this role is of its records."""
    return not role.startswith(NO_RECORDS)


class Descent:
    """The record of what is about to be sealed, and those of its ancestors."""

    def __init__(self, stage: str, kind: str, key: str, settings: dict[str, Any], inputs: dict[str, Artifact]):
        parents = [
            {"role": role, "key": a.key, "kind": a.kind, "stage": a.stage, "path": str(a.path), "files": a.files}
            for role, a in inputs.items()
        ]
        self.key = key
        self.made: Record = {"stage": stage, "kind": kind, "settings": settings, "parents": parents}
        self._ancestors = ancestors_of(inputs)

    def of(self, parent: Record | None) -> Record | None:
        """The record of a parent that this project made; None for an outside one."""
        return None if parent is None or parent["stage"] == "outside" else self._ancestors.get(parent["key"])

    def model_stages(self) -> list[Record]:
        """The records of the stages that the model itself went through, the first first: of a merge those of its adapter."""
        found: list[Record] = []
        record: Record | None = self.made
        while record:
            found.insert(0, record)
            record = self.of(_parent(record, "adapter") or _parent(record, "model"))
        return found

    def base(self) -> str | None:
        """The outside model that it began with, by its name; None of one from nothing."""
        record: Record | None = self.made
        while record and (parent := _parent(record, "model")):
            record = self.of(parent)
            if record is None:
                return name_of(Path(parent["path"]))
        return None

    def data(self, record: Record | None = None) -> Iterator[Record]:
        """The outside files that it learnt from, or is made of."""
        record = record or self.made
        takes = TAKES.get(record["stage"])
        for parent in record["parents"]:
            if parent["role"] not in takes if takes else not is_of_records(parent["role"]):
                continue
            if made := self.of(parent):
                yield from self.data(made)
            elif parent["kind"] == "file":
                yield parent

    def data_names(self) -> list[str]:
        return list(dict.fromkeys(name_of(Path(parent["path"])) for parent in self.data()))

    def road(self) -> list[str]:
        """A line of Markdown for it and for each ancestor, indented under what was made of it."""
        lines: list[str] = []
        self._road(self.made, self.key, "", 0, lines, set())
        return lines

    def _road(self, record: Record, key: str, role: str, depth: int, lines: list[str], seen: set[str]) -> None:
        again = key in seen
        seen.add(key)
        lines.append(f"{'    ' * depth}- {role}{record['kind']} by `{record['stage']}`, key `{key[:12]}`{' (above)' * again}")
        for parent in () if again else record["parents"]:
            if parent["role"].startswith("exact_"):  # the merge's own, under it
                continue
            if made := self.of(parent):
                self._road(made, parent["key"], f"{parent['role']}: ", depth + 1, lines, seen)
            else:
                lines.append(f"{'    ' * (depth + 1)}- {parent['role']}: {_outside(parent)}, key `{parent['key'][:12]}`")


def _parent(record: Record, role: str) -> Record | None:
    return next((parent for parent in record["parents"] if parent["role"] == role), None)


def _outside(parent: Record) -> str:
    count = len(parent.get("files") or ())
    return f"`{name_of(Path(parent['path']))}`" + f" ({count} files)" * (count > 1 and parent["kind"] == "file")
