"""Columns by other names than the layouts have: `data.columns` says which is which, and where nothing fits a mapping is proposed."""

import shlex
from collections.abc import Mapping

from src.records.formats import ANSWERS, CONTEXTS, LISTS, PROMPTS, REASONING, SYSTEMS, TURN_NAMES, listed
from src.records.json_stream import Malformed, quote
from src.records.turns import ROLES

MEANT = {"messages": LISTS, "prompt": PROMPTS, "response": ANSWERS, "input": CONTEXTS, "system": SYSTEMS, "reasoning": REASONING}
"""our name of a column -> the names the layouts know it by, all of which give way to the one that is named"""
NEEDED = ("messages", "prompt", "response", "chosen", "text")
"""columns that a record must have where they are named"""
ASKING = ("instruction", "prompt", "question", "query", "problem", "request", "user", "human", "input")
ANSWERING = ("response", "answer", "output", "completion", "reply", "assistant", "solution", "target", "label", "bot", "gpt")
"""what is in the names of columns that hold questions and answers, likeliest first"""


def renamed(record: dict, columns: Mapping[str, str | None]) -> tuple[dict, set[str]]:
    """The record with its columns, and the fields of its turns, by our names, and notes on what gave way to them.

    columns: {our name: the name in the file, or null for a column that is not what it is called}. Raises Malformed where a needed one is not there.
    """
    if not columns:
        return record, set()
    named = {ours: theirs for ours, theirs in columns.items() if theirs is not None and ours not in TURN_NAMES}
    for ours, theirs in named.items():
        if ours in NEEDED and theirs not in record:
            has = ", ".join(quote(key) for key in list(record)[:8])
            raise Malformed("missing field", f"the record has no {quote(theirs)}, which data.columns names; it has {has}")
    out_of_the_way = {ours for ours, theirs in columns.items() if theirs is None}
    for ours in named:
        out_of_the_way |= {ours, *MEANT.get(ours, ())}
    if named.keys() & {"prompt", "response", "text"} and "messages" not in named:
        out_of_the_way |= {*LISTS, *({"chosen"} - named.keys())}
    taken = set(named.values())
    found = {key: value for key, value in record.items() if key not in out_of_the_way | taken}
    found |= {ours: record[theirs] for ours, theirs in named.items() if theirs in record}
    notes = {f"column left out by data.columns: {quote(key)}" for key in record if key in out_of_the_way - taken}
    notes |= {f"no such column, which data.columns names: {quote(theirs)}" for theirs in named.values() if theirs not in record}
    fields = {theirs: ours for ours, theirs in columns.items() if ours in TURN_NAMES and theirs is not None}
    for key in LISTS if fields else ():
        if key in found:
            turns = listed(found, key, [])
            found[key] = [{fields.get(f, f): v for f, v in turn.items()} if isinstance(turn, dict) else turn for turn in turns]
    return found, notes


def proposed(record: dict) -> str:
    """The setting by which a record of an unknown layout may be read, as it is typed in a shell; empty where nothing suggests itself."""
    record = {key: value for key, value in record.items() if key.isprintable() and len(key) < 100}
    for key in record:
        turns = _turns_in(record, key)
        if turns and all(isinstance(turn, dict) for turn in turns):
            fields = _fields(turns)
            return setting("columns", {"messages": key, **fields}) if fields is not None else ""
    texts = [key for key, value in record.items() if isinstance(value, str) and key.lower() not in ("id", "uuid", "source", "category")]
    answer = _likeliest(texts, ANSWERING)
    prompt = _likeliest([key for key in texts if key != answer], ASKING)
    if len(texts) == 2:
        answer = answer or next(name for name in reversed(texts) if name != prompt)
        prompt = prompt or next(name for name in texts if name != answer)
    if prompt is None or answer is None:
        return ""
    return setting("columns", {"prompt": prompt, "response": answer})


def _turns_in(record: dict, key: str) -> list:
    """The list in a column, or in its text; empty where there is none."""
    try:
        return listed(record, key, [])
    except Malformed:
        return []


def _likeliest(names: list[str], words: tuple[str, ...]) -> str | None:
    return next((name for word in words for name in names if word in name.lower()), None)


def _fields(turns: list[dict]) -> dict[str, str] | None:
    """Which fields of the turns are their role and their text, as far as they are called otherwise; None where it cannot be told."""
    keys = [key for key in turns[0] if all(isinstance(turn.get(key), str) for turn in turns)]
    role = next((key for key in keys if all(turn[key].strip().lower() in ROLES for turn in turns)), None)
    text = next((key for key in keys if key != role), None)
    if role is None or text is None:
        return None
    return {} if (role, text) in (("role", "content"), ("from", "value")) else {"role": role, "content": text}


def setting(name: str, mapping: Mapping[str, str]) -> str:
    """data.<name>={a:b,...} quoted for a shell."""
    return shlex.quote(f"data.{name}={{{','.join(f'{_typed(key)}:{_typed(value)}' for key, value in mapping.items())}}}")


def _typed(name: str) -> str:
    """A name as Hydra reads it within braces."""
    if name.isidentifier() and name.isascii() and name.lower() not in ("null", "true", "false", "nan", "inf"):
        return name
    return "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"
