"""A client of OpenAI-compatible servers (axllm serve, llama.cpp's server, vLLM): served models, streamed greedy chat, log-probabilities of given tokens.

The protocol is OpenAI's chat completions with server-sent events (https://platform.openai.com/docs/api-reference/chat-streaming); events follow the
HTML standard's server-sent events. No redirect is followed and no proxy asked, so prompts and the key reach the host that was named and no other.
"""

import contextlib
import http.client
import io
import json
import math
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from src.core.errors import NoAnswer
from src.core.log import say
from src.serving.protocol import BUSY, LONGEST_TOKEN, Refused, Server, count_of, message_of, seconds_to_wait, tokens_used

# Ways to ask for an answer, richest first; a server that refuses one gets the next. vLLM would otherwise take sampling defaults, such as
# repetition_penalty 1.05, from the model's generation_config.json (vLLM's --generation-config auto). llama.cpp would otherwise keep the prompts of
# an earlier evaluation (cache_prompt), and so seem quicker to the first token than it is. Each ignores what it does not know.
FORMS: tuple[dict, ...] = (
    {"stream": True, "stream_options": {"include_usage": True}, "repetition_penalty": 1.0, "cache_prompt": False},
    {"stream": True},
    {},
)
DOES_NOT_KNOW = (400, 415, 422, 501)
"""statuses that a server gives to settings it does not take"""
BIAS = 100
"""what makes a token come, whatever the others are: the largest that OpenAI's logit_bias may be"""
LARGEST = 1 << 26
"""bytes of one reply at most"""
WHOLE = 10
"""times the timeout that a whole answer may take, while it goes on"""


@dataclass(frozen=True)
class Reply:
    """One answer.

    text: what it says, and after it each call of a tool that the server keeps apart, a line of JSON with "name" and "arguments".
    ended: the model ended its turn (finish_reason stop, or tool_calls), rather than being cut off.
    seconds: from the request until the last event. first: until the first piece of text; None without streaming.
    pieces: events that carried text. prompt_tokens, tokens: the server's own count, the turn's end included; None where it gives none.
    cached: prompt tokens that the server says it did not compute anew.
    reasoned: the server kept reasoning apart from the text, which holds none of it.
    """

    text: str
    ended: bool
    seconds: float
    first: float | None
    pieces: int
    prompt_tokens: int | None
    tokens: int | None
    cached: int
    reasoned: bool


@dataclass(frozen=True)
class Echo:
    """Log-probabilities of given tokens, one entry a token; the first has none.

    names: the server's name of each token: its text, or `token_id:7`. logprobs: natural logarithms. best: name of the likeliest token at each place.
    """

    names: list[str]
    logprobs: list[float | None]
    best: list[str | None]


AGAIN = "the same command goes on after the answers it has"
NOT_OPENAI = "give the address of an OpenAI-compatible API as endpoint.url"
START = [
    "start the server there, listening on all interfaces (0.0.0.0) if it is another machine",
    "http://HOST:PORT of the server as endpoint.url, if that is another",
]


class Deadline:
    """When a request is given up: `timeout` seconds after it began or last went on, and WHOLE times as many after it began, however it goes on."""

    def __init__(self, timeout: float, where: str):
        self._timeout, self._where, self._began = timeout, where, time.monotonic()
        self._silent_since = self._began

    def went_on(self) -> None:
        """A piece of the answer came. Nothing else is progress: no header, no comment, no byte of what may never be whole."""
        self._silent_since = time.monotonic()

    def left(self) -> float:
        """Seconds, above 0. Raises NoAnswer where there are none."""
        now, whole = time.monotonic(), self._timeout * WHOLE
        if now >= self._began + whole:
            raise self._over(f"the answer was not whole after {whole:g} s")
        if now >= self._silent_since + self._timeout:
            raise self.silent()
        return min(self._began + whole, self._silent_since + self._timeout) - now

    def silent(self) -> NoAnswer:
        return self._over(f"the server was silent for {self._timeout:g} s")

    def _over(self, what: str) -> NoAnswer:
        return NoAnswer(what, where=self._where, fix="endpoint.timeout=SECONDS waits longer")


class Timed(io.RawIOBase):
    """What comes over a socket, read within a deadline, also where each byte comes in time and the line they make never ends."""

    def __init__(self, sock: socket.socket, deadline: Deadline):
        self._sock, self._deadline = sock, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        self._sock.settimeout(self._deadline.left())
        try:
            return self._sock.recv_into(buffer)
        except TimeoutError:
            self._deadline.left()
            raise self._deadline.silent() from None


class TimedReply(http.client.HTTPResponse):
    """A reply that is read within a deadline, its interim ones (100 Continue) too."""

    def __init__(self, sock: socket.socket, deadline: Deadline, method: str):
        super().__init__(sock, method=method)
        self.fp.close()
        self.fp = io.BufferedReader(Timed(sock, deadline))


class Client:
    """Requests to one server, each over a connection of its own, with the time it took.

    url: with or without /v1 at its end. timeout: seconds the server may be silent; a whole answer may take WHOLE times as many. A key comes from
    OPENAI_API_KEY.
    """

    def __init__(self, url: str, *, timeout: float):
        self.server, self.timeout = Server(url, key_env="OPENAI_API_KEY", setting="endpoint.url", name="the server"), timeout
        self.url, self._parts = self.server.url, urlsplit(self.server.url)
        self._forms = FORMS
        self._open_now: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._told: set[str] = set()

    def models(self) -> list[dict]:
        """What GET /models lists, each with an `id`; raises NoAnswer, Refused where the server has no such list."""
        with self._asked("GET", "/models") as (response, *_):
            listed = self._json(self._read(response))
        with self._shaped(listed):
            return [entry for entry in listed["data"] if entry["id"].encode()]

    def chat(self, model: str, messages: list[dict], tools: list | None, *, max_tokens: int) -> Reply:
        """The greedy answer to a conversation. Raises Refused where the server refuses it, NoAnswer where it fails."""
        *_, reply = self.parts(model, messages, tools, max_tokens=max_tokens, temperature=0)
        assert isinstance(reply, Reply)
        return reply

    def parts(self, model: str, messages: list[dict], tools: list | None, *, max_tokens: int, **sampling) -> Iterator[str | Reply]:
        """The pieces of an answer as they come, then the whole of it. sampling: temperature and what else the protocol has. Raises as `chat`."""
        body = {"model": model, "messages": messages, "max_tokens": max_tokens, **sampling} | ({"tools": tools} if tools else {})
        forms, refusal = self._forms, None
        for form in forms:
            parts = self._chat(body | form, max_tokens)
            try:
                first = next(parts)
            except Refused as error:
                if error.status not in DOES_NOT_KNOW or form is forms[-1]:
                    raise
                refusal = error
                continue
            if refusal and len(self._forms) > 1:
                without = "streaming" if not form else "stream_options (token counts), repetition_penalty or cache_prompt"
                self._say_once(f"endpoint: it refuses {without} (HTTP {refusal.status}), asked without from here on")
            self._forms = (form,)
            yield first
            yield from parts
            return

    def echo(self, model: str, ids: list[int]) -> Echo:
        """Log-probabilities of token ids by /completions with echo, as vLLM and OpenAI's legacy API have it; raises NoAnswer where there are none.

        max_tokens is 1, since 0 means "without limit" to some servers; what is generated stands behind the given tokens and is left out.
        """
        asked = {"echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
        with self._asked("POST", "/completions", _completion(model, ids) | asked) as (response, *_):
            given = self._json(self._read(response))
        with self._shaped(given):
            found = given["choices"][0].get("logprobs") or {}
            names, values, tops = (found.get(k) or [] for k in ("tokens", "token_logprobs", "top_logprobs"))
            if not len(ids) <= len(names) == len(values) == len(tops) <= len(ids) + 1:
                raise NoAnswer("it gives none of a prompt's tokens", where=self.url)
            names = ["".join(name) for name in names]
            best = [max(top, key=top.get) if top else None for top in tops]
            values = [None if v is None else float(v) for v in values]
        return Echo(names[: len(ids)], values[: len(ids)], best[: len(ids)])

    def following(self, model: str, ids: list[int], count: int, *, whole: int) -> dict[int, float]:
        """{token id: log-probability} of the `count` likeliest tokens after these, as llama.cpp's server gives them; raises NoAnswer where there are none.

        whole: id of a token whose text is whole characters. llama.cpp tells nothing of a token that is a piece of one, as it waits for the rest; asked again with a
        bias that makes `whole` come, it tells the same log-probabilities, which are those before biases. A server that counts the bias in is refused.
        The server must have read as many tokens as it was given: one that puts a token of its own first is refused.
        """
        _, likeliest = self._next(model, ids, {"logprobs": count})
        if not likeliest:
            _, likeliest = self._next(model, ids, {"logprobs": count, "logit_bias": {str(whole): BIAS}})
            if likeliest.get(whole, -math.inf) > math.log(0.5):
                raise NoAnswer("of a piece of a character it tells nothing, and with a bias it counts the bias in", where=self.url)
        if not likeliest:
            raise NoAnswer("it gives none of the next token's by id", where=self.url)
        return likeliest

    def one_following(self, model: str, ids: list[int], token: int) -> float | None:
        """The log-probability of one token after these, by a bias that makes it come: the server tells it as it was before the bias. None where it does not.

        For a token that is not among the likeliest: to list a whole vocabulary takes llama.cpp's server seconds.
        """
        made, _ = self._next(model, ids, {"logprobs": 1, "logit_bias": {str(token): BIAS}})
        return made[1] if made and made[0] == token else None

    def _next(self, model: str, ids: list[int], more: dict) -> tuple[tuple[int, float] | None, dict[int, float]]:
        """((id, log-probability) of the token that came, {id: log-probability} of the likeliest); None and empty where it tells neither."""
        with self._asked("POST", "/completions", _completion(model, ids) | more) as (response, *_):
            given = self._json(self._read(response))
        with self._shaped(given):
            found = (given["choices"][0].get("logprobs") or {}).get("content") or []
            likeliest = {entry["id"]: float(entry["logprob"]) for entry in (found[0]["top_logprobs"] if found else []) if "id" in entry}
            made = (found[0]["id"], float(found[0]["logprob"])) if likeliest and {"id", "logprob"} <= found[0].keys() else None
            read = tokens_used(given.get("usage"))[0]
        if likeliest and read != len(ids):
            raise NoAnswer(f"it read {read} tokens where {len(ids)} were given", where=self.url)
        return made, likeliest

    def close(self) -> None:
        """End every request under way, from whichever thread."""
        with self._lock:
            for sock in self._open_now:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _chat(self, body: dict, max_tokens: int) -> Iterator[str | Reply]:
        text, length, finish, first, pieces, reasoned = [], 0, None, None, 0, False
        usage: dict = {}
        calls: dict[int, dict[str, str]] = {}
        with self._asked("POST", "/chat/completions", body) as (response, start, deadline):
            streamed = "event-stream" in response.headers.get("Content-Type", "")
            for event in self._events(response) if streamed else [self._json(self._read(response))]:
                now = time.monotonic()
                with self._shaped(event):
                    if event.get("error"):
                        raise NoAnswer(
                            "the server failed in the middle of an answer", where=f"{self.url}: {self.server.plain(event['error'])}"
                        )
                    usage = event.get("usage") or usage
                    for choice in event["choices"][:1] if streamed else [event["choices"][0]]:
                        part = (choice.get("delta") or {}) if streamed else choice["message"]
                        finish = choice.get("finish_reason") or finish
                        thought = part.get("reasoning_content") or part.get("reasoning")
                        if part.get("content") or thought or part.get("tool_calls"):
                            first, pieces = first or now, pieces + 1
                            deadline.went_on()
                        text.append("".join(part.get("content") or ""))
                        length += len(text[-1]) + _gather_calls(part.get("tool_calls") or [], calls)
                        reasoned = reasoned or bool(thought)
                    counts = tokens_used(usage)
                    cached = count_of((usage.get("prompt_tokens_details") or {}).get("cached_tokens")) or 0
                    if length > LONGEST_TOKEN * max_tokens:
                        raise NoAnswer(f"the server goes on long after max_tokens={max_tokens}", where=self.url)
                if event["choices"]:
                    yield text[-1]
                deadline.left()
            end = time.monotonic()
        if finish is None and streamed:
            raise NoAnswer(f"the stream was cut off after {pieces} pieces, before a finish_reason", where=self.url, fix=AGAIN)
        # An emoji may come as two halves of a surrogate pair, in two pieces; a half that stays alone cannot be written to a file.
        # A key may come in two pieces as well.
        told = "\n".join(["".join(text)] * bool("".join(text)) + [_call_told(call) for call in calls.values()])
        whole = self.server.hidden(told.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
        yield Reply(
            whole,
            finish in ("stop", "tool_calls"),
            end - start,
            first - start if first and streamed else None,
            pieces,
            *counts,
            cached,
            reasoned,
        )

    @contextlib.contextmanager
    def _asked(self, method: str, path: str, body: dict | None = None) -> Iterator[tuple[http.client.HTTPResponse, float, Deadline]]:
        """An open reply of status 200, the moment its request began, the connection being made, and its deadline; waits for a busy server, within the
        timeout."""
        began, tries = time.monotonic(), 0
        headers = self.server.headers | {"Connection": "close"}
        while True:
            secure = self._parts.scheme == "https"
            connection = (http.client.HTTPSConnection if secure else http.client.HTTPConnection)(
                self._parts.hostname or "", self._parts.port, timeout=self.timeout
            )
            sock = None
            try:
                connection.connect()
                sock = connection.sock
                with self._lock:
                    self._open_now.add(sock)
                start = time.monotonic()
                connection.request(method, self._parts.path + path, json.dumps(body).encode() if body else None, headers)
                deadline = Deadline(self.timeout, self.url + path)
                response = TimedReply(sock, deadline, method)
                response.begin()
                if response.status == 200:
                    with contextlib.closing(response):
                        yield response, start, deadline
                    return
                refusal = self._refusal(response)
                wait = seconds_to_wait(response.headers.get("Retry-After"), tries)
            except TimeoutError:
                raise Deadline(self.timeout, self.url + path).silent() from None
            except ConnectionRefusedError:
                raise NoAnswer("nothing listens there", where=self.url, fix=START) from None
            except ssl.SSLError as error:
                raise NoAnswer(
                    f"no secure connection: {error.reason or error}",
                    where=self.url,
                    fix="http://HOST:PORT as endpoint.url, for a server without TLS",
                ) from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                told = self.server.plain(str(error)) or type(error).__name__
                raise NoAnswer(f"no connection, or it broke: {told}", where=self.url, fix=[AGAIN, *START]) from None
            finally:
                connection.close()
                with self._lock:
                    self._open_now.discard(sock)
            if refusal.status not in BUSY or time.monotonic() - began + wait > self.timeout:
                raise refusal
            self._say_once(f"endpoint: busy (HTTP {refusal.status}), asked again in {wait:g} s, for up to {self.timeout:g} s a request")
            time.sleep(wait)
            tries += 1

    def _refusal(self, response: http.client.HTTPResponse) -> Refused:
        """The error a status other than 200 means, with the server's own words."""
        status = response.status
        if denied := self.server.denied(status, response.headers.get("Location")):
            what, fix = denied
        elif status in BUSY:
            what, fix = f"the server stays busy (HTTP {status})", "endpoint.timeout=SECONDS waits longer"
        else:
            what, fix = (
                f"the server answers HTTP {status}",
                NOT_OPENAI,
            )
        with contextlib.suppress(OSError, http.client.HTTPException, NoAnswer):
            body = response.read(4096).decode(errors="replace").strip()
            what += f": {self.server.plain(message_of(body))}" if body else ""
        return Refused(what, status=status, where=self.url, fix=fix)

    def _events(self, response: http.client.HTTPResponse) -> Iterator[dict]:
        """The JSON of each server-sent event, until [DONE] or the end."""
        data, read = [], 0
        while line := response.readline(LARGEST):
            read += len(line)
            if read > LARGEST:
                raise NoAnswer(f"the reply is larger than {LARGEST >> 20} MiB", where=self.url)
            field, _, value = line.decode(errors="replace").rstrip("\r\n").partition(":")
            if field == "data" and value.strip() == "[DONE]":
                return
            if field == "data":
                data.append(value)
            elif field == "error":  # llama.cpp's server until 2025
                yield {"error": value.strip()}
            elif not field and data:
                yield self._json("\n".join(data))
                data = []
            elif field.startswith("{"):
                raise NoAnswer("the stream is not made of server-sent events", where=f"{self.url}: {self.server.plain(field + value)}")
            elif not field:
                yield {"choices": []}  # a comment or an empty line: the caller looks at the clock
        if data:
            yield self._json("\n".join(data))

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        parts, size = [], 0
        while part := response.read1(1 << 16):
            parts.append(part)
            size += len(part)
            if size > LARGEST:
                raise NoAnswer(f"the reply is larger than {LARGEST >> 20} MiB", where=self.url)
        return b"".join(parts)

    def _json(self, data: str | bytes):
        text = data if isinstance(data, str) else data.decode(errors="replace")
        try:
            return self.server.json(text)
        except ValueError:
            raise NoAnswer("the reply is not JSON", where=f"{self.url}: {self.server.plain(text)}", fix=NOT_OPENAI) from None

    @contextlib.contextmanager
    def _shaped(self, value) -> Iterator[None]:
        """Reads a reply that may be of any shape."""
        try:
            yield
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
            raise NoAnswer("the reply is not of OpenAI's form", where=f"{self.url}: {self.server.plain(value)}", fix=NOT_OPENAI) from None

    def _say_once(self, line: str) -> None:
        with self._lock:
            new = line not in self._told
            self._told.add(line)
        if new:
            say(line)


def _completion(model: str, ids: list[int]) -> dict:
    return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 0}


def _gather_calls(parts: list[dict], calls: dict[int, dict[str, str]]) -> int:
    """Add the pieces of an event's tool calls to those that came before, by their place; returns how many letters they are."""
    letters = 0
    for at, part in enumerate(parts):
        call = calls.setdefault(part.get("index", at), {"name": "", "arguments": ""})
        for name in call:
            piece = (part.get("function") or {}).get(name) or ""
            piece = piece if isinstance(piece, str) else json.dumps(piece)
            call[name] += piece
            letters += len(piece)
    return letters


def _call_told(call: dict[str, str]) -> str:
    """A call as JSON; arguments that are none stay text."""
    try:
        arguments = json.loads(call["arguments"] or "{}")
    except ValueError:
        arguments = call["arguments"]
    return json.dumps({"name": call["name"], "arguments": arguments}, ensure_ascii=False)
