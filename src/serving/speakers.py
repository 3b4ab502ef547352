"""Whatever can answer a conversation, behind one protocol: a model on this machine, a bundle through its own runtime, a server."""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from src.core.errors import BadData, UserError
from src.models.speaking import Asked, Ended, TooLong
from src.serving import measure
from src.serving.client import Client, Reply
from src.serving.protocol import Refused
from src.settings.answers import Decoding

TOO_LONG = re.compile(r"context|too long|maximum.*length", re.IGNORECASE)
"""what servers say of a conversation that is longer than their model takes (llama.cpp, vLLM, ours)"""


class Speaker(Protocol):
    """Answers conversations. name: what it is called; raw: it knows no conversations, and goes on with a text."""

    name: str
    raw: bool

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None, /) -> Iterator[str | Ended]:
        """The answer's pieces as they are made, then how it ended. Whoever closes the iterator ends the answer. Raises TooLong."""

    def replies(self, asked: Sequence[Asked], decoding: Decoding, /) -> list[Ended | UserError]:
        """The answers to several conversations, and for one that cannot be answered why. Raises what stands in the way of all."""

    def close(self) -> None:
        """Ends what is being said, and lets go of what is held."""


def whole(speaker: Speaker, asked: Asked, decoding: Decoding) -> Ended | UserError:
    """One answer to its end, or why there is none."""
    try:
        *_, ended = speaker.reply(asked[0], decoding, asked[1])
    except BadData as error:
        return error
    except Refused as error:
        if error.status in measure.FOR_ALL:
            raise
        return error
    assert isinstance(ended, Ended)
    return ended


class ServerSpeaker:
    """An OpenAI-compatible server. served: how it describes its model. What it draws by a seed is its own."""

    raw = False

    def __init__(self, client: Client, model: str | None, at_once: int):
        self._client, self._at_once = client, at_once
        self._model, self.served = measure.choose(client, model)
        self.name = f"{self._model} at {client.url}"

    def close(self) -> None:
        self._client.close()

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None) -> Iterator[str | Ended]:
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "seed": decoding.seed}
        stop = {"stop": decoding.stop} if decoding.stop else {}
        server, word = self._client.server, ""  # word: the end of what came, which may be a part of the key
        try:
            for part in self._client.parts(self._model, messages, tools, max_tokens=decoding.max_tokens, **sampling, **stop):
                if isinstance(part, Reply):
                    if word:
                        yield server.hidden(word)
                    yield Ended(part.text, "stop" if part.ended else "length", part.ended, part.prompt_tokens, part.tokens)
                    return
                said = word + part
                word = said.split(" ")[-1] if server.has_key else ""
                if piece := said[: len(said) - len(word)]:
                    yield server.hidden(piece)
        except Refused as error:
            if error.status in (400, 413, 422) and TOO_LONG.search(error.what):
                raise TooLong(0, 0, error.where, error.what) from None
            raise

    def replies(self, asked: Sequence[Asked], decoding: Decoding) -> list[Ended | UserError]:
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                return list(pool.map(lambda one: whole(self, one, decoding), asked))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise
