"""How much memory this process may still take: what the machine has available, and what its container allows."""

from collections.abc import Iterator
from pathlib import Path

CGROUPS = {
    2: ("", "memory.max", "memory.current", "inactive_file"),
    1: ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""version -> where its groups are mounted, and the files of a limit, of what is used, and of what memory.stat calls file pages that would be given back"""


def available(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping: /proc/meminfo's MemAvailable, which counts the page cache as free, within every limit on this process's
    control group and those above it.

    root: where /proc and /sys are.
    """
    limits = (_left(folder, *names) for folder, (_, *names) in _groups(root))
    return max(0, min([_meminfo(root, "MemAvailable"), *(left for left in limits if left is not None)]))


def swap(root: Path = Path("/")) -> int:
    """Bytes that may be swapped out beside it: /proc/meminfo's SwapFree, within the limits of control groups of version 2."""
    limits = (_left(folder, "memory.swap.max", "memory.swap.current") for folder, _ in _groups(root))
    return max(0, min([_meminfo(root, "SwapFree"), *(left for left in limits if left is not None)]))


def _meminfo(root: Path, name: str) -> int:
    lines = (root / "proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _groups(root: Path) -> Iterator[tuple[Path, tuple[str, str, str, str]]]:
    """(folder, its version's names) of this process's control groups that may limit its memory, and of those above them; see cgroups(7)."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        version = 2 if number == "0" and not controllers else 1
        if version == 1 and "memory" not in controllers.split(","):
            continue
        top = root / "sys/fs/cgroup" / CGROUPS[version][0]
        own = top / path.lstrip("/")
        # Inside a container the path may be the host's, which is not mounted there; what is, is its own.
        for folder in (own, *own.parents) if own.is_dir() else (top,):
            yield folder, CGROUPS[version]
            if folder == top:
                break


def _left(folder: Path, limit: str, usage: str, cache: str = "") -> int | None:
    """Bytes below a group's limit, file pages that would be given back not counted as used; None where there is no limit."""
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines()) if cache else {}
        return None if allowed == "max" else int(allowed) - used + int(stat.get(cache, 0))
    except (OSError, ValueError):
        return None
