"""Teachers: what answers a request. An OpenAI-compatible endpoint here; its batch API in batch.py, a model folder in local.py.

The protocol is OpenAI's chat completions, and completions for text that is to be gone on from (https://platform.openai.com/docs/api-reference). No
redirect is followed and no proxy asked, so prompts and the key reach the host that was named and no other.
"""

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Protocol, Self

import aiohttp

from src.chat.template import said_apart
from src.core.errors import NoAnswer
from src.core.files import canonical
from src.distill.pipeline import Request
from src.serving.protocol import BUSY, LONGEST_TOKEN, Server, message_of, retry_after, tokens_used
from src.settings.teachers import EndpointTeacher

LARGEST = 1 << 24
"""bytes of one reply at most"""
LONGEST_WAIT = 3600.0
"""seconds a teacher may ask us to wait before the run stops and says so"""
KEPT_ALIVE = 3.0
"""seconds an idle connection is kept; uvicorn, under vLLM and others, closes its own after 5, perhaps just as a request is sent"""
PER_MESSAGE = 32
"""tokens that a template may put around a message; the text itself has no more tokens than bytes, as byte-level BPE splits it at most"""


@dataclass(frozen=True)
class TeacherReply:
    """One answer. reasoning: what the teacher thought before it, which is no part of text. finish: stop or length. prompt_tokens, tokens: the teacher's own count; None where it gives none."""

    text: str
    reasoning: str
    finish: str
    prompt_tokens: int | None
    tokens: int | None

    @property
    def paid(self) -> tuple[int, int] | None:
        """(prompt tokens, tokens); None where the teacher does not give both."""
        return None if self.prompt_tokens is None or self.tokens is None else (self.prompt_tokens, self.tokens)


class Failed(Exception):
    """One try gave nothing of use.

    reason: a few words to count by; detail: for a person. again: another try may do better.
    together: it is the server's fault, which all requests on their way share. busy: it turned the request away for now.
    fault: the answer itself was bad, and would be again. down: nobody is there.
    wait: seconds it asks to wait.
    paid: (prompt tokens, tokens) that it costs as far as known; None: not known, so as much as was reserved.
    """

    def __init__(
        self,
        reason: str,
        detail: str = "",
        *,
        again: bool = True,
        together: bool = False,
        busy: bool = False,
        fault: bool = False,
        down: bool = False,
        wait: float | None = None,
        paid: tuple[int, int] | None = (0, 0),
    ):
        self.reason, self.detail, self.again, self.together, self.busy = reason, detail, again, together, busy
        self.fault, self.down, self.wait, self.paid = fault, down, wait, paid
        super().__init__(f"{reason}: {detail}" if detail else reason)


class AskedTeacher(Protocol):
    """What answers a request: a server (here), or a model on this machine (local_model.py)."""

    name: str
    """by which the journal knows it"""

    def key_of(self, request: Request) -> str:
        """The journal's key of a request to it."""

    def most(self, request: Request) -> tuple[int, int]:
        """(prompt tokens, tokens) that a request may cost at most."""

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        """USD; 0 where no price is given."""

    def learn(self, most: int, prompt_tokens: int) -> bool:
        """Told how many prompt tokens it counted where `most` were thought possible; whether it expects more from now on."""

    def plain(self, text: str) -> str:
        """Its words for a person, without its key."""

    async def send(self, request: Request, seed: int) -> TeacherReply:
        """Raises Failed for this try, NoAnswer where no request can succeed."""


def digest(name: str, extra: dict, request: Request) -> str:
    """The journal's key: sha256 over the teacher's name and revision, its messages, sampling, seed and schema. Where it runs takes no part."""
    asked = {
        "teacher": name,
        "extra": extra,
        "messages": request.messages,
        "prefix": request.prefix,
        "sampling": [request.temperature, request.top_p, request.max_tokens, list(request.stop)],
        "seed": request.seed,
        "schema": request.schema,
    }
    return hashlib.sha256(canonical(asked)).hexdigest()


def server_of(settings: EndpointTeacher) -> Server:
    return Server(settings.url, key_env=settings.key_env, setting="teacher.url", name="the teacher")


class RemoteTeacher:
    """An OpenAI-compatible server."""

    def __init__(self, settings: EndpointTeacher):
        self.settings = settings
        self.server = server_of(settings)
        self.url = self.server.url
        self.name = f"{settings.model}@{settings.revision}" if settings.revision else settings.model
        self._scale = 1.0

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            headers=self.server.headers | {"Accept-Encoding": "identity"},
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_ALIVE),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=aiohttp.ClientTimeout(total=self.settings.limits.timeout),
            trust_env=False,
            auto_decompress=False,
        )
        return self

    async def __aexit__(self, *_) -> None:
        await self._session.close()

    def key_of(self, request: Request) -> str:
        return digest(self.name, self.settings.extra, request)

    def most(self, request: Request) -> tuple[int, int]:
        """(prompt tokens, tokens) that a request may cost at most."""
        texts = [request.prefix] if request.prefix is not None else [m["content"] for m in request.messages]
        size = sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) + PER_MESSAGE * (1 + len(texts))
        size += len(json.dumps(request.schema)) if request.schema else 0
        return int(size * self._scale) + 1, request.max_tokens

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        """USD; 0 where no price is given."""
        price = self.settings.price
        return (prompt_tokens * (price.prompt or 0.0) + tokens * (price.completion or 0.0)) / 1e6

    def learn(self, most: int, prompt_tokens: int) -> bool:
        """Reserve more from now on where the teacher counted more prompt tokens than was thought possible; whether it did."""
        if prompt_tokens > most:
            self._scale *= 1.1 * prompt_tokens / most
        return prompt_tokens > most

    def body_of(self, request: Request, seed: int) -> dict:
        """The JSON to send."""
        settings = self.settings
        body = {
            "model": settings.model,
            settings.token_limit: request.max_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            **({"prompt": request.prefix} if request.prefix is not None else {"messages": request.messages}),
        }
        if settings.seed:
            body["seed"] = seed
        if request.stop:
            body["stop"] = list(request.stop)
        if request.schema and settings.structured == "json_schema":
            body["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "answer", "strict": True, "schema": request.schema},
            }
        elif request.schema and settings.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
        return body | settings.extra

    async def send(self, request: Request, seed: int) -> TeacherReply:
        """Raises Failed for this try, NoAnswer where no request can succeed."""
        path = "/chat/completions" if request.prefix is None else "/completions"
        status, data, wait = await self.call("POST", path, data=json.dumps(self.body_of(request, seed)).encode())
        return self.reply_of(status, data, request.max_tokens, wait)

    async def call(self, method: str, path: str, **sent) -> tuple[int, bytes, float | None]:
        """(status, body, seconds to wait by Retry-After). Raises Failed where the connection fails."""
        try:
            async with self._session.request(method, self.url + path, allow_redirects=False, **sent) as response:
                parts, size = [], 0
                async for part in response.content.iter_any():
                    parts.append(part)
                    size += len(part)
                    if size > LARGEST:
                        raise Failed("reply too large", f"over {LARGEST >> 20} MiB", again=False, paid=None)
                if 300 <= response.status < 400 and (denied := self.server.denied(response.status, response.headers.get("Location"))):
                    raise NoAnswer(denied[0], where=self.url, fix=denied[1])
                return response.status, b"".join(parts), retry_after(response.headers.get("Retry-After"))
        except aiohttp.ClientConnectorError as error:
            raise Failed("no connection", self.plain(str(error)), together=True, down=True) from None
        except TimeoutError:
            raise Failed("timed out", together=True, busy=True, paid=None) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise Failed("connection broke", self.plain(f"{type(error).__name__}: {error}"), together=True, paid=None) from None

    async def lines(self, path: str) -> AsyncIterator[bytes]:
        """The lines of a file at the endpoint, which may be of any size."""
        try:
            async with self._session.get(self.url + path, allow_redirects=False) as response:
                if response.status != 200:
                    raise self.refusal(response.status, self.plain((await response.content.read(4096)).decode(errors="replace")), None)
                rest = b""
                async for part in response.content.iter_any():
                    *whole, rest = (rest + part).split(b"\n")
                    if len(rest) > LARGEST:
                        raise NoAnswer(f"a line of {path} is larger than {LARGEST >> 20} MiB", where=self.url)
                    for line in whole:
                        yield line
                yield rest
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Failed("connection broke", self.plain(f"{type(error).__name__}: {error}"), together=True) from None

    def reply_of(self, status: int, data: bytes, max_tokens: int, wait: float | None = None) -> TeacherReply:
        """What a status and body mean, for a reply to a request or a line of a batch."""
        if status != 200:
            raise self.refusal(status, self.plain(message_of(data[:4096].decode(errors="replace"))), wait)
        try:
            given = self.server.json(data)
        except ValueError:
            raise Failed("reply is not JSON", self.plain(data.decode(errors="replace")), paid=None) from None
        return self._read(given, max_tokens)

    def _read(self, given, max_tokens: int) -> TeacherReply:
        try:
            prompt_tokens, tokens = tokens_used(given.get("usage"))
            paid = None if prompt_tokens is None or tokens is None else (prompt_tokens, tokens)
            if given.get("error"):
                raise Failed("the server failed", self.plain(json.dumps(given["error"])), together=True, paid=paid)
            choice = given["choices"][0]
            message = choice["message"] if "message" in choice else {"content": choice["text"]}
            text, finish = message.get("content") or "", choice.get("finish_reason")
            reasoning = message.get("reasoning_content") or message.get("reasoning") or ""
            if not reasoning:
                text, reasoning = said_apart(text)
            refusal = message.get("refusal")
            (text + reasoning).encode()
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise Failed("reply is not of OpenAI's form", repr(error), paid=None) from None
        except UnicodeEncodeError:
            raise Failed("half of a surrogate pair", fault=True, paid=paid) from None
        if finish == "content_filter" or refusal:
            raise Failed("refused by the endpoint", self.plain(str(refusal or finish)), again=False, fault=True, paid=paid)
        if not isinstance(finish, str):
            raise Failed("no finish_reason", fault=True, paid=paid)
        if len(text) > LONGEST_TOKEN * max_tokens:
            raise Failed("longer than its limit", again=False, fault=True, paid=paid)
        if not text.strip() and finish != "length":
            raise Failed("empty answer", fault=True, paid=paid)
        return TeacherReply(text, reasoning, "length" if finish == "length" else "stop", *(paid or (None, None)))

    def refusal(self, status: int, words: str, wait: float | None) -> Failed | NoAnswer:
        """The error that a status other than 200 means."""
        if status == 429 and "insufficient_quota" in words:
            return NoAnswer(f"the account has no quota left: {words}", where=self.url, fix="the same command goes on once it has")
        if wait is not None and wait > LONGEST_WAIT:
            return NoAnswer(f"the teacher asks us to wait {wait:,.0f} s: {words}", where=self.url, fix="the same command goes on then")
        if status in BUSY:
            return Failed(f"HTTP {status}", words, together=True, busy=True, wait=wait)
        if denied := self.server.denied(status, None):
            return NoAnswer(f"{denied[0]}: {words}", where=self.url, fix=denied[1])
        if status == 404:
            return NoAnswer(
                f"the teacher knows no such address or model (HTTP 404): {words}", where=self.url, fix="check teacher.url and teacher.model"
            )
        return Failed(f"HTTP {status}", words, again=status >= 500 or status in (408, 409), together=status >= 500, wait=wait)

    def plain(self, text: str) -> str:
        """A server's words for a person, and never the key."""
        return self.server.plain(text)
