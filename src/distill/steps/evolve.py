"""Harder and rarer prompts out of given ones (Evol-Instruct, Xu et al. 2023, arXiv:2304.12244)."""

from collections.abc import AsyncIterator
from dataclasses import replace

from src.distill.pipeline import Row, SetAside, Work
from src.distill.requests import TEXT, YES_NO, obj, request
from src.distill.steps.respond import prompt_of
from src.distill.texts import fill, grown, kept, part, said, words
from src.settings.recipes import Evolve

IN_BREADTH = "in_breadth"


async def evolve(rows: AsyncIterator[Row], settings: Evolve, work: Work) -> AsyncIterator[Row]:
    """Each prompt becomes as many rows as there are rounds, answered; an eliminated evolution is set aside, and the next starts where it did.

    Eliminated, as in the paper: what asks the same as before (a judge says so), what the teacher declines or answers with punctuation alone, and what
    copies words of the evolving prompt. The paper's pool of all prompts is left for a chain a prompt, so that rows go through one by one. Turns before
    the last user's stay as they are.
    """
    names = [*settings.in_depth, IN_BREADTH]
    templates = {**settings.in_depth, IN_BREADTH: settings.in_breadth}

    async def grow(row: Row) -> list[Row]:
        current = grown(row, messages=prompt_of(row, None))
        made = [await _answered(current, settings, work)] if settings.keep_given else []
        for number in range(1, settings.rounds + 1):
            operation = work.draw(work.step, row.id, number).choice(names)
            evolved = await _evolved(current, row.id, number, operation, templates[operation], settings, work)
            work.count(f"asked for: {operation}")
            made.append(evolved)
            if "eliminated" not in evolved.data:
                current = replace(evolved, messages=evolved.messages[:-1])
        return made

    async for row in work.each(rows, grow):
        if reason := row.data.get("eliminated"):
            work.set_aside(row, reason)
        else:
            yield row


async def _answered(row: Row, settings: Evolve, work: Work) -> Row:
    answer = await work.ask(request(row.messages, settings.teacher, settings.answer))
    return grown(row, answer, messages=said(row.messages, kept(answer.text)))


async def _evolved(row: Row, root: str, number: int, operation: str, template: str, settings: Evolve, work: Work) -> Row:
    """The child of a row by one operation, answered; with data["eliminated"] where it should not go on."""
    before = part(row.messages, "prompt")
    # A reference answers the prompt as it was given, not what became of it.
    data = {key: value for key, value in row.data.items() if key != "reference"}
    child = Row(f"{root}/{number}", row.messages, {**data, "parents": [row.id], "operation": operation}, row.asks)
    try:
        answer = await work.ask(
            request(fill(template, prompt=before), settings.teacher, settings.sampling, seed=number, schema=obj(prompt=TEXT))
        )
        after = kept(answer.value["prompt"], "prompt")
        child = grown(child, answer, messages=[*row.messages[:-1], {"role": "user", "content": after}])
        _no_copy(before, after, settings.copied)
        verdict = await work.ask(
            request(
                fill(settings.equal, first=before, second=after),
                settings.judge,
                settings.sampling,
                schema=obj(reasoning=TEXT, equal=YES_NO),
            )
        )
        child = grown(child, verdict)
        if verdict.value["equal"]:
            raise SetAside("asks the same as before")
        child = await _answered(child, settings, work)
        _no_refusal(child.messages[-1]["content"], settings.refusals)
    except SetAside as aside:
        return grown(child, eliminated=aside.reason)
    return child


def _no_copy(before: str, after: str, copied: list[str]) -> None:
    if any(word.lower() in after.lower() and word.lower() not in before.lower() for word in copied):
        raise SetAside("copies words of the evolving prompt")


def _no_refusal(answer: str, refusals: list[str]) -> None:
    if any(answer.lower().replace("’", "'").startswith(start.lower()) for start in refusals):
        raise SetAside("the teacher declines")
    if not words(answer):
        raise SetAside("the teacher answers with punctuation alone")
