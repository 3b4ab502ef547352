"""What steps ask of texts: the parts of a record, words, one spelling for comparisons, prompts filled in, answers fit to be kept."""

import re
from collections.abc import Iterable
from dataclasses import replace

from src.distill.pipeline import Answer, Record, SetAside

_NAME = re.compile(r"\{([a-z_]+)\}")
# A Chinese, Japanese or Korean character stands for a word, as no spaces part words there (Korean has them, but with particles attached).
_CONTROL = re.compile(r"<\|[^\s|<>]{1,40}\|>|</?s>|[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
_CLOSING = re.compile(r"</[a-z ]+>")
_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def fill(template: str, **values: object) -> str:
    """The template with each {name} replaced, in one pass: a {name} inside a value stays as it is, and a value cannot close a tag of the template."""
    tags = set(_CLOSING.findall(template))

    def value(found: re.Match) -> str:
        return _unclosing(str(values[found[1]]), tags) if found[1] in values else found[0]

    return _NAME.sub(value, template)


def _unclosing(text: str, tags: Iterable[str]) -> str:
    """The text with a space in each of these closing tags: what a model is to judge must not look like the end of it."""
    for tag in tags:
        text = text.replace(tag, f"< {tag[1:]}")
    return text


def part(messages: list[dict], of: str) -> str:
    """The last user turn ("prompt"), the last assistant turn ("answer"), or all turns ("all"); empty where there is none."""
    if of == "all":
        return "\n".join(message["content"] for message in messages)
    role = {"prompt": "user", "answer": "assistant"}[of]
    return next((m["content"] for m in reversed(messages) if m["role"] == role), "")


def text_of(record: Record) -> str:
    """The document a record stands for, or all its turns."""
    return record.data.get("text") or part(record.messages, "all")


def transcript(messages: Iterable[dict]) -> str:
    """A conversation as a judge reads it, each turn under its role."""
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


def listed(texts: Iterable[str], title: str) -> str:
    """Numbered texts as a teacher reads them: "<title 1>", the text, "</title 1>"."""
    return "\n\n".join(
        f"<{title} {number}>\n{_unclosing(text, [f'</{title} '])}\n</{title} {number}>" for number, text in enumerate(texts, 1)
    )


def usable(text: str, what: str = "answer") -> str:
    """The text without white space around it. Raises SetAside if it is empty, or holds control tokens or characters that would break a record."""
    text = text.strip()
    if not text:
        raise SetAside(f"empty {what}")
    if found := _CONTROL.search(text):
        raise SetAside(f"control token in the {what}" if found[0].startswith("<") else f"control character in the {what}")
    return text


def all_usable(texts: Iterable[str], what: str = "answer") -> list[str]:
    """Those of the texts that can be kept. Raises SetAside where none can."""
    found, fault = [], SetAside(f"no {what}")
    for text in texts:
        try:
            found.append(usable(text, what))
        except SetAside as aside:
            fault = aside
    if not found:
        raise fault
    return found


def code_of(text: str) -> str:
    """The fenced code blocks of a text, joined; the text itself where it has none."""
    return "\n".join(_FENCED.findall(text)) or text


def derive(record: Record, *answers: Answer, id: str | None = None, messages: list[dict] | None = None, **data: object) -> Record:
    """The record with what a step adds: other messages, further data, the requests it came from; with an id, a child of the record."""
    return replace(
        record,
        id=record.id if id is None else f"{record.id}/{id}",
        messages=record.messages if messages is None else messages,
        data={**record.data, **({} if id is None else {"parents": [record.id]}), **data},
        asks=(*record.asks, *(answer.key for answer in answers)),
    )


def user(text: str) -> list[dict]:
    """A conversation of one user turn."""
    return [{"role": "user", "content": text}]


def append_answer(messages: list[dict], text: str, reasoning: str = "") -> list[dict]:
    """The conversation with an assistant's turn more, with what the teacher thought before it, unless that holds what would break a record."""
    thought = {"reasoning_content": reasoning.strip()} if reasoning.strip() and not _CONTROL.search(reasoning) else {}
    return [*messages, {"role": "assistant", "content": text, **thought}]


def reasoning_by_answer(answers: Iterable[Answer]) -> dict[str, str]:
    """{usable text of an answer: what the teacher thought before it}, of those that have any."""
    return {answer.text.strip(): answer.reasoning for answer in answers if answer.reasoning.strip()}
