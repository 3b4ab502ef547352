"""Harder and rarer prompts out of given ones (Evol-Instruct, Xu et al. 2023, arXiv:2304.12244)."""

from dataclasses import replace

from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, YES_NO, obj, request
from src.distill.steps.respond import prompt_of
from src.distill.texts import append_answer, derive, fill, part, usable
from src.records.near_duplicates import words
from src.settings.recipes import Evolve

IN_BREADTH = "in_breadth"


async def evolve(records: Records, settings: Evolve, work: Work) -> Records:
    """Each prompt becomes as many records as there are rounds, answered; an eliminated evolution is set aside, and the next starts where it did.

    Eliminated, as in the paper: what asks the same as before (a judge says so), what the teacher declines or answers with punctuation alone, and what
    copies words of the evolving prompt. The paper's pool of all prompts is left for a chain a prompt, so that records go through one by one. Turns before
    the last user's stay as they are.
    """
    names = [*settings.in_depth, IN_BREADTH]
    templates = {**settings.in_depth, IN_BREADTH: settings.in_breadth}

    async def grow(record: Record) -> list[Record]:
        current = derive(record, messages=prompt_of(record, None))
        made = [await _answered(current, settings, work)] if settings.keep_given else []
        for number in range(1, settings.rounds + 1):
            operation = work.draw(work.step, record.id, number).choice(names)
            evolved = await _evolved(current, record.id, number, operation, templates[operation], settings, work)
            work.count(f"asked for: {operation}")
            made.append(evolved)
            if "eliminated" not in evolved.data:
                current = replace(evolved, messages=evolved.messages[:-1])
        return made

    async for record in work.each(records, grow):
        if reason := record.data.get("eliminated"):
            work.set_aside(record, reason)
        else:
            yield record


async def _answered(record: Record, settings: Evolve, work: Work) -> Record:
    answer = await work.ask(request(record.messages, settings.teacher, settings.answer))
    return derive(record, answer, messages=append_answer(record.messages, usable(answer.text), answer.reasoning))


async def _evolved(record: Record, root: str, number: int, operation: str, template: str, settings: Evolve, work: Work) -> Record:
    """The child of a record by one operation, answered; with data["eliminated"] where it should not go on."""
    before = part(record.messages, "prompt")
    # A reference answers the prompt as it was given, not what became of it.
    data = {key: value for key, value in record.data.items() if key != "reference"}
    child = Record(f"{root}/{number}", record.messages, {**data, "parents": [record.id], "operation": operation}, record.asks)
    try:
        answer = await work.ask(
            request(fill(template, prompt=before), settings.teacher, settings.sampling, seed=number, schema=obj(prompt=TEXT))
        )
        after = usable(answer.value["prompt"], "prompt")
        child = derive(child, answer, messages=[*record.messages[:-1], {"role": "user", "content": after}])
        _no_copy(before, after, settings.copied)
        verdict = await work.ask(
            request(
                fill(settings.equal, first=before, second=after),
                settings.judge,
                settings.sampling,
                schema=obj(reasoning=TEXT, equal=YES_NO),
            )
        )
        child = derive(child, verdict)
        if verdict.value["equal"]:
            raise SetAside("asks the same as before")
        child = await _answered(child, settings, work)
        _no_refusal(child.messages[-1]["content"], settings.refusals)
    except SetAside as aside:
        return derive(child, eliminated=aside.reason)
    return child


def _no_copy(before: str, after: str, copied: list[str]) -> None:
    if any(word.lower() in after.lower() and word.lower() not in before.lower() for word in copied):
        raise SetAside("copies words of the evolving prompt")


def _no_refusal(answer: str, refusals: list[str]) -> None:
    if any(answer.lower().replace("’", "'").startswith(start.lower()) for start in refusals):
        raise SetAside("the teacher declines")
    if not words(answer):
        raise SetAside("the teacher answers with punctuation alone")
