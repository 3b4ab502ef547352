"""Answers that can be checked against the one that the data gives: the last number, the letter of a choice, JSON, JSON that follows a schema, calls of tools.

Either is read in the same way, so that what counts is what was meant and not how it was put. Reasoning in front of an answer is no part of it.
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from src.chat import encoding
from src.chat.template import THINKING, Unteachable
from src.core.artifact import Artifact
from src.core.errors import BadData, using
from src.core.files import read_json
from src.core.log import warn
from src.records import turns
from src.records.json_stream import Decoder, Malformed
from src.settings.evaluations import Evaluation

_NUMBER = (
    r"(?:(?<![\w)])[-−])?(?:(?<![A-Za-z_\d])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][+-]?\d+)?(?:/0*[1-9]\d*)?"
)
NUMBER = re.compile(_NUMBER)
ENDS_IN_NUMBER = re.compile(rf"{_NUMBER}\W*\w{{0,5}}\W*\Z")
"""a number with no more than a unit behind it"""
LETTER = r"([B-HJ]|[AI](?!\s+[a-z]))\b"
"""of a choice; A and I may be words"""
CHOICES = (
    re.compile(rf"(?i:\b(?:answer|choice|option)\b(?:\s+is)?|정답은?)\s*[:=]?\s*[*(]*{LETTER}(?!['’])"),
    re.compile(r"\A\s*[*(]*([A-J])[*)]*(?:[.):]|\s*\Z)"),
    re.compile(r"\\boxed\{([A-J])\}"),
)
NAMED = 5
"""prompts that are named where a model lost what its parent could"""
TOO_LARGE = re.compile(r"[eE][+-]?\d{4}|.{100}")
"""a number that takes long to be made one"""


def said(text: str) -> str:
    """An answer without the reasoning in front of it."""
    for _, closing in THINKING:
        text = text.rpartition(closing)[2]
    return text


def number(text: str) -> Fraction | None:
    """The last number in a text: 1,234.5, -3, 1e-4, 3/4."""
    found = NUMBER.findall(said(text))
    if not found or TOO_LARGE.search(found[-1]):
        return None
    over, _, under = found[-1].replace(",", "").replace("−", "-").partition("/")
    return Fraction(over) / Fraction(under or 1)


def choice(text: str) -> str | None:
    """The letter that an answer chooses: the one it names as its answer, in the end, or begins with."""
    return next((found[-1] for form in CHOICES if (found := form.findall(said(text)))), None)


def value(text: str) -> dict | list | None:
    """The JSON object or list that a text is, in a code fence or not."""
    text = said(text).strip()
    if text.startswith("```") and text.endswith("```") and "\n" in text:
        text = text[text.index("\n") : -3]
    try:
        found = turns.loads(text, "the answer")
    except Malformed:
        return None
    return found if isinstance(found, dict | list) else None


def calls(text: str) -> list[dict]:
    """The calls, {"name", "arguments"} each, that a text holds as JSON objects or lists of them, whatever a template writes around them."""
    decoder, text, found, at = Decoder(), said(text), [], 0
    while (begin := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            one, at = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            at = begin.end()
            continue
        for call in turns.as_list(one):
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict) and {"arguments", "parameters"} & function.keys():
                try:
                    found.append(turns.call_of(call, "the answer", [])["function"])
                except Malformed:
                    continue
    return found


def same_calls(some: list[dict], others: list[dict]) -> bool:
    """Whether the calls are the same, in any order."""
    left = list(others)
    for call in some:
        if (at := next((i for i, other in enumerate(left) if _same(call, other)), None)) is None:
            return False
        del left[at]
    return not left


def _same(one: object, other: object) -> bool:
    """Whether two JSON values are equal: 1 is 1.0, and not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_same(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other and isinstance(one, bool) == isinstance(other, bool)


class Reference(NamedTuple):
    """A prompt and the answer that the data gives to it."""

    messages: list[dict]
    tools: list | None
    answer: dict

    @property
    def text(self) -> str:
        return self.answer["content"]

    @property
    def calls(self) -> list[dict]:
        return [call["function"] for call in self.answer.get("tool_calls", ())]

    def readable(self, tokenizer) -> bool:
        """Whether the chat template writes the answer's calls in a way that `calls` reads."""
        try:
            row = encoding.encode(tokenizer, [*self.messages, self.answer], self.tools)
        except (BadData, Unteachable):
            return False
        spans = groupby(zip(row.labels, row.input_ids), key=lambda pair: pair[0] != encoding.IGNORE)
        *_, last = ([id for _, id in pairs] for trained, pairs in spans if trained)
        return same_calls(self.calls, calls(tokenizer.decode(last, skip_special_tokens=True)))


def openings(records: Iterable[dict], most: int) -> list[Reference]:
    """The messages up to the first answer, and that answer, of the first records of a split that open differently."""
    found: dict[str, Reference] = {}
    for record in records:
        messages = record["messages"]
        asked = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages))
        cut = next((i for i, m in enumerate(messages) if m["role"] == "assistant" and i > asked), 0)
        if cut and len(found) < most:
            opening = Reference(messages[:cut], record.get("tools"), messages[cut])
            found.setdefault(json.dumps(opening[:2]), opening)
    return list(found.values())


def asked(settings: Evaluation, records: list[dict]) -> list[tuple[list[dict], list | None]]:
    """Prompts as (messages, tools): the ones given, else the openings of the first validation records."""
    if settings.prompts is not None:
        return [([{"role": "user", "content": text}], None) for text in settings.prompts]
    return [(each.messages, each.tools) for each in openings(records, settings.samples)]


def asked_row(messages: list[dict]) -> dict:
    """How an answer's row says what was asked: the last message, and under "before" the messages that stood before it, if any."""
    *before, last = messages
    return {"prompt": last["content"]} | ({"before": before} if before else {})


def expected(settings: Evaluation, answers: dict[str, list[dict]]) -> dict[str, int]:
    """How many answers of each role match evaluation.expect and end their turn, marked in their rows; nothing where none is expected."""
    if settings.expect is None:
        return {}
    for row in (row for rows in answers.values() for row in rows):
        text = f"{row['prompt']}\n{row['answer']}"
        row["as_expected"] = row["ended"] and re.fullmatch(settings.expect, text, re.DOTALL) is not None
    return {("" if role == "model" else "parent_") + "expected": sum(row["as_expected"] for row in rows) for role, rows in answers.items()}


@dataclass(frozen=True)
class Check:
    """name: the setting's value; words: what is looked at. fits(reference): whether it can be checked; tells(reference): whether its form says that it is meant to
    be. right(reference, answer)."""

    name: str
    words: str
    fits: Callable[[Reference], bool]
    tells: Callable[[Reference], bool]
    right: Callable[[Reference, str], bool]


def _equal(name: str, words: str, read: Callable[[str], object], tells: Callable[[Reference], bool] | None = None) -> Check:
    fits = lambda reference: not reference.calls and read(reference.text) is not None
    return Check(name, words, fits, tells or fits, lambda reference, answer: read(answer) == read(reference.text))


NUMBERS = _equal("number", "the last number", number, lambda reference: bool(ENDS_IN_NUMBER.search(said(reference.text))))
CHOICE = _equal("choice", "the letter chosen", choice)
JSON = _equal("json", "JSON of the same kind (object or list)", lambda text: None if (found := value(text)) is None else type(found))
CALLS = Check(
    "calls",
    "tool calls by name and arguments",
    fits=lambda reference: bool(reference.calls or reference.tools),
    tells=lambda reference: bool(reference.calls or reference.tools),
    right=lambda reference, answer: same_calls(reference.calls, calls(answer)),
)


def of_schema(file: Path) -> Check:
    """The check of a file's JSON Schema, which every answer is to follow. Raises MissingTool, or BadData where it is no schema."""
    schema = read_json(file)
    with using("the JSON Schema", file):
        from jsonschema.validators import Draft202012Validator, validator_for
        from referencing import Registry

        kind = validator_for(schema, default=Draft202012Validator)
        kind.check_schema(schema)
        follows = kind(schema, registry=Registry())  # which fetches nothing

    def right(_: Reference, answer: str) -> bool:
        with using("the JSON Schema", file):
            return (found := value(answer)) is not None and follows.is_valid(found)

    always = lambda reference: not reference.calls
    return Check("schema", f"JSON that follows {file.name}", always, always, right)


def to_check(settings: Evaluation, inputs: dict[str, Artifact], records: list[dict]) -> tuple[Check | None, list[Reference]]:
    """What of the answers is checked, if anything, and by which of the data's own; prompts of the user's have none."""
    references = [] if settings.prompts is not None else openings(records, settings.samples)
    return choose(settings.check, references, inputs["json_schema"].path if "json_schema" in inputs else None), references


def choose(wanted: str, references: list[Reference], schema: Path | None) -> Check | None:
    """The check that is wanted; by "auto" the first that at least half of the references are made for, calls where any calls; None where there is none."""
    if wanted == "none" or not references:
        return None
    if wanted == "schema" or (wanted == "auto" and schema):
        assert schema, "a rule of the settings"
        return of_schema(schema)
    if wanted != "auto":
        check = next(check for check in (NUMBERS, CHOICE, JSON, CALLS) if check.name == wanted)
        return check if any(map(check.fits, references)) else None
    if any(reference.calls for reference in references):
        return CALLS
    found = next((check for check in (JSON, CHOICE, NUMBERS) if 2 * sum(map(check.tells, references)) >= len(references)), None)
    return found and replace(found, fits=found.tells)


def score(
    check: Check, references: list[Reference], answers: dict[str, list[dict]], tokenizer
) -> tuple[dict[str, Any], dict[str, list[bool]]]:
    """(what was checked, {role: whether each answer is right}), marked in the rows of `answers`; an answer that did not end its turn is wrong, a prompt that an
    endpoint refused is not checked.

    tokenizer: with the chat template that wrote the prompts; None where it is not known.
    Of calls, false_calls are answers that call where the data's does not. What the chat template does not write as calls that can be read is not checked, and said.
    """
    at = [i for i, reference in enumerate(references) if check.fits(reference) and not any("error" in rows[i] for rows in answers.values())]
    if check is CALLS and tokenizer:
        readable = [i for i in at if references[i].readable(tokenizer)]
        if len(readable) < len(at):
            warn(
                f"this chat template shows {len(at) - len(readable)} of {len(at)} answers without calls that can be read, so they are not checked"
            )
        at = readable
    right: dict[str, list[bool]] = {}
    found: dict[str, Any] = {"task_check": check.name, "task_prompts": len(at)}
    for role, rows in answers.items():
        for i in at:
            rows[i]["right"] = rows[i]["ended"] and check.right(references[i], rows[i]["answer"])
        right[role] = [rows[i]["right"] for i in at]
        if check is CALLS:
            false = sum(not references[i].calls and bool(calls(rows[i]["answer"])) for i in at)
            found[("" if role == "model" else "parent_") + "false_calls"] = false
    lost = [i for i in at if "parent" in answers and answers["parent"][i]["right"] and not answers["model"][i]["right"]]
    return found | {"task_lost": [answers["model"][i]["prompt"] for i in lost[:NAMED]]}, right
