"""The mark of what is private, which push does not share: set, kept and taken away, and found in all that was made from it.

Marks stand outside of keys, so that marking makes nothing anew. A manifest carries those that its ancestors had when it was written; those that an ancestor
got since are read where it still is. An outside file that lies in an artifact is of that artifact.
"""

import contextlib
from collections.abc import Iterable
from pathlib import Path

from src.core.artifact import MANIFEST, Artifact, is_finished, open_artifact, seal_of
from src.core.errors import Tampered, UserError
from src.core.files import write_json
from src.core.log import say, warn


def marked(a: Artifact) -> dict[str, str]:
    """{key: where} of all that is marked private among this artifact and what it was made from."""
    found: dict[str, str] = {}
    _marked(a, found, set())
    return found


def _marked(a: Artifact, found: dict[str, str], seen: set[Path]) -> None:
    if (place := a.path.resolve()) in seen:
        return
    seen.add(place)
    if a.manifest is None:
        for folder in filter(is_finished, (place, *place.parents)):
            with contextlib.suppress(Tampered):  # another program's manifest.json
                _marked(open_artifact(folder), found, seen)
        return
    records = {**a.manifest["ancestors"], a.key: a.manifest}
    places = {parent["key"]: parent["path"] for record in records.values() for parent in record["parents"]} | {a.key: str(a.path)}
    for key, record in records.items():
        if record.get("private"):
            found[key] = f"{record['stage']} {places[key]}, key {key[:12]}"
    for parent in a.manifest["parents"]:
        path = a.path_of(parent)
        if is_finished(path):
            _marked(open_artifact(path), found, seen)
        elif "files" in parent:
            _marked(Artifact(path, parent["kind"], parent["key"], None, parent["files"]), found, seen)


def is_to_be(path: Path, inputs: Iterable[Artifact], setting: str, wanted: bool | None) -> bool:
    """Whether what is made at `path` bears the mark itself: since it reads a file out of an artifact that does, by its setting, or, where that is None, as what it
    replaces does. What becomes of a mark is said. setting: its name; "" for a stage without one."""
    if any(marked(a) for a in inputs if a.manifest is None):
        return True
    if not setting:
        return False
    was = False
    with contextlib.suppress(UserError):  # a damaged one tells nothing
        was = is_finished(path) and _bears(open_artifact(path))
    if was and wanted is None:
        say(f"{path} stays marked private; {setting}=false makes it without the mark")
    if was and wanted is False:
        warn(f"{path} was marked private and is so no more ({setting}=false); what carries the mark from it has to be made again")
    return was if wanted is None else wanted


def settle(done: Artifact, setting: str, wanted: bool | None, outputs: Path, *, dry: bool) -> None:
    """Give a finished artifact, and its like in every other run, the mark that is wanted; say where one has it that is not. dry: only say."""
    if not wanted and _bears(done):
        say(f"{done.path} stays marked private; {setting}=false force=true makes it anew without the mark")
    for path in sorted(outputs.glob(f"*/{done.path.name}")) if wanted else ():
        if is_finished(path) and (same := open_artifact(path)).key == done.key and not _bears(same):
            say(f"{path}: {'would be ' * dry}marked private; nothing is made anew")
            if not dry:
                manifest = {**(same.manifest or {}), "private": True}
                write_json(path / MANIFEST, manifest | {"seal": seal_of(manifest)})


def _bears(a: Artifact) -> bool:
    return bool((a.manifest or {}).get("private"))
