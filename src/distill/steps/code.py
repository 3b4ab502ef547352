"""Exercises out of texts, kept only where their code passes its tests (phi-1, Gunasekar et al. 2023, arXiv:2306.11644)."""

import asyncio

from src.core.log import warn
from src.distill import sandbox
from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, ask_all, given, obj, request
from src.distill.texts import append_answer, code_of, derive, fill, text_of, usable, user
from src.settings.recipes import Exercise, RunCode


async def exercise(records: Records, settings: Exercise, work: Work) -> Records:
    """From each text n exercises, each about a topic drawn for it: the user gives signature and docstring, the assistant the whole function.

    The paper draws the function's name to make exercises differ; here it is the topic and the text. The tests stay in data["tests"].
    """
    schema = obj(signature=TEXT, function=TEXT, tests=TEXT)

    async def ask(record: Record) -> list[Record]:
        draw, text = work.draw(work.step, record.id), usable(text_of(record), "text")
        topics = [draw.choice(settings.topics) for _ in range(settings.n)]
        prompts = [fill(settings.prompt, text=text, topic=topic) for topic in topics]
        asked = [request(p, settings.teacher, settings.sampling, seed=seed, schema=schema) for seed, p in enumerate(prompts)]
        results = await ask_all(work, asked)
        given(results)
        return [_child(record, number, result, topics[number], settings) for number, result in enumerate(results)]

    async for record in work.each(records, ask):
        if reason := record.data.get("eliminated"):
            work.set_aside(record, reason)
        else:
            yield record


def _child(record: Record, number: int, result, topic: str, settings: Exercise) -> Record:
    if isinstance(result, SetAside):
        return derive(record, id=str(number), eliminated=result.reason)
    try:
        signature, function, tests = (usable(code_of(result.value[key]), key) for key in ("signature", "function", "tests"))
    except SetAside as aside:
        return derive(record, result, id=str(number), eliminated=aside.reason)
    messages = append_answer(user(fill(settings.ask, signature=signature)), f"```python\n{function}\n```")
    return derive(record, result, id=str(number), messages=messages, code=function, tests=tests, topic=topic)


async def run_code(records: Records, settings: RunCode, work: Work) -> Records:
    """Keeps the records whose data["code"] passes data["tests"] in the sandbox; what fails, and tests that pass without the code, are set aside."""
    if lacking := sandbox.check(settings.isolation, work.step):
        warn(f"{work.step}: programs of the teacher run with limits alone, as the kernel lacks {lacking}")
    limits = sandbox.Limits(seconds=settings.seconds, memory=int(settings.memory * 2**20), closed=settings.isolation == "full")
    slots = asyncio.Semaphore(settings.at_once)

    async def run(record: Record) -> Record:
        code, tests = record.data.get("code", ""), record.data.get("tests", "")
        if fault := sandbox.unfit(code, tests):
            raise SetAside(fault)
        async with slots:
            outcome = await sandbox.run(code, tests, limits)
            if outcome != sandbox.PASSED:
                raise SetAside(f"code: {outcome}")
            if await sandbox.run(sandbox.hollow(code), tests, limits) == sandbox.PASSED:
                raise SetAside("tests that pass without the code")
        return record

    async for record in work.each(records, run):
        yield record
