"""Boardwalk: walk a language model from conversations to a board. Every verb is `python -m src.<verb>`; see README.md."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

__version__ = "0.11.0"
"""the one place of it: pyproject.toml, `python -m src --version`, manifests and trackers read it here"""

ROOT = Path(__file__).resolve().parent.parent
"""the project: configs/, assets/, src/"""

for number, name in enumerate(("stdin", "stdout", "stderr")):
    try:
        os.fstat(number)
    except OSError:  # closed by who started this: the next file opened would get its number, and what libraries write to it
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        setattr(sys, name, open(number, "w" if number else "r", closefd=False))

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m src.<verb>` is still importing: Ctrl-C ends it without a traceback. Where the verb begins, core/processes hears it again.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if not all(importlib.util.find_spec(name) for name in ("hydra", "pydantic")):
    print(
        "missing tool: this Python has not the project's packages\n"
        f"  where: {sys.executable}\n"
        "  fix:   source .venv/bin/activate\n"
        "  or:    bash scripts/quickstart.sh makes .venv first",
        file=sys.stderr,
    )
    sys.exit(7)
