"""How fast and how much a teacher may be asked: rates, a concurrency that adapts, waits it asks for, a circuit breaker and a budget.

None of this changes what a run makes, only when, or how far it gets before it stops.
"""

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass

from src.core.errors import BudgetSpent
from src.core.log import say
from src.settings.teachers import TeacherLimits
from src.settings.verbs import Budget

LONGEST_BACK_OFF = 60.0


def back_off(tries: int, first: float) -> float:
    """Seconds before the next try of a request that failed `tries` times: doubling from `first`, half of it drawn, so that many do not come back at once."""
    longest = min(first * 2.0 ** min(tries - 1, 99), LONGEST_BACK_OFF)
    return random.uniform(longest / 2, longest)


class RateLimiter:
    """At most `per_minute` units in any minute, evenly, in bursts of a second's worth (the generic cell rate algorithm, ITU-T I.371)."""

    def __init__(self, per_minute: int | None):
        self._burst = 1.0
        # What a burst lets through early is taken off the rate, so that no minute holds more than it may.
        self._each = 60.0 / per_minute * (60.0 + self._burst) / 60.0 if per_minute else 0.0
        self._next = 0.0

    async def wait(self, units: float) -> None:
        """Until this many more may go; a place is taken at once, so that those who wait go in turn."""
        now = time.monotonic()
        begins = max(self._next, now - self._burst)
        self._next = begins + units * self._each
        if (early := begins - now) > 0:
            await asyncio.sleep(early)

    def give_back(self, units: float) -> None:
        """Units taken, but not used."""
        self._next -= units * self._each


class AdaptiveConcurrency:
    """Requests on their way at once: one more with each round that goes well, half as many when the teacher is busy (AIMD, Chiu and Jain 1989).

    A round is as many requests as there are slots. What was sent before the last halving tells nothing new, and changes nothing.
    """

    def __init__(self, most: int):
        self.most, self.limit, self.used = most, float(most), 0
        self._waiting: deque[asyncio.Future] = deque()
        self._halved = 0.0

    async def take(self) -> None:
        if self.used < int(self.limit) and not self._waiting:
            self.used += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.give_back()
            else:
                self._waiting.remove(turn)
            raise

    def give_back(self) -> None:
        self.used -= 1
        while self._waiting and self.used < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.used += 1
                turn.set_result(None)

    def well(self) -> None:
        self.limit = min(float(self.most), self.limit + 1.0 / self.limit)

    def busy(self, sent: float) -> None:
        """A request sent at this moment (time.monotonic) was turned away."""
        if sent >= self._halved:
            self.limit = max(1.0, self.limit / 2)
            self._halved = time.monotonic()


class Pause:
    """The wait a teacher asks of everybody (Retry-After)."""

    def __init__(self):
        self._until = 0.0

    def ask(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        if until > self._until + 1.0 and seconds >= 5:
            say(f"distill: waits {seconds:.0f} s, as the teacher asks")
        self._until = max(self._until, until)

    def left(self) -> float:
        """Seconds to go; 0 or less where nobody has to wait."""
        return self._until - time.monotonic()


class Breaker:
    """Stops a run whose teacher is out of order: `most` requests on end that failed at their first try, of whatever kind.

    Later tries say nothing new of the teacher: towards the end of a run only requests that always fail are left, and those are set aside one by one.
    Failures that are the server's are borne for `grace` seconds, since all requests on their way fail together when it is started anew.
    """

    def __init__(self, most: int, grace: float):
        self.most, self._grace, self._run, self._since = most, grace, 0, 0.0
        self.aside: list[str] = []
        """keys set aside since the last answer"""

    def well(self) -> None:
        self._run = 0
        self.aside.clear()

    def failed(self, first: bool, together: bool) -> bool:
        """Whether that was one too many. first: it was the request's first try. together: it is the server's fault, not the request's."""
        if not self._run:
            self._since = time.monotonic()
        self._run += first
        return self._run >= self.most and (not together or time.monotonic() - self._since >= self._grace)


@dataclass
class BudgetTracker:
    """The budget in tokens and money (USD), over every run that shared the journal. Spent and reserved together never pass it.

    Before a request is sent the most it can cost is reserved; when it is answered, what it did cost is spent.
    """

    budget: Budget
    tokens: int = 0
    money: float = 0.0
    reserved_tokens: int = 0
    reserved_money: float = 0.0

    def __post_init__(self):
        self._settled = asyncio.Event()

    async def reserve(self, tokens: int, money: float) -> None:
        """Raises BudgetSpent where it would be passed, however cheap the requests on their way turn out."""
        while not self._fits(tokens, money, self.reserved_tokens, self.reserved_money):
            if not self._fits(tokens, money, 0, 0.0) or not self.reserved_tokens:
                raise self.spent()
            self._settled.clear()
            await self._settled.wait()
        self.reserved_tokens += tokens
        self.reserved_money += money

    def _fits(self, tokens: int, money: float, reserved_tokens: int, reserved_money: float) -> bool:
        most, dollars = self.budget.tokens, self.budget.money
        return (most is None or self.tokens + reserved_tokens + tokens <= most) and (
            dollars is None or self.money + reserved_money + money <= dollars + 1e-9
        )

    def settle(self, reserved_tokens: int, reserved_money: float, tokens: int, money: float) -> None:
        """A reservation becomes what the request did cost."""
        self.reserved_tokens -= reserved_tokens
        self.reserved_money -= reserved_money
        self.tokens += tokens
        self.money += money
        self._settled.set()

    def spent(self) -> BudgetSpent:
        return BudgetSpent(
            f"of {in_words(self.budget)}, {self.tokens:,} tokens and ${self.money:,.4f} are spent, and the next request could pass it"
        )


def in_words(budget: Budget) -> str:
    """1,000 tokens and $2.50; none."""
    parts = [] if budget.tokens is None else [f"{budget.tokens:,} tokens"]
    parts += [] if budget.money is None else [f"${budget.money:,.2f}"]
    return " and ".join(parts) or "none"


class Gate:
    """All limits of one teacher, in the order a request meets them."""

    def __init__(self, limits: TeacherLimits):
        self.requests, self.tokens = RateLimiter(limits.requests_per_minute), RateLimiter(limits.tokens_per_minute)
        self.concurrency, self.pause, self.breaker = (
            AdaptiveConcurrency(limits.concurrency),
            Pause(),
            Breaker(limits.breaker, 10 * limits.back_off),
        )
        # A few more than can be on their way are written to the journal beforehand, so that no slot waits for the disk.
        self.ready = asyncio.Semaphore(limits.concurrency + max(4, limits.concurrency // 4))
