"""JSON with one spelling, hashes by content, and files that are either the old one or the whole new one."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from src.core.errors import BadData, MissingInput

Files = dict[str, dict[str, Any]]
"""{relative path: {"sha256": hex, "size": bytes}}"""
AGAIN = "mend the file, or copy or download it again"


_one_spelling = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode


def canonical(value: object) -> bytes:
    """JSON with one spelling: sorted keys, no spaces, UTF-8."""
    return _one_spelling(value).encode()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(root: Path, cache: Path | None = None) -> Files:
    """{relative path: {"sha256", "size"}} of every regular file under root (or of root itself, a file), sorted.

    cache: a JSON file of earlier hashes, reused while path, size, modification time and inode all stay the same.
    Hidden files and folders and Python's caches are not content.
    """
    known = _load_cache(cache)
    fresh = dict(known)
    found = {}
    for path in [root] if root.is_file() else _walk(root):
        stat = path.stat()
        mark = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ino}"
        digest = known.get(mark) or sha256(path)
        fresh[mark] = digest
        found[path.name if path == root else path.relative_to(root).as_posix()] = {"sha256": digest, "size": stat.st_size}
    if cache and fresh != known:
        write_json(cache, fresh)
    return found


def _walk(root: Path) -> list[Path]:
    paths = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
        paths += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in paths if path.is_file()]


def _load_cache(cache: Path | None) -> dict[str, Any]:
    if cache is None or not cache.is_file():
        return {}
    try:
        return read_json(cache)
    except BadData:
        return {}  # a damaged cache costs time, nothing else


def spelled(value: object) -> str:
    """JSON as this project writes it to files: one space deep, a newline at the end."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(spelled(value))
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; damaged content is the user's error, named with its place."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingInput("no such file", where=str(path), fix="check the path") from None
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 at byte {error.start}", where=str(path), fix=AGAIN) from None
    except (ValueError, RecursionError) as error:
        raise BadData(f"not valid JSON: {error}", where=str(path), fix=AGAIN) from None
    if not isinstance(value, dict):
        raise BadData(f"expected a JSON object, found {type(value).__name__}", where=str(path), fix=AGAIN)
    return value
