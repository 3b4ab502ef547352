"""Conversations in other languages, with what is no language left as it was."""

import re
from collections import Counter

from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, array, obj, request
from src.distill.texts import derive, fill, listed, usable
from src.settings.recipes import Translate

NAMES = {"ko": "Korean", "zh": "Chinese", "ja": "Japanese", "en": "English"}
# Code, addresses, markup, formulas and what programs fill in.
_FIXED = re.compile(
    r"```.*?```|`[^`\n]+`|https?://[^\s)\]]+|\b[\w.+-]+@[\w-]+\.[\w.]+|<[^<>\n]{1,200}>|\$\$.+?\$\$|\{\{?\w+\}?\}|%\(\w+\)[sd]|%[sd]\b",
    re.DOTALL,
)
_MARK = re.compile(r"⟦(\d{1,9})⟧")
_NUMBER = re.compile(r"\d[\d,.]*\d|\d")


async def translate(records: Records, settings: Translate, work: Work) -> Records:
    """Each conversation once in each language, all its turns in one request so that words stay the same throughout.

    Code, addresses, tags, formulas and placeholders are taken out before (as ⟦1⟧) and put back after; a translation that lost one, or that has other
    numbers than the original, is set aside. data["language"] says which language a record is in, for the language filter.
    """

    async def turn(record: Record) -> list[Record]:
        made = [record] if settings.keep_given else []
        for language in settings.to:
            made.append(await _translated(record, language, settings, work))
        return made

    async for record in work.each(records, turn):
        if reason := record.data.get("eliminated"):
            work.set_aside(record, reason)
        else:
            yield record


async def _translated(record: Record, language: str, settings: Translate, work: Work) -> Record:
    """The record's child in a language; with data["eliminated"] where it did not come out well."""
    child = derive(record, id=language, language=language)
    try:
        if any(message.get("tool_calls") or message.get("reasoning_content") or message["role"] == "tool" for message in record.messages):
            raise SetAside("calls tools or reasons")
        if not record.messages:
            raise SetAside("no conversation")
        texts = [message["content"] for message in record.messages]
        hidden = [hide(text) for text in texts]
        prompt = fill(settings.prompt, language=NAMES[language], texts=listed((text for text, _ in hidden), "text"), count=len(texts))
        schema = obj(texts=array(TEXT, len(texts), len(texts)))
        answer = await work.ask(request(prompt, settings.teacher, settings.sampling, schema=schema))
        child = derive(child, answer)
        turned = [restore(new, old, fixed) for new, (old, fixed) in zip(answer.value["texts"], hidden)]
    except SetAside as aside:
        return derive(child, eliminated=aside.reason)
    return derive(child, messages=[{**message, "content": text} for message, text in zip(record.messages, turned)])


def hide(text: str) -> tuple[str, list[str]]:
    """The text with each fixed part as ⟦n⟧, and those parts. Marks that the text has itself are parts too."""
    fixed = []

    def mark(found: re.Match) -> str:
        fixed.append(found[0])
        return f"⟦{len(fixed)}⟧"

    return re.sub(f"{_FIXED.pattern}|{_MARK.pattern}", mark, text, flags=re.DOTALL), fixed


def restore(new: str, old: str, fixed: list[str]) -> str:
    """The translation with its fixed parts back. Raises SetAside where one is lost or doubled, or the numbers are others than in `old`."""
    new = usable(new, "translation") if old.strip() else new.strip()
    if sorted(int(n) for n in _MARK.findall(new)) != list(range(1, len(fixed) + 1)):
        raise SetAside("code, an address or a placeholder is lost or doubled")
    if numbers(new) != numbers(old):
        raise SetAside("numbers differ")
    return _MARK.sub(lambda found: fixed[int(found[1]) - 1], new)


def numbers(text: str) -> Counter[str]:
    """Numbers in figures, without the commas that part thousands."""
    return Counter(found.replace(",", "").rstrip(".") for found in _NUMBER.findall(_MARK.sub("", text)))
