"""Folders that are made once and kept under the key of what they were made from. A cache costs time, nothing else: any number of processes may make
the same one at once, one of them may be killed, and what is damaged or cannot be read is made anew.
"""

import atexit
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path

from src.core.errors import UserError
from src.core.files import remove
from src.core.log import say, warn

BROKEN = (OSError, ValueError, KeyError, TypeError, EOFError, UserError)
"""what reading a folder that is missing, damaged or not ours to read can raise"""


def kept_or_made(folder: Path, make: Callable[[Path], None], read: Callable[[Path], object]) -> Path:
    """Where the folder is: as it was kept, if `read` can read it, else made by `make(empty folder)`; a temporary one where none can be kept."""
    if reads(folder, read):
        return folder
    if folder.exists():
        warn(f"the cache {folder} is damaged or cannot be read; it is made anew")
    partial = place(folder)
    try:
        make(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return published(partial, folder, read)


def reads(folder: Path, read: Callable[[Path], object]) -> bool:
    """Whether the folder is there and `read` can read it."""
    try:
        read(folder)
    except BROKEN:
        return False
    return True


def place(folder: Path) -> Path:
    """An empty folder of this process's own beside `folder`, those of dead processes cleared away; elsewhere where there can be none."""
    own = folder.with_name(f"{folder.name}.{socket.gethostname()}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for left in folder.parent.glob("*.partial"):
            if _is_dead(left.name):
                shutil.rmtree(left, ignore_errors=True)
        own.mkdir()
        return own
    except OSError as error:
        elsewhere = Path(tempfile.mkdtemp(prefix="boardwalk-"))
        atexit.register(shutil.rmtree, elsewhere, ignore_errors=True)
        warn(f"nothing can be kept in {folder.parent} ({error.strerror}); it is made for this run alone, in {elsewhere}")
        return elsewhere


def _is_dead(name: str) -> bool:
    """Whether a partial folder is of a process of this machine that is no more."""
    *_, host, pid, _ = name.rsplit(".", 3) if name.count(".") >= 3 else ("", "", "", "")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def published(partial: Path, folder: Path, read: Callable[[Path], object]) -> Path:
    """`folder`, which is `partial` from now on, or what another process was quicker to make; `partial` itself where it cannot be renamed."""
    if partial.parent != folder.parent:
        return partial
    with contextlib.suppress(OSError):  # a folder with files in it stands there
        partial.rename(folder)
        return folder
    if reads(folder, read):
        shutil.rmtree(partial, ignore_errors=True)
        return folder
    aside = folder.with_name(f"{partial.name.removesuffix('.partial')}.damaged.partial")
    try:
        folder.rename(aside)
        partial.rename(folder)
    except OSError:
        say(f"the cache {folder} cannot be replaced; what was made stays in {partial} for this run")
        atexit.register(shutil.rmtree, partial, ignore_errors=True)
        return partial
    with contextlib.suppress(OSError):
        remove(aside)
    return folder
