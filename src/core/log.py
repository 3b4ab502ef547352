"""What a person sees: plain lines on stderr from rank 0, progress bars only on a terminal, and colour there unless NO_COLOR is set (no-color.org).

Much of it comes from elsewhere (manifests, configurations, a template's own words, a server's), so everything goes through `shown`.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, TextIO, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")

# What steers a terminal (C0 and C1 controls but tab and new line), turns the order of what is read around (Unicode's bidirectional controls), breaks lines
# unseen, or cannot be written at all (surrogates).
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
GREEN, YELLOW, RESET = "\ufdd0", "\ufdd1", "\ufdd2"
"""colours within a line, as characters that Unicode keeps for a program's own use; an escape code would be shown as what it is"""
_CODES = {GREEN: "\033[32m", YELLOW: "\033[33m", RESET: "\033[0m"}

_unfinished = False
"""whether the terminal's cursor stands at the end of a status line"""
_bars: "Progress | None" = None
"""what is under way on the terminal, of which the last begun is seen"""
UNHEARD = (OSError, ValueError, AttributeError)
"""what writing to stderr fails with where it is closed, or its terminal has gone"""
FIRST, EVERY = 2.0, 10.0
"""seconds to the first line of what is under way, where there is no terminal, and from line to line"""


def rank() -> int:
    """Global rank of this process under torchrun; 0 elsewhere."""
    value = os.environ.get("RANK", "0")
    return int(value) if value.isdecimal() else 0


def on_terminal() -> bool:
    """Whether stderr goes to a terminal that can go back in a line."""
    return _is_terminal(sys.stderr) and os.environ.get("TERM") != "dumb"


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def in_colour() -> bool:
    return on_terminal() and not os.environ.get("NO_COLOR")


def _console() -> "Console":
    """The terminal that stderr is, as wide as it is at the moment; rich heeds NO_COLOR too."""
    from rich.console import Console

    return Console(stderr=True, force_terminal=True)


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
        text = text.replace(colour, code if in_colour() else "")
    return text


def _write(text: str) -> None:
    """What cannot be said (stderr is closed, a full disk, a pipe without a reader) ends no work."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except UNHEARD:
        # What its buffer still holds Python would try to say again at its end, and count as a failure (exit code 120).
        with contextlib.suppress(*UNHEARD):
            sys.stderr = open(sys.stderr.fileno(), "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)


def status(line: str) -> None:
    """Where a long work stands: on a terminal each overwrites the last and is shortened to its width, elsewhere each is a line."""
    global _unfinished
    if rank() != 0:
        return
    if on_terminal():
        _write(f"\r\033[K{fitted((line, 0))}")
        _unfinished = True
    else:
        say(line)


def fitted(*cells: tuple[str, int]) -> str:
    """One line of (text, rank) cells; on a terminal that is narrower, without those of the highest ranks, and the last that is left is shortened."""
    kept = [(shown(text), rank) for text, rank in cells]
    line = "".join(text for text, _ in kept)
    if not on_terminal():
        return line
    from rich.text import Text

    width = _console().width
    while len(kept) > 1 and Text(line).cell_len > width:
        kept.remove(max(kept, key=lambda cell: cell[1]))
        line = "".join(text for text, _ in kept)
    short = Text(line)
    short.truncate(width, overflow="ellipsis")
    return short.plain


def mark(text: str, marked: bool) -> str:
    """Text that stands out from what is around it: green on a terminal, in double brackets elsewhere."""
    if not marked:
        return text
    return f"{GREEN}{text}{RESET}" if in_colour() else f"[[{text}]]"


def shortened(text: str, limit: int) -> str:
    """The text without its middle, where it is longer than so many characters."""
    return text if len(text) <= limit else f"{text[: limit * 2 // 3]} … {text[-limit // 3 :]}"


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
    """Yield the items, with ticks as each is done. total: how many there are, where they do not know it."""
    total = total if total is not None else len(items) if isinstance(items, Sized) else None
    with ticks(total, what) as tick:
        for item in items:
            yield item
            tick()


@contextlib.contextmanager
def ticks(total: int | None, what: str, *, done: int = 0, lines: bool = True) -> Iterator[Callable[..., None]]:
    """A function to call from any thread as a part of `total` is done, or with how many are, or what share of one is.

    Shows a bar with the time left on a terminal; elsewhere, with `lines`, a plain line after FIRST seconds and then EVERY so many. done: parts that are
    done already.
    """
    if rank() != 0 or not (lines or on_terminal()):
        yield lambda count=1: None
    elif on_terminal():
        with _bar(total, what, done) as tick:
            yield tick
    else:
        yield _lines(total, what, done)


def _lines(total: int | None, what: str, begun_with: int) -> Callable[..., None]:
    start, lock = time.monotonic(), threading.Lock()
    done, due = float(begun_with), start + FIRST

    def tick(count: float = 1) -> None:
        nonlocal done, due
        with lock:
            done += count
            whole = int(done + 1e-6)
            if (now := time.monotonic()) < due or whole == total:
                return
            due = now + EVERY
            left = f", {duration((now - start) / (done - begun_with) * max(total - done, 0))} left" if total else ""
            say(f"  {what}: {whole:,}{f' of {total:,}' if total else ''}{left}")

    return tick


@contextlib.contextmanager
def _bar(total: int | None, what: str, done: int) -> Iterator[Callable[..., None]]:
    """The one line at the foot of the terminal, in place of what was begun before until this is done."""
    global _bars, _unfinished
    if _unfinished:
        _write("\n")
        _unfinished = False
    bars = _bars = _bars or _begin_bars()
    for task in bars.task_ids:
        bars.update(task, visible=False)
    mine, lock, waiting, shown_at = bars.add_task(shown(what), total=total, completed=done), threading.Lock(), 0.0, 0.0

    def tick(count: float = 1) -> None:
        nonlocal waiting, shown_at
        with lock:
            waiting += count
            if (now := time.monotonic()) - shown_at > 0.1:  # an update costs more than many a part
                bars.update(mine, advance=waiting)
                waiting, shown_at = 0.0, now

    try:
        yield tick
    finally:
        bars.remove_task(mine)
        with contextlib.suppress(*UNHEARD):
            if bars.task_ids:
                bars.update(bars.task_ids[-1], visible=True, refresh=True)
            else:
                _bars = None
                bars.stop()


def _begin_bars() -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
    from rich.table import Column
    from rich.text import Text

    class Name(ProgressColumn):
        """Shortened where the others leave no room."""

        def render(self, task: Task) -> Text:
            return Text(task.description, no_wrap=True, overflow="ellipsis")

    bars = Progress(
        Name(),
        BarColumn(),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True)),
        console=_console(),
        transient=True,
        refresh_per_second=4,
        speed_estimate_period=3600,  # a part may take minutes
        redirect_stdout=_is_terminal(sys.stdout),
    )
    bars.start()
    return bars


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows under a head, as text for stdout: ruled and wrapped to its width on a terminal, else plain and as wide as it takes.

    right: numbers of columns that are set to the right.
    """
    from rich.box import SIMPLE_HEAD, Box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    terminal = _is_terminal(sys.stdout) and on_terminal()
    plain = Box("    \n    \n -- \n    \n    \n    \n    \n    \n", ascii=True)
    made = Table(box=SIMPLE_HEAD if terminal else plain, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(head):
        made.add_column(name, justify="right" if i in right else "left", no_wrap=not terminal)
    for row in rows:
        made.add_row(*(Text(shown(cell)) for cell in row))
    console = Console(
        width=None if terminal else 1 << 14, color_system="auto" if terminal and in_colour() else None, force_terminal=terminal
    )
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
