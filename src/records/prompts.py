"""Files of prompts: lines of text, or records of JSON in any layout, of which what comes up to the last user turn is asked."""

from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from src.core.errors import AGAIN, BadData
from src.core.files import canonical
from src.records import json_stream
from src.records.conversations import CONTROL
from src.records.formats import PARSERS, detect, tools_of
from src.records.json_stream import Damaged, Malformed, array, container, lines, open_text

KEYS = ("messages", "conversations", "conversation")
"""keys of a record that hold turns, which its other fields do not repeat"""


def raw_records(path: Path) -> Iterator[json_stream.RawRecord]:
    """The records of a file as they stand there; of a .txt each line that is not empty. Raises BadData where nothing more can be read."""
    read = _plain_lines if path.suffix == ".txt" else array if container(path) == "array" else lines
    with open_text(path) as file:
        try:
            yield from read(file, path.name)
        except Damaged as damage:
            raise BadData(f"the JSON array is damaged: {damage}", where=f"{path} line {damage.line}", fix=AGAIN) from None


def id_of(record: dict, number: int) -> str:
    """The id a record has in its file and its number there, so that it is unique whatever the records say."""
    own = record.get("id")
    return f"{own}#{number}" if type(own) in (str, int) and own != "" else str(number)


def asked(messages: list[dict]) -> list[dict]:
    """Turns up to the last user's. Raises Malformed where there is none."""
    last = max((number for number, m in enumerate(messages) if m["role"] == "user"), default=None)
    if last is None or not messages[last]["content"].strip():
        raise Malformed("no prompt", "there is no user turn, or it is empty")
    return messages[: last + 1]


def messages_of(record: dict) -> tuple[list[dict], dict]:
    """The turns of a record in any layout, and its other fields."""
    if "prompt" in record and not any(isinstance(record.get(key), list) for key in KEYS):
        given = record["prompt"]
        messages = (
            PARSERS["openai"]({"messages": given}) if isinstance(given, list) else [{"role": "user", "content": text_of(record, "prompt")}]
        )
        if isinstance(record.get("system"), str) and record["system"] and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": record["system"]})
    elif "instruction" in record and not any(record.get(key) is not None for key in ("output", "response")):
        messages = PARSERS["alpaca"]({**record, "output": ""})[:-1]
    else:
        messages = PARSERS[detect(record)[0]](record)
    fields = {key: value for key, value in record.items() if key not in (*KEYS, "prompt", "system", "tools", "id")}
    tools = tools_of(record)
    return messages, {"fields": fields} | ({"tools": list(tools)} if tools else {})


def text_of(record: dict, key: str) -> str:
    if not isinstance(record.get(key), str):
        raise Malformed("missing field" if key not in record else "ill-typed field", f"the record has no text under {key!r}")
    return record[key]


def check_sound(value: object) -> None:
    """Raises Malformed for what could not be written or trained on."""
    try:
        text = canonical(value).decode()
    except UnicodeEncodeError:
        raise Malformed("half of a surrogate pair", "a \\ud800..\\udfff escape stands alone") from None
    except RecursionError:
        raise Malformed("nested too deeply") from None
    except ValueError:
        raise Malformed("not a JSON number", "one beyond the range of double precision") from None
    if found := CONTROL.search(text):
        raise Malformed("control string", f"{found[0]} would end or forge a turn")


def _plain_lines(file: TextIO, name: str) -> Iterator[json_stream.RawRecord]:
    """Lines of text as records with a prompt each; empty ones are none."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield json_stream.RawRecord(number, f"{name}:{number}", {"prompt": line.strip().removeprefix("\ufeff")})
