"""How a request gets its answer: from the journal, else from its teacher, under all limits, tried again where that may help, or set aside.

A request is reserved against the budget, then written to the journal, then sent. Its answer is written to the journal before anyone sees it. Two records
that ask the same share one request. Once something stops the run nothing more is sent, and what is on its way is waited for, since it is paid.
"""

import asyncio
import functools
import json
import time
from dataclasses import dataclass

from src.core.errors import NoAnswer, UserError
from src.core.files import canonical
from src.core.log import say, warn
from src.distill.batch import Batches
from src.distill.endpoint import AskedTeacher, Failed, TeacherReply
from src.distill.journal import Journal, Known
from src.distill.limits import BudgetTracker, Gate, back_off
from src.distill.pipeline import ASKED, Answer, Request, SetAside
from src.settings.teachers import TeacherLimits

STRIDE = 1_000_003
"""added to the seed for each answer that was bad, since the same seed would bring the same; not where the server failed"""
BUSY_TRIES = 10
"""times as many tries for a request that is turned away for now as for one that fails"""


@dataclass
class TeacherChannel:
    """One teacher and what is between it and the records."""

    teacher: AskedTeacher
    limits: TeacherLimits
    gate: Gate
    batches: Batches | None = None

    @property
    def at_once(self) -> int:
        """Requests it takes at once."""
        return self.batches.size if self.batches else self.limits.concurrency


class Stopped(UserError):
    """The run ends, so this request is not sent."""


class Dispatcher:
    """All teachers of a run behind one `ask`. channels: by role; budget: holds what earlier commands spent.

    costs: where an estimate wants it, gets {id of a record under work: (tokens, USD) its requests cost, whenever they were sent}.
    """

    def __init__(
        self,
        channels: dict[str, TeacherChannel],
        journal: Journal,
        budget: BudgetTracker,
        *,
        allow_cut_off: bool,
        costs: dict[str, tuple[int, float]] | None = None,
    ):
        self.channels, self.journal, self.budget, self.allow_cut_off = channels, journal, budget, allow_cut_off
        self.stopped: UserError | None = None
        self.costs = costs
        self._stop = asyncio.Event()
        self._under_way: dict[str, asyncio.Task] = {}
        self._on_wire: set[str] = set()

    async def ask(self, request: Request) -> Answer:
        """Raises SetAside where no answer will do, and the UserError that stops the run."""
        channel = self.channels[request.teacher]
        key = channel.teacher.key_of(request)
        task = self._under_way.get(key)
        if task is None:
            task = self._under_way[key] = asyncio.create_task(self._obtain(channel, key, request))
            task.add_done_callback(functools.partial(self._ended, key))
        known = await asyncio.shield(task)
        self._charge(known)
        if known.state == "aside":
            raise SetAside(known.reason, known.detail)
        if known.finish == "length" and not self.allow_cut_off:
            raise SetAside("cut off", f"at {request.max_tokens} tokens; allow_cut_off=true takes such answers")
        value = value_of(known.text, request.schema)
        return Answer(key, known.text, value, known.prompt_tokens, known.tokens, known.finish, known.paid_money, reasoning=known.reasoning)

    def _ended(self, key: str, task: asyncio.Task) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # seen, even where the record that asked is gone

    def _charge(self, known: Known) -> None:
        if self.costs is not None and (record := ASKED.get()) is not None:
            tokens, money = self.costs.get(record, (0, 0.0))
            self.costs[record] = (tokens + known.paid_tokens, money + known.paid_money)

    async def drain(self) -> None:
        """Send nothing more, and wait for the answers on their way. Batches go on at the endpoint; the next command fetches them."""
        self._halt(Stopped("the run stops"))
        waiting = {key: task for key, task in self._under_way.items() if key in self._on_wire}
        for key, task in self._under_way.items():
            if key not in waiting:
                task.cancel()
        if waiting:
            say(f"distill: waits for {len(waiting)} answers on their way")
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)

    async def _obtain(self, channel: TeacherChannel, key: str, request: Request) -> Known:
        """The journal's record of the request, answered or set aside."""
        try:
            known = await self.journal.look(key)
            return known if known and known.state == "aside" else await self._answered(channel, key, request, known)
        except UserError as error:
            self._halt(error)
            raise

    def _halt(self, error: UserError) -> None:
        """Nothing more is sent, for this reason."""
        self.stopped = self.stopped or error
        self._stop.set()

    async def _answered(self, channel: TeacherChannel, key: str, request: Request, known: Known | None) -> Known:
        bad, failures, busy, first = known.faults if known else 0, 0, 0, known is None
        while True:
            try:
                earlier = known if known and known.state == "answered" else None
                answered = earlier or await self._try(channel, key, request, request.seed + bad * STRIDE)
                await self._check(channel, answered, request, fresh=not earlier)
                return answered
            except Failed as failed:
                await self._count(channel, failed, first or failed.down)
                known, first = None, False
                bad, busy, failures = bad + failed.fault, busy + failed.busy, failures + (not failed.fault and not failed.busy)
                if not failed.again or bad + failures >= channel.limits.tries or busy >= BUSY_TRIES * channel.limits.tries:
                    return await self._put_aside(channel, key, failed)
                await self._sleep(back_off(bad + failures + busy, channel.limits.back_off))

    async def _check(self, channel: TeacherChannel, known: Known, request: Request, fresh: bool) -> None:
        """Raises Failed where an answer is not what was asked for."""
        try:
            if known.finish != "length":
                value_of(known.text, request.schema)
        except Failed:
            await self.journal.spoil(known.key)
            raise
        if fresh:
            channel.gate.breaker.well()

    async def _put_aside(self, channel: TeacherChannel, key: str, failed: Failed) -> Known:
        await self.journal.put_aside(key, channel.teacher.name, failed.reason, channel.teacher.plain(failed.detail))
        channel.gate.breaker.aside.append(key)
        return await self.journal.recall(key)

    async def _try(self, channel: TeacherChannel, key: str, request: Request, seed: int) -> Known:
        """Send it once."""
        if channel.batches:
            return await channel.batches.ask(key, request, seed)
        gate, most = channel.gate, channel.teacher.most(request)
        money = channel.teacher.cost(*most)
        try:
            async with gate.ready:
                await self._paused(gate)
                await gate.requests.wait(1)
                await gate.tokens.wait(sum(most))
                self._go_on()
                self._on_wire.add(key)
                await self.budget.reserve(sum(most), money)
                sent = await self.journal.send(key, channel.teacher.name, *most, money)
                outcome = await self._send(channel, request, seed)
            return await self.settle(channel, sent, key, most, outcome)
        finally:
            self._on_wire.discard(key)

    async def _send(self, channel: TeacherChannel, request: Request, seed: int) -> TeacherReply | Failed | UserError:
        gate, begun = channel.gate, 0.0
        await gate.concurrency.take()
        try:
            await self._paused(gate)
            self._go_on()
            begun = time.monotonic()
            reply = await channel.teacher.send(request, seed)
            gate.concurrency.well()
            return reply
        except Failed as failed:
            if failed.busy:
                gate.concurrency.busy(begun)
            if failed.wait is not None:
                gate.pause.ask(failed.wait)
            return failed
        except UserError as error:
            self._halt(error)
            return error
        finally:
            gate.concurrency.give_back()

    async def settle(
        self, channel: TeacherChannel, sent: int, key: str, most: tuple[int, int], outcome: TeacherReply | Failed | UserError
    ) -> Known:
        """Write down what became of a request sent, and what it cost: what the teacher counted, or all that was reserved where it did not say."""
        teacher, reserved, money = channel.teacher, sum(most), channel.teacher.cost(*most)
        paid = (0, 0) if isinstance(outcome, UserError) else outcome.paid
        tokens, cost = (sum(paid), teacher.cost(*paid)) if paid else (reserved, money)
        self.budget.settle(reserved, money, tokens, cost)
        channel.gate.tokens.give_back(reserved - tokens)
        if paid and teacher.learn(most[0], paid[0]):
            warn(
                f"distill: {teacher.name} counts {paid[0]} tokens in a prompt of at most {most[0]} by its bytes; more is reserved from here on"
            )
        if isinstance(outcome, TeacherReply):
            prompt_tokens, made = paid or most
            text = {"text": outcome.text, "reasoning": outcome.reasoning, "finish": outcome.finish}
            return await self.journal.answered(
                sent, key, teacher.name, tokens, cost, text | {"prompt_tokens": prompt_tokens, "tokens": made}
            )
        await self.journal.failed(sent, key, teacher.name, tokens, cost, isinstance(outcome, Failed) and outcome.fault)
        raise outcome

    async def _count(self, channel: TeacherChannel, failed: Failed, first: bool) -> None:
        """Raises NoAnswer where that failure was one too many on end."""
        breaker = channel.gate.breaker
        if breaker.failed(first, failed.together):
            await self.journal.take_back(breaker.aside)
            raise NoAnswer(
                f"{breaker.most} failures on end, the last: {failed}",
                where=channel.teacher.name,
                fix=[
                    "mend what it says; the same command goes on, with every answer so far",
                    "teacher.limits.breaker=N, higher, waits for more",
                ],
            )

    async def _paused(self, gate: Gate) -> None:
        while (left := gate.pause.left()) > 0:
            await self._sleep(left)

    async def _sleep(self, seconds: float) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), seconds)
        except TimeoutError:
            return
        self._go_on()

    def _go_on(self) -> None:
        """Raises what stopped the run, if anything did."""
        if self.stopped:
            raise self.stopped


def value_of(text: str, schema: dict | None):
    """The JSON in an answer that has to fit a schema; None where none was asked. Raises Failed."""
    if schema is None:
        return None
    try:
        value = json.loads(_bare(text), parse_constant=_no_constant)
        canonical(value)  # an escape may stand for half of a surrogate pair, which nothing can hold
    except (ValueError, RecursionError) as error:
        raise Failed("answer is not JSON", str(error), fault=True) from None
    if fault := next(_validator(json.dumps(schema, sort_keys=True)).iter_errors(value), None):
        raise Failed("answer does not fit the schema", fault.message[:300], fault=True)
    return value


def _bare(text: str) -> str:
    """Without the code fence that many models put around JSON."""
    text = text.strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        return text[text.index("\n") : -3]
    return text


def _no_constant(name: str):
    raise ValueError(f"{name} is not JSON")


@functools.lru_cache(64)
def _validator(schema: str):
    from jsonschema import Draft202012Validator

    return Draft202012Validator(json.loads(schema))
