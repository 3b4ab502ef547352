"""Says that a stage was killed, which what is killed cannot say itself.

This file is also the program that does so: a small process beside the stage, of the standard library alone, that outlives it and its group.
"""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def watched(name: str) -> Iterator[None]:
    """Have stderr told where this process is killed within the block. name: what the stage makes.

    The launcher of a worker process tells that itself.
    """
    if "WORLD_SIZE" in os.environ or not hasattr(os, "pidfd_open"):
        yield
        return
    watcher = subprocess.Popen([sys.executable, "-I", "-S", __file__, str(os.getpid()), name], start_new_session=True)
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()


def kills_for_memory() -> int:
    """Processes that the kernel has killed for lack of memory since it started, in control groups too; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def wait(process: int, name: str) -> None:
    """Until the process ends; who ends well kills this one first."""
    before = kills_for_memory()
    with contextlib.suppress(ProcessLookupError):
        select.select([os.pidfd_open(process)], [], [])
    why = "by the kernel, for lack of memory" if kills_for_memory() > before else "by a signal"
    print(f"{name} was killed {why}; the same command goes on, from the last checkpoint where there is one", file=sys.stderr)


if __name__ == "__main__":
    wait(int(sys.argv[1]), sys.argv[2])
