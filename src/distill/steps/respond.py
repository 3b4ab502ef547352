"""The teacher answers prompts."""

from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import ask_all, given, request
from src.distill.texts import all_usable, append_answer, derive, reasoning_by_answer
from src.settings.recipes import Respond


async def respond(records: Records, settings: Respond, work: Work) -> Records:
    """Answers each prompt. With n of 1 the answer becomes the record's last turn, else all usable ones become data["answers"].

    A record without a usable answer is set aside, one of which some answers failed goes on with the others.
    """

    async def answer(record: Record) -> Record:
        messages = prompt_of(record, settings.system)
        requests = [request(messages, settings.teacher, settings.sampling, seed=seed) for seed in range(settings.n)]
        answers = given(await ask_all(work, requests))
        texts = all_usable(answer.text for answer in answers)
        if len(texts) < settings.n:
            work.count("answers missing", settings.n - len(texts))
        thoughts = reasoning_by_answer(answers)
        if thoughts:
            work.count("answers with reasoning", len(thoughts))
        if settings.n == 1:
            return derive(record, *answers, messages=append_answer(messages, texts[0], thoughts.get(texts[0], "")))
        return derive(record, *answers, messages=messages, answers=texts, reasoning=thoughts)

    async for record in work.each(records, answer):
        yield record


def prompt_of(record: Record, system: str | None) -> list[dict]:
    """The record's messages, with the system text before them where they have none. Raises SetAside if they do not end with a user's turn.

    One that declares tools is set aside too: teachers are not given any, and a record must not teach to leave them unused.
    """
    if record.data.get("tools"):
        raise SetAside("declares tools")
    if not record.messages or record.messages[-1]["role"] != "user":
        raise SetAside("no prompt to answer")
    if system is None or record.messages[0]["role"] == "system":
        return record.messages
    return [{"role": "system", "content": system}, *record.messages]
