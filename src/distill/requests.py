"""Requests as steps make them, several at once, and the JSON schemas their answers have to fit."""

import asyncio
import json
from collections.abc import Iterable, Sequence

from src.distill.pipeline import Answer, Record, Records, Request, SetAside, Work
from src.distill.texts import user
from src.settings.recipes import Sampling

AS_JSON = "Answer with one JSON object and nothing before or after it. It has to fit this JSON schema:"
TEXT = {"type": "string"}
YES_NO = {"type": "boolean"}


def request(prompt: str | list[dict], teacher: str, sampling: Sampling, *, seed: int = 0, schema: dict | None = None) -> Request:
    """A request for the next assistant turn. prompt: one user turn's text, or the messages.

    With a schema the prompt ends in it, since not every server shows it to the model and a local teacher has no other way to know.
    """
    if schema is not None:
        prompt = f"{prompt}\n\n{AS_JSON}\n{json.dumps(schema)}"
    return Request(
        messages=user(prompt) if isinstance(prompt, str) else prompt,
        teacher=teacher,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        seed=seed,
        schema=schema,
    )


async def ask_all(work: Work, requests: Sequence[Request]) -> list[Answer | SetAside]:
    """The answer to each request, or why there is none, in their order; all are asked at once."""
    tasks = [asyncio.create_task(_attempt(work, one)) for one in requests]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _attempt(work: Work, one: Request) -> Answer | SetAside:
    try:
        return await work.ask(one)
    except SetAside as aside:
        return aside


def given(results: Sequence[Answer | SetAside]) -> list[Answer]:
    """The answers among results. Raises the first SetAside where there are none."""
    answers = [result for result in results if isinstance(result, Answer)]
    if not answers:
        raise next(result for result in results if isinstance(result, SetAside))
    return answers


def obj(**properties: dict) -> dict:
    """JSON schema of an object with exactly these properties."""
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def array(items: dict, low: int, high: int) -> dict:
    """JSON schema of an array of `low` to `high` such items."""
    return {"type": "array", "items": items, "minItems": low, "maxItems": high}


def whole(low: int, high: int) -> dict:
    """JSON schema of a whole number within bounds."""
    return {"type": "integer", "minimum": low, "maximum": high}


async def stream(records: Iterable[Record]) -> Records:
    """The records as `Work.each` takes them."""
    for record in records:
        yield record
