"""What every settings class builds on. Imports pydantic alone, as all schemas do; see config.py."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

Unkeyed = Field(exclude=True)
Fraction = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """A group of settings: every key known, every value checked, none changed, no default."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True, allow_inf_nan=False, protected_namespaces=()
    )


def check_address(url: str, setting: str) -> None:
    """Raises ValueError where a server's address is not a plain http://HOST:PORT, without showing what it may hold."""
    try:
        parts = urlsplit(url)
        port_in_range = parts.port != 0
    except ValueError:
        raise ValueError(f"{setting} is not an address; write http://HOST:PORT") from None
    if parts.username is not None or parts.password is not None or "@" in url:
        raise ValueError(f"{setting} holds a user name or password, which a report would keep; give a key in OPENAI_API_KEY instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_in_range:
        raise ValueError(f"{setting} must begin with http://HOST or https://HOST")
    if parts.query or parts.fragment or not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"{setting} is a plain address: no spaces, no ? and no #")
    if parts.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"{setting} names the server, not a request to it: http://HOST:PORT or http://HOST:PORT/v1")
