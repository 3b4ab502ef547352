"""Prompts drawn from an aligned teacher by its template alone (Magpie, Xu et al. 2024, arXiv:2406.08464)."""

from src.distill.pipeline import Record, Records, Request, SetAside, Work
from src.distill.requests import stream
from src.distill.texts import derive, usable, user
from src.settings.recipes import Magpie


async def magpie(records: Records, settings: Magpie, work: Work) -> Records:
    """The teacher goes on from the opening of a user's turn, as often as records are asked for, each with a seed of its own; records that came in go on.

    Works with teachers that complete raw text (/completions, or a local model). What the paper adds by system prompts for mathematics or code belongs
    into `prefix`.
    """
    async for record in records:
        yield record
    work.made(settings.rows)
    numbered = (Record(f"{work.step}/{number}", [], {"number": number}) for number in range(settings.rows))

    async def draw(record: Record) -> Record:
        answer = await work.ask(
            Request(
                messages=[],
                teacher=settings.teacher,
                temperature=settings.sampling.temperature,
                top_p=settings.sampling.top_p,
                max_tokens=settings.sampling.max_tokens,
                seed=record.data["number"],
                prefix=settings.prefix,
            )
        )
        text = usable(answer.text, "prompt")
        if len(text) < settings.min_chars:
            raise SetAside(f"a prompt under {settings.min_chars} characters")
        return derive(record, answer, messages=user(text))

    async for record in work.each(stream(numbered), draw):
        yield record
