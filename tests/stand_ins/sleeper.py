"""Stands in for a training's worker process: it says its rank and process id, and waits."""

import os
import sys
import time

from src.core import stage


def wait() -> int:
    print(f"ready {os.environ['RANK']} {os.getpid()}", flush=True)
    time.sleep(120)
    return 0


if __name__ == "__main__":
    sys.exit(stage.guarded(wait))
