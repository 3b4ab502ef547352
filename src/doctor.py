"""Look over this machine and say what would stand in the way, and what to do about each: Python, packages, compilers, GPU, DeepSpeed, vendors' tools, disk,
memory, hub and trackers.

What it prints is plain text without keys or your name, to be pasted into a report of a fault. Exit code 7 where something has to be mended.
"""

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from src import ROOT, __version__
from src.core import artifact, compose, memory, room, stage
from src.core.errors import ConfigError, MissingTool
from src.core.log import out, size, table
from src.settings.verbs import DoctorVerb

OK, NOTE, FAULT = "ok", "note", "MEND"
DISK, MEMORY, SHARED, FILES = 20e9, 4e9, 1e9, 1024
"""bytes free of disk, of memory and of /dev/shm, and open files, below which it is said"""
SECONDS = 3.0
"""to wait for a server"""


@dataclass(frozen=True)
class Finding:
    """state: ok, note (works, and may surprise) or MEND. what: that was looked at. found: in words. todo: what to do about it."""

    state: str
    what: str
    found: str
    todo: str = ""


def findings(cfg: DoctorVerb) -> Iterator[Finding]:
    yield from python()
    yield from packages()
    yield from compilers()
    yield from gpus()
    yield from deepspeed_ops()
    yield from vendors()
    yield from folders(Path(cfg.outputs))
    yield from limits()
    yield from environment()
    if cfg.network:
        yield from network()


def python() -> Iterator[Finding]:
    here = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    fits = (3, 11) <= sys.version_info[:2] <= (3, 13)
    yield Finding(
        OK if fits else FAULT, "Python", here, "" if fits else "install Python 3.11, 3.12 or 3.13, then bash scripts/quickstart.sh"
    )
    if platform.system() != "Linux":
        yield Finding(FAULT, "system", platform.system(), "use Linux; on Windows, WSL 2")
    if Path(sys.prefix) == Path(sys.base_prefix):
        yield Finding(NOTE, "environment", "not a virtual environment", "source .venv/bin/activate, which the quickstart makes")


def packages() -> Iterator[Finding]:
    """requirements.txt against what is installed."""
    pins = re.findall(r"^([A-Za-z0-9_.-]+)==([^\s;]+)", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    missing, other = [], []
    for name, version in pins:
        try:
            there = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if there != version:
            other.append(f"{name} {there}, not {version}")
    again = "bash scripts/quickstart.sh brings .venv up to date; then source .venv/bin/activate"
    if missing:
        yield Finding(FAULT, "packages", f"not installed: {', '.join(missing)}", again)
    if other:
        yield Finding(FAULT, "packages", f"other versions than requirements.txt has: {', '.join(other)}", again)
    if not missing and not other:
        yield Finding(OK, "packages", f"{len(pins)} as requirements.txt has them")
    if importlib.util.find_spec("torch"):
        yield Finding(OK, "torch", importlib.metadata.version("torch"))
    if dead := [name for name in ("auto_gptq", "awq") if importlib.util.find_spec(name)]:
        yield Finding(NOTE, "packages", f"{', '.join(dead)} is installed, which nobody keeps any more", f"pip uninstall {' '.join(dead)}")
    if outside := [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and Path(p).resolve() != ROOT]:
        yield Finding(NOTE, "PYTHONPATH", f"{len(outside)} folders stand before the environment's packages", "unset PYTHONPATH")


def compilers() -> Iterator[Finding]:
    for tool, why in (
        ("make", "deploy target=llama2c"),
        ("cc", "deploy target=llama2c"),
        ("g++", "DeepSpeed's own operations"),
        ("git", "manifests"),
    ):
        there = shutil.which(tool)
        need = FAULT if tool in ("make", "cc") else NOTE
        yield (
            Finding(OK, tool, _first_line(tool))
            if there
            else Finding(need, tool, f"not found; for {why}", "apt-get install build-essential git")
        )


def _first_line(tool: str) -> str:
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "does not answer"
    return (done.stdout.splitlines() or [""])[0]


def gpus() -> Iterator[Finding]:
    """Whether there is one, and torch can use it. torch is imported only where the kernel shows a GPU."""
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not nodes:
        yield Finding(OK, "GPU", "none; everything runs on the CPU, Q-LoRA and ZeRO too")
        return
    driver = _read(Path("/proc/driver/nvidia/version")).partition("Kernel Module")[2].split()[:1]
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Finding(NOTE, "GPU", f"{len(nodes)} there, hidden by CUDA_VISIBLE_DEVICES", "unset CUDA_VISIBLE_DEVICES")
        return
    import torch

    if not torch.cuda.is_available():
        build = "torch's CPU build" if torch.version.cuda is None else f"torch for CUDA {torch.version.cuda}"
        yield Finding(
            FAULT,
            "GPU",
            f"{len(nodes)} there, driver {' '.join(driver) or 'unknown'}; {build} cannot use them",
            "install a driver for that CUDA, or torch's CUDA build",
        )
        return
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        taken = free < 0.8 * whole
        yield Finding(
            NOTE if taken else OK,
            "GPU",
            f"{torch.cuda.get_device_name(number)}, {size(free)} free of {size(whole)}",
            "end what holds its memory: nvidia-smi" if taken else "",
        )


def deepspeed_ops() -> Iterator[Finding]:
    """A build that was killed leaves a lock that every later run waits for without a word."""
    place = Path(
        os.environ.get("TORCH_EXTENSIONS_DIR") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    )
    locks = [lock for lock in sorted(place.rglob("lock")) if lock.is_file()] if place.is_dir() else []
    if locks:
        yield Finding(
            FAULT,
            "DeepSpeed",
            f"{len(locks)} locks of a build in {_shown(place)}",
            f"where no training runs: rm {' '.join(map(_shown, locks))}",
        )
    else:
        yield Finding(OK, "DeepSpeed", "no build hangs")


def vendors() -> Iterator[Finding]:
    """What targets find here; none is a fault to lack, as a target says itself."""
    pulsar = shutil.which("pulsar2") or (f"in Docker ({_first_line('docker')})" if shutil.which("docker") else "")
    yield Finding(
        OK if pulsar else NOTE,
        "AXERA",
        f"pulsar2 {pulsar}" if pulsar else "no pulsar2, no Docker",
        "" if pulsar else "docs/axera.md says where it comes from",
    )
    seen = set()
    for name, target in compose.options("target").items():
        if (folder := target.get("environment")) and folder not in seen:
            seen.add(folder)
            there = (ROOT / folder / "bin" / "python").exists()
            kind = target["kind"]
            yield Finding(
                OK if there else NOTE,
                name,
                f"{folder} is there" if there else f"no {folder}",
                "" if there else f"bash scripts/{kind}_env.sh makes it",
            )


def folders(outputs: Path) -> Iterator[Finding]:
    there = room.here(outputs)
    low = there.disk < DISK
    yield Finding(
        NOTE if low else OK,
        "disk",
        f"{size(there.disk)} free for {_shown(outputs)}",
        "outputs=FOLDER on a larger disk, or python -m src.runs to see what can go" if low else "",
    )
    places = {
        "outputs": there.at,
        "temporary files": Path(tempfile.gettempdir()),
        "hub cache": _existing(Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")),
    }
    for what, place in places.items():
        if not os.access(place, os.W_OK | os.X_OK):
            yield Finding(
                FAULT,
                what,
                f"{_shown(place)} cannot be written",
                f"chmod u+rwx {_shown(place)}, or name another ({'outputs=FOLDER' if what == 'outputs' else 'TMPDIR' if what != 'hub cache' else 'HF_HOME'})",
            )
    if outputs.is_dir() and (begun := sorted(outputs.glob("*/*.partial"))):
        yield Finding(
            NOTE,
            "outputs",
            f"{len(begun)} unfinished: {', '.join(f'{p.parent.name}/{p.name}' for p in begun[:4])}",
            "the same commands go on; python -m src.runs shows them",
        )


def limits() -> Iterator[Finding]:
    free, swap = memory.available(), memory.swap()
    yield Finding(
        NOTE if free < MEMORY else OK,
        "memory",
        f"{size(free)} available, {size(swap)} of swap",
        "end other programs, or add swap" if free < MEMORY else "",
    )
    yield Finding(
        OK, "cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}" if hasattr(os, "sched_getaffinity") else str(os.cpu_count())
    )
    if Path("/dev/shm").is_dir() and (shared := shutil.disk_usage("/dev/shm").free) < SHARED:
        yield Finding(
            NOTE, "/dev/shm", f"{size(shared)} free; processes that train together share memory there", "docker run --shm-size=8g"
        )
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 < soft < FILES:
        yield Finding(NOTE, "open files", f"at most {soft}", f"ulimit -n {4 * FILES}")


def environment() -> Iterator[Finding]:
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        yield Finding(FAULT, "locale", f"file names are {sys.getfilesystemencoding()}", "export LANG=C.UTF-8")
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and not threads.isdecimal():
        yield Finding(FAULT, "OMP_NUM_THREADS", f"{threads!r} is no number", "unset OMP_NUM_THREADS")
    elif threads == "1" and (os.cpu_count() or 1) > 1 and "WORLD_SIZE" not in os.environ:
        yield Finding(NOTE, "OMP_NUM_THREADS", f"1, of {os.cpu_count()} cores", "unset OMP_NUM_THREADS to train on all of them")
    try:
        stage.check_environment()
    except ConfigError as error:
        yield Finding(FAULT, "environment", str(error).splitlines()[0], "unset it: torchrun sets it for its own processes")
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "0").lower() in ("1", "true", "yes", "on"):
            yield Finding(NOTE, name, "set: nothing is fetched from the hub", f"unset {name}")
    keys = sorted(name for name in os.environ if stage.SECRET.search(name) and os.environ[name])
    yield Finding(OK, "keys", f"set, not shown: {', '.join(keys)}" if keys else "none in the environment")


def network() -> Iterator[Finding]:
    """Whether hub and tracker answer at all; nothing is sent."""
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    wandb = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    for what, address, without in (
        ("hub", hub, "model.path=FOLDER and data.path=FILE need none"),
        ("wandb", wandb, "tracker=wandb works offline; wandb sync sends it later"),
    ):
        parts = urllib.parse.urlsplit(address)
        try:
            with socket.create_connection((parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)), timeout=SECONDS):
                yield Finding(OK, what, f"{parts.hostname} is reached")
        except OSError as error:
            yield Finding(NOTE, what, f"{parts.hostname} is not reached: {error.strerror or error}", without)


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _shown(path: Path) -> str:
    """A path without the user's name."""
    home = str(Path.home())
    return f"~{str(path)[len(home) :]}" if home != "/" and str(path).startswith(home) else str(path)


def doctor(cfg: DoctorVerb) -> int:
    if cfg.dry_run:
        out(
            "would look at Python, packages, compilers, GPU, DeepSpeed, vendors' tools, folders, limits, the environment"
            + (" and the network" if cfg.network else "")
        )
        return 0
    found = list(findings(cfg))
    out(f"Boardwalk {__version__}, {artifact.git_revision() or 'not in git'}")
    out(table(["", "", "", "what to do"], [[one.state, one.what, one.found, one.todo] for one in found]))
    faults = [one.what for one in found if one.state == FAULT]
    out(f"to mend: {', '.join(faults)}" if faults else "nothing to mend")
    return MissingTool.exit_code if faults else 0


if __name__ == "__main__":
    stage.main_plain("doctor", __doc__, DoctorVerb, doctor)
