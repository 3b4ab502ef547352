"""What every step works with: records, requests, answers, and the one object through which a step asks, draws, counts and sets aside.

Records come out in the order they went in, and every draw follows from the seed and its words alone. So a run's result depends on its input, its seed
and the answers, never on which answer came first: after a kill the same command replays the journal and writes the same bytes.

A step is an async generator `step(records, settings, work)` over records. A record that cannot go on is set aside with a reason, never dropped without one:
records in + records made = records out + records set aside holds for each step, and is checked when the run ends.
"""

import asyncio
import contextlib
import contextvars
import copy
import hashlib
import random
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from src.core.errors import ProofFailed
from src.core.files import canonical


@dataclass(frozen=True)
class Record:
    """What becomes a conversation.

    id: unique and stable; what is made from a record extends its id: "seed_12#3/0".
    messages: ChatML turns so far, {"role", "content"} each; a prompt ends with the user's turn.
    data: JSON-able, what steps know of it. Read from a source: "reference" (the answer its record has), "fields" (the record's other keys), "tools",
        "text" and "path" (a document). Kept in the result: "scores", "parents" (ids), "chosen" and "rejected" (answers, written as preferences).
    asks: journal keys of the requests it came from, in order; its teachers and cost follow from them.
    """

    id: str
    messages: list[dict]
    data: dict = field(default_factory=dict)
    asks: tuple[str, ...] = ()


Records = AsyncGenerator[Record, None]


@dataclass(frozen=True)
class Request:
    """One question to a teacher. All of it is part of the journal's key.

    teacher: role in the settings, teacher or judge. seed: n answers to one prompt are seeds 0 to n - 1.
    schema: JSON schema the answer has to fit. prefix: raw text to go on from in place of messages, template tokens included.
    stop: texts that end the answer, themselves left out.
    """

    messages: list[dict]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int = 0
    teacher: str = "teacher"
    schema: dict | None = None
    prefix: str | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What came back.

    key: the journal's. value: JSON of the form that the request's schema says; None where it has none. finish: stop or length. money: USD.
    reasoning: what the teacher thought, where its server tells it apart from the text.
    """

    key: str
    text: str
    value: Any
    prompt_tokens: int
    tokens: int
    finish: str
    money: float
    reasoning: str = ""


class SetAside(Exception):
    """This record cannot go on. reason: a few words to count by, without anything of the record itself. detail: for the person who looks at the record."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason, self.detail = reason, detail
        super().__init__(f"{reason}: {detail}" if detail else reason)


@dataclass
class Flow:
    """Records of one step: those that came in, were made there, went out, and were set aside by reason."""

    came: int = 0
    made: int = 0
    went: int = 0
    aside: Counter[str] = field(default_factory=Counter)


ASKED: contextvars.ContextVar[str | None] = contextvars.ContextVar("asked", default=None)
"""id of the record under work, for the accounts of an estimate"""


class Work:
    """What a step of a run is given; all steps of the run share its accounts.

    ask(request) -> Answer: from the journal, else from the teacher; raises SetAside where it gives no usable answer.
    step: the name that the recipe gives the step. window: records under work at once.
    on_aside(record, step, reason, detail): keeps what was set aside.
    """

    def __init__(
        self,
        *,
        seed: int,
        ask: Callable[[Request], Awaitable[Answer]],
        step: str = "step",
        window: int = 256,
        on_aside: Callable[[Record, str, str, str], None] = lambda record, step, reason, detail: None,
    ):
        self.seed, self.ask, self.step, self.window, self._on_aside = seed, ask, step, window, on_aside
        self.flows: dict[str, Flow] = {}
        self.counts: dict[str, Counter[str]] = {}
        self.measures: dict[str, dict[str, float]] = {}

    def clear(self) -> None:
        """Begin the accounts anew."""
        self.flows.clear()
        self.counts.clear()
        self.measures.clear()

    def at(self, step: str) -> "Work":
        """The same work for the step of this name."""
        other = copy.copy(self)
        other.step = step
        return other

    @property
    def flow(self) -> Flow:
        """This step's account of records."""
        return self.flows.setdefault(self.step, Flow())

    def draw(self, *words: str | int) -> random.Random:
        """A generator seeded by the run's seed and these words alone, so equal on every run."""
        return random.Random(hashlib.sha256(canonical([self.seed, *words])).digest())

    def made(self, count: int) -> None:
        """Records this step made beyond those that came in; `each` counts its own."""
        self.flow.made += count

    def count(self, name: str, n: int = 1) -> None:
        """A figure for the report, such as pairs in which both orders agree."""
        self.counts.setdefault(self.step, Counter())[name] += n

    def measure(self, name: str, value: float) -> None:
        """A figure for the report that is no count, such as the agreement of judges."""
        self.measures.setdefault(self.step, {})[name] = value

    def set_aside(self, record: Record, reason: str, detail: str = "") -> None:
        self.flow.aside[reason] += 1
        self._on_aside(record, self.step, reason, detail)

    async def each(self, records: Records, work_on: Callable[[Record], Awaitable[Record | list[Record]]]) -> Records:
        """`await work_on(record)` for every record, many at once, results in input order. A list of records replaces the record; SetAside puts it aside."""
        pending: deque[tuple[Record, asyncio.Task]] = deque()
        try:
            async for record in records:
                pending.append((record, asyncio.create_task(_named(record, work_on))))
                if len(pending) >= self.window:
                    for result in await self._results(*pending.popleft()):
                        yield result
            while pending:
                for result in await self._results(*pending.popleft()):
                    yield result
        finally:
            for _, task in pending:
                task.cancel()
            await asyncio.gather(*(task for _, task in pending), return_exceptions=True)

    async def _results(self, record: Record, task: asyncio.Task) -> list[Record]:
        try:
            result = await task
        except SetAside as aside:
            self.set_aside(record, aside.reason, aside.detail)
            return []
        results = result if isinstance(result, list) else [result]
        if not results:
            raise RuntimeError(f"{self.step} made nothing of record {record.id} and gave no reason")
        self.made(len(results) - 1)
        return results


async def _named(record: Record, work_on: Callable[[Record], Awaitable[Record | list[Record]]]) -> Record | list[Record]:
    ASKED.set(record.id)
    return await work_on(record)


StepFunction = Callable[[Records, Any, Work], Records]
"""(records, the step's own settings, work) -> records"""


class NamedStep(NamedTuple):
    """A step of a run: what it is called there, what it does, and by which settings."""

    name: str
    function: StepFunction
    settings: object


async def through(records: Records, steps: list[NamedStep], work: Work) -> Records:
    """Records through every step in turn, no name twice."""
    for name, step, settings in steps:
        mine = work.at(name)
        records = _leaving(step(_entering(records, mine.flow), settings, mine), mine.flow)
    async with contextlib.aclosing(records):
        async for record in records:
            yield record


async def _entering(records: Records, flow: Flow) -> Records:
    async with contextlib.aclosing(records):
        async for record in records:
            flow.came += 1
            yield record


async def _leaving(records: Records, flow: Flow) -> Records:
    async with contextlib.aclosing(records):
        async for record in records:
            flow.went += 1
            yield record


def check_flows(work: Work) -> None:
    """Raises ProofFailed where records in + records made are not records out + records set aside."""
    for step, flow in work.flows.items():
        if flow.came + flow.made != flow.went + flow.aside.total():
            raise ProofFailed(
                f"step '{step}': {flow.came} records came and {flow.made} were made, but {flow.went} went on and {flow.aside.total()} were set aside",
            )
