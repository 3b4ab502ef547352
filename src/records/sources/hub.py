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

from src.core.errors import AGAIN, BadData, ConfigError, MissingInput, UserError, WrongKind
from src.core.log import say

ANYTHING = "data.path=FILE names a file, a folder, a glob such as 'chats/*.jsonl', or a data set of the hub"
ONE_FILE = "data.path=FILE names one of its files"
ABOUT = ("README.md", "dataset_infos.json", ".huggingface.yaml")
"""files from which datasets takes what subsets and splits there are"""
_HF_PATH = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")


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
    """The files of one subset and split of a folder laid out as on the hub, others of which may be missing, as after a download of one.

    Raises ConfigError or MissingInput where it has none such, WrongKind where it needs code, BadData where its README makes no sense.
    """
    from datasets.data_files import get_data_patterns, resolve_pattern, sanitize_patterns
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if (folder / f"{folder.name}.py").is_file():
        raise _needs_code(str(folder), remote=False)
    with _user_faults(str(folder), remote=False):
        subsets = MetadataConfigs.from_dataset_card_data(DatasetCard.load(folder / "README.md").data)
        name = subset or (subsets.get_default_config_name() if len(subsets) > 1 else next(iter(subsets)))
        if name not in subsets:
            raise _no_subset(str(folder), subset, list(subsets))
        base = str(folder / str(subsets[name].get("data_dir") or ""))
        patterns = sanitize_patterns(subsets[name]["data_files"]) if "data_files" in subsets[name] else get_data_patterns(base)
        if split not in patterns:
            raise no_split(str(folder), split, sorted(map(str, patterns)))
        if elsewhere := next(
            (pattern for pattern in patterns[split] if "://" in pattern or pattern.startswith("/") or ".." in pattern), None
        ):
            raise _elsewhere(str(folder), elsewhere)
        return [
            folder / Path(found).relative_to(os.path.abspath(folder))
            for pattern in patterns[split]
            for found in resolve_pattern(pattern, os.path.abspath(base))
        ]


def fetched(id: str, *, subset: str | None, split: str, revision: str | None, download: bool) -> tuple[Path, str, list[Path] | None]:
    """The folder in the hub's cache that holds the files of one subset and split, each downloaded once, the commit they are of, and the files; None in
    place of these where nothing was downloaded now, and the folder has to tell.

    Raises MissingInput where it is not in the cache and the hub does not give it, or has no such subset or split; WrongKind where it needs code.
    """
    import datasets
    from huggingface_hub import hf_hub_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import EntryNotFoundError

    if not download:
        say(f"looks for {id} among the data sets downloaded before, since a dry run downloads nothing")
    if HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE or not download:
        return *_earlier(id, subset, revision), None
    try:
        by_split = _listed(id, subset, revision)
    except MissingInput:
        with contextlib.suppress(UserError):
            folder, commit = _earlier(id, subset, revision)
            say(f"the hub does not give {id} now; takes what was downloaded before")
            return folder, commit, None
        raise
    commit, names = _of_split(id, by_split, split)
    with _user_faults(id, remote=True):
        for name in ABOUT:
            with contextlib.suppress(EntryNotFoundError):
                hf_hub_download(id, name, repo_type="dataset", revision=revision)
        paths = [Path(hf_hub_download(id, name, repo_type="dataset", revision=commit)) for name in names]
    return paths[0].parents[names[0].count("/")], commit, paths


def _earlier(id: str, subset: str | None, revision: str | None) -> tuple[Path, str]:
    """The folder of what was downloaded, or prepared by `datasets.load_dataset`, earlier, and its commit. Raises MissingInput where there is none."""
    import datasets
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(id, repo_type="dataset", revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError) as error:
        if not datasets.config.HF_HUB_OFFLINE:
            raise _not_there(id, error) from error
        with _user_faults(id, remote=True):
            folder = Path(datasets.load_dataset_builder(id, subset, revision=revision).cache_dir)
    return folder, folder.name


def _not_there(id: str, error: Exception) -> MissingInput:
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return MissingInput(
        f"no file or folder '{id}' here, and the hub did not give a data set of that name: {first}",
        where=id,
        fix=[f"hf download {id} --repo-type dataset fetches it, or says why it cannot", ANYTHING],
    )


def _listed(id: str, subset: str | None, revision: str | None) -> dict[str, list[str]]:
    """{split: addresses of its files} of one subset, as datasets lists them."""
    import datasets

    with tempfile.TemporaryDirectory() as cache, _user_faults(id, remote=True, subset=subset):
        builder = datasets.load_dataset_builder(id, subset, revision=revision, cache_dir=cache)
        return {str(split): [str(name) for name in names] for split, names in (builder.config.data_files or {}).items()}


def _of_split(id: str, by_split: dict[str, list[str]], split: str) -> tuple[str, list[str]]:
    """The commit, and the names of one split's files within the data set."""
    if not by_split.get(split):
        raise no_split(id, split, sorted(by_split))
    found = [(name, _HF_PATH.fullmatch(name)) for name in by_split[split]]
    if elsewhere := next((name for name, match in found if not match or match[1] != id), None):
        raise _elsewhere(id, elsewhere)
    matches = [match for _, match in found if match]
    return matches[0][2], [match[3] for match in matches]


def no_split(where: str, split: str, there: list[str]) -> MissingInput:
    ways = [f"data.hub_split={name}" for name in there] or [ONE_FILE]
    return MissingInput(f"the data set has no split '{split}'; it has {', '.join(there) or 'none'}", where=where, fix=ways)


def _no_subset(where: str, subset: str | None, there: list[str]) -> ConfigError:
    what = f"no subset '{subset}'; it has" if subset else "several subsets:"
    return ConfigError(f"the data set has {what} {', '.join(there[:20])}", where=where, fix=[f"data.subset={name}" for name in there[:3]])


def _elsewhere(where: str, name: str) -> BadData:
    return BadData(f"its README names a file outside of it: {name}", where=where, fix="data.path=FILE names the file itself")


def _needs_code(where: str, remote: bool) -> WrongKind:
    converted = ["data.revision=refs/convert/parquet, where the hub keeps one as Parquet"] * remote
    return WrongKind("the data set is made by a loading script, which could run anything", where=where, fix=[ONE_FILE, *converted])


@contextlib.contextmanager
def _user_faults(where: str, *, remote: bool, subset: str | None = None) -> Iterator[None]:
    """The errors of datasets and the hub's client as ours."""
    try:
        yield
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, UserError | MemoryError) or getattr(error, "errno", None) in (errno.ENOSPC, errno.EACCES):
            raise
        if isinstance(error, RuntimeError) and "script" in text:
            raise _needs_code(where, remote) from None
        if isinstance(error, ValueError) and ("BuilderConfig" in text or "Config name" in text):
            raise _no_subset(where, subset, re.findall(r"'([^']+)'", str(error).partition("[")[2].partition("]")[0])) from None
        if isinstance(error, FileNotFoundError) and not remote:
            raise MissingInput(
                f"files that its README names are not there: {text}",
                where=where,
                fix=[AGAIN, ONE_FILE],
            ) from None
        if remote:
            raise _not_there(where, error) from error
        raise BadData(f"its README cannot be used: {text}", where=where, fix=ONE_FILE) from error
