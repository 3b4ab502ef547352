"""Settings of distillation's teachers and judges: a server, a model on this machine, what they cost and how fast they may be asked."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, JsonValue, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from src.settings.base import Settings, Unkeyed, check_address


class Price(Settings):
    prompt: NonNegativeFloat | None
    """USD per million prompt tokens; null: not known"""
    completion: NonNegativeFloat | None
    """USD per million tokens of answers; null: not known"""


class TeacherLimits(Settings):
    concurrency: PositiveInt
    """requests at a time at most; fewer while the teacher is busy"""
    requests_per_minute: PositiveInt | None
    """null: without limit"""
    tokens_per_minute: PositiveInt | None
    """of prompts and answers together, an answer counted at its longest until it is there; null: without limit"""
    timeout: PositiveFloat
    """seconds an answer may take"""
    tries: PositiveInt
    """times a request is sent at most before it is set aside"""
    back_off: PositiveFloat
    """seconds before the second try at most; it doubles with each, up to a minute"""
    breaker: PositiveInt
    """failures on end, without an answer between, that stop the run"""


class EndpointTeacher(Settings):
    kind: Literal["endpoint"]
    """an OpenAI-compatible server"""
    url: Annotated[str, Unkeyed]
    """its address, http://HOST:PORT with or without /v1"""
    model: str
    """name of the model to ask"""
    revision: str | None
    """what tells this model from others of its name, such as a commit; answers of another are not used again; null: nothing"""
    key_env: Annotated[str, Field(exclude=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
    """environment variable that holds the key, if the server wants one"""
    seed: bool
    """send each request's seed; false for servers that refuse it"""
    structured: Literal["json_schema", "json_object", "none"]
    """how the server is told of a JSON schema; the answer is checked against it in any case"""
    token_limit: Literal["max_tokens", "max_completion_tokens"]
    """what the server calls the longest answer"""
    extra: dict[str, JsonValue]
    """further fields of every request, such as chat_template_kwargs"""
    batch: Annotated[bool, Unkeyed]
    """ask by the endpoint's batch API: files of requests, answered within a day, often at half the price"""
    batch_size: Annotated[PositiveInt, Unkeyed]
    """requests in a batch at most"""
    price: Price
    """what it costs"""
    licence: str | None
    """licence of the model, for the dataset's card"""
    terms: str | None
    """what its maker's terms say of training on its answers, for the dataset's card"""
    limits: Annotated[TeacherLimits, Unkeyed]
    """how fast and how often it is asked"""

    @model_validator(mode="after")
    def _plain_address(self) -> Self:
        check_address(self.url, "url")
        if taken := sorted(self.extra.keys() & {"model", "messages", "prompt", "stream", "n"}):
            raise ValueError(f"extra sets {', '.join(taken)}, which the request itself does")
        if found := _like_a_key(self.extra, "extra"):
            raise ValueError(
                f"{found} looks like a key, which the manifest would keep; give it in the environment variable that key_env names"
            )
        return self


NAME_OF_KEY = re.compile(
    r"(x[-_])?api[-_]?key|(access|auth|bearer|id)[-_]?token|key|token|authorization|bearer|(client[-_]?)?secret|password", re.IGNORECASE
)
KEY = re.compile(r"(Bearer |Basic |sk-|hf_|gsk_|xai-|AIza)\S{8,}")
"""how headers with keys, and the keys of common services, begin"""


def _like_a_key(value: JsonValue, place: str) -> str | None:
    """The place of what is named or begins as a key does, among further fields of a request; None where there is nothing of the kind."""
    if isinstance(value, str) and KEY.match(value):
        return place
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        if KEY.match(str(name)):
            return place
        if NAME_OF_KEY.fullmatch(str(name)) and isinstance(part, str):
            return f"{place}.{name}"
        if found := _like_a_key(part, f"{place}.{name}"):
            return found
    return None


class LocalTeacher(Settings):
    kind: Literal["local"]
    """a model folder, run here by transformers"""
    path: Annotated[str, Unkeyed]
    """Hugging Face folder, or a model, adapter or quantized artifact"""
    batch_size: PositiveInt
    """prompts answered together; above 1 quicker on a GPU, but the last bits of a record's arithmetic, and so its words, may follow its neighbours"""
    licence: str | None
    """licence of the model, for the dataset's card"""
    terms: str | None
    """what its maker's terms say of training on its answers, for the dataset's card"""


class SameTeacher(Settings):
    kind: Literal["same"]
    """the teacher judges itself"""


AnyTeacher = Annotated[EndpointTeacher | LocalTeacher, Field(discriminator="kind")]
AnyJudge = Annotated[SameTeacher | EndpointTeacher | LocalTeacher, Field(discriminator="kind")]
