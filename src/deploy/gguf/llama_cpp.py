"""llama.cpp in an environment of its own (scripts/gguf_env.sh): what is in it, and asking it. See inside.py for what can be asked."""

import os
from collections.abc import Callable
from pathlib import Path

from src.deploy import answers
from src.deploy.vendor import installed, interpreter
from src.settings.targets import LlamaCpp

PACKAGES = ("xllamacpp", "llama_cpp_py_sync")
"""llama.cpp with a server, and the declarations of its functions, beside a library that quantizes"""
INSIDE = Path(__file__).with_name("inside.py")
READ = "the log has all that it said; its first line is the command, which can be run by hand"
ANOTHER = "bash scripts/gguf_env.sh NEW_FOLDER, then target.environment=NEW_FOLDER"
"""the way out of an environment that is not as the script makes it: one that it made before it takes for finished"""


def versions(target: LlamaCpp) -> dict[str, str]:
    return installed(target.environment, PACKAGES)


def is_here(target: LlamaCpp) -> bool:
    return len(versions(target)) == len(PACKAGES)


def ways(target: LlamaCpp) -> list[str]:
    """Ways out where it is not."""
    make = ANOTHER if Path(target.environment).exists() else f"bash scripts/gguf_env.sh {target.environment}, a minute and 0.2 GB"
    return [make, "target.environment=FOLDER names one that has it"]


def line(target: LlamaCpp) -> str:
    """What is known of the environment, for the plan."""
    if not is_here(target):
        return f"llama.cpp: not in {target.environment} (bash scripts/gguf_env.sh makes it)"
    return f"llama.cpp: {', '.join(map(' '.join, versions(target).items()))} in {target.environment}"


def questioner(target: LlamaCpp, work: Path, file: Path, adapter: Path | None = None) -> Callable[..., dict]:
    """ask(do, **what) -> the answer of inside.py about a GGUF, with an adapter's beside it."""
    # Its threads wait by spinning, so more of them than there is room for cost time instead of saving it.
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    about = {
        "file": str(file.absolute()),
        "adapter": str(adapter.absolute()) if adapter else None,
        "kv_cache": target.kv_cache,
        "threads": threads,
    }
    return answers.questioner(interpreter(target.environment), INSIDE, work, "llama.cpp", READ, **about)
