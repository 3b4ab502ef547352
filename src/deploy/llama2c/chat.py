"""A chat template as the fixed pieces of text that run.c puts around what is said, and the ids that end an answer."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from src.chat import encoding
from src.core.errors import BadData

# Role, text, role, text, ...: what the pieces are proved on, here as text and in proof.py as ids.
CONVERSATIONS = (
    ("user", "Hello!"),
    ("system", "Be brief.", "user", "What is 2 + 2?\nExplain."),
    ("user", "  안녕하세요  ", "assistant", "네, 안녕하세요! 🙂\n", "user", "1234 apples"),
    ("system", "You are a poet.\n", "user", "Hi", "assistant", " Ho ", "user", "你好", "assistant", "a  b", "user", "bye's"),
)


@dataclass
class ChatPieces:
    """What the template puts around the texts of a conversation.

    open | system_open + system + system_close, then user, then (answer + assistant + next + user)*, then generate.
    """

    open: str
    answer: str
    generate: str
    next: str
    system_open: str | None = None
    system_close: str | None = None
    trim: frozenset[str] = frozenset()
    """Roles whose text the template strips of white space."""

    def conversations(self) -> list[list[dict]]:
        """CONVERSATIONS as messages, less those with a system text where the template takes none."""
        talks = [messages_of(*texts) for texts in CONVERSATIONS]
        return [talk for talk in talks if self.system_open is not None or talk[0]["role"] != "system"]

    def render(self, messages: list[dict]) -> str:
        texts = [m["content"].strip() if m["role"] in self.trim else m["content"] for m in messages]
        if messages[0]["role"] == "system":
            out, texts = self.system_open + texts[0] + self.system_close, texts[1:]
        else:
            out = self.open
        for i, text in enumerate(texts):
            out += ("" if i == 0 else self.answer if i % 2 else self.next) + text
        return out + self.generate


def messages_of(*texts: str) -> list[dict]:
    """Messages from role, text, role, text, ..."""
    return [{"role": role, "content": text} for role, text in zip(texts[::2], texts[1::2], strict=True)]


def find_chat(tokenizer) -> tuple[ChatPieces | None, str]:
    """Derive the pieces from renderings of the template and prove them on CONVERSATIONS. Returns (pieces or None, why none)."""
    if not tokenizer.chat_template:
        return None, "its tokenizer has no chat template"
    try:
        return _derive(lambda messages: encoding.render(tokenizer, messages, prompt=True)), ""
    except BadData as fault:
        return None, fault.what
    except (ValueError, TypeError) as fault:
        return None, str(fault)


def _derive(render: Callable[[list[dict]], str]) -> ChatPieces:
    """The pieces of a template, given what renders it. Raises ValueError where they are not fixed, and what `render` raises."""
    opening, generate = _cut(render(messages_of("user", "Qu1")), "Qu1")
    talk = messages_of("user", "Qu1", "assistant", "Qa1", "user", "Qu2")
    _, answer, between, again = _cut(render(talk), "Qu1", "Qa1", "Qu2")
    if again != generate:
        raise ValueError("the template ends a second turn otherwise than the first")
    pieces = ChatPieces(opening, answer, generate, between)
    with suppress(BadData, ValueError, TypeError):  # Gemma's and early Mistral's templates refuse a system role, and serve without
        pieces.system_open, pieces.system_close, _ = _cut(render(messages_of("system", "Qs1", "user", "Qu1")), "Qs1", "Qu1")

    spaced = {
        "user": ("user", " \nQ \n"),
        "assistant": ("user", "Q", "assistant", " \nQ \n", "user", "Q"),
        "system": ("system", " \nQ \n", "user", "Q"),
    }
    if pieces.system_open is None:
        del spaced["system"]
    pieces.trim = frozenset(role for role, texts in spaced.items() if " \nQ \n" not in render(messages_of(*texts)))
    if any(pieces.render(talk) != render(talk) for talk in pieces.conversations()):
        raise ValueError("the template is not made of fixed pieces around the texts")
    return pieces


def _cut(text: str, *marks: str) -> list[str]:
    """What stands before, between and after the marks."""
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"the template drops or changes {mark!r}")
        parts.append(part)
    return [*parts, text]
