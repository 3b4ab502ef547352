"""Chat datasets of every common layout, read as a stream into one normal form, with each record accounted for.

A file is a JSON array or JSON Lines, told apart by content. A record is kept, dropped because nothing can be learned from it, or malformed; none is
repaired by guessing, and no text is trimmed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TextIO

from src.errors import BadData, MissingInput

FORMATS = ("qwen", "sharegpt", "openai", "alpaca")

CHUNK = 1 << 20
RECORD_LIMIT = 64 << 20
DEPTH_LIMIT = 100
FAULTS_LISTED = 10
NOTES_LISTED = 50

SPACE = " \t\r\n"
_SPACES = re.compile(f"[{SPACE}]*")
_CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")

QWEN_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "tool": "tool"}
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system", "function_call": "call", "observation": "tool", "tool": "tool"}
OPENAI_ROLES = QWEN_ROLES | {"developer": "system"}

PROMPTS = ("instruction", "query")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response")
RECORD_KEYS = ("messages", "conversations", "conversation", *PROMPTS)
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
UNREADABLE = ("function_call", "refusal", *MEDIA)

SHARED_COLUMNS = ("id", "system", "tools", *MEDIA)
COLUMNS = {
    "qwen": {"conversations", *SHARED_COLUMNS},
    "sharegpt": {"conversations", "conversation", *SHARED_COLUMNS},
    "openai": {"messages", *SHARED_COLUMNS},
    "alpaca": {"history", *PROMPTS, *CONTEXTS, *ANSWERS, *SHARED_COLUMNS},
}
TURN_FIELDS = {
    "conversations": {"from", "value"},
    "conversation": {"human", "assistant"},
    "messages": {"role", "content", "name", "tool_calls", "reasoning_content", *UNREADABLE},
}

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Conversation:
    """One conversation as transformers' chat templates take it.

    id: the record's own, or "<file>:<line>" (JSON Lines) or "<file>#<index from 0>" (array) where it has none.
    messages: {"role": system|user|assistant|tool, "content": str}; an assistant's may add "reasoning_content" and "tool_calls", each
        {"type": "function", "function": {"name": str, "arguments": dict}}; any may add "name".
    tools: {"type": "function", "function": {...}} each; None where the record declares none.
    """

    id: str
    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None

    @cached_property
    def _content(self) -> str:
        # Tool arguments keep the file's key order, because templates print them in it.
        return _encode({"messages": self.messages, "tools": self.tools})

    def to_json(self) -> str:
        """One line of JSON, without its newline: id, messages, tools."""
        return f'{{"id": {_encode(self.id)}, {self._content[1:]}'

    def digest(self) -> str:
        """sha256 hex of messages and tools; the id takes no part, so equal content has an equal digest."""
        return hashlib.sha256(self._content.encode()).hexdigest()


@dataclass
class Fault:
    """where: "file.json line 12, record 'identity_3'"; what: what is wrong there."""

    where: str
    what: str


@dataclass
class Tally:
    """What became of every record; rows_in == kept + sum(dropped.values()) at all times, over all files read with it.

    dropped: {reason: records}; malformed records are under "malformed: <reason>".
    faults: the first ten of fault_count malformed records.
    formats: {format: well-formed records}.
    notes: {what was seen and left alone, such as "duplicate kept" or "unknown column ignored: 'topic'": records}.
    """

    rows_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)
    fault_count: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    _seen: set[int] = field(default_factory=set, repr=False, compare=False)

    def _fault(self, where: str, fault: "_Malformed") -> None:
        self.dropped[f"malformed: {fault.reason}"] += 1
        self.fault_count += 1
        if len(self.faults) < FAULTS_LISTED:
            self.faults.append(Fault(where, str(fault)))

    def _keep(self, conversation: Conversation) -> None:
        self.kept += 1
        # 64 bits of the digest do: this set is all that grows with the file.
        key = int(conversation.digest()[:16], 16)
        if key in self._seen:
            self.notes["duplicate kept"] += 1
        self._seen.add(key)

    def _note(self, note: str) -> None:
        # A file with a new column name in every record must not fill memory and manifest with notes.
        if note not in self.notes and len(self.notes) >= NOTES_LISTED:
            note = "further unknown columns or fields ignored"
        self.notes[note] += 1


def read(path: Path, *, format: str, on_fault: str, tally: Tally) -> Iterator[Conversation]:
    """Yield the conversations of one file in order, counting every record in `tally`.

    format: one of FORMATS, or "auto", the format of the first record that tells. A record of another format is malformed.
    on_fault: "drop" counts malformed records and goes on; "error" goes on too, to find them all, and raises when the file is read, so whatever
        was made of the records before has to be thrown away.
    Memory follows the largest record, not the file, save for the set that finds duplicates (some 70 bytes a record).

    Raises MissingInput (at once, not at the first record) if there is no such file or it cannot be read; BadData at once if it is empty or no
    JSON of records; BadData while reading for damage in an array, beyond which no record can be found; BadData at the end if it holds no
    record, or for the malformed ones.
    """
    if format not in ("auto", *FORMATS) or on_fault not in ("error", "drop"):
        raise ValueError(f"format={format!r}, on_fault={on_fault!r}")
    return _conversations(path, _container(path), None if format == "auto" else format, on_fault, tally)


def split_of(digest: str, seed: int, val: float, calib: float) -> str:
    """The split of a record: "train", "val" or "calib", by a hash of (seed, digest) alone, so none moves when others come or go.

    val, calib: shares of the records. Raising calib takes records from train only; val stays as it is.
    """
    place = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "big") / 2**64
    if place < val:
        return "val"
    return "calib" if place < val + calib else "train"


class _Malformed(Exception):
    """One record is unusable. reason: a few words to count by; the message adds the detail."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        super().__init__(f"{reason}: {detail}" if detail else reason)


class _Damaged(Exception):
    """The array cannot be read beyond `line`."""

    def __init__(self, line: int, what: str):
        self.line = line
        super().__init__(what)


class _Row(NamedTuple):
    """A record as it lies in the file. line: from 1; name: its id if it brings none; value: the decoded JSON, or why there is none."""

    line: int
    name: str
    value: object


def _container(path: Path) -> str:
    """Whether the file is an "array" or "lines", by its first character that is not space. Raises as `read` does at once."""
    try:
        if not path.is_file():
            raise MissingInput("not a file" if path.exists() else "no such file", where=str(path), fix="name a JSON or JSON Lines file")
        with _open(path, "utf-8-sig") as file:
            head = ""
            while not head and (text := file.read(CHUNK)):
                head = text.lstrip(SPACE)
    except OSError as error:
        raise MissingInput(f"the file cannot be read: {error.strerror}", where=str(path), fix="check its permissions") from error

    if not head:
        raise BadData("the file is empty", where=str(path), fix="name a JSON or JSON Lines file of conversations")
    if head.startswith("version https://git-lfs.github.com/spec/v1"):
        raise BadData("the file is a Git LFS pointer, not the data it stands for", where=str(path), fix="run `git lfs pull` where it came from")
    if head[0] == "[":
        return "array"
    first, newline, _ = head.partition("\n")
    if head[0] == "{" and newline and first.rstrip().endswith(("{", "[", ",")):
        raise BadData(
            "the file is one JSON object over several lines; expected an array of records, or one record a line",
            where=str(path),
            fix="keep only the list of records that is in it",
        )
    if head[0] == "{":
        return "lines"
    raise BadData(f"the file begins with {_quote(head[:20])}; expected [ or {{", where=str(path), fix="convert it to UTF-8 JSON or JSON Lines")


def _open(path: Path, encoding: str = "utf-8") -> TextIO:
    # Bytes that are not UTF-8 become lone surrogates: they spoil the record they are in, not the file.
    return open(path, encoding=encoding, errors="surrogateescape", newline="\n")


def _conversations(path: Path, container: str, chosen: str | None, on_fault: str, tally: Tally) -> Iterator[Conversation]:
    """`read` without its first checks. chosen: the format, None to detect it."""
    began = "data.format is" if chosen else "the file began as"
    rows_before, faults_before = tally.rows_in, tally.fault_count
    last_good = None
    with _open(path) as file:
        try:
            for row in (_array if container == "array" else _lines)(file, path.name):
                tally.rows_in += 1
                try:
                    record = _object(row.value)
                    format, sure = (chosen, True) if chosen else _detect(record)
                    conversation = _conversation(record, format, began, row.name)
                except _Malformed as fault:
                    tally._fault(_where(path.name, row), fault)
                    continue
                if sure:
                    chosen = format
                last_good = conversation.id
                tally.formats[format] += 1
                for note in _ignored(record, format):
                    tally._note(note)
                if reason := _useless(conversation.messages):
                    tally.dropped[reason] += 1
                    continue
                tally._keep(conversation)
                yield conversation
        except _Damaged as damage:
            after = f"the last good record before it is {_quote(last_good)}" if last_good is not None else "there is no good record before it"
            raise BadData(
                f"the JSON array is damaged: {damage}; {after}",
                where=f"{path} line {damage.line}",
                fix=["fetch or export the file again", "mend it there; records beyond the damage cannot be found"],
            ) from None

    rows, faults = tally.rows_in - rows_before, tally.fault_count - faults_before
    if not rows:
        raise BadData("the file holds no records", where=str(path), fix="name a file of conversations")
    if faults and on_fault == "error":
        raise BadData(
            _listing(rows, faults, tally.faults), where=str(path), fix=["mend the file", "data.on_fault=drop: leave them out and count them"]
        )


def _listing(rows: int, count: int, faults: list[Fault]) -> str:
    lines = [f"{count} of {rows} records are malformed", *(f"  {fault.where}: {fault.what}" for fault in faults)]
    return "\n".join(lines + [f"  and {count - len(faults)} more"] * (count > len(faults)))


def _where(file: str, row: _Row) -> str:
    own = _own_id(row.value) if isinstance(row.value, dict) else None
    index = row.name.removeprefix(file)
    record = f", record {_quote(own)}" if own else f", record {index}" if index[0] == "#" else ""
    return f"{file} line {row.line}{record}"


def _quote(text: str, limit: int = 60) -> str:
    """`text` in quotes, short and printable whatever is in it."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


class _Decoder(json.JSONDecoder):
    """Remembers in `constant` the NaN or Infinity that the last value held: Python reads them, but JSON does not have them."""

    def __init__(self):
        super().__init__(parse_constant=self._constant)

    def _constant(self, name: str) -> None:
        self.constant = name

    def raw_decode(self, s: str, idx: int = 0) -> tuple[object, int]:
        self.constant = None
        return super().raw_decode(s, idx)


def _why(error: Exception) -> str:
    """A decoding error in words, without the decoder's line and column, which count from where it was made to begin."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _size(text: str) -> int:
    """Bytes of `text` in its file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _check_text(text: str, line: int, offset: int) -> None:
    """Raise _Malformed if the record's text, which begins at that line and byte offset, is too long or not UTF-8."""
    if len(text) > RECORD_LIMIT:
        raise _Malformed("record too large", f"over {RECORD_LIMIT >> 20} MiB")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start]
        byte = ord(text[error.start]) - 0xDC00
        raise _Malformed(
            "not UTF-8", f"byte 0x{byte:02x} at line {line + before.count(chr(10))}, offset {offset + _size(before)} of the file"
        ) from None


def _lines(file: TextIO, name: str) -> Iterator[_Row]:
    """The records of JSON Lines; a bad line spoils itself alone."""
    decoder = _Decoder()
    line = offset = 0
    while text := file.readline(RECORD_LIMIT + 1):
        line += 1
        start, offset = offset, offset + _size(text)
        if text.strip(SPACE):
            yield _Row(line, f"{name}:{line}", _decode_line(decoder, text, line, start))
        while not text.endswith("\n") and (text := file.readline(CHUNK)):
            offset += _size(text)


def _decode_line(decoder: _Decoder, text: str, line: int, offset: int) -> object:
    """The line's value, or the _Malformed that says why it has none."""
    try:
        _check_text(text, line, offset)
        value = decoder.decode(text.removeprefix("\ufeff") if line == 1 else text)
    except _Malformed as fault:
        return fault
    except (ValueError, RecursionError) as error:
        return _Malformed("bad JSON", _why(error) + (f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""))
    return _Malformed("not a JSON number", decoder.constant) if decoder.constant else value


def _array(file: TextIO, name: str) -> Iterator[_Row]:
    """The records of one JSON array. Raises _Damaged where the array itself breaks: what follows cannot be told apart."""
    decoder = _Decoder()
    window = _Window(file)
    window.take()
    index = 0
    mark = window.take() if window.peek() == "]" else ","
    while mark == ",":
        window.peek()
        line, offset = window.place()
        value, text = window.value(decoder)
        try:
            _check_text(text, line, offset)
        except _Malformed as fault:
            value = fault
        if decoder.constant:
            value = _Malformed("not a JSON number", decoder.constant)
        yield _Row(line, f"{name}#{index}", value)
        index += 1
        if window.peek() not in (",", "]"):
            found = window.peek()
            raise _Damaged(window.place()[0], f"expected , or ] after a record, found {_quote(found)}" if found else "the file ends without a ]")
        mark = window.take()
    if window.peek():
        raise _Damaged(window.place()[0], "there is more text after its closing ]")


class _Window:
    """The part of a text file in memory. `text[at]` is the next character."""

    def __init__(self, file: TextIO):
        self.file = file
        self.text = ""
        self.at = 0
        self._counted = self._offset = 0
        self._line = 1
        if self._more() and self.text[0] == "\ufeff":
            self.at = 1

    def place(self) -> tuple[int, int]:
        """Line (from 1) and byte offset in the file of the next character."""
        passed = self.text[self._counted : self.at]
        self._counted = self.at
        self._line += passed.count("\n")
        self._offset += _size(passed)
        return self._line, self._offset

    def take(self) -> str:
        """The next character that is not space, and move beyond it; "" at the end of the file."""
        mark = self.peek()
        self.at += len(mark)
        return mark

    def peek(self) -> str:
        """Move to the next character that is not space; "" at the end of the file."""
        while True:
            self.at = _SPACES.match(self.text, self.at).end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self, decoder: _Decoder) -> tuple[object, str]:
        """The next JSON value and its text, and move beyond it. Raises _Damaged if none can be read."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not (self._cut_short(error) and self._more()):
                    raise self._damage(error) from None
            except (ValueError, RecursionError) as error:
                raise _Damaged(self.place()[0], _why(error)) from None
            else:
                # A number that touches the window's end may go on beyond it.
                if end < len(self.text) or not self._more():
                    text = self.text[self.at : end]
                    self.at = end
                    return value, text

    def _more(self) -> bool:
        """Read on, at least as much as is waiting, so that a long record takes linear time. False at the end of the file."""
        line, _ = self.place()
        waiting = self.text[self.at :]
        if len(waiting) > RECORD_LIMIT:
            raise _Damaged(line, f"a record is over {RECORD_LIMIT >> 20} MiB")
        text = self.file.read(max(CHUNK, len(waiting)))
        if text:
            self.text, self.at, self._counted = waiting + text, 0, 0
        return bool(text)

    def _cut_short(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend the error: it is at the window's end, give or take the longest word, or in a string without an end."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("-Infinity")

    def _damage(self, error: json.JSONDecodeError) -> _Damaged:
        line, offset = self.place()
        line_of_error = line + self.text.count("\n", self.at, error.pos)
        try:
            _check_text(self.text[self.at : error.pos + 1], line, offset)
        except _Malformed as fault:
            return _Damaged(line_of_error, str(fault))
        if error.msg.startswith("Unterminated string") or error.pos >= len(self.text.rstrip(SPACE)):
            return _Damaged(line_of_error, "the file ends in the middle of a record")
        return _Damaged(line_of_error, f"{error.msg}, found {_quote(self.text[error.pos : error.pos + 20])}")


def _object(value: object) -> dict:
    if isinstance(value, _Malformed):
        raise value
    if not isinstance(value, dict):
        raise _Malformed("not an object", f"the record is {_kind(value)}")
    return value


def _kind(value: object) -> str:
    kinds = {str: "a string", list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")


def _detect(record: dict) -> tuple[str, bool]:
    """The format a record is in, and whether it could be no other. Raises _Malformed if it is in none."""
    if isinstance(record.get("messages"), list):
        return "openai", True
    if isinstance(record.get("conversations"), list):
        roles = {turn.get("from") for turn in record["conversations"] if isinstance(turn, dict) and isinstance(turn.get("from"), str)}
        if roles & SHAREGPT_ROLES.keys() - QWEN_ROLES.keys():
            return "sharegpt", True
        return "qwen", bool(roles & QWEN_ROLES.keys() - SHAREGPT_ROLES.keys())
    if isinstance(record.get("conversation"), list):
        return "sharegpt", True
    if _present(record, PROMPTS) and _present(record, ANSWERS):
        return "alpaca", True
    for key, value in record.items():
        if isinstance(value, list) and value and isinstance(value[0], dict) and _present(value[0], RECORD_KEYS):
            raise _Malformed("unknown format", f"an object with its records under {_quote(key)}; expected an array of them, or one a line")
    keys = ", ".join(_quote(key) for key in list(record)[:8]) or "no keys"
    raise _Malformed("unknown format", f"the record has {keys}; expected 'conversations', 'messages', or 'instruction' and 'output'")


def _conversation(record: dict, format: str, began: str, name: str) -> Conversation:
    """The record in normal form. Raises _Malformed."""
    try:
        messages, tools = _PARSERS[format](record), _tools(record)
    except _Malformed as fault:
        raise _other_format(record, format, began) or fault from None
    if media := [key for key in MEDIA if record.get(key)]:
        raise _Malformed("not text", f"the record has {media[0]!r}")
    conversation = Conversation(_own_id(record) or name, tuple(messages), tools)
    if any(_deep(value) for value in [tools, *(message["tool_calls"] for message in messages if "tool_calls" in message)]):
        raise _Malformed("nested too deeply", f"over {DEPTH_LIMIT} levels")
    try:
        conversation.to_json().encode()
    except UnicodeEncodeError:
        raise _Malformed("half of a surrogate pair", "a \\ud800..\\udfff escape stands alone") from None
    except ValueError:
        raise _Malformed("not a JSON number", "one beyond the range of double precision") from None
    if control := _CONTROL.search(conversation._content):
        raise _Malformed("control string", f"{control[0]} in {_place(control[0], conversation.messages)} would end or forge a turn")
    return conversation


def _deep(value: object) -> bool:
    """Whether lists and objects go beyond DEPTH_LIMIT, so that no later stage runs out of stack on them."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner for outer in level if isinstance(outer, dict | list | tuple) for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _other_format(record: dict, format: str, began: str) -> _Malformed | None:
    """The fault of a record that is sound, but in another format than `format`."""
    try:
        other, sure = _detect(record)
        if other == format or not sure:
            return None
        _PARSERS[other](record)
    except _Malformed:
        return None
    return _Malformed("another format", f"record is {other!r} but {began} {format!r}")


def _own_id(record: dict) -> str | None:
    value = record.get("id")
    return str(value) if type(value) in (str, int) and value != "" else None


def _place(control: str, messages: tuple[dict, ...]) -> str:
    return next((f"turn {n} ({m['role']})" for n, m in enumerate(messages, 1) if control in _encode(m)), "the tools")


def _ignored(record: dict, format: str) -> set[str]:
    """Notes on what the record has beyond its format."""
    notes = {f"unknown column ignored: {_quote(key)}" for key in record if key not in COLUMNS[format]}
    turns = next((key for key in TURN_FIELDS if key in COLUMNS[format] and key in record), None)
    if turns:
        notes |= {f"unknown turn field ignored: {_quote(key)}" for turn in record[turns] for key in turn if key not in TURN_FIELDS[turns]}
    return notes


def _useless(messages: tuple[dict, ...]) -> str | None:
    """Why nothing can be learned from well-formed messages, or None. White space alone teaches nothing."""
    said = [m["role"] for m in messages if m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content", "").strip()]
    if not said:
        return "no content in any turn"
    if "assistant" in said:
        return None
    return "every assistant turn is empty" if any(m["role"] == "assistant" for m in messages) else "no assistant turn"


def _qwen(record: dict) -> list[dict]:
    return _system(record) + [_turn(turn, QWEN_ROLES, number) for number, turn in _items(record, "conversations")]


def _sharegpt(record: dict) -> list[dict]:
    if "conversation" not in record or "conversations" in record:
        return _system(record) + [_turn(turn, SHAREGPT_ROLES, number) for number, turn in _items(record, "conversations")]
    messages = _system(record)
    for number, pair in _items(record, "conversation"):
        messages.append({"role": "user", "content": _text(pair, "human", f"pair {number}")})
        messages.append({"role": "assistant", "content": _text(pair, "assistant", f"pair {number}")})
    return messages


def _turn(turn: dict, roles: dict[str, str], number: int) -> dict:
    role = _role(turn, "from", roles, number)
    value = _text(turn, "value", f"turn {number}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(_loads(value, f"turn {number}"), f"turn {number}")}
    return {"role": role, "content": value}


def _openai(record: dict) -> list[dict]:
    return _system(record) + [_message(message, number) for number, message in _items(record, "messages")]


def _message(message: dict, number: int) -> dict:
    here = f"turn {number}"
    role = _role(message, "role", OPENAI_ROLES, number)
    if extra := [key for key in UNREADABLE if message.get(key)]:
        raise _Malformed("unsupported field", f"{here} has {extra[0]!r}")
    calls = _list(message, "tool_calls") if message.get("tool_calls") is not None else []
    content = message.get("content")
    if isinstance(content, list):
        text, reasoning, more = _parts(content, here)
        calls = calls + more
    elif content is None and calls:
        text, reasoning = "", ""
    else:
        text, reasoning = _text(message, "content", here), ""
    if message.get("reasoning_content") is not None:
        reasoning = _text(message, "reasoning_content", here) + reasoning
    if role != "assistant" and (calls or reasoning):
        raise _Malformed("only the assistant calls tools or reasons", f"{here} is from {role!r}")
    normal = {"role": role, "content": text}
    if reasoning:
        normal["reasoning_content"] = reasoning
    if calls:
        normal["tool_calls"] = _calls(calls, here)
    if message.get("name") is not None:
        normal["name"] = _text(message, "name", here)
    return normal


def _parts(parts: list, here: str) -> tuple[str, str, list]:
    """Text, reasoning and tool calls of a content in parts; those of one kind are joined as they are."""
    found = {"reasoning": [], "text": [], "tool_call": []}
    order = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in found:
            raise _Malformed(
                "unsupported content part", f"{here} has {_quote(kind) if isinstance(kind, str) else _kind(part)}; known: {_known(found)}"
            )
        found[kind].append(_text(part, "value" if "value" in part else "text", here))
        order.append(list(found).index(kind))
    # A normal message says first what it thinks, then what it says, then what it calls; another order could not be given back.
    if order != sorted(order):
        raise _Malformed("content parts out of order", f"{here}; expected {_known(found)}")
    return "".join(found["text"]), "".join(found["reasoning"]), [_loads(call, here) for call in found["tool_call"]]


def _alpaca(record: dict) -> list[dict]:
    messages = _system(record)
    for number, pair in enumerate(_list(record, "history") if record.get("history") is not None else [], 1):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise _Malformed("ill-typed field", f"'history' pair {number} is not [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    prompt, answer = _one(record, PROMPTS), _one(record, ANSWERS)
    context = _one(record, CONTEXTS) if _present(record, CONTEXTS) else ""
    # Joined by one newline, as LLaMA-Factory and ms-swift do.
    messages.append({"role": "user", "content": "\n".join(text for text in (prompt, context) if text)})
    messages.append({"role": "assistant", "content": answer})
    return messages


def _system(record: dict) -> list[dict]:
    """The system message of a top-level "system" column; none if it is absent, null or empty."""
    text = _text(record, "system", "the record") if record.get("system") is not None else ""
    return [{"role": "system", "content": text}] if text else []


def _tools(record: dict) -> tuple[dict, ...] | None:
    """The tools declared, a list or its JSON; a bare function gets the wrapping that templates expect."""
    tools = record.get("tools")
    if isinstance(tools, str):
        tools = _loads(tools, "'tools'") if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and isinstance(tool.get("function", tool), dict) for tool in tools):
        raise _Malformed("ill-typed field", "'tools' is not a list of functions")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools)


def _calls(calls: object, here: str) -> list[dict]:
    return [_call(call, here) for call in (calls if isinstance(calls, list) else [calls])]


def _call(call: object, here: str) -> dict:
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        raise _Malformed("bad tool call", f"{here}: a call is {_kind(function)}, not an object")
    name, arguments = _text(function, "name", f"{here}: a tool call"), function.get("arguments")
    if isinstance(arguments, str):
        arguments = _loads(arguments, f"{here}: arguments")
    if not isinstance(arguments, dict):
        raise _Malformed("bad tool call", f"{here}: arguments are {_kind(arguments)}, not an object")
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def _loads(text: str, here: str) -> object:
    """JSON within a JSON string."""
    decoder = _Decoder()
    try:
        value = decoder.decode(text)
    except (ValueError, RecursionError) as error:
        raise _Malformed("bad JSON in a string", f"{here}: {_why(error)}") from None
    if decoder.constant:
        raise _Malformed("not a JSON number", f"{here}: {decoder.constant}")
    return value


def _role(turn: dict, key: str, roles: dict[str, str], number: int) -> str:
    role = _text(turn, key, f"turn {number}")
    if role not in roles:
        raise _Malformed("unknown role", f"turn {number} is from {_quote(role)}; known: {_known(roles)}")
    return roles[role]


def _items(record: dict, key: str) -> Iterator[tuple[int, dict]]:
    """The objects of a list that must not be empty, numbered from 1."""
    items = _list(record, key)
    if not items:
        raise _Malformed("empty list", repr(key))
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise _Malformed("ill-typed field", f"{key!r} item {number} is {_kind(item)}, not an object")
        yield number, item


def _list(record: dict, key: str) -> list:
    if key not in record:
        raise _Malformed("missing field", f"the record has no {key!r}")
    if not isinstance(record[key], list):
        raise _Malformed("ill-typed field", f"{key!r} is {_kind(record[key])}, not a list")
    return record[key]


def _text(fields: dict, key: str, here: str) -> str:
    if key not in fields:
        raise _Malformed("missing field", f"{here} has no {key!r}")
    if not isinstance(fields[key], str):
        raise _Malformed("ill-typed field", f"{here}: {key!r} is {_kind(fields[key])}, not a string")
    return fields[key]


def _one(record: dict, keys: tuple[str, ...]) -> str:
    """The text under whichever of `keys` the record has; two would say different things."""
    present = _present(record, keys) or [next((key for key in keys if key in record), keys[0])]
    if len(present) > 1:
        raise _Malformed("ambiguous fields", f"the record has both {present[0]!r} and {present[1]!r}")
    return _text(record, present[0], "the record")


def _present(fields: dict, keys: tuple[str, ...]) -> list[str]:
    return [key for key in keys if fields.get(key) is not None]


def _known(names) -> str:
    return ", ".join(names)


_PARSERS = {"qwen": _qwen, "sharegpt": _sharegpt, "openai": _openai, "alpaca": _alpaca}
