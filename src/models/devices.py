"""Where a model is computed, and in which dtype, by what the machine has and has room for."""

import ctypes
import sys
import time

from src.core.log import say
from src.core.memory import available


def device() -> str:
    """cuda where there is a GPU, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def give_back_memory() -> None:
    """Let go of what nobody holds any more, also of what torch keeps of a GPU's memory for itself and glibc of the host's."""
    import gc

    import torch

    gc.collect()
    trim()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def trim() -> None:
    """Have glibc give back the pages of what was freed, also between what is held."""
    if sys.platform == "linux" and (malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        malloc_trim(0)


_next_trim = 0.0


def trim_sparingly() -> None:
    """`trim`, for at most a hundredth of the time: a call walks through all that is free, three milliseconds, and a pass of a small model takes ten."""
    global _next_trim
    begun = time.perf_counter()
    if begun >= _next_trim:
        trim()
        _next_trim = begun + 100 * (time.perf_counter() - begun)


def device_that_fits(parameters: int) -> str:
    """cuda where a GPU has room for a model of so many parameters in fp32, else cpu."""
    import torch

    return "cuda" if torch.cuda.is_available() and 1.2 * 4 * parameters < torch.cuda.mem_get_info()[0] else "cpu"


def fits_whole(parameters: int, device: str) -> bool:
    """Whether a model of so many parameters fits the device's free memory twice in fp32, as one that is loaded may be held."""
    import torch

    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available()
    return 2 * 4 * parameters < free


def say_device(name: str) -> None:
    import torch

    say(f"device: {torch.cuda.get_device_name()}" if name == "cuda" else f"device: CPU, {torch.get_num_threads()} threads")
