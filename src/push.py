"""Share a finished artifact on the hub: verified first, as a repository that only you see, and never where its lineage holds data marked private.

    python -m src.push outputs/mine/merge id=people/name [private=false]

Refused are also changed bytes, pickles, keys, and paths of this machine in the manifest. The token is the hub's own (hf auth login) or HF_TOKEN, the hub
HF_ENDPOINT's. The same command goes on where one was cut off: what has arrived is not sent again. docs/sharing.md has more.
"""

import contextlib
import mmap
import os
import re
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src import ROOT
from src.core import artifact, card, compose, private, stage
from src.core.artifact import MANIFEST, REMADE, Artifact
from src.core.card import HUB_NAME
from src.core.descent import name_of
from src.core.errors import BadData, ConfigError, MissingInput, NoAnswer, Tampered, UserError, Withheld, WrongKind
from src.core.files import flatten, read_json, spelled
from src.core.log import on_terminal, out, say, size, table, warn
from src.settings.verbs import PushVerb

KINDS = ("dataset", "adapter", "model", "quantized", "bundle")
PICKLES = (".pt", ".pth", ".pkl", ".pickle", ".ckpt")
PICKLE = re.compile(rb"\x80[\x02-\x05][\x95}\](cX\x8a]")
"""how a pickle begins: its protocol, and an operation that one begins with"""
SHORTEST_KEY = 16
"""characters of what the environment keeps secret, below which it could stand in a file by chance"""
TOKENS = {b"hf_": rb"hf_[A-Za-z0-9]{30,}", b"ghp_": rb"ghp_[A-Za-z0-9]{36}", b"sk-": rb"sk-[A-Za-z0-9_-]{40,}"}
"""beginning of a key -> the whole of it: the hub's, GitHub's, OpenAI's"""
TEXT = (".json", ".md", ".log", ".sh", ".yaml", ".cfg", ".py", "")
"""endings of files beside the manifest that may tell of folders of this machine"""
LARGEST_TEXT = 1 << 20
AGAIN = "run the same command again: what has arrived is not sent again"


def push(overrides: list[str]) -> int:
    cfg = compose.compose("push", compose.with_path(overrides, "source"), PushVerb)
    if not HUB_NAME.fullmatch(cfg.id) or "/" not in cfg.id:
        raise ConfigError(f"id={cfg.id} is no name on the hub, which is people/name", fix="id=PEOPLE/NAME")
    found = find(Path(cfg.source))
    refuse_private(found)
    manifest = shared(found)
    refuse_files(found)
    if faults := artifact.verify(found):
        raise Tampered("\n".join([f"{len(faults)} differences from what was sealed:", *faults[:20]]), where=str(found.path), fix=REMADE)
    tell(cfg, found, manifest)
    if cfg.dry_run:
        return 0
    with hub_faults():
        send(cfg, found, manifest)
    return 0


def find(path: Path) -> Artifact:
    if not artifact.is_finished(path):
        raise MissingInput(
            "not a finished artifact: no manifest.json", where=str(path), fix="python -m src.push outputs/default/merge id=people/name"
        )
    found = artifact.open_artifact(path)
    if found.kind not in KINDS:
        parent = next((found.path_of(p) for p in (found.manifest or {})["parents"] if p["kind"] in KINDS), None)
        raise WrongKind(
            f"what is shared is {', '.join(KINDS[:-1])} or {KINDS[-1]}, not {found.kind}",
            where=str(path),
            fix=f"give {parent}, which it is of" if parent else (),
        )
    return found


def refuse_private(found: Artifact) -> None:
    """Raises Withheld where it is marked private, or something that it was made from."""
    if marks := private.marked(found):
        raise Withheld(
            "it was made from what is marked private:\n" + "\n".join(f"  {where}" for where in marks.values()),
            where=str(found.path),
            fix=[
                "make it from data that may be shared",
                "where the mark is a mistake: data.private=false force=true, with the command that made the dataset",
            ],
        )


def shared(found: Artifact) -> dict[str, Any]:
    """The manifest as others get it: of what lay elsewhere on this machine the name in place of its path, and sealed anew; keys, settings and hashes stay.

    Raises Withheld where it still names a folder of this machine.
    """
    assert found.manifest is not None
    ancestors = {key: record | {"parents": _named(record["parents"])} for key, record in found.manifest["ancestors"].items()}
    manifest = found.manifest | {"parents": _named(found.manifest["parents"]), "ancestors": ancestors}
    manifest["seal"] = artifact.seal_of(manifest)
    for name, value in flatten(manifest).items():
        if any(folder in str(value) for folder in _folders(found)):
            raise Withheld(
                f"its manifest names a folder of this machine: {name} = {value}",
                where=str(found.path / MANIFEST),
                fix=f"make it again with {name.rpartition('settings.')[2]} as a path below the project's folder, or without it",
            )
    return manifest


def _named(parents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [parent | ({"path": name_of(Path(parent["path"]))} if Path(parent["path"]).is_absolute() else {}) for parent in parents]


def _folders(found: Artifact) -> set[str]:
    """Beginnings of paths that tell of this machine and its user."""
    return {f"{folder}/" for folder in (Path.home(), ROOT, found.path.resolve().parent.parent) if folder != Path("/")}


def refuse_files(found: Artifact) -> None:
    """Raises WrongKind for a pickle, Withheld for a key in a file; says which files tell of folders here."""
    telling = []
    for name in found.files:
        path = found.path / name
        if is_pickle(path):
            raise WrongKind(f"'{name}' is a pickle, which can run any code when it is opened", where=str(path))
        if held := key_in(path):
            raise Withheld(f"'{name}' holds {held}", where=str(path), fix="take it out of what this was made from, and make it again")
        if path.suffix in TEXT and path.stat().st_size < LARGEST_TEXT:
            text = path.read_text("utf-8", errors="replace")
            telling += [name] * any(folder in text for folder in _folders(found))
    if telling:
        warn(f"{', '.join(telling)} of {found.path} names folders of this machine, which who gets it can read")


def is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        begins = file.read(4)
    if path.suffix in PICKLES or PICKLE.match(begins):
        return True
    return begins.startswith(b"PK\3\4") and zipfile.is_zipfile(path) and any(n.endswith(".pkl") for n in zipfile.ZipFile(path).namelist())


def key_in(path: Path) -> str | None:
    """In words, a key that a file holds: one that the environment keeps secret, or what looks like one."""
    if not path.stat().st_size:
        return None
    secrets = {name: value for name, value in os.environ.items() if stage.SECRET.search(name) and len(value) >= SHORTEST_KEY}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for name, value in sorted(secrets.items()):
            if content.find(value.encode()) >= 0:
                return f"what {name} is in the environment"
        for begins, whole in TOKENS.items():
            at = content.find(begins)
            while at >= 0:
                if re.match(whole, content[at : at + 100]):
                    return f"what looks like a key: {begins.decode()}..."
                at = content.find(begins, at + 1)
    return None


def tell(cfg: PushVerb, found: Artifact, manifest: dict[str, Any]) -> None:
    """The plan, before anything is sent."""
    sizes = {name: entry["size"] for name, entry in found.files.items()} | {MANIFEST: len(spelled(manifest).encode())}
    out(table(["file", "size"], [[name, size(count)] for name, count in sizes.items()], right=(1,)))
    seen = "which only you and who you let in see" if cfg.private else "which EVERYONE sees"
    say(
        f"push: {'would send' if cfg.dry_run else 'sends'} {len(sizes)} files, {size(sum(sizes.values()))}, to the {_repo_type(found)} {cfg.id}, {seen}"
    )
    if card.NAME not in sizes:
        say("push: it has no README.md, which the hub shows as its card; the command that made it, with force=true, writes one")


def _repo_type(found: Artifact) -> str:
    return "dataset" if found.kind == "dataset" else "model"


def send(cfg: PushVerb, found: Artifact, manifest: dict[str, Any]) -> None:
    """One commit with all files of the artifact, and without those that an earlier one brought there and this one lacks."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.utils import disable_progress_bars

    if not on_terminal():
        disable_progress_bars()
    if not (token := get_token()):
        raise MissingInput(
            "there is no token for the hub",
            where=cfg.id,
            fix=["hf auth login keeps one on this machine", "HF_TOKEN in the environment holds one"],
        )
    api, kind = HfApi(token=token), _repo_type(found)
    api.create_repo(cfg.id, repo_type=kind, private=cfg.private, exist_ok=True)
    there = api.repo_info(cfg.id, repo_type=kind)
    if cfg.private and not there.private:
        raise Withheld(
            f"{cfg.id} is there already, and everyone sees it",
            where=cfg.id,
            fix=["private=false shares it with everyone", "id=PEOPLE/OTHER_NAME"],
        )
    if not cfg.private and there.private:
        warn(f"{cfg.id} is there already, and private; it stays so until its page on the hub says otherwise")
    operations: list[Any] = [CommitOperationAdd(name, found.path / name) for name in found.files]
    operations.append(CommitOperationAdd(MANIFEST, spelled(manifest).encode()))
    gone = _earlier(api, cfg.id, kind, {file.rfilename for file in getattr(there, "siblings", None) or ()}) - found.files.keys()
    operations += [CommitOperationDelete(name) for name in sorted(gone)]
    if gone:
        say(f"push: removes there what an earlier push brought: {', '.join(sorted(gone))}")
    message = f"{found.stage} {found.key[:12]}, by Boardwalk"
    done = api.create_commit(cfg.id, operations, commit_message=message, repo_type=kind)
    out(f"push: {done.commit_url}")


def _earlier(api: Any, id: str, kind: str, names: set[str]) -> set[str]:
    """Files of a repository that an artifact pushed there earlier lists."""
    if MANIFEST not in names:
        return set()
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(BadData):
        listed = read_json(Path(api.hf_hub_download(id, MANIFEST, repo_type=kind, local_dir=folder))).get("files")
        return names & set(listed if isinstance(listed, dict) else ())
    return set()


@contextlib.contextmanager
def hub_faults() -> Iterator[None]:
    """What the hub and the way to it fail with, as a user's errors."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except UserError:
        raise
    except OfflineModeIsEnabled:
        raise NoAnswer("the hub is not asked: HF_HUB_OFFLINE is set", where=constants.ENDPOINT, fix="unset HF_HUB_OFFLINE") from None
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename:  # of this machine's disk
            raise
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        said = (str(cause).strip() or type(cause).__name__).replace(get_token() or "\0", "***")
        code = getattr(getattr(cause, "response", None), "status_code", None) if isinstance(cause, HfHubHTTPError) else None
        if code in (401, 403):
            raise NoAnswer(
                f"the hub refuses the token: {said}",
                where=constants.ENDPOINT,
                fix=["hf auth login, with a token that may write to that name", "id=YOUR_NAME/NAME"],
            ) from None
        if code < 500 if code else isinstance(cause, ValueError):
            raise NoAnswer(f"the hub does not take it: {said}", where=constants.ENDPOINT) from None
        raise NoAnswer(
            f"the hub was not reached, or broke off: {said}", where=constants.ENDPOINT, fix=[AGAIN, "HF_ENDPOINT names another hub"]
        ) from None


if __name__ == "__main__":
    stage.main_uncomposed("push", __doc__, PushVerb, push)
