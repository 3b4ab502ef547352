"""How much memory this process may still take: what the machine has available, and what its container allows."""

from collections.abc import Iterator
from pathlib import Path


def available(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping: /proc/meminfo's MemAvailable, which counts the page cache as free, within every limit on this process's
    control group and those above it.

    root: where /proc and /sys are.
    """
    lines = (root / "proc/meminfo").read_text().splitlines()
    memory = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    return max(0, min([memory, *_left_by_limits(root)]))


def _left_by_limits(root: Path) -> Iterator[int]:
    """Bytes below each limit, file pages that would be given back not counted as used; cgroups of version 2 and 1 (cgroups(7))."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0" and not controllers:
            mount, limit, usage, cache = "", "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            mount, limit, usage, cache = "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        top = root / "sys/fs/cgroup" / mount
        own = top / path.lstrip("/")
        # Inside a container the path may be the host's, which is not mounted there; what is, is its own.
        for folder in (own, *own.parents) if own.is_dir() else (top,):
            try:
                allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                if allowed != "max":
                    yield int(allowed) - used + int(stat.get(cache, 0))
            except (OSError, ValueError):
                pass
            if folder == top:
                break
