"""The journal: every request a run has sent, its answer, what it cost, and why it was set aside. SQLite, one file, kept outside the artifact.

A request is on disk before it is sent, and its answer before anything follows from it. So a kill loses no answer that was received, and what was on
its way then counts as spent in full, since the teacher may have charged for it. A thread of its own commits in groups: all that came in during one
commit goes into the next, so hundreds of requests a second share a few dozen syncs of the disk.

The file is readable by its owner alone, for it holds prompts and answers; it never holds a key of a teacher's.
"""

import asyncio
import os
import queue
import sqlite3
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self, TypeVar

from src.core.errors import NO_SPACE, BadData, Busy, NoRoom

APPLICATION = 0x0B0A9D01
"""SQLite's application_id, by which a journal is told from another database"""
TABLES = """
CREATE TABLE requests (key TEXT PRIMARY KEY, teacher TEXT, state TEXT, faults INTEGER, paid_tokens INTEGER, paid_money REAL,
    text TEXT, reasoning TEXT, prompt_tokens INTEGER, tokens INTEGER, finish TEXT, reason TEXT, detail TEXT);
CREATE TABLE sent (id INTEGER PRIMARY KEY, key TEXT, teacher TEXT, prompt_tokens INTEGER, tokens INTEGER, money REAL, batch TEXT);
CREATE TABLE totals (teacher TEXT PRIMARY KEY, requests INTEGER, tokens INTEGER, money REAL, lost INTEGER);
CREATE TABLE batches (name TEXT PRIMARY KEY, teacher TEXT, id TEXT);
CREATE INDEX sent_by_batch ON sent (batch);
"""
Result = TypeVar("Result")


@dataclass(frozen=True)
class Known:
    """What the journal holds of a request.

    state: answered, aside, or tried (sent before, without an answer that will do). faults: answers of no use so far.
    paid_tokens, paid_money: over all attempts, USD. text to finish: of the answer. reason, detail: why it was set aside.
    """

    key: str
    teacher: str
    state: str
    faults: int
    paid_tokens: int
    paid_money: float
    text: str
    reasoning: str
    prompt_tokens: int
    tokens: int
    finish: str
    reason: str
    detail: str


@dataclass(frozen=True)
class Total:
    """Of one teacher: requests sent, tokens and money (USD) spent; lost: requests on their way when a run was killed, counted as spent in full."""

    requests: int = 0
    tokens: int = 0
    money: float = 0.0
    lost: int = 0


class Operation(NamedTuple):
    """`work(base, *args)` for the journal's thread, and who waits for its result."""

    work: Callable
    args: tuple
    future: asyncio.Future
    writes: bool


class Journal:
    """Opened by one process at a time. Its methods are to be awaited in one event loop and return when what they did is on disk."""

    def __init__(self, path: Path):
        """Raises Busy where another process has it open, BadData where the file is no journal or is damaged; it is left as it is."""
        self.path = path
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._ended = False
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        try:
            self._prepare()
        except sqlite3.Error as error:
            self._base.close()
            raise self._in_words(error) from error

    def _prepare(self) -> None:
        base = self._base
        base.execute("PRAGMA locking_mode = EXCLUSIVE")
        base.execute("PRAGMA journal_mode = WAL")
        base.execute("PRAGMA synchronous = FULL")
        base.execute("PRAGMA cache_size = -8000")
        base.execute("BEGIN EXCLUSIVE")
        found = base.execute("PRAGMA application_id").fetchone()[0]
        if found == 0 and not base.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in TABLES.split(";"):
                base.execute(statement)
            base.execute(f"PRAGMA application_id = {APPLICATION}")
        elif found != APPLICATION:
            raise sqlite3.DatabaseError("not a journal of this version")
        elif (state := base.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise sqlite3.DatabaseError(state)
        for row in base.execute("SELECT id, key, teacher, prompt_tokens + tokens, money FROM sent WHERE batch IS NULL").fetchall():
            _settle(base, *row, lost=1)
        base.execute("COMMIT")

    def _in_words(self, error: sqlite3.Error) -> Exception:
        name = getattr(error, "sqlite_errorname", "")
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            return Busy("another process has the journal open", where=str(self.path), fix=["wait until it has ended", "run=OTHER_NAME"])
        if name.startswith(("SQLITE_FULL", "SQLITE_IOERR", "SQLITE_CANTOPEN", "SQLITE_READONLY")):
            return NoRoom(str(error), where=str(self.path), fix=NO_SPACE)
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or not name:
            return BadData(
                f"the journal is damaged: {error}; it was left as it is",
                where=str(self.path),
                fix=[
                    "put back a copy of it",
                    "move it away: all is asked, and paid, anew",
                ],
            )
        return error

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *_) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join)
        self._base.close()

    async def _do(self, work: Callable[..., Result], *args, writes: bool = True) -> Result:
        future: asyncio.Future[Result] = self._loop.create_future()
        self._queue.put(Operation(work, args, future, writes))
        if self._ended:  # and has emptied the queue, perhaps before this was put there
            raise RuntimeError("the journal's thread has ended")
        return await future

    def _write(self) -> None:
        group: list[Operation | None] = []
        try:
            while None not in group:
                group = [self._queue.get()]
                while not self._queue.empty():
                    group.append(self._queue.get())
                self._answer([op for op in group if op])
        except Exception as error:
            self._ended = True
            while not self._queue.empty():
                group.append(self._queue.get())
            left = [op for op in group if op]
            self._loop.call_soon_threadsafe(_resolve, left, [error] * len(left))
            raise

    def _answer(self, group: list[Operation]) -> None:
        try:
            results = self._commit(group)
        except sqlite3.Error as error:
            if self._base.in_transaction:
                self._base.execute("ROLLBACK")
            results = [self._in_words(error)] * len(group)
        self._loop.call_soon_threadsafe(_resolve, group, results)

    def _commit(self, group: list[Operation]) -> list:
        if not any(op.writes for op in group):
            return [op.work(self._base, *op.args) for op in group]
        self._base.execute("BEGIN")
        results = [op.work(self._base, *op.args) for op in group]
        self._base.execute("COMMIT")
        return results

    async def look(self, key: str) -> Known | None:
        """What is known of a request."""
        return await self._do(_look, key, writes=False)

    async def recall(self, key: str) -> Known:
        """The same of a request that was sent or put aside."""
        return await self._do(_recall, key, writes=False)

    async def send(self, key: str, teacher: str, prompt_tokens: int, tokens: int, money: float) -> int:
        """A request is about to be sent at up to this cost; returns the number to settle it by."""
        return await self._do(_send, key, teacher, prompt_tokens, tokens, money, None)

    async def answered(self, sent: int, key: str, teacher: str, tokens: int, money: float, answer: dict) -> Known:
        """The answer to a request sent, and what it cost. answer: text, reasoning, prompt_tokens, tokens, finish."""
        return await self._do(_answered, sent, key, teacher, tokens, money, answer)

    async def failed(self, sent: int, key: str, teacher: str, tokens: int, money: float, fault: bool) -> None:
        """A request sent gave nothing of use at this cost. fault: it is the answer that was bad, which counts on later runs too."""
        await self._do(_failed, sent, key, teacher, tokens, money, fault)

    async def spoil(self, key: str) -> None:
        """The answer that came is of no use after all; the request counts as tried."""
        await self._do(_spoil, key)

    async def put_aside(self, key: str, teacher: str, reason: str, detail: str) -> None:
        """No answer to this request will do; it is not asked again unless told to."""
        await self._do(_put_aside, key, teacher, reason, detail)

    async def take_back(self, keys: list[str]) -> None:
        """Requests set aside while the teacher was out of order: they are asked anew by the next run."""
        await self._do(_take_back, keys)

    async def take_back_all(self) -> int:
        """Every request set aside so far may be asked anew; returns how many."""
        return await self._do(_take_back_all)

    async def totals(self) -> dict[str, Total]:
        """{teacher: what it was sent and paid} over all runs that shared this journal."""
        return await self._do(_totals, writes=False)

    async def begin_batch(self, name: str, teacher: str, requests: list[tuple[str, int, int, float]]) -> list[int]:
        """A batch is about to be sent: (key, prompt tokens, tokens, USD) of each request at most; returns the numbers to settle them by."""
        return await self._do(_begin_batch, name, teacher, requests)

    async def name_batch(self, name: str, id: str) -> None:
        """The batch's id at the endpoint, known from here on."""
        await self._do(_name_batch, name, id)

    async def end_batch(self, name: str) -> None:
        """Nothing more comes of it; requests not settled cost nothing."""
        await self._do(_end_batch, name)

    async def open_batches(self, teacher: str) -> list["OpenBatch"]:
        """Batches of this teacher that have not ended."""
        return await self._do(_open_batches, teacher, writes=False)


@dataclass(frozen=True)
class OpenBatch:
    """id: at the endpoint; None where it is not known whether it was sent. requests: {key: (number to settle by, prompt tokens, tokens)}."""

    name: str
    id: str | None
    requests: dict[str, tuple[int, int, int]]


def _resolve(group: list[Operation], results: list) -> None:
    for op, result in zip(group, results):
        if op.future.done():
            continue
        if isinstance(result, Exception):
            op.future.set_exception(result)
        else:
            op.future.set_result(result)


def _look(base: sqlite3.Connection, key: str) -> Known | None:
    row = base.execute("SELECT * FROM requests WHERE key = ?", (key,)).fetchone()
    return Known(*row) if row else None


def _recall(base: sqlite3.Connection, key: str) -> Known:
    if known := _look(base, key):
        return known
    raise RuntimeError(f"the journal has no request {key}")


def _send(base: sqlite3.Connection, key: str, teacher: str, prompt_tokens: int, tokens: int, money: float, batch: str | None) -> int:
    insert = "INSERT INTO sent (key, teacher, prompt_tokens, tokens, money, batch) VALUES (?, ?, ?, ?, ?, ?)"
    number = base.execute(insert, (key, teacher, prompt_tokens, tokens, money, batch)).lastrowid
    assert number is not None  # a row was inserted
    return number


def _settle(
    base: sqlite3.Connection, sent: int, key: str, teacher: str, tokens: int, money: float, *, fault: int = 0, lost: int = 0
) -> None:
    """What a request sent has cost in the end, on its own account and its teacher's."""
    if base.execute("DELETE FROM sent WHERE id = ?", (sent,)).rowcount != 1:
        raise RuntimeError(f"request {sent} was settled before")
    base.execute(
        "INSERT INTO requests VALUES (?1, ?2, 'tried', ?3, ?4, ?5, '', '', 0, 0, '', '', '') ON CONFLICT (key) DO UPDATE SET"
        " faults = faults + ?3, paid_tokens = paid_tokens + ?4, paid_money = paid_money + ?5",
        (key, teacher, fault, tokens, money),
    )
    base.execute(
        "INSERT INTO totals VALUES (?1, 1, ?2, ?3, ?4) ON CONFLICT (teacher) DO UPDATE SET"
        " requests = requests + 1, tokens = tokens + ?2, money = money + ?3, lost = lost + ?4",
        (teacher, tokens, money, lost),
    )


def _answered(base: sqlite3.Connection, sent: int, key: str, teacher: str, tokens: int, money: float, answer: dict) -> Known:
    _settle(base, sent, key, teacher, tokens, money)
    base.execute(
        "UPDATE requests SET state = 'answered', text = :text, reasoning = :reasoning, prompt_tokens = :prompt_tokens, tokens = :tokens,"
        " finish = :finish WHERE key = :key",
        {**answer, "key": key},
    )
    return _recall(base, key)


def _failed(base: sqlite3.Connection, sent: int, key: str, teacher: str, tokens: int, money: float, fault: bool) -> None:
    _settle(base, sent, key, teacher, tokens, money, fault=int(fault))


def _spoil(base: sqlite3.Connection, key: str) -> None:
    base.execute("UPDATE requests SET state = 'tried', faults = faults + 1 WHERE key = ?", (key,))


def _put_aside(base: sqlite3.Connection, key: str, teacher: str, reason: str, detail: str) -> None:
    base.execute(
        "INSERT INTO requests VALUES (?1, ?2, 'aside', 0, 0, 0, '', '', 0, 0, '', ?3, ?4) ON CONFLICT (key) DO UPDATE SET"
        " state = 'aside', reason = ?3, detail = ?4",
        (key, teacher, reason, detail),
    )


def _take_back(base: sqlite3.Connection, keys: list[str]) -> None:
    base.executemany("UPDATE requests SET state = 'tried', faults = 0 WHERE key = ? AND state = 'aside'", [(key,) for key in keys])


def _take_back_all(base: sqlite3.Connection) -> int:
    return base.execute("UPDATE requests SET state = 'tried', faults = 0 WHERE state = 'aside'").rowcount


def _totals(base: sqlite3.Connection) -> dict[str, Total]:
    return {teacher: Total(*rest) for teacher, *rest in base.execute("SELECT * FROM totals")}


def _begin_batch(base: sqlite3.Connection, name: str, teacher: str, requests: list[tuple[str, int, int, float]]) -> list[int]:
    base.execute("INSERT INTO batches VALUES (?, ?, NULL)", (name, teacher))
    return [_send(base, key, teacher, prompt_tokens, tokens, money, name) for key, prompt_tokens, tokens, money in requests]


def _name_batch(base: sqlite3.Connection, name: str, id: str) -> None:
    base.execute("UPDATE batches SET id = ? WHERE name = ?", (id, name))


def _end_batch(base: sqlite3.Connection, name: str) -> None:
    base.execute("DELETE FROM sent WHERE batch = ?", (name,))
    base.execute("DELETE FROM batches WHERE name = ?", (name,))


def _open_batches(base: sqlite3.Connection, teacher: str) -> list[OpenBatch]:
    found = []
    for name, id in base.execute("SELECT name, id FROM batches WHERE teacher = ?", (teacher,)).fetchall():
        rows = base.execute("SELECT key, id, prompt_tokens, tokens FROM sent WHERE batch = ?", (name,))
        found.append(OpenBatch(name, id, {key: (number, prompt_tokens, tokens) for key, number, prompt_tokens, tokens in rows}))
    return found
