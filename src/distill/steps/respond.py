"""The teacher answers prompts."""

from collections.abc import AsyncIterator

from src.distill.pipeline import Row, SetAside, Work
from src.distill.requests import ask_all, given, request
from src.distill.texts import all_kept, grown, said
from src.settings.recipes import Respond


async def respond(rows: AsyncIterator[Row], settings: Respond, work: Work) -> AsyncIterator[Row]:
    """Answers each prompt. With n of 1 the answer becomes the row's last turn, else all usable ones become data["answers"].

    A row without a usable answer is set aside, one of which some answers failed goes on with the others.
    """

    async def answer(row: Row) -> Row:
        messages = prompt_of(row, settings.system)
        requests = [request(messages, settings.teacher, settings.sampling, seed=seed) for seed in range(settings.n)]
        answers = given(await ask_all(work, requests))
        texts = all_kept(answer.text for answer in answers)
        if len(texts) < settings.n:
            work.count("answers missing", settings.n - len(texts))
        if settings.n == 1:
            return grown(row, *answers, messages=said(messages, texts[0]))
        return grown(row, *answers, messages=messages, answers=texts)

    async for row in work.each(rows, answer):
        yield row


def prompt_of(row: Row, system: str | None) -> list[dict]:
    """The row's messages, with the system text before them where they have none. Raises SetAside if they do not end with a user's turn.

    One that declares tools is set aside too: teachers are not given any, and a row must not teach to leave them unused.
    """
    if row.data.get("tools"):
        raise SetAside("declares tools")
    if not row.messages or row.messages[-1]["role"] != "user":
        raise SetAside("no prompt to answer")
    if system is None or row.messages[0]["role"] == "system":
        return row.messages
    return [{"role": "system", "content": system}, *row.messages]
