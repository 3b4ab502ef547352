"""What a person sees: plain lines on stderr from rank 0, colour and progress bars only on a terminal.

Much of it comes from elsewhere (manifests, configurations, a template's own words, a server's), so everything goes through `shown`.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from typing import TypeVar

T = TypeVar("T")

# What steers a terminal (C0 and C1 controls but tab and new line), turns the order of what is read around (Unicode's bidirectional controls), breaks lines
# unseen, or cannot be written at all (surrogates).
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
GREEN, YELLOW, RESET = "\ufdd0", "\ufdd1", "\ufdd2"
"""colours within a line, as characters that Unicode keeps for a program's own use; an escape code would be shown as what it is"""
_CODES = {GREEN: "\033[32m", YELLOW: "\033[33m", RESET: "\033[0m"}

_unfinished = False
"""whether the terminal's cursor stands at the end of a status line"""


def rank() -> int:
    """Global rank of this process under torchrun; 0 elsewhere."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


def on_terminal() -> bool:
    return sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty() and "NO_COLOR" not in os.environ


def shown(text: str) -> str:
    """The text with each character that steers a terminal or the order of reading spelled out, such as \\x1b; new lines and tabs stay."""
    return _STEERS.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def say(line: str) -> None:
    """One fact for the user. Silent on every rank but 0."""
    global _unfinished
    if rank() == 0:
        line = _coloured(shown(line))
        _write(f"\n{line}\n" if _unfinished else f"{line}\n")
        _unfinished = False


def tell(text: str) -> None:
    """Text onto stderr, from any rank."""
    _write(shown(text))


def out(text: str) -> None:
    """A result for stdout."""
    print(shown(text))


def _coloured(text: str) -> str:
    for colour, code in _CODES.items():
        text = text.replace(colour, code if on_terminal() else "")
    return text


def _write(text: str) -> None:
    """What cannot be said (stderr is closed, a full disk, a pipe without a reader) ends no work."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.stderr.write(text)
        sys.stderr.flush()


def status(line: str) -> None:
    """Where a long work stands: on a terminal each overwrites the last, elsewhere each is a line."""
    global _unfinished
    if rank() != 0:
        return
    if on_terminal():
        _write(f"\r\033[K{shown(line)}")
        _unfinished = True
    else:
        say(line)


def mark(text: str, marked: bool) -> str:
    """Text that stands out from what is around it: green on a terminal, in double brackets elsewhere."""
    if not marked:
        return text
    return f"{GREEN}{text}{RESET}" if on_terminal() else f"[[{text}]]"


def spark(values: list[float]) -> str:
    """A curve in one line of text, at most 40 characters: each is the mean of its share of the values."""
    if len(values) < 2:
        return ""
    count = min(40, len(values))
    means = [sum(part) / len(part) for part in (values[i * len(values) // count : (i + 1) * len(values) // count] for i in range(count))]
    low, high = min(means), max(means)
    return "".join("▁▂▃▄▅▆▇█"[round((value - low) / ((high - low) or 1) * 7)] for value in means)


def warn(line: str) -> None:
    """Something the user should look at, though the run goes on."""
    say(f"{YELLOW}warning:{RESET} {line}")


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yield the items with a bar and time left on a terminal, or a plain line every ten seconds elsewhere."""
    if rank() != 0:
        yield from items
        return
    if on_terminal():
        from rich.console import Console
        from rich.progress import track

        yield from track(items, what, total, transient=True, console=Console(stderr=True))
        return
    total = total if total is not None else len(items) if isinstance(items, Sized) else None
    start = said = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - said > 10:
            left = f", {duration((now - start) / done * (total - done))} left" if total and done else ""
            say(f"  {what}: {done}{f' of {total}' if total else ''}{left}")
            said = now
        yield item


@contextlib.contextmanager
def ticks(total: int, what: str) -> Iterator[Callable[[], None]]:
    """A function to call from any thread as each of `total` parts is done; see progress."""
    steps, lock = progress(range(total + 1), what), threading.Lock()

    def tick() -> None:
        with lock:
            next(steps, None)

    tick()
    yield tick
    for _ in steps:
        pass


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows under a head, as text for stdout: ruled and wrapped to its width on a terminal, else plain and as wide as it takes.

    right: numbers of columns that are set to the right.
    """
    from rich.box import SIMPLE_HEAD, Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = sys.stdout.isatty() and on_terminal()
    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    made = Table(box=SIMPLE_HEAD if terminal else plain, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        made.add_column(name, justify="right" if i in right else "left", no_wrap=not terminal)
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(width=None if terminal else 1 << 14, color_system="auto" if terminal else None, force_terminal=terminal)
    with console.capture() as captured:
        console.print(made)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


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
