"""What a person sees: plain lines on stderr from rank 0, colour and progress bars only on a terminal."""

import os
import sys
import time
from collections.abc import Iterable, Iterator


def rank() -> int:
    """Global rank of this process under torchrun; 0 elsewhere."""
    return int(os.environ.get("RANK", "0"))


def on_terminal() -> bool:
    return sys.stderr.isatty() and "NO_COLOR" not in os.environ


def say(line: str) -> None:
    """One fact for the user. Silent on every rank but 0."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def warn(line: str) -> None:
    """Something the user should look at, though the run goes on."""
    say(f"\033[33mwarning:\033[0m {line}" if on_terminal() else f"warning: {line}")


def progress(items: Iterable, what: str, total: int | None = None) -> Iterator:
    """Yield the items with a bar and time left on a terminal, or a plain line every ten seconds elsewhere."""
    if rank() != 0:
        yield from items
        return
    if on_terminal():
        from tqdm import tqdm

        yield from tqdm(items, desc=what, total=total, leave=False)
        return
    total = total if total is not None else len(items) if hasattr(items, "__len__") else None
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > 10:
            left = f", {duration((now - start) / done * (total - done))} left" if total and done else ""
            say(f"  {what}: {done}{f' of {total}' if total else ''}{left}")
            said = now
        yield item


def size(count: float) -> str:
    """Bytes for people: 1.5 MB. Decimal units, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def duration(seconds: float) -> str:
    """Seconds for people: 4.2 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
