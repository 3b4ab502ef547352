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

from src.chat.formats import MEDIA, PARSERS, as_object, detect, ignored, tools_of
from src.chat.json_stream import Damaged, Malformed, RawRecord, array, container, lines, open_text, quote
from src.core.errors import BadData

FORMATS = tuple(PARSERS)
DEPTH_LIMIT = 100
FAULTS_LISTED = 10
NOTES_LISTED = 50
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")

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

    def _fault(self, where: str, fault: "Malformed") -> None:
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
    return _conversations(path, container(path), None if format == "auto" else format, on_fault, tally)


def split_of(digest: str, seed: int, val: float, calib: float) -> str:
    """The split of a record: "train", "val" or "calib", by a hash of (seed, digest) alone, so none moves when others come or go.

    val, calib: shares of the records. Raising calib takes records from train only; val stays as it is.
    """
    place = int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "big") / 2**64
    if place < val:
        return "val"
    return "calib" if place < val + calib else "train"


def _conversations(path: Path, container: str, chosen: str | None, on_fault: str, tally: Tally) -> Iterator[Conversation]:
    """`read` without its first checks. chosen: the format, None to detect it."""
    began = "data.format is" if chosen else "the file began as"
    rows_before, faults_before = tally.rows_in, tally.fault_count
    last_good = None
    with open_text(path) as file:
        try:
            for raw in (array if container == "array" else lines)(file, path.name):
                tally.rows_in += 1
                try:
                    record = as_object(raw.value)
                    format, sure = (chosen, True) if chosen else detect(record)
                    conversation = _conversation(record, format, began, raw.name)
                except Malformed as fault:
                    tally._fault(_where(path.name, raw), fault)
                    continue
                if sure:
                    chosen = format
                last_good = conversation.id
                tally.formats[format] += 1
                for note in ignored(record, format):
                    tally._note(note)
                if reason := _useless(conversation.messages):
                    tally.dropped[reason] += 1
                    continue
                tally._keep(conversation)
                yield conversation
        except Damaged as damage:
            after = (
                f"the last good record before it is {quote(last_good)}" if last_good is not None else "there is no good record before it"
            )
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
            _listing(rows, faults, tally.faults),
            where=str(path),
            fix=["mend the file", "data.on_fault=drop: leave them out and count them"],
        )


def _listing(rows: int, count: int, faults: list[Fault]) -> str:
    lines = [f"{count} of {rows} records are malformed", *(f"  {fault.where}: {fault.what}" for fault in faults)]
    return "\n".join(lines + [f"  and {count - len(faults)} more"] * (count > len(faults)))


def _where(file: str, raw: RawRecord) -> str:
    own = _own_id(raw.value) if isinstance(raw.value, dict) else None
    index = raw.name.removeprefix(file)
    record = f", record {quote(own)}" if own else f", record {index}" if index[0] == "#" else ""
    return f"{file} line {raw.line}{record}"


def _conversation(record: dict, format: str, began: str, name: str) -> Conversation:
    """The record in normal form. Raises Malformed."""
    try:
        messages, tools = PARSERS[format](record), tools_of(record)
    except Malformed as fault:
        raise _other_format(record, format, began) or fault from None
    if media := [key for key in MEDIA if record.get(key)]:
        raise Malformed("not text", f"the record has {media[0]!r}")
    conversation = Conversation(_own_id(record) or name, tuple(messages), tools)
    if any(_deep(value) for value in [tools, *(message["tool_calls"] for message in messages if "tool_calls" in message)]):
        raise Malformed("nested too deeply", f"over {DEPTH_LIMIT} levels")
    try:
        conversation.to_json().encode()
    except UnicodeEncodeError:
        raise Malformed("half of a surrogate pair", "a \\ud800..\\udfff escape stands alone") from None
    except ValueError:
        raise Malformed("not a JSON number", "one beyond the range of double precision") from None
    if control := CONTROL.search(conversation._content):
        raise Malformed("control string", f"{control[0]} in {_place(control[0], conversation.messages)} would end or forge a turn")
    return conversation


def _deep(value: object) -> bool:
    """Whether lists and objects go beyond DEPTH_LIMIT, so that no later stage runs out of stack on them."""
    level = [value]
    for _ in range(DEPTH_LIMIT):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list | tuple)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _other_format(record: dict, format: str, began: str) -> Malformed | None:
    """The fault of a record that is sound, but in another format than `format`."""
    try:
        other, sure = detect(record)
        if other == format or not sure:
            return None
        PARSERS[other](record)
    except Malformed:
        return None
    return Malformed("another format", f"record is {other!r} but {began} {format!r}")


def _own_id(record: dict) -> str | None:
    value = record.get("id")
    return str(value) if type(value) in (str, int) and value != "" else None


def _place(control: str, messages: tuple[dict, ...]) -> str:
    return next((f"turn {n} ({m['role']})" for n, m in enumerate(messages, 1) if control in _encode(m)), "the tools")


def _useless(messages: tuple[dict, ...]) -> str | None:
    """Why nothing can be learned from well-formed messages, or None. White space alone teaches nothing."""
    said = [m["role"] for m in messages if m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content", "").strip()]
    if not said:
        return "no content in any turn"
    if "assistant" in said:
        return None
    return "every assistant turn is empty" if any(m["role"] == "assistant" for m in messages) else "no assistant turn"
