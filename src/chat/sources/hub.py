"""Data sets of the Hugging Face hub: which files a subset and split of one consist of is `datasets`' to say, and the files lie in the hub's own cache.

No code of a data set runs. HF_HOME, HF_HUB_CACHE, HF_HUB_OFFLINE, HF_DATASETS_OFFLINE, HF_ENDPOINT and HF_TOKEN work as they do for the hub's own tools.
"""

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from src.core.errors import BadData, ConfigError, MissingInput, UserError, WrongKind
from src.core.log import say

ABOUT = ("README.md", "dataset_infos.json", ".huggingface.yaml")
"""files from which datasets takes what subsets and splits there are"""
_HF_PATH = re.compile(r"hf://datasets/[^@]+@([^/]+)/(.+)")


def describes_itself(folder: Path) -> bool:
    """Whether a folder's README says in its head which files are which subset and split, or the folder has a loading script."""
    readme = folder / "README.md"
    if (folder / f"{folder.name}.py").is_file():
        return True
    if not readme.is_file():
        return False
    with open(readme, encoding="utf-8", errors="replace") as file:
        head = file.read(1 << 16)
    return head.startswith("---") and bool(re.search(r"^(configs|data_files):", head.split("\n---", 1)[0], re.M))


def files_of(folder: Path, *, subset: str | None, split: str) -> list[Path]:
    """The files of one subset and split of a folder laid out as on the hub. Raises MissingInput where it has none such, WrongKind where it needs code."""
    paths = [Path(os.path.abspath(name)) for name in _listed(str(folder), subset, split, None)]
    if outside := next((path for path in paths if not path.is_relative_to(os.path.abspath(folder))), None):
        raise BadData(f"its README names a file outside of it: {outside}", where=str(folder), fix="data.path=FILE names the file itself")
    return [folder / path.relative_to(os.path.abspath(folder)) for path in paths]


def fetched(id: str, *, subset: str | None, split: str, revision: str | None, download: bool) -> tuple[Path, str]:
    """The folder in the hub's cache that holds the files of one subset and split, each downloaded once, and the commit they are of.

    Raises MissingInput where it is not in the cache and the hub does not give it, or has no such subset or split; WrongKind where it needs code.
    """
    import datasets
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    if not download:
        say(f"looks for {id} among the data sets downloaded before, since a dry run downloads nothing")
    if HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE or not download:
        try:
            folder = Path(snapshot_download(id, repo_type="dataset", revision=revision, local_files_only=True))
            return folder, folder.name
        except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
            if not datasets.config.HF_HUB_OFFLINE:
                raise _not_there(id, error) from error
        return _prepared(id, subset, revision)
    listed = [_HF_PATH.fullmatch(name) for name in _listed(id, subset, split, revision)]
    parts = [match[2] for match in listed if match]
    with _user_faults(id, subset, remote=True):
        for name in ABOUT:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(id, name, repo_type="dataset", revision=revision)
        commit = next(match[1] for match in listed if match)
        paths = [Path(hf_hub_download(id, name, repo_type="dataset", revision=commit)) for name in parts]
    return paths[0].parents[parts[0].count("/")], commit


def _prepared(id: str, subset: str | None, revision: str | None) -> tuple[Path, str]:
    """The folder of Arrow files that `datasets.load_dataset` made of the data set earlier."""
    import datasets

    with _user_faults(id, subset, remote=True):
        folder = Path(datasets.load_dataset_builder(id, subset, revision=revision).cache_dir)
    return folder, folder.name


def _not_there(id: str, error: Exception) -> MissingInput:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MissingInput(
        f"no file or folder '{id}' here, and the hub did not give a data set of that name: {first}",
        where=id,
        fix=["data.path=FILE names a file that is here", "check the name, the network and, for gated data sets, HF_TOKEN"],
    )


def _listed(where: str, subset: str | None, split: str, revision: str | None) -> list[str]:
    """Paths or addresses of the files of one subset and split, as datasets lists them."""
    import datasets

    with tempfile.TemporaryDirectory() as cache, _user_faults(where, subset, remote=not Path(where).is_dir()):
        builder = datasets.load_dataset_builder(where, subset, revision=revision, cache_dir=cache)
        by_split = builder.config.data_files or {}
    if split not in by_split:
        names = sorted(map(str, by_split))
        raise MissingInput(
            f"the data set has no split '{split}'; it has {', '.join(names) or 'none'}",
            where=where,
            fix=[f"data.hub_split={name}" for name in names] or ["data.path=FILE names one of its files"],
        )
    return [str(name) for name in by_split[split]]


@contextlib.contextmanager
def _user_faults(where: str, subset: str | None, *, remote: bool) -> Iterator[None]:
    """The errors of datasets and the hub's client as ours."""
    try:
        yield
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, UserError | MemoryError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise
        if isinstance(error, RuntimeError) and "script" in text:
            raise WrongKind(
                "the data set is made by a loading script, which could run anything",
                where=where,
                fix=["data.path=FILE names the data itself", "data.revision=refs/convert/parquet, where the hub keeps one as Parquet"],
            ) from None
        if isinstance(error, ValueError) and ("BuilderConfig" in text or "Config name" in text):
            names = re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])
            what = f"no subset '{subset}'; it has" if subset else "several subsets:"
            raise ConfigError(
                f"the data set has {what} {', '.join(names[:20])}", where=where, fix=[f"data.subset={name}" for name in names[:3]]
            ) from None
        if remote:
            raise _not_there(where, error) from error
        raise BadData(f"its README cannot be used: {text}", where=where, fix="data.path=FILE names one of its files") from error
