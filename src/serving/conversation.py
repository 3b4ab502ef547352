"""A conversation as it goes on: what was said, what of it still fits, and tool calls that wait for their results."""

import re
from collections.abc import Iterator

from src.core.log import say
from src.models.checks import calls
from src.models.speaking import Ended, TooLong
from src.serving.protocol import plain
from src.serving.speakers import Speaker
from src.settings.answers import Decoding

OPENS = re.compile(r"<[^<>\s]*tool[^<>\s]*>|\[TOOL_CALLS\]|```|[{\[]")
"""where the calls of an answer begin"""


class Conversation:
    """With one speaker. messages: all that was said, the system text first; forgotten: how many of the turns after it are no longer shown to the model.

    forgets: turns are forgotten, oldest first, where they do not fit any more; else TooLong is raised and the turn taken back.
    """

    def __init__(self, speaker: Speaker, *, system: str | None, tools: list | None, forgets: bool):
        self.speaker, self.tools, self.forgets = speaker, tools, forgets
        self.messages: list[dict] = []
        self.forgotten = 0
        self.system = system

    def clear(self) -> None:
        self.messages, self.forgotten = [], 0

    @property
    def whole(self) -> list[dict]:
        """All messages, with the system text."""
        return [*([{"role": "system", "content": self.system}] if self.system and not self.speaker.raw else []), *self.messages]

    @property
    def open_calls(self) -> list[str]:
        """Names of the functions that were called and have no result yet."""
        last = next((i for i in reversed(range(len(self.messages))) if self.messages[i]["role"] != "tool"), None)
        if last is None:
            return []
        called = self.messages[last].get("tool_calls", [])
        return [call["function"]["name"] for call in called][len(self.messages) - last - 1 :]

    def ask(self, text: str, decoding: Decoding) -> Iterator[str | Ended]:
        """The answer's pieces to what the user says, or to the result of the call that waits first. Of an answer that is broken off stays what was said; a
        turn without any is taken back."""
        role = "tool" if self.open_calls else "user"
        self.messages.append({"role": role, "content": text.encode("utf-8", "replace").decode()})  # a terminal gives half a character too
        said, ended = "", False
        try:
            for part in self._reply(decoding):
                if isinstance(part, str):
                    said += part
                else:
                    self.messages.append(self._said(part.text))
                    ended = True
                yield part
        finally:
            if not ended and said:
                self.messages.append({"role": "assistant", "content": said})
            elif not ended:
                self.messages.pop()

    def _reply(self, decoding: Decoding) -> Iterator[str | Ended]:
        while True:
            system = self.whole[: len(self.whole) - len(self.messages)]
            try:
                yield from self.speaker.reply([*system, *self.messages[self.forgotten :]], decoding, self.tools)
                return
            except TooLong as error:
                following = self.forgotten + 1
                while following < len(self.messages) and self.messages[following]["role"] != "user":
                    following += 1
                if not self.forgets or following >= len(self.messages):
                    raise
                self.forgotten = following
                say(f"[{self.speaker.name}: {error.what}; forgets the oldest {self.forgotten} messages, /clear begins anew]")

    def _said(self, text: str) -> dict:
        found = calls(text) if self.tools else []
        if not found:
            return {"role": "assistant", "content": text}
        made = [{"type": "function", "function": {"name": plain(str(c["name"])), "arguments": c["arguments"]}} for c in found]
        return {"role": "assistant", "content": OPENS.split(text, maxsplit=1)[0].strip(), "tool_calls": made}
