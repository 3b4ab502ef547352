"""What is measured, where, and what a report is held to."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from src.settings.base import Settings, Unkeyed, check_address


class Evaluation(Settings):
    batch_size: PositiveInt
    """prompts answered together"""
    max_length: PositiveInt
    """tokens per conversation; longer ones are left out, and counted"""
    rows: PositiveInt | None
    """rows used at most, of the validation split and of general; null: all"""
    samples: NonNegativeInt
    """prompts answered greedily"""
    max_new_tokens: PositiveInt
    """tokens per answer at most"""
    prompts: list[str] | None
    """prompts to answer; null: first user turns of the validation split"""
    expect: str | None
    """regular expression that prompt, newline and answer together must match whole; answers that do not end their turn count as wrong"""
    check: Literal["auto", "none", "number", "choice", "json", "schema", "calls"]
    """what of an answer has to be that of the data's own: its last number, the letter of a choice, that it is JSON, or follows json_schema, its tool calls; auto:
    what the data's answers are made for, and says it"""
    json_schema: Annotated[str | None, Unkeyed]
    """file with the JSON Schema that every answer has to follow"""
    general: Annotated[str | None, Unkeyed]
    """text or chats of another domain, as data.path takes them, to see what of that the model forgot; of a text each line is a row, cut at max_length"""
    tasks: Annotated[list[str] | None, Field(exclude_if=lambda names: names is None)]
    """tasks of lm-eval, by name or as a YAML file of your own, of which `rows` documents are taken at most; null: none"""

    @model_validator(mode="after")
    def _schema_where_it_is_checked(self) -> Self:
        if self.check == "schema" and self.json_schema is None:
            raise ValueError("to check by a schema, give evaluation.json_schema=FILE too")
        if self.json_schema is not None and self.check not in ("auto", "schema"):
            raise ValueError("evaluation.json_schema is of use where schema is what is checked")
        return self


class Endpoint(Settings):
    url: str | None
    """OpenAI-compatible server, http://HOST:PORT with or without /v1; null: a model on this machine. A key comes from OPENAI_API_KEY"""
    model: str | None
    """name of the model to ask; null: the only one it serves"""
    timeout: Annotated[PositiveFloat, Unkeyed]
    """seconds it may be silent or busy; a whole answer may take ten times as many while it goes on"""
    concurrency: PositiveInt
    """requests at a time; boards serve one"""

    # Raised for the group, not the field: a field's fault is printed with its value, and that may hold a password.
    @model_validator(mode="after")
    def _plain_address(self) -> Self:
        if self.url is not None:
            check_address(self.url, "endpoint.url")
        elif self.model is not None:
            raise ValueError("endpoint.model is of use with endpoint.url only")
        return self


class Gate(Settings):
    """Limits of a report's figures against the parent; null: none."""

    kl: PositiveFloat | None
    """nats of KL to the parent at most"""
    top1: Annotated[float, Field(gt=0, le=1)] | None
    """share of tokens whose likeliest is the parent's, at least"""
    perplexity_ratio: PositiveFloat | None
    """perplexity over the parent's at most"""
    task_drop: Annotated[float, Field(ge=0, le=1)] | None
    """share of answers right that may be lost of the parent's (evaluation.check)"""
    forgetting: NonNegativeFloat | None
    """nats of loss over the parent's at most, on evaluation.general"""
