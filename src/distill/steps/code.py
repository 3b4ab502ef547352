"""Exercises out of texts, kept only where their code passes its tests (phi-1, Gunasekar et al. 2023, arXiv:2306.11644)."""

import asyncio
from collections.abc import AsyncIterator

from src.core.log import warn
from src.distill import sandbox
from src.distill.pipeline import Row, SetAside, Work
from src.distill.requests import TEXT, ask_all, given, obj, request
from src.distill.texts import code_of, fill, grown, kept, said, text_of, user
from src.settings.recipes import Exercise, RunCode


async def exercise(rows: AsyncIterator[Row], settings: Exercise, work: Work) -> AsyncIterator[Row]:
    """From each text n exercises, each about a topic drawn for it: the user gives signature and docstring, the assistant the whole function.

    The paper draws the function's name to make exercises differ; here it is the topic and the text. The tests stay in data["tests"].
    """
    schema = obj(signature=TEXT, function=TEXT, tests=TEXT)

    async def ask(row: Row) -> list[Row]:
        draw, text = work.draw(work.step, row.id), kept(text_of(row), "text")
        topics = [draw.choice(settings.topics) for _ in range(settings.n)]
        prompts = [fill(settings.prompt, text=text, topic=topic) for topic in topics]
        asked = [request(p, settings.teacher, settings.sampling, seed=seed, schema=schema) for seed, p in enumerate(prompts)]
        results = await ask_all(work, asked)
        given(results)
        return [_child(row, number, result, topics[number], settings) for number, result in enumerate(results)]

    async for row in work.each(rows, ask):
        if reason := row.data.get("eliminated"):
            work.set_aside(row, reason)
        else:
            yield row


def _child(row: Row, number: int, result, topic: str, settings: Exercise) -> Row:
    if isinstance(result, SetAside):
        return grown(row, id=str(number), eliminated=result.reason)
    try:
        signature, function, tests = (kept(code_of(result.value[key]), key) for key in ("signature", "function", "tests"))
    except SetAside as aside:
        return grown(row, result, id=str(number), eliminated=aside.reason)
    messages = said(user(fill(settings.ask, signature=signature)), f"```python\n{function}\n```")
    return grown(row, result, id=str(number), messages=messages, code=function, tests=tests, topic=topic)


async def run_code(rows: AsyncIterator[Row], settings: RunCode, work: Work) -> AsyncIterator[Row]:
    """Keeps the rows whose data["code"] passes data["tests"] in the sandbox; what fails, and tests that pass without the code, are set aside."""
    if lacking := sandbox.check(settings.isolation, work.step):
        warn(f"{work.step}: programs of the teacher run with limits alone, as the kernel lacks {lacking}")
    limits = sandbox.Limits(seconds=settings.seconds, memory=int(settings.memory * 2**20), closed=settings.isolation == "full")
    slots = asyncio.Semaphore(settings.at_once)

    async def run(row: Row) -> Row:
        code, tests = row.data.get("code", ""), row.data.get("tests", "")
        if fault := sandbox.unfit(code, tests):
            raise SetAside(fault)
        async with slots:
            outcome = await sandbox.run(f"{code}\n\n{tests}\n", limits)
            if outcome != sandbox.PASSED:
                raise SetAside(f"code: {outcome}")
            if await sandbox.run(f"{sandbox.hollow(code)}\n\n{tests}\n", limits) == sandbox.PASSED:
                raise SetAside("tests that pass without the code")
        return row

    async for row in work.each(rows, run):
        yield row
