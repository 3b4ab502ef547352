"""What `data.path` names: a file, a folder, a glob, a folder of `save_to_disk` or a data set of the Hugging Face hub, as files to read in order."""

import glob
import os
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from src.core.errors import AGAIN, BadData, MissingInput
from src.core.files import read_json
from src.records.sources import hub

SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".tab", ".parquet", ".pq", ".arrow", ".feather", ".txt")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".zstd", ".zip")
NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "manifest.json", "requirements.txt", "license.txt")
"""files of folders of data that are about it"""
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""what splits are called in the names of files and folders, as `datasets` reads them"""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Found:
    """Files of records.

    root: the folder they lie in, or the one file. files: below it, in the order they are read. left: what is there and not read. revision: the commit of a
    data set of the hub.
    """

    root: Path
    files: tuple[Path, ...]
    left: tuple[str, ...] = ()
    revision: str | None = None


def found(given: str, *, subset: str | None, split: str, revision: str | None, download: bool) -> Found:
    """The files that `given` names.

    subset, split: of a data set of several; revision: of one on the hub; download: False looks only at what was downloaded before.
    Raises MissingInput where there is nothing of that name or nothing to read in it; BadData for a folder that needs code of its own.
    """
    path = Path(given)
    if path.is_dir():
        return _folder(path, subset, split)
    if path.exists() or path.is_symlink():
        if not path.is_file():
            what = "not a file" if path.exists() else "a link that leads nowhere, or to itself"
            raise MissingInput(what, where=given, fix=hub.ANYTHING)
        return Found(path, (path,))
    if glob.has_magic(given):
        return _matching(given)
    if HUB_ID.fullmatch(given) and not _names_data(path):
        folder, commit, files = hub.fetched(given, subset=subset, split=split, revision=revision, download=download)
        inside = Found(folder, tuple(files)) if files is not None else _folder(folder, subset, split)
        return replace(inside, revision=commit)
    raise MissingInput("no such file", where=given, fix=hub.ANYTHING)


def _names_data(path: Path) -> bool:
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    return any(suffix in SUFFIXES for suffix in suffixes) and suffixes[-1] in SUFFIXES + PACKED


def _matching(pattern: str) -> Found:
    files = sorted(path for name in glob.glob(pattern, recursive=True) if (path := Path(name)).is_file())
    if not files:
        there = next(place for place in (*Path(pattern).parents, Path()) if not glob.has_magic(str(place)) and place.is_dir())
        raise MissingInput("no file matches", where=pattern, fix=f"ls {shlex.quote(str(there))} shows what is there")
    return Found(Path(os.path.commonpath([file.parent for file in files])), tuple(files))


def _folder(folder: Path, subset: str | None, split: str) -> Found:
    """The files of one split of a folder of data."""
    if (folder / "dataset_dict.json").is_file():
        names = read_json(folder / "dataset_dict.json").get("splits")
        splits = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
        if split not in splits:
            raise hub.no_split(str(folder), split, splits)
        return _saved(folder / split, folder, [f"split {name}" for name in splits if name != split])
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return _saved(folder, folder, [])
    if hub.describes_itself(folder):
        files = hub.files_of(folder, subset=subset, split=split)
        return Found(folder, tuple(files))
    if subset is not None:
        raise MissingInput(f"the folder has no subsets, so none called '{subset}'", where=str(folder), fix="data.subset=null")
    files = [path for path in _walk(folder) if _names_data(path) and path.name.lower() not in NO_DATA]
    if not files:
        raise MissingInput(
            "the folder holds no file of records",
            where=str(folder),
            fix=f"data.path=FILE names one; of a folder those named {' '.join(SUFFIXES)} are read, packed or not",
        )
    return _split_by_name(folder, files, split)


def _walk(folder: Path) -> list[Path]:
    """The files below a folder that are not hidden, in order; folders that are links are not entered, so none is entered twice."""
    paths: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        paths += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in paths if path.is_file()]


def _split_by_name(folder: Path, files: list[Path], split: str) -> Found:
    """Where the names of files tell their splits, those of the one that is asked for; else all."""
    splits = {file: split_in(file.relative_to(folder).as_posix()) for file in files}
    there = sorted({name for name in splits.values() if name})
    if not there:
        return Found(folder, tuple(files))
    chosen = [file for file in files if splits[file] == split]
    if not chosen:
        raise hub.no_split(str(folder), split, there)
    return Found(folder, tuple(chosen), tuple(file.relative_to(folder).as_posix() for file in files if splits[file] != split))


def split_in(name: str) -> str | None:
    """The split that a file's path names, if any: train of data/train-00000-of-00002.parquet."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((split for split, called in SPLIT_WORDS.items() if any(word in called for word in words)), None)


def _saved(folder: Path, root: Path, left: list[str]) -> Found:
    """The Arrow files that a folder of `save_to_disk` lists, in their order."""
    listed = read_json(folder / "state.json").get("_data_files")
    names = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name and (folder / name).is_file() for name in names):
        raise BadData("its state.json lists files that are not beside it", where=str(folder), fix=AGAIN)
    return Found(root, tuple(folder / str(name) for name in names), tuple(left))
