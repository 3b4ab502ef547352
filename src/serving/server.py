"""Speakers behind an OpenAI-compatible endpoint, and a page to talk to them: the standard library's HTTP server, one thread a connection.

Served: GET / (the page), /v1/models, /health; POST /v1/chat/completions (stream, temperature, top_p, max_tokens, seed, stop, tools) and /v1/completions for the
log-probabilities of given tokens (echo), by which `evaluate endpoint.url=` measures a loss. What would change an answer and is not done here is refused.

A page of another site that a browser shows can send requests to this machine too: its Origin is refused, and so is a name that was made to point here.
"""

import contextlib
import hmac
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn
from urllib.parse import SplitResult, urlsplit

from pydantic import ValidationError

from src.core.errors import ConfigError, NoMemory, UserError
from src.core.files import canonical
from src.models.speaking import Ended, ModelSpeaker, TooLong
from src.records.formats import PARSERS, tools_of
from src.records.json_stream import Malformed
from src.serving.speakers import Speaker
from src.settings.answers import Decoding

LARGEST = 16 << 20
"""bytes of a request at most"""
SILENT = 60
"""seconds a client may keep a connection without a word"""
LOCAL = ("127.0.0.1", "localhost", "::1")
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "top_k": (0, -1),
    "min_p": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}
"""what a request may ask for that is not done here, and the values with which it changes nothing"""


class Refusal(Exception):
    """A request that gets a status other than 200. type, code: as OpenAI's errors have them."""

    def __init__(self, status: HTTPStatus, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code
        super().__init__(message)


class Server(ThreadingHTTPServer):
    """Bound as it is made, so that a port in use is said before models are loaded; it takes requests in from `listen` on.

    key: what requests have to bear, None for nothing. waiting: requests that may wait for their turn.
    Raises ConfigError where it cannot be bound.
    """

    daemon_threads = False  # closing waits for answers under way: a thread inside torch at the interpreter's end aborts it
    allow_reuse_address = True

    def __init__(self, host: str, port: int, *, key: str | None, decoding: Decoding, waiting: int, page: bytes):
        self.key, self.decoding, self.page, self.host = key, decoding, page, host
        self.turns, self.ending = threading.BoundedSemaphore(waiting + 1), threading.Event()
        self.speakers: Mapping[str, Speaker] = {}
        self.connections: set[socket.socket] = set()
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise ConfigError(
                f"cannot listen on {host} port {port}: {error.strerror or error}",
                fix=["listen.port=0 takes a free port", "listen.host=127.0.0.1 is this machine's own"],
            ) from None

    def server_bind(self) -> None:
        """Without HTTPServer's own, which asks for the machine's name."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.host, self.server_address[1]

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}"

    def listen(self, speakers: Mapping[str, Speaker]) -> None:
        """From here on requests are taken in."""
        self.speakers = speakers
        self.server_activate()

    def run(self) -> None:
        """Answer them until the process is told to end; then what is under way is ended, and its connections closed."""
        try:
            self.serve_forever(poll_interval=0.2)
        finally:
            self.ending.set()
            for speaker in self.speakers.values():
                speaker.close()
            for connection in list(self.connections):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RD)  # of one that waits for its next request, which would be waited for in turn
            self.server_close()

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is no fault of ours; anything else is."""
        import sys

        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "boardwalk", ""
    timeout = SILENT
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        with contextlib.suppress(ConnectionError):
            super().finish()

    def log_message(self, *args) -> None:
        """Requests are nobody's to see."""

    def do_GET(self) -> None:
        with self._refusals():
            self._check_origin()
            if self.path in ("/", "/index.html"):
                return self._send(HTTPStatus.OK, self.server.page, "text/html")
            if self.path == "/health":
                return self._json({"status": "ok"})
            self._check_key()
            if self.path.removeprefix("/v1") == "/models":
                return self._json({"object": "list", "data": [_model(name, one) for name, one in self.server.speakers.items()]})
            raise Refusal(HTTPStatus.NOT_FOUND, f"no such page: {self.path}")

    def do_POST(self) -> None:
        with self._refusals():
            body = self._body()  # read whatever follows, so that the connection can go on
            self._check_origin()
            self._check_key()
            work = {"/chat/completions": self._chat, "/completions": self._complete}.get(self.path.removeprefix("/v1"))
            if work is None:
                raise Refusal(HTTPStatus.NOT_FOUND, f"no such page: {self.path}")
            if not self.server.turns.acquire(blocking=False):
                raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "too many requests wait for their turn")
            try:
                work(_object(body))
            finally:
                self.server.turns.release()

    # ---- answers

    def _chat(self, asked: dict) -> None:
        speaker, decoding = self._speaker(asked), _decoding(asked, self.server.decoding)
        refuse_undone(asked)
        try:
            messages = [dict(turn) for turn in PARSERS["openai"]({"messages": asked.get("messages")})]
            tools = list(tools_of(asked) or []) or None
            canonical([messages, tools])
        except Malformed as fault:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"messages or tools: {fault}") from None
        except (ValueError, RecursionError):
            raise Refusal(
                HTTPStatus.BAD_REQUEST, "messages or tools hold half a character, or no number, or are nested too deeply"
            ) from None
        head = {"id": f"chatcmpl-{time.time_ns():x}", "created": int(time.time()), "model": speaker.name}
        with contextlib.closing(_begun(speaker.reply(messages, decoding, tools))) as parts:  # type: ignore[type-var]
            if asked.get("stream"):
                options = asked.get("stream_options")
                usage = isinstance(options, dict) and bool(options.get("include_usage"))
                self._stream(parts, head | {"object": "chat.completion.chunk"}, usage)
                return
            ended = next(part for part in parts if isinstance(part, Ended))
        if self.server.ending.is_set():
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "the server ends")
        choice = {"index": 0, "message": {"role": "assistant", "content": ended.text}, "finish_reason": ended.finish}
        self._json(head | {"object": "chat.completion", "choices": [choice], "usage": _usage(ended)})

    def _stream(self, parts: Iterator[str | Ended], head: dict, with_usage: bool) -> None:
        self.close_connection = True
        self._head(HTTPStatus.OK, "text/event-stream", None)
        self._event(head | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for part in parts:
            if self.server.ending.is_set():
                return  # without a finish_reason, by which a client tells
            delta, finish = ({"content": part}, None) if isinstance(part, str) else ({}, part.finish)
            self._event(head | {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})
            if isinstance(part, Ended) and with_usage:
                self._event(head | {"choices": [], "usage": _usage(part)})
        self.wfile.write(b"data: [DONE]\n\n")

    def _complete(self, asked: dict) -> None:
        """Log-probabilities of given tokens, as vLLM has them."""
        speaker, ids = self._speaker(asked), asked.get("prompt")
        if not isinstance(speaker, ModelSpeaker) or not asked.get("echo"):
            raise Refusal(
                HTTPStatus.NOT_IMPLEMENTED, "/v1/completions tells log-probabilities of given tokens (echo), of models run by transformers"
            )
        if isinstance(ids, str):
            ids = speaker.tokenizer(ids, add_special_tokens=False).input_ids
        known = len(speaker.tokenizer)
        if not isinstance(ids, list) or not ids or not all(type(id) is int and 0 <= id < known for id in ids):
            raise Refusal(HTTPStatus.BAD_REQUEST, "prompt is a text, or a list of token ids that the model has")
        top = asked.get("logprobs") or 0
        if type(top) is not int or not 0 <= top <= 20:
            raise Refusal(HTTPStatus.BAD_REQUEST, "logprobs is a number up to 20")
        own, likeliest = speaker.scored(ids, max(top, 1))
        name = (lambda id: f"token_id:{id}") if asked.get("return_tokens_as_token_ids") else (lambda id: speaker.tokenizer.decode([id]))
        told = {
            "tokens": [name(id) for id in ids],
            "token_logprobs": [None, *own],
            "top_logprobs": [None, *({name(id): value for id, value in row} for row in likeliest)],
        }
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        text = speaker.tokenizer.decode(ids)
        choice = {"index": 0, "text": text, "finish_reason": "length", "logprobs": told}
        self._json({"object": "text_completion", "model": speaker.name, "choices": [choice], "usage": usage})

    def _speaker(self, asked: dict) -> Speaker:
        speakers, wanted = self.server.speakers, asked.get("model")
        if wanted is None and len(speakers) == 1:
            return next(iter(speakers.values()))
        if not isinstance(wanted, str) or wanted not in speakers:
            raise Refusal(HTTPStatus.NOT_FOUND, f"model is one of {', '.join(speakers)}", "model_not_found")
        return speakers[wanted]

    # ---- who asks

    def _check_origin(self) -> None:
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if self.server.key is None and _place(f"//{host}").hostname not in (*LOCAL, self.server.host):
            raise Refusal(HTTPStatus.FORBIDDEN, "this server is for its own machine alone")
        if origin is not None and _place(origin).netloc != host:
            raise Refusal(HTTPStatus.FORBIDDEN, "a page of another site asks")

    def _check_key(self) -> None:
        given = self.headers.get("Authorization", "").encode()
        if self.server.key and not hmac.compare_digest(given, f"Bearer {self.server.key}".encode()):
            raise Refusal(HTTPStatus.UNAUTHORIZED, "a key is needed, as Authorization: Bearer KEY")

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isdecimal() or int(length) > LARGEST:
            self.close_connection = True
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has a Content-Length, of {LARGEST >> 20} MiB at most")
        return self.rfile.read(int(length))

    # ---- replies

    @contextlib.contextmanager
    def _refusals(self) -> Iterator[None]:
        """What a request is refused for, as the JSON of an error."""
        try:
            yield
        except Refusal as refusal:
            self._refuse(refusal)
        except TooLong as error:
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, error.what, "context_length_exceeded"))
        except NoMemory as error:
            self._refuse(Refusal(HTTPStatus.SERVICE_UNAVAILABLE, error.what))
        except UserError as error:
            self._refuse(Refusal(HTTPStatus.BAD_REQUEST, error.what))

    def _refuse(self, refusal: Refusal) -> None:
        kind = "server_error" if refusal.status >= 500 else "invalid_request_error"
        told = json.dumps({"error": {"message": refusal.message, "type": kind, "code": refusal.code}})
        busy = {"Retry-After": "1"} if refusal.status == HTTPStatus.SERVICE_UNAVAILABLE else {}
        self._send(refusal.status, told.encode(), "application/json", busy)

    def _json(self, value: dict) -> None:
        self._send(HTTPStatus.OK, json.dumps(value, ensure_ascii=False).encode(errors="replace"), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str, more: Mapping[str, str] | None = None) -> None:
        self._head(status, kind, len(content), more)
        self.wfile.write(content)

    def _head(self, status: HTTPStatus, kind: str, length: int | None, more: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store"}
        headers |= {
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:"
        }
        headers |= {"Connection": "close"} if length is None else {"Content-Length": str(length)}
        for name, value in (headers | dict(more or {})).items():
            self.send_header(name, value)
        self.end_headers()

    def _event(self, value: dict) -> None:
        self.wfile.write(b"data: " + json.dumps(value, ensure_ascii=False).encode(errors="replace") + b"\n\n")


def _begun(parts: Iterator[str | Ended]) -> Iterator[str | Ended]:
    """The same parts, of which the first is made already, so that what is refused is refused with a status."""
    first = next(parts)

    def go_on() -> Iterator[str | Ended]:
        with contextlib.closing(parts):  # type: ignore[type-var]
            yield first
            yield from parts

    return go_on()


def _place(url: str) -> SplitResult:
    """A URL's parts; empty ones of what is none."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")


def refuse_undone(asked: dict) -> None:
    for name, values in NEUTRAL.items():
        if asked.get(name) is not None and not any(asked[name] == value for value in values):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"{name} is not done here; leave it out", "unsupported_parameter")


def _decoding(asked: dict, usual: Decoding) -> Decoding:
    """How a request wants its answer made, where it says."""
    given = {name: asked[name] for name in ("temperature", "top_p", "seed", "stop") if asked.get(name) is not None}
    if (most := asked.get("max_completion_tokens", asked.get("max_tokens"))) is not None:
        given["max_tokens"] = most
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        return Decoding.model_validate(usual.model_dump() | given)
    except ValidationError as error:
        fault = error.errors()[0]
        raise Refusal(HTTPStatus.BAD_REQUEST, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}") from None


def _object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        _refuse_body()
    return found if isinstance(found, dict) else _refuse_body()


def _refuse_body() -> NoReturn:
    raise Refusal(HTTPStatus.BAD_REQUEST, "the request is no JSON object")


def _model(name: str, speaker: Speaker) -> dict:
    return {"id": name, "object": "model", "owned_by": "boardwalk", "raw": speaker.raw}


def _usage(ended: Ended) -> dict:
    counts = ended.prompt_tokens or 0, ended.tokens or 0
    return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "total_tokens": sum(counts)}


def named(speakers: list[Speaker]) -> dict[str, Speaker]:
    """Speakers by their names, of which a second one of the same name has a number."""
    found: dict[str, Speaker] = {}
    for speaker in speakers:
        number = next(k for k in itertools.count(1) if (speaker.name if k == 1 else f"{speaker.name} {k}") not in found)
        found[speaker.name if number == 1 else f"{speaker.name} {number}"] = speaker
    return found
