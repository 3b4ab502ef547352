"""What clients of OpenAI-compatible servers share: addresses, refusals, waits, and the shape of an answer."""

import contextlib
import email.utils
import html
import json
import math
import os
import re
from datetime import UTC, datetime
from functools import partial
from urllib.parse import urlsplit

from src.core.errors import ConfigError, NoAnswer
from src.core.log import warn

BUSY = (429, 503)
MASK = "***"
"""stands where a key was"""
# A character in JSON's escapes (whose backslashes are doubled in each JSON within JSON), in a URL's, and in HTML's.
_ESCAPED = re.compile(
    r"\\{1,16}u00([0-9a-fA-F]{2})|\\{1,16}([\"/\\])|%([0-9a-fA-F]{2})|&#0{0,8}([0-9]{1,3});|&#[xX]0{0,8}([0-9a-fA-F]{1,2});|&(amp|lt|gt|quot|apos);"
)
MOST_TOKENS = 1 << 31
"""of one request: a journal's sums stay within SQLite's 64 bits for four billion of them"""
LONGEST_TOKEN = 256
"""characters per token at most: an answer longer than its token limit explains comes from a server that ignores the limit"""


class Refused(NoAnswer):
    """The server answered with an HTTP status other than 200."""

    def __init__(self, what: str, *, status: int, where: str, fix: str | list[str]):
        self.status = status
        super().__init__(what, where=where, fix=fix)

    def __reduce__(self):
        return partial(Refused, self.what, status=self.status, where=self.where, fix=self.fix), ()


class Server:
    """One OpenAI-compatible server as every client of it sees it: its address, its key, and what its refusals mean.

    url: with or without /v1 at its end. key_env: environment variable that may hold a key, which is sent as a bearer token and shown nowhere.
    setting: what the settings call the address, such as endpoint.url. name: what messages call the server.
    Raises ConfigError for a key that can be none.
    """

    def __init__(self, url: str, *, key_env: str, setting: str, name: str):
        self.url, self.key_env, self.setting, self.name = api_of(url), key_env, setting, name
        self._key = key_in(key_env)
        self._repeats_it = False

    @property
    def headers(self) -> dict[str, str]:
        """Of every request."""
        authorization = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"} | authorization

    @property
    def has_key(self) -> bool:
        return self._key is not None

    @property
    def with_key(self) -> str:
        """Which key goes to it, in words."""
        if not self._key:
            return "without a key"
        return f"with the key in {self.key_env}" + (" (unencrypted, over http)" if self.url.startswith("http://") else "")

    def hidden(self, text: str) -> str:
        """The text without the key, however the server spells it (JSON's escapes at any depth, a URL's, HTML's); that it does so is said once."""
        if not self._key:
            return text
        masked = _masked(text.replace(self._key, MASK), self._key)
        if masked != text and not self._repeats_it:
            self._repeats_it = True
            warn(f"{self.name} repeats the key in {self.key_env}; {MASK} stands in its place")
        return masked

    def plain(self, value: object) -> str:
        """A server's words for a person, and never the key; see `plain`."""
        return plain(self.hidden(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))

    def json(self, data: str | bytes):
        """A reply's JSON without the key, which is looked for in what the JSON's texts say. Raises ValueError where it is none."""
        try:
            return self._without_key(json.loads(data if isinstance(data, str) else data.decode(errors="replace")))
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def _without_key(self, value):
        if isinstance(value, str):
            return self.hidden(value)
        if isinstance(value, dict):
            return {self.hidden(name): self._without_key(inner) for name, inner in value.items()}
        return [self._without_key(inner) for inner in value] if isinstance(value, list) else value

    def denied(self, status: int, location: str | None) -> tuple[str, str] | None:
        """(what, way out) of a status that no other request would change: a redirect, which is not followed, or a key refused. None for others."""
        if 300 <= status < 400:
            return (
                f"{self.name} sends us on to {self.plain(_place(location or ''))}, which is not followed",
                f"if you trust that address, give it as {self.setting}",
            )
        if status in (401, 403):
            refused = f"the key in {self.key_env}" if self._key else "requests without a key"
            return f"{self.name} refuses {refused} (HTTP {status})", f"export {self.key_env}=... with the key it wants"
        return None


def _masked(text: str, key: str) -> str:
    """The text without the key where characters of it are escaped. Takes time in proportion to the text, whatever the text is."""
    plain_text = _ESCAPED.sub(_character, text)
    if key not in plain_text:
        return text
    places, last = list[int](), 0  # of each character of the plain text, and of its end, in the text
    for found in _ESCAPED.finditer(text):
        places += [*range(last, found.start()), found.start()]
        last = found.end()
    places += range(last, len(text) + 1)
    pieces, done, at = [], 0, plain_text.find(key)
    while at >= 0:
        pieces += [text[done : places[at]], MASK]
        done = places[at + len(key)]
        at = plain_text.find(key, at + len(key))
    return "".join(pieces) + text[done:]


def _character(found: re.Match) -> str:
    hexadecimal, itself, decimal, name = found[1] or found[3] or found[5], found[2], found[4], found[6]
    return itself or (html.unescape(f"&{name};") if name else chr(int(hexadecimal, 16) if hexadecimal else int(decimal)))


def key_in(variable: str) -> str | None:
    """The key in this environment variable, or None. Raises ConfigError for what can be no key."""
    key = os.environ.get(variable) or None
    if key and not (key.isascii() and key.isprintable() and " " not in key):
        raise ConfigError(
            f"{variable} holds spaces or characters that no key has", fix=[f"export {variable}=... with the key alone", f"unset {variable}"]
        )
    return key


def plain(text: str) -> str:
    """Words from outside for a person: one line, at most 300 characters, nothing that steers a terminal."""
    return "".join(c if c.isprintable() else " " for c in text[:400])[:300].strip()


def tokens_used(usage: dict | None) -> tuple[int | None, int | None]:
    """(prompt tokens, tokens of the answer) as a reply's "usage" counts them; None where it does not say, or says what is no count."""
    prompt_tokens, tokens = (count_of((usage or {}).get(name)) for name in ("prompt_tokens", "completion_tokens"))
    return prompt_tokens, tokens


def count_of(value: object) -> int | None:
    """A number of tokens as a server counts it; None for what is no count: below 0, a truth value, or more than any context holds."""
    return value if isinstance(value, int) and type(value) is int and 0 <= value < MOST_TOKENS else None


def _place(location: str) -> str:
    """A redirect's target without what may be secret in it."""
    with contextlib.suppress(ValueError):
        parts = urlsplit(location)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.scheme}://{parts.hostname}{port}{parts.path}" if parts.hostname else parts.path
    return "another address"


def api_of(url: str) -> str:
    """The API's address without a slash at its end: http://HOST:PORT/v1 of http://HOST:PORT."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3: seconds or a date), never none at all; None where it says nothing."""
    if header is None:
        return None
    with contextlib.suppress(ValueError):
        if math.isfinite(seconds := float(header)):
            return max(seconds, 0.2)
    with contextlib.suppress(ValueError, TypeError):
        return max((email.utils.parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.2)
    return None


def seconds_to_wait(header: str | None, tries: int) -> float:
    """Seconds to wait by a Retry-After header, else 1, 2, 4 ... 30 with the number of tries so far."""
    asked = retry_after(header)
    return min(2.0**tries, 30.0) if asked is None else asked


def message_of(body: str) -> str:
    """The sentence in an error's body: {"error": {"message": ...}}, {"error": ...}, {"message": ...} or the body itself."""
    try:
        found = json.loads(body)
        found = found.get("error") or found.get("message") or found.get("detail") or body
        return found.get("message") or body if isinstance(found, dict) else found if isinstance(found, str) else body
    except (ValueError, AttributeError, RecursionError):
        return body
