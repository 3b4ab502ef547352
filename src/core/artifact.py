"""Artifacts: finished results, each a folder whose manifest.json is written last and which is then renamed into place.

"Has a manifest" means "is finished". An artifact's key is the sha256 of (stage, stage version, settings, parents' keys), so equal work has an equal
name wherever it is done. A manifest also carries its ancestors' keys and settings: a bundle copied to a board still tells where it came from.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from src import ROOT, __version__
from src.core.errors import BadData, Busy, MissingInput, Moved, ProofFailed, Tampered, WrongKind
from src.core.files import Files, HashCache, canonical, hash_files, read_json, remove, spelled, write_json
from src.core.log import say, size

MANIFEST = "manifest.json"
REMADE = ["copy it again from where it was made", "force=true, with the command that made it, makes it anew"]
"""ways out of an artifact that is not as it was sealed"""
NOT_OURS = ["move it elsewhere", "force=true removes it"]
"""ways out of a folder in the way that Boardwalk neither finished nor began"""
SCHEMA = 1
PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "deepspeed",
    "datasets",
    "bitsandbytes",
    "gptqmodel",
    "numpy",
    "safetensors",
)


ROAD = ("pretrain", "cpt", "data", "distill", "finetune", "merge", "quantize", "deploy", "answer", "evaluate")
"""stages that make an artifact, in the order that a run goes through them; an evaluation is of any of them"""
MAKES = {
    "data": "dataset",
    "distill": "dataset",
    "pretrain": "model",
    "merge": "model",
    "quantize": "quantized",
    "evaluate": "report",
    "answer": "answers",
    "deploy": "bundle",
}
"""stage -> the kind of all that it makes"""


def kind_made(stage: str, settings: dict[str, Any]) -> str | None:
    """The kind of artifact that a stage makes by these settings, both of which are under the key as the kind itself is not; None for an unknown stage."""
    if stage in ("finetune", "cpt") and isinstance(tuner := settings.get("tuner"), dict):
        return "model" if tuner.get("kind") == "full" else "adapter"
    return MAKES.get(stage)


@dataclass(frozen=True)
class Artifact:
    """One input or result: a finished artifact of this project, or an outside file or folder known by its hashes.

    kind: dataset, adapter, model, quantized, report, answers, bundle; or file, for a raw input.
    manifest: None for an outside input.
    files: {relative path: {"sha256", "size"}}.
    """

    path: Path
    kind: str
    key: str
    manifest: dict[str, Any] | None
    files: Files

    @property
    def stage(self) -> str:
        return self.manifest["stage"] if self.manifest else "outside"

    @property
    def settings(self) -> dict[str, Any]:
        return self.manifest["settings"] if self.manifest else {}

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest["metrics"] if self.manifest else {}

    def parent(self, role: str) -> dict[str, Any] | None:
        """The manifest's record of the parent in this role, or None."""
        return next((p for p in (self.manifest or {}).get("parents", []) if p["role"] == role), None)

    def path_of(self, parent: dict[str, Any]) -> Path:
        """Where a parent's record says it was; relative records are seen from this artifact's own place."""
        return Path(os.path.normpath(self.path.parent / parent["path"]))


def key_of(stage: str, version: int, settings: dict[str, Any], parents: dict[str, str]) -> str:
    """sha256 hex over stage, its version, its settings and {role: parent key}."""
    return hashlib.sha256(canonical({"stage": stage, "version": version, "settings": settings, "parents": parents})).hexdigest()


def outside(path: Path, kind: str, cache: HashCache | None = None, only: Sequence[Path] | None = None) -> Artifact:
    """A file or folder this project did not make, named by the hashes of its content.

    only: the files of a folder that are taken from it, in the order they are to be in; all if not given.
    """
    files = hash_files(path, cache, only)
    if not files:
        raise MissingInput("the folder is empty", where=str(path))
    return Artifact(path, kind, content_key(files), None, files)


def content_key(files: Files) -> str:
    """The key of an outside input: sha256 hex over its files' names and hashes."""
    return hashlib.sha256(canonical({name: entry["sha256"] for name, entry in files.items()})).hexdigest()


def kind_of_folder(path: Path) -> str:
    """adapter, quantized or model, told by the configuration files of a Hugging Face folder."""
    if (path / "adapter_config.json").is_file():
        return "adapter"
    config = path / "config.json"
    if config.is_file():
        return "quantized" if read_json(config).get("quantization_config") else "model"
    raise WrongKind(
        "not an artifact of this project and not a Hugging Face folder (no manifest.json, adapter_config.json or config.json)",
        where=str(path),
        fix="give the folder that holds one of them, which may be inside this one",
    )


def is_finished(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def open_artifact(path: Path) -> Artifact:
    """A finished artifact. Its manifest is checked against its own seal, its files by name and size (their bytes: see `verify`)."""
    try:
        manifest = read_json(path / MANIFEST)
    except BadData as error:
        raise Tampered(error.what, where=error.where, fix=REMADE) from None
    if manifest.get("schema") != SCHEMA or manifest.get("seal") != seal_of(manifest):
        raise Tampered(
            "the manifest was changed after it was written, or by another version",
            where=str(path / MANIFEST),
            fix=REMADE,
        )
    if fault := _other_kind(manifest):
        raise Tampered(fault, where=str(path / MANIFEST), fix=REMADE)
    for name, entry in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["size"]:
            raise Tampered(
                f"'{name}' is missing or has another size than the manifest says",
                where=str(path),
                fix=REMADE,
            )
    return Artifact(path, manifest["kind"], manifest["key"], manifest, manifest["files"])


def of_run(folder: Path) -> dict[str, Artifact]:
    """{name: a finished artifact of a run}, in the order of the road; an evaluation stands behind what it is of."""

    def place(name: str) -> tuple[int, bool, str]:
        stage, _, rest = name.partition("-")
        of = rest.partition("-")[0] if stage == "evaluate" else stage
        return ROAD.index(of) if of in ROAD else len(ROAD), stage == "evaluate", name

    names = sorted((path.name for path in folder.iterdir() if is_finished(path)), key=place)
    return {name: open_artifact(folder / name) for name in names}


def open_any(path: Path, cache: HashCache | None = None) -> Artifact:
    """A finished artifact, or any complete Hugging Face folder as an outside input."""
    if path.is_file() and path.suffix == ".bin":
        raise WrongKind(
            "a file, not a folder",
            where=str(path),
            fix=f"python -m src.aux_files source={path} target=NEW_FOLDER, if it is a model.bin of llama2.c",
        )
    if not path.is_dir():
        raise MissingInput("no such folder", where=str(path))
    return open_artifact(path) if is_finished(path) else outside(path, kind_of_folder(path), cache)


def seal_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(canonical({k: v for k, v in manifest.items() if k != "seal"})).hexdigest()


def verify(artifact: Artifact) -> list[str]:
    """Recompute every hash; returns one line per difference, none when all is as it was sealed.

    A file beside the listed ones is a difference too: a board would load it.
    """
    actual = hash_files(artifact.path)
    actual.pop(MANIFEST, None)
    faults = [f"{name}: missing" for name in artifact.files.keys() - actual.keys()]
    faults += [f"{name}: not in the manifest" for name in actual.keys() - artifact.files.keys()]
    faults += [f"{name}: bytes differ" for name in artifact.files.keys() & actual.keys() if artifact.files[name] != actual[name]]
    if artifact.manifest:
        if (artifact.path / MANIFEST).read_bytes() != spelled(artifact.manifest).encode():
            faults.append(f"{MANIFEST}: bytes differ")
        faults += [f"{MANIFEST}: {fault}" for fault in _contradictions(artifact.manifest)]
    return sorted(faults)


def _other_kind(m: dict[str, Any]) -> str | None:
    """What is wrong with a manifest's kind, or an ancestor's, if anything."""
    made = kind_made(m["stage"], m["settings"])
    return None if made in (None, m["kind"]) else f"its kind is '{m['kind']}', and '{m['stage']}' by these settings makes '{made}'"


def _contradictions(manifest: dict[str, Any]) -> Iterator[str]:
    """Where a manifest, sealed anew after a change, still contradicts itself: keys that do not follow from what they stand for."""
    for key, m in {**manifest["ancestors"], manifest["key"]: manifest}.items():
        if key_of(m["stage"], m["version"], m["settings"], {p["role"]: p["key"] for p in m["parents"]}) != key:
            yield f"the key of '{m['stage']}' does not follow from its stage, settings and parents"
        if fault := _other_kind(m):
            yield f"the record of '{m['stage']}': {fault}"
        for parent in m["parents"]:
            record = manifest["ancestors"].get(parent["key"])
            if record and (parent["kind"], parent["stage"]) != (record["kind"], record["stage"]):
                yield f"'{parent['role']}' under '{m['stage']}' is another kind of artifact than its own record says"
            if "files" in parent and content_key(parent["files"]) != parent["key"]:
                yield f"the key of '{parent['role']}' under '{m['stage']}' does not follow from its files"
            if "files" not in parent and parent["key"] not in manifest["ancestors"]:
                yield f"the record of '{parent['role']}' under '{m['stage']}' is missing"


def seal(
    out: Path,
    *,
    stage: str,
    kind: str,
    version: int,
    settings: dict[str, Any],
    inputs: dict[str, Artifact],
    metrics: dict[str, Any],
    seconds: float,
    private: bool = False,
) -> None:
    """Write manifest.json, the last file of an artifact, into the folder `out`.

    private: whether it is marked private, see private.py. Raises ProofFailed where a figure of `metrics` is no number: what was measured makes no sense, and JSON has no word for it.
    """
    if odd := next(_not_numbers(metrics), None):
        raise ProofFailed(
            f"what was measured makes no sense: {odd[0]} is {odd[1]}",
            where=str(out),
        )
    manifest = {
        "schema": SCHEMA,
        "stage": stage,
        "kind": kind,
        "version": version,
        "key": key_of(stage, version, settings, {role: a.key for role, a in inputs.items()}),
        "settings": settings,
        "parents": parent_records(inputs, out.parent),
        "metrics": metrics,
        "seconds": round(seconds, 2),
        "boardwalk": __version__,
        "git": git_revision(),
        "packages": package_versions(),
        "files": hash_files(out),
        "ancestors": ancestors_of(inputs),
    }
    if private:
        manifest["private"] = True
    manifest["seal"] = seal_of(manifest)
    write_json(out / MANIFEST, manifest)


def ancestors_of(inputs: dict[str, Artifact]) -> dict[str, dict[str, Any]]:
    """{key: what a manifest carries of an ancestor}: stage, kind, version, settings, parents, and the mark of what is private."""
    ancestors: dict[str, dict[str, Any]] = {}
    for parent in inputs.values():
        if parent.manifest:
            ancestors |= parent.manifest["ancestors"]
            ancestors[parent.key] = {
                k: parent.manifest[k] for k in ("stage", "kind", "version", "settings", "parents", "private") if k in parent.manifest
            }
    return ancestors


def _not_numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, value) of every figure that is infinite or not a number."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value


def parent_records(inputs: dict[str, Artifact], folder: Path) -> list[dict[str, Any]]:
    """What a manifest keeps of each input: role, key, kind, stage, path as seen from `folder`, and the hashes of an outside one."""
    return [
        {"role": role, "key": a.key, "kind": a.kind, "stage": a.stage, "path": _relative(a.path, folder)}
        | ({"files": a.files} if a.manifest is None else {})
        for role, a in inputs.items()
    ]


def _relative(path: Path, start: Path) -> str:
    """Paths beside the run are kept relative, so that a moved outputs folder keeps its chain."""
    path, start = path.resolve(), start.resolve()
    return os.path.relpath(path, start) if path.is_relative_to(start.parent) else str(path)


@functools.cache
def package_versions() -> dict[str, str]:
    return {d: importlib.metadata.version(d) for d in PACKAGES if importlib.util.find_spec(d)}


def git_revision() -> str | None:
    """Commit of this checkout, with -dirty when files differ from it; None outside git."""
    try:
        done = subprocess.run(
            ["git", "-C", ROOT, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"], capture_output=True, text=True, timeout=10
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


@contextlib.contextmanager
def building(
    path: Path, key: str, *, resumes: Callable[[Path], bool] | None = None, draft: dict[str, Any] | None = None, force: bool = False
) -> Iterator[Path]:
    """A folder `<name>.partial` to build in, held by one process; when the block ends well it is renamed to `path`.

    A partial folder left by a crash is continued if the stage resumes and its key is the same; else it is cleared, and that is said.
    resumes: tells whether a partial folder holds work worth keeping; when the block raises, one that does not is cleared at once.
    draft: what of the manifest is known beforehand, kept beside the folder for `unfinished`.
    force: what this program did not make is removed too, and that is said; without it Moved is raised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, note = path.with_name(f"{path.name}.partial"), _note(path)
    replaced = path.with_name(f".{path.name}.replaced")
    with held(path.with_name(f".{path.name}.lock"), path):
        if is_finished(replaced) and not path.exists():
            os.replace(replaced, path)  # killed between the two renames below
        for foreign in in_the_way(path):
            if not force:
                raise Moved(f"'{foreign}' is nothing that Boardwalk finished or began, so it stays", fix=NOT_OURS)
            say(f"force=true: removes {foreign}, {described(foreign)}")
            remove(foreign)
        before = unfinished(path)
        if partial.exists() and not (resumes and before and before.key == key):
            say(f"clearing an unfinished {partial.name} of an earlier run")
            remove(partial)
        write_json(note, {"key": key, **(draft or {})})  # first, so that the folder is known as ours
        partial.mkdir(exist_ok=True)
        try:
            yield partial
        except Exception:
            if not (resumes and resumes(partial)):
                shutil.rmtree(partial, ignore_errors=True)
                note.unlink(missing_ok=True)
            raise
        if not is_finished(partial):
            raise RuntimeError(f"{partial} was left without a manifest")
        if is_finished(replaced):
            remove(replaced)
        if path.exists():
            os.replace(path, replaced)
        os.replace(partial, path)
        remove(replaced)
        note.unlink(missing_ok=True)


def link(found: Artifact, path: Path) -> None:
    """Have a finished artifact at another place too: its files are linked where the disk can, as what is finished never changes, else copied."""
    if path.exists():
        raise Moved(f"'{path}' is in the way", fix=NOT_OURS)
    with building(path, found.key) as out:
        shutil.copytree(found.path, out, copy_function=_linked, dirs_exist_ok=True)


def _linked(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def in_the_way(path: Path) -> list[Path]:
    """What stands where an artifact, or its `.partial`, is to be, and was neither finished nor begun by this program: a user's own files, an artifact
    whose manifest is lost, a link. An empty folder is in nobody's way."""
    partial, found = path.with_name(f"{path.name}.partial"), []
    if (path.is_symlink() and not is_finished(path)) or (path.exists() and not is_finished(path) and not _is_empty(path)):
        found.append(path)
    if partial.is_symlink() or (partial.exists() and not _note(path).is_file() and not _is_empty(partial)):
        found.append(partial)
    return found


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def described(path: Path) -> str:
    """What is at a path, in a few words."""
    if path.is_symlink():
        return f"a link to {os.readlink(path)}, which stays"
    if path.is_file():
        return f"a file of {size(path.stat().st_size)}"
    sizes = [file.lstat().st_size for file in path.rglob("*") if not file.is_dir()]
    return f"{len(sizes)} files, {size(sum(sizes))}"


def unfinished(path: Path) -> Artifact | None:
    """What is known of the unfinished `<name>.partial` beside `path`: its key and the draft it was begun with; None where there is none."""
    partial = path.with_name(f"{path.name}.partial")
    if not partial.is_dir() or not _note(path).is_file():
        return None
    try:
        draft = json.loads(_note(path).read_text())
        return Artifact(partial, "unfinished", draft["key"], draft, {})
    except (ValueError, KeyError, TypeError):
        return None


def _note(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial.key")


def replaced_since(a: Artifact) -> str | None:
    """Which ancestor of this artifact was made anew since, in words; None when the chain that is on this disk still holds together."""
    for parent in (a.manifest or {}).get("parents", []):
        path = a.path_of(parent)
        if "files" in parent or not is_finished(path):
            continue
        now = open_artifact(path)
        if now.key != parent["key"]:
            return f"'{a.path}' was made from an earlier '{path}', which was made anew since"
        if deeper := replaced_since(now):
            return deeper
    return None


@contextlib.contextmanager
def held(lock: Path, path: Path) -> Iterator[None]:
    """Holds `path` against other processes; the kernel lets go of it with the process. The lock's file says who holds it and since when."""
    with open(lock, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(100).strip() or "another process"
            raise Busy(f"{holder} is making this artifact", where=str(path), fix=["wait until it has ended", "run=OTHER_NAME"]) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}, since {datetime.now():%Y-%m-%d %H:%M:%S},")
        file.flush()
        yield
