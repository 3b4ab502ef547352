"""Requests by an endpoint's batch API (https://platform.openai.com/docs/api-reference/batch): files of requests, answered within a day.

A batch is in the journal before it is sent, under a name that also goes into its metadata. After a kill the next command finds the batch by its id,
or by that name where the kill came before the id, and fetches its answers; nothing is sent twice.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Self

import aiohttp

from src.core.errors import NoAnswer, UserError
from src.core.log import say
from src.distill.endpoint import Failed, RemoteTeacher, TeacherReply
from src.distill.journal import Journal, Known, OpenBatch
from src.distill.limits import BudgetTracker, back_off
from src.distill.pipeline import Request

ENDED = ("completed", "failed", "expired", "cancelled")
METADATA = "boardwalk_batch"
SETTLED_AT_ONCE = 500
POLL = 60.0
"""seconds between two looks at a batch at most"""
LONGEST_BATCH = 25 * 3600.0
"""seconds a command waits for one; the API answers within a day, or says that the batch is expired"""
MOST_PAGES = 1000
"""of a hundred batches each, looked through for one"""
Settle = Callable[[int, str, tuple[int, int], TeacherReply | Failed | NoAnswer], Awaitable[Known]]


@dataclass(frozen=True)
class Item:
    """A request to be sent, and who waits for it."""

    key: str
    request: Request
    seed: int
    future: asyncio.Future


class Batches:
    """settle(number, key, reserved tokens, outcome): writes down what became of a request; returns its record or raises Failed.

    size: requests in one batch at most.
    """

    def __init__(self, endpoint: RemoteTeacher, journal: Journal, budget: BudgetTracker, settle: Settle):
        self._endpoint, self._journal, self._purse, self._settle = endpoint, journal, budget, settle
        self._limits, self.size = endpoint.settings.limits, endpoint.settings.batch_size
        self._gathered: list[Item] = []
        self._came = asyncio.Event()
        self._expected: dict[str, asyncio.Future] = {}
        self._tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> Self:
        for batch in await self._journal.open_batches(self._endpoint.name):
            for key, (_, *reserved) in batch.requests.items():
                await self._purse.reserve(sum(reserved), self._endpoint.cost(*reserved))
                self._expected[key] = asyncio.get_running_loop().create_future()
            self._start(self._resume(batch), list(batch.requests))
        self._start(self._collect(), [])
        return self

    async def __aexit__(self, *_) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, key: str, request: Request, seed: int) -> Known:
        """Its record once the batch it goes with has ended. Raises Failed, or the UserError that stops the run."""
        if key not in self._expected:
            most = self._endpoint.most(request)
            await self._purse.reserve(sum(most), self._endpoint.cost(*most))
            self._expected[key] = asyncio.get_running_loop().create_future()
            self._gathered.append(Item(key, request, seed, self._expected[key]))
            self._came.set()
        future = self._expected[key]
        try:
            return await asyncio.shield(future)
        finally:
            if future.done():
                self._expected.pop(key, None)

    def _start(self, work, keys: list[str]) -> None:
        task = asyncio.create_task(self._guarded(work, keys))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work, keys: list[str]) -> None:
        """What stops a batch stops those who wait for it."""
        try:
            await work
        except Failed as error:
            for key in keys:
                self._tell(key, NoAnswer(f"the batch API fails: {error}", where=self._endpoint.url, fix="the same command goes on"))
        except Exception as error:
            for key in keys:
                self._tell(key, error)
            if not isinstance(error, UserError):
                raise

    async def _collect(self) -> None:
        """Send what has gathered once it fills a batch, or nothing more comes."""
        while True:
            await self._came.wait()
            before = -1
            while before < len(self._gathered) < self.size:
                before = len(self._gathered)
                await asyncio.sleep(min(1.0, self._limits.back_off))
            items, self._gathered = self._gathered[: self.size], self._gathered[self.size :]
            if not self._gathered:
                self._came.clear()
            self._start(self._send(items), [item.key for item in items])

    async def _send(self, items: list[Item]) -> None:
        endpoint = self._endpoint
        name = hashlib.sha256(f"{time.time_ns()} {' '.join(item.key for item in items)}".encode()).hexdigest()
        most = [endpoint.most(item.request) for item in items]
        rows = [(item.key, *m, endpoint.cost(*m)) for item, m in zip(items, most)]
        sent = await self._journal.begin_batch(name, endpoint.name, rows)
        requests = {item.key: (number, *m) for item, number, m in zip(items, sent, most)}
        try:
            file = await self._call("POST", "/files", data=lambda: _form(self._lines(items)))
            body = {"input_file_id": _field(file, "id"), "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        except (Failed, NoAnswer):
            await self._journal.end_batch(name)
            raise
        id = await self._create(name, body)
        await self._journal.name_batch(name, id)
        say(f"distill: batch {endpoint.plain(id)} of {len(items):,} requests is sent; if this command ends, the same command fetches it")
        await self._fetch(OpenBatch(name, id, requests))

    def _lines(self, items: list[Item]) -> bytes:
        lines = [
            json.dumps(
                {
                    "custom_id": item.key,
                    "method": "POST",
                    "url": "/v1/chat/completions",
                    "body": self._endpoint.body_of(item.request, item.seed),
                }
            )
            for item in items
        ]
        return "\n".join(lines).encode() + b"\n"

    async def _create(self, name: str, body: dict) -> str:
        """The batch's id. Where a try may have been heard, it is looked for before the next."""
        data = json.dumps(body | {"metadata": {METADATA: name}}).encode()
        for tries in range(1, self._limits.tries + 1):
            try:
                return _field(await self._once("POST", "/batches", data), "id")
            except Failed as failed:
                if not failed.again or tries == self._limits.tries:
                    raise
                await asyncio.sleep(back_off(tries, self._limits.back_off))
                if found := await self._find(name):
                    return found
        raise AssertionError

    async def _find(self, name: str) -> str | None:
        """The id of the batch with this name in its metadata."""
        after = ""
        for _ in range(MOST_PAGES):
            listed = await self._call("GET", f"/batches?limit=100{after}")
            batches = [batch for batch in listed.get("data") or [] if isinstance(batch, dict)]
            for batch in batches:
                if (batch.get("metadata") or {}).get(METADATA) == name:
                    return _field(batch, "id")
            if not listed.get("has_more") or not batches:
                return None
            after = f"&after={_field(batches[-1], 'id')}"
        raise NoAnswer(
            f"the endpoint lists more than {MOST_PAGES * 100:,} batches",
            where=self._endpoint.url,
            fix="teacher.batch=false asks one by one",
        )

    async def _resume(self, batch: OpenBatch) -> None:
        id = batch.id or await self._find(batch.name)
        if id is None:
            for key, (number, prompt_tokens, tokens) in batch.requests.items():
                await self._conclude(key, number, (prompt_tokens, tokens), Failed("batch never sent"))
            return await self._journal.end_batch(batch.name)
        await self._journal.name_batch(batch.name, id)
        say(f"distill: fetches batch {self._endpoint.plain(id)} of {len(batch.requests):,} requests, sent by an earlier command")
        await self._fetch(OpenBatch(batch.name, id, batch.requests))

    async def _fetch(self, batch: OpenBatch) -> None:
        """Wait for a batch to end, and give each request its outcome."""
        looks, began = 0, time.monotonic()
        while _field(state := await self._call("GET", f"/batches/{batch.id}"), "status") not in ENDED:
            looks += 1
            if time.monotonic() - began > LONGEST_BATCH:
                raise NoAnswer(
                    f"batch {self._endpoint.plain(str(batch.id))} has not ended in {LONGEST_BATCH / 3600:g} hours",
                    where=self._endpoint.url,
                    fix="the same command waits on",
                )
            await asyncio.sleep(min(POLL, self._limits.back_off * 1.5 ** min(looks, 99)))
        left = dict(batch.requests)
        for file in (state.get("output_file_id"), state.get("error_file_id")):
            if file:
                await self._tried(lambda: self._conclude_all(f"/files/{file}/content", left))
        words = self._endpoint.plain(json.dumps(state.get("errors"))) if state.get("errors") else ""
        for key, (number, prompt_tokens, tokens) in left.items():
            await self._conclude(
                key, number, (prompt_tokens, tokens), Failed(f"batch {state['status']}", words, again=state["status"] != "failed")
            )
        await self._journal.end_batch(batch.name)
        if state["status"] == "failed":
            raise NoAnswer(f"the endpoint refuses the batch: {words}", where=self._endpoint.url, fix="teacher.batch=false asks one by one")

    async def _conclude_all(self, path: str, left: dict) -> None:
        group = []
        async for line in self._endpoint.lines(path):
            if line.strip() and (found := self._outcome(line, left)):
                group.append(self._conclude(*found))
            if len(group) >= SETTLED_AT_ONCE:
                await asyncio.gather(*group)
                group = []
        await asyncio.gather(*group)

    def _outcome(self, line: bytes, left: dict) -> tuple | None:
        """(key, number, reserved, outcome) of a line of a batch's output; None for a key that is not of this batch."""
        try:
            entry = json.loads(line)
            key, response = entry["custom_id"], entry.get("response") or {}
            status, body = response.get("status_code", 500), json.dumps(response.get("body") or entry.get("error")).encode()
        except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
            return None
        if key not in left:
            return None
        number, *reserved = left.pop(key)
        try:
            return key, number, tuple(reserved), self._endpoint.reply_of(status, body, reserved[1])
        except (Failed, NoAnswer) as error:
            return key, number, tuple(reserved), error

    async def _conclude(self, key: str, number: int, reserved: tuple[int, int], outcome: TeacherReply | Failed | NoAnswer) -> None:
        try:
            self._tell(key, await self._settle(number, key, reserved, outcome))
        except (Failed, UserError) as error:
            self._tell(key, error)

    def _tell(self, key: str, result: Known | Exception) -> None:
        future = self._expected.get(key)
        if future is None or future.done():
            return
        if isinstance(result, Exception):
            future.set_exception(result)
            future.exception()  # seen, even where nobody asks for it
        else:
            future.set_result(result)

    async def _call(self, method: str, path: str, data: Callable | None = None) -> dict:
        return await self._tried(lambda: self._once(method, path, data() if data else None))

    async def _tried(self, work: Callable):
        """What `work()` gives, tried as often as a request."""
        for tries in range(1, self._limits.tries + 1):
            try:
                return await work()
            except Failed as failed:
                if not failed.again or tries == self._limits.tries:
                    raise
                await asyncio.sleep(failed.wait or back_off(tries, self._limits.back_off))
        raise AssertionError

    async def _once(self, method: str, path: str, data) -> dict:
        form = {"headers": {"Content-Type": data.content_type}} if isinstance(data, aiohttp.MultipartWriter) else {}
        status, body, wait = await self._endpoint.call(method, path, data=data, **form)
        if status != 200:
            raise self._endpoint.refusal(status, self._endpoint.plain(body[:4096].decode(errors="replace")), wait)
        try:
            found = self._endpoint.server.json(body)
            return found if isinstance(found, dict) else {}
        except ValueError:
            raise Failed("reply is not JSON", self._endpoint.plain(body[:300].decode(errors="replace"))) from None


def _form(lines: bytes) -> aiohttp.MultipartWriter:
    form = aiohttp.MultipartWriter("form-data")
    form.append(b"batch").set_content_disposition("form-data", name="purpose")
    form.append(lines, {"Content-Type": "application/jsonl"}).set_content_disposition("form-data", name="file", filename="requests.jsonl")
    return form


def _field(found: dict, name: str) -> str:
    """A text in a reply that has to be there."""
    if not isinstance(found.get(name), str):
        raise Failed("reply is not of OpenAI's form", f"no {name}")
    return found[name]
