"""What clients of OpenAI-compatible servers share: addresses, refusals, waits, and the shape of an answer."""

import contextlib
import email.utils
import json
import math
from dataclasses import dataclass
from datetime import UTC, datetime

from src.core.errors import NoAnswer

BUSY = (429, 503)
LARGEST = 1 << 26
"""bytes of one reply at most"""
LONGEST_TOKEN = 256
"""characters per token at most: an answer longer than its token limit explains comes from a server that ignores the limit"""


class Refused(NoAnswer):
    """The server answered with an HTTP status other than 200."""

    status = 0


@dataclass(frozen=True)
class Reply:
    """One answer.

    ended: the model ended its turn (finish_reason stop), rather than being cut off.
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
NOT_OPENAI = "check that endpoint.url is an OpenAI-compatible API"
START = [
    "start the server there, listening on all interfaces (0.0.0.0) if it is another machine",
    "check the host and port of endpoint.url",
]


def api_of(url: str) -> str:
    """The API's address without a slash at its end: http://HOST:PORT/v1 of http://HOST:PORT."""
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def retry_after(header: str | None) -> float | None:
    """Seconds to wait by a Retry-After header (RFC 9110, 10.2.3: seconds or a date), never none at all; None where it says nothing."""
    with contextlib.suppress(ValueError, TypeError):
        if math.isfinite(seconds := float(header)):
            return max(seconds, 0.2)
    with contextlib.suppress(ValueError, TypeError):
        return max((email.utils.parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.2)
    return None


def _wait(header: str | None, tries: int) -> float:
    """Seconds to wait by a Retry-After header, else 1, 2, 4 ... 30."""
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
