"""Prompts drawn from an aligned teacher by its template alone (Magpie, Xu et al. 2024, arXiv:2406.08464)."""

from collections.abc import AsyncIterator

from src.distill.pipeline import Request, Row, SetAside, Work
from src.distill.requests import stream
from src.distill.texts import grown, kept, user
from src.settings.recipes import Magpie


async def magpie(rows: AsyncIterator[Row], settings: Magpie, work: Work) -> AsyncIterator[Row]:
    """The teacher goes on from the opening of a user's turn, as often as rows are asked for, each with a seed of its own; rows that came in go on.

    Works with teachers that complete raw text (/completions, or a local model). What the paper adds by system prompts for mathematics or code belongs
    into `prefix`.
    """
    async for row in rows:
        yield row
    work.made(settings.rows)
    numbered = (Row(f"{work.step}/{number}", [], {"number": number}) for number in range(settings.rows))

    async def draw(row: Row) -> Row:
        answer = await work.ask(
            Request(
                messages=[],
                teacher=settings.teacher,
                temperature=settings.sampling.temperature,
                top_p=settings.sampling.top_p,
                max_tokens=settings.sampling.max_tokens,
                seed=row.data["number"],
                prefix=settings.prefix,
            )
        )
        text = kept(answer.text, "prompt")
        if len(text) < settings.min_chars:
            raise SetAside(f"a prompt under {settings.min_chars} characters")
        return grown(row, answer, messages=user(text))

    async for row in work.each(stream(numbered), draw):
        yield row
