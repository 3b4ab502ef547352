"""What all vendors' drivers share: running a vendor's tool under watch, and the folder in which unfinished work waits for it.

A vendor's tool stays behind a process boundary: an argv list, logged whole, its output kept beside its work.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from src.core.log import say

WORK = ".work"
"""Folder inside an unfinished bundle with what the vendor's tool needs and makes. Hidden, so it is no content; gone when the bundle is finished."""
COMPILED = "compiled.json"
"""The record in WORK of a compile that ended well, which is not repeated; written last."""
BY_HAND = "by_hand.txt"
"""The mark in WORK of a compile that was run by a script on another machine and brought back."""


def work_folder(out: Path) -> Path:
    """The bundle's WORK folder, made if it is not there. From then on an unfinished bundle is kept and gone on with."""
    (out / WORK).mkdir(exist_ok=True)
    return out / WORK


def finish(out: Path) -> None:
    """Drop the WORK folder of a bundle that has all it needs."""
    shutil.rmtree(out / WORK)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A name to write a file under; it is renamed to `path` when the block ends well, so that a file by this name is always whole."""
    partial = path.with_name(f"{path.name}.partial")
    yield partial
    os.replace(partial, path)


@dataclass
class Done:
    """How a tool's run ended. tail: its last lines. seen: which of the watched texts it printed."""

    code: int
    tail: str
    seen: set[str] = field(default_factory=set)


def run(
    argv: list[str],
    log: Path,
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    watch: tuple[str, ...] = (),
    line: Callable[[str], None] = lambda text: None,
    container: str | None = None,
) -> Done:
    """Run a vendor's tool, its stdout and stderr together into `log`, and tell how it ended.

    watch: texts whose appearance is recorded. line: called with each line as it comes, also with the beginning of one that has not ended.
    container: its name where it runs in one, which is stopped too when this process is interrupted or terminated.
    """
    say(f"runs {shlex.join(argv)}")
    seen: set[str] = set()
    tail: deque[str] = deque(maxlen=30)
    with open(log, "wb") as file, terminated_as_interrupt():
        file.write(f"$ {shlex.join(argv)}\n".encode())
        tool = subprocess.Popen(
            [os.path.abspath(argv[0]) if "/" in argv[0] else argv[0], *argv[1:]],  # a path is from where the user is, not from cwd
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            for text, ended in _lines(tool.stdout, file):
                line(text)
                if ended:
                    seen |= {words for words in watch if words in text}
                    tail.append(text)
            code = tool.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(tool.pid, signal.SIGTERM)
            if container:
                stop_container(container)
            try:
                tool.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(tool.pid, signal.SIGKILL)
                tool.wait()
            raise
    return Done(code if code >= 0 else 128 - code, "\n".join(tail), seen)


def _lines(stream, log) -> Iterator[tuple[str, bool]]:
    """(line, whether it has ended) of a byte stream, each copied to `log` as it came; terminal escapes are taken out.

    A carriage return ends a line too. What has come of the next one is given at once, since a progress bar stands there until it moves on.
    """
    rest = b""
    while chunk := stream.read1(65536):
        log.write(chunk)
        log.flush()
        *whole_lines, rest = re.split(rb"[\r\n]", rest + chunk)
        yield from ((_plain(text), True) for text in whole_lines if text.strip())
        if rest.strip():
            yield _plain(rest), False
    if rest.strip():
        yield _plain(rest), True


def _plain(text: bytes) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.decode(errors="replace")).rstrip()


@contextlib.contextmanager
def terminated_as_interrupt() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, so that what was started is stopped too."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def ask(argv: list[str], timeout: float = 120) -> subprocess.CompletedProcess | None:
    """A short question to a tool, such as its version; None where it is not there or does not answer in time (seconds)."""
    try:
        return subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=timeout)
    except (FileNotFoundError, PermissionError, subprocess.TimeoutExpired):
        return None


def image_id(image: str) -> str | None:
    """A Docker image's content id, which its name does not tell; None where there is no such image here."""
    done = ask(["docker", "image", "inspect", "--format", "{{.Id}}", image])
    return done.stdout.strip() if done and done.returncode == 0 else None


def stop_container(name: str) -> None:
    """Stop a container that was started with --rm, if it is there; it goes on when the client that started it is killed."""
    ask(["docker", "kill", name], timeout=30)


def hand_back(image: str, folder: Path) -> None:
    """Give the caller what a container of this image left as root's in a folder."""
    if os.getuid():
        owner = f"{os.getuid()}:{os.getgid()}"
        ask(["docker", "run", "--rm", "-v", f"{folder.resolve()}:/work", image, "chown", "-R", owner, "/work"])


def interpreter(environment: str) -> Path:
    """A Python environment's, not resolved: a venv's is a link to another."""
    return Path(environment).expanduser().absolute() / "bin" / "python"


def installed(environment: str, packages: tuple[str, ...]) -> dict[str, str]:
    """{package: version} of those installed in a Python environment, told by the names of its dist-info folders; a missing package is left out."""
    if not interpreter(environment).exists():
        return {}
    found = {}
    for info in interpreter(environment).parents[1].glob("lib/python3*/site-packages/*.dist-info"):
        name, _, version = info.stem.rpartition("-")
        found[name.lower()] = version
    return {name: found[name] for name in packages if name in found}
