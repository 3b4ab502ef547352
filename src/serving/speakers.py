"""Whatever can answer a conversation, behind one protocol: a model on this machine, a bundle through its own runtime, a server."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from src.core.artifact import Artifact
from src.core.errors import BadData, UserError, WrongKind
from src.core.room import Needs
from src.core.stage import Run
from src.models.folder import weights_of
from src.models.speaking import Asked, Ended, ModelSpeaker
from src.serving import measure
from src.serving.client import Client, Reply
from src.serving.protocol import Refused
from src.settings.answers import Decoding
from src.settings.verbs import Endpoint
from src.sizing import host
from src.sizing.config_reader import read_shape

KINDS = {"adapter", "model", "quantized", "bundle"}
"""kinds of artifact that can be talked to"""


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


class EndpointSpeaker:
    """An OpenAI-compatible server. served: how it describes its model. What it draws by a seed is its own."""

    raw = False

    def __init__(self, settings: Endpoint):
        assert settings.url
        self._client = Client(settings.url, timeout=settings.timeout)
        self._at_once = settings.concurrency
        self._model, self.served = measure.choose(self._client, settings.model)
        self.name = f"{self._model} at {self._client.url}"

    def close(self) -> None:
        self._client.close()

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None) -> Iterator[str | Ended]:
        sampling = {"temperature": decoding.temperature, "top_p": decoding.top_p, "seed": decoding.seed}
        stop = {"stop": decoding.stop} if decoding.stop else {}
        server, word = self._client.server, ""  # word: the end of what came, which may be a part of the key
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

    def replies(self, asked: Sequence[Asked], decoding: Decoding) -> list[Ended | UserError]:
        with ThreadPoolExecutor(self._at_once) as pool:
            try:
                return list(pool.map(lambda one: whole(self, one, decoding), asked))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.close()
                raise


def find(run: Run, source: str | None) -> Artifact:
    """What is to be talked to: the artifact, folder or GGUF file at `source`, or the run's merge, else its adapter, else its quantized model."""
    return run.source(source, "merge", "finetune", "quantize", kinds=KINDS)


def check(found: Artifact) -> str:
    """What would be talked to, in a line. Raises WrongKind for a bundle that does not run here."""
    if found.kind == "bundle":
        raise WrongKind("nothing here runs it", where=str(found.path), fix="give the model that it was made from")
    return f"{found.path} ({found.kind})"


def needs(inputs: Sequence[Artifact], batch: int = 1) -> Needs:
    """What they take of this machine, all of them loaded; a bundle's own runtime is not counted."""
    return host.answers([read_shape(weights_of(found)) for found in inputs if found.kind != "bundle"], batch)


def open_speaker(found: Artifact, base: str | None = None) -> Speaker:
    """The speaker of what `check` has looked at."""
    check(found)
    return ModelSpeaker(found, name_of(found), Path(base) if base else None)


def name_of(found: Artifact) -> str:
    """mine/merge of outputs/mine/merge; the folder's own name for one made elsewhere."""
    path = found.path.resolve()
    return f"{path.parent.name}/{path.name}" if found.manifest else path.name
