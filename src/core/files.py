"""JSON with one spelling, hashes by content, and files that are either the old one or the whole new one."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.core.errors import AGAIN, BadData, MissingInput, UserError

Files = dict[str, dict[str, Any]]
"""{relative path: {"sha256": hex, "size": bytes}}"""
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


_one_spelling = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8."""
    return _one_spelling(value).encode()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path, cache: "HashCache | None" = None, only: Sequence[Path] | None = None) -> Files:
    """{relative path: {"sha256", "size"}} of every regular file under root (or of root itself, a file), sorted; or of those in `only`, in their order.

    cache: earlier hashes, reused while path, size, modification time and inode all stay the same.
    Hidden files and folders and Python's caches are not content.
    """
    known = cache.read() if cache else {}
    fresh = dict(known)
    found = {}
    for path in [root] if root.is_file() else _walk(root) if only is None else only:
        stat = path.stat()
        mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        digest = known.get(mark) or sha256(path)
        fresh[mark] = digest
        found[path.name if path == root else path.relative_to(root).as_posix()] = {"sha256": digest, "size": stat.st_size}
    if cache and fresh != known:
        cache.write(fresh)
    return found


def _walk(root: Path) -> list[Path]:
    paths = []
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        paths += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    for path in paths:
        if not str(path).isascii() and any("\ud800" <= letter <= "\udfff" for letter in str(path)):
            raise BadData("a file's name is not UTF-8 text", where=str(path), fix="rename it")
    return [path for path in paths if path.is_file()]


def _raise(error: OSError) -> None:
    """A folder that cannot be listed is not an empty one."""
    raise error


@dataclass(frozen=True)
class HashCache:
    """A JSON file of hashes. It costs time, nothing else: one that is damaged or not readable is none, and one that cannot be written stays as it was.

    keeps: False for a dry run, which writes nothing.
    """

    path: Path
    keeps: bool = True

    def read(self) -> dict[str, Any]:
        with contextlib.suppress(OSError, UserError):
            return read_json(self.path)
        return {}

    def write(self, hashes: dict[str, Any]) -> None:
        if self.keeps:
            with contextlib.suppress(OSError):
                write_json(self.path, hashes)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves, spelled as JSON."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
    return flat


def spelled(value: object) -> str:
    """JSON as this project writes it to files: one space deep, a newline at the end."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either the old one or the whole new one, on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def write_json(path: Path, value: object) -> None:
    """`write_text` of a value as JSON."""
    write_text(path, spelled(value))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; damaged content is the user's error, named with its place."""
    try:
        value = json.loads(text := path.read_text(encoding="utf-8"))
        if SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except FileNotFoundError:
        raise MissingInput("no such file", where=str(path)) from None
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 at byte {error.start}", where=str(path), fix=AGAIN) from None
    except UnicodeEncodeError:
        raise BadData("half of a character (a lone surrogate), which is no text", where=str(path), fix=AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise BadData(f"not valid JSON: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(value, dict):
        raise BadData(f"expected a JSON object, found {type(value).__name__}", where=str(path), fix=AGAIN)
    return value


def remove(path: Path) -> None:
    """A folder with all that is in it; of a link the link alone."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)
