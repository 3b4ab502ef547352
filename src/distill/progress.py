"""How far a run is: records, tokens, money, pace and the end in sight, each second on a terminal and every ten elsewhere."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Self

from src.core.log import duration, fitted, on_terminal, status

PACE_OVER = 60.0
"""seconds the pace is measured over"""


class Progress:
    """state() -> (records begun with and gone through, all of them, records kept, records set aside, tokens, USD)."""

    def __init__(self, state: Callable[[], tuple[int, int, int, int, int, float]]):
        self._state = state
        self._past: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._show())
        return self

    async def __aexit__(self, *_) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _show(self) -> None:
        while True:
            await asyncio.sleep(1.0 if on_terminal() else 10.0)
            status(self.line(time.monotonic()))

    def line(self, now: float) -> str:
        """One line for this moment (time.monotonic)."""
        through, total, kept, aside, tokens, money = self._state()
        self._past.append((now, through))
        while len(self._past) > 2 and self._past[0][0] < now - PACE_OVER:
            self._past.popleft()
        begun, before = self._past[0]
        pace = (through - before) / max(now - begun, 1e-9)
        left = f", ends in about {duration((total - through) / pace)}" if pace > 0 and total > through else ""
        spent = f"{tokens:,} tokens" + (f", ${money:,.4f}" if money else "")
        return fitted(
            (f"distill: {through:,} of {total:,} records through", 0),
            (f", {kept:,} kept, {aside:,} set aside", 4),
            (f"; {spent}", 3),
            (f"; {pace * 60:,.0f} records/min", 2),
            (left, 1),
        )
