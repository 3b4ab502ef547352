"""Chat datasets of every common layout, read as a stream into one normal form, with each record accounted for.

What kind of file it is is told by content, and by name where content does not tell (sources/). A record is kept, dropped because nothing can be learned
from it, or malformed; none is repaired by guessing, and no text is trimmed.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TextIO

from src.core.errors import AGAIN, BadData
from src.records import columns as columns_
from src.records.formats import KNOWN, PARSERS, as_object, decoded, desired, detect, fits, ignored, seen, tools_of, weight_of_record
from src.records.json_stream import Damaged, Malformed, RawRecord, quote
from src.records.sources import kinds, opened
from src.records.turns import MEDIA, is_empty

FORMATS = tuple(PARSERS)
DEPTH_LIMIT = 100
FAULTS_LISTED = 10
PLACES_LISTED = 3
NOTES_LISTED = 50
COLUMNS_LISTED = 30
FILES_KEPT = 100
CONTROL = re.compile(r"<\|(?:im_start|im_end|endoftext)\|>")

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode


@dataclass(frozen=True)
class Conversation:
    """One conversation as transformers' chat templates take it.

    id: the record's own, or "<file>:<line>" (a file of lines) or "<file>#<index from 0>" (an array, Parquet, Arrow) where it has none.
    messages: {"role": system|user|assistant|tool, "content": str}; an assistant's may add "reasoning_content", "tool_calls", each
        {"type": "function", "function": {"name": str, "arguments": dict}} with "id" where it was given, and "weight", of its loss, where that is not 1;
        a tool's "tool_call_id"; any may add "name".
    tools: {"type": "function", "function": {...}} each; None where the record declares none.
    weight: of the losses of all its turns.
    """

    id: str
    messages: tuple[dict, ...]
    tools: tuple[dict, ...] | None
    weight: float = 1.0

    @cached_property
    def _content(self) -> str:
        # Tool arguments keep the file's key order, because templates print them in it.
        return _encode({"messages": self.messages, "tools": self.tools} | ({} if self.weight == 1 else {"weight": self.weight}))

    def to_json(self) -> str:
        """One line of JSON, without its newline: id, messages, tools, and weight where it is not 1."""
        return f'{{"id": {_encode(self.id)}, {self._content[1:]}'

    def digest(self) -> str:
        """sha256 hex of messages, tools and weight, so equal content has an equal digest. The record's id and those of its calls, often drawn anew
        each time a conversation is written, take no part."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        if any("tool_call_id" in m or any("id" in call for call in m.get("tool_calls", ())) for m in self.messages):
            return Conversation("", tuple(map(_without_ids, self.messages)), self.tools, self.weight).digest()
        return hashlib.sha256(self._content.encode()).hexdigest()


def _without_ids(message: dict) -> dict:
    calls = [{key: value for key, value in call.items() if key != "id"} for call in message.get("tool_calls", ())]
    return {key: calls if key == "tool_calls" else value for key, value in message.items() if key != "tool_call_id"}


@dataclass
class RecordFault:
    """what: what is wrong; count: in how many records; where: the first of them, such as "file.json line 12, record 'identity_3'"."""

    what: str
    count: int = 0
    where: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.where[0]}: {self.what}"
        more = f" and {self.count - len(self.where)} more" if self.count > len(self.where) else ""
        return f"{self.what} ({self.count} records): {'; '.join(self.where)}{more}"


@dataclass
class FileTally:
    """What one file held: kind as in sources.kinds.File; columns in the order they came, the first thirty."""

    name: str
    kind: str
    rows_in: int = 0
    kept: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    columns: dict[str, None] = field(default_factory=dict)

    def seen(self) -> str:
        """The columns, in words."""
        more = " and more" if len(self.columns) >= COLUMNS_LISTED else ""
        return f"columns {', '.join(name if name.isidentifier() else quote(name) for name in list(self.columns)[:COLUMNS_LISTED])}{more}"

    def _see(self, record: dict) -> None:
        if not record.keys() <= self.columns.keys() and len(self.columns) < COLUMNS_LISTED:
            self.columns |= dict.fromkeys(record)


@dataclass
class Tally:
    """What became of every record; rows_in == kept + sum(dropped.values()) at all times, over all files read with it.

    dropped: {reason: records}; malformed records are under "malformed: <reason>".
    faults: the first ten different faults of fault_count malformed records.
    fixes: what may help against them.
    formats: {format: well-formed records}.
    notes: {what was seen and left alone, such as "duplicate kept" or "unknown column ignored: 'topic'": records}.
    files: each file read.
    log: where each dropped record is named, as one {"where", "id", "reason", "detail"} a line of ASCII.
    """

    rows_in: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: list[RecordFault] = field(default_factory=list)
    fault_count: int = 0
    fixes: dict[str, None] = field(default_factory=dict)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    files: list[FileTally] = field(default_factory=list)
    log: TextIO | None = field(default=None, repr=False, compare=False)
    _seen: set[int] = field(default_factory=set, repr=False, compare=False)
    _last: RawRecord | None = field(default=None, repr=False, compare=False)
    _last_noted: str = field(default="", repr=False, compare=False)

    def ordered(self, what: str) -> list[tuple[str, int]]:
        """The counts of dropped or notes, the most frequent first, equal ones by name."""
        return sorted(getattr(self, what).items(), key=lambda item: (-item[1], item[0]))

    def metrics(self) -> dict:
        """The counts for a manifest."""
        files = {f.name: {"kind": f.kind, "rows_in": f.rows_in, "kept": f.kept} for f in self.files[:FILES_KEPT]}
        counts = {"rows_in": self.rows_in, "rows_kept": self.kept, "dropped": dict(self.ordered("dropped"))}
        return counts | {"formats": dict(self.formats), "notes": dict(self.ordered("notes")), "sources": files}

    def set_aside(self, conversation: Conversation, reason: str, detail: str = "") -> None:
        """Count the conversation that was kept last as dropped after all."""
        self.kept -= 1
        self.files[-1].kept -= 1
        if self._last_noted:
            self.notes -= Counter([self._last_noted])
        self._drop(_where(self.files[-1].name, self._last) if self._last else "", conversation.id, reason, detail)

    def _drop(self, where: str, id: str | None, reason: str, detail: str = "") -> None:
        self.dropped[reason] += 1
        if self.log:
            line = {"where": where, "id": id, "reason": reason, "detail": detail}
            self.log.write(json.dumps({key: value for key, value in line.items() if value}) + "\n")

    def _fault(self, where: str, id: str | None, fault: Malformed) -> None:
        self._drop(where, id, f"malformed: {fault.reason}", str(fault))
        self.fault_count += 1
        if fault.fix and len(self.fixes) < PLACES_LISTED:
            self.fixes[fault.fix] = None
        known = next((one for one in self.faults if one.what == str(fault)), None)
        if known is None and len(self.faults) < FAULTS_LISTED:
            self.faults.append(known := RecordFault(str(fault)))
        if known:
            known.count += 1
            known.where += [where] * (len(known.where) < PLACES_LISTED)

    def _keep(self, conversation: Conversation, raw: RawRecord) -> None:
        self._last = raw
        self.kept += 1
        self.files[-1].kept += 1
        # 64 bits of the digest do: this set is all that grows with the file.
        key = int(conversation.digest()[:16], 16)
        self._last_noted = "duplicate kept" if key in self._seen else ""
        if self._last_noted:
            self.notes[self._last_noted] += 1
        self._seen.add(key)

    def _note(self, note: str) -> None:
        # A file with a new column name in every record must not fill memory and manifest with notes.
        if "ignored: " in note and note not in self.notes and len(self.notes) >= NOTES_LISTED:
            note = "further unknown columns or fields ignored"
        self.notes[note] += 1


@dataclass(frozen=True)
class RecordLayout:
    """How records are to be understood: format, one of FORMATS, or "auto", in each file the format of the first record that tells.

    columns: {our name: the file's name of a column, or None} (columns.renamed). roles: names of roles beside the known ones, and the role of each.
    """

    format: str = "auto"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)


def read(path: Path | Sequence[kinds.File], *, format: str | RecordLayout, on_fault: str, tally: Tally) -> Iterator[Conversation]:
    """Yield the conversations of one file, or of several in their order, counting every record in `tally`.

    format: a RecordLayout, or the format of one.
    on_fault: "drop" counts malformed records and goes on; "error" goes on too, to find them all, and raises when all is read, so whatever was made of the
        records before has to be thrown away.
    Memory follows the largest record, not the file, save for the set that finds duplicates (some 70 bytes a record).

    Raises MissingInput (at once, not at the first record) if there is no such file; BadData at once if it is empty or none of
    records; BadData while reading for damage beyond which no record can be found; BadData at the end if it holds no record, or for the malformed ones.
    """
    layout = RecordLayout(format) if isinstance(format, str) else format
    if layout.format not in ("auto", *FORMATS) or on_fault not in ("error", "drop"):
        raise ValueError(f"format={layout.format!r}, on_fault={on_fault!r}")
    return _all_files([kinds.file(path)] if isinstance(path, Path) else list(path), layout, on_fault, tally)


def split_of(digest: str, seed: int, val: float, calib: float) -> str:
    """The split of a record: "train", "val" or "calib", by a hash of (seed, digest) alone, so none moves when others come or go.

    val, calib: shares of the records. Raising calib takes records from train only; val stays as it is.
    """
    place = place_of(digest, seed) / 2**64
    if place < val:
        return "val"
    return "calib" if place < val + calib else "train"


def place_of(digest: str, seed: int) -> int:
    """Where a record lies among all there could be, from 0 to 2**64, by a hash of (seed, digest)."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{digest}".encode()).digest()[:8], "big")


def _all_files(files: list[kinds.File], layout: RecordLayout, on_fault: str, tally: Tally) -> Iterator[Conversation]:
    """`read` without its first checks."""
    rows_before, faults_before = tally.rows_in, tally.fault_count
    for file in files:
        yield from _conversations(file, layout, tally)
    rows, faults = tally.rows_in - rows_before, tally.fault_count - faults_before
    where = str(files[0].path) if len(files) == 1 else ", ".join(file.name for file in files[:3]) + f" ({len(files)} files)"
    if not rows:
        raise BadData("the file holds no records", where=where, fix=AGAIN)
    if faults and on_fault == "error":
        raise BadData(
            _listing(rows, faults, tally.faults),
            where=where,
            fix=[*tally.fixes, "mend the records that are named"]
            + ["data.on_fault=drop leaves them out, counts them and names each in dropped.jsonl"] * (faults < rows),
        )


def _conversations(file: kinds.File, layout: RecordLayout, tally: Tally) -> Iterator[Conversation]:
    """The conversations of one file. Raises BadData for damage, and for a table whose columns fit no layout."""
    chosen, began = (None, "the file began as") if layout.format == "auto" else (layout.format, "data.format is")
    own = FileTally(file.name, file.kind)
    tally.files.append(own)
    last_good = None
    try:
        for raw in file.records(KNOWN):
            tally.rows_in += 1
            own.rows_in += 1
            try:
                record, notes = columns_.renamed(as_object(raw.value), layout.columns)
                record = decoded(record, notes)
                own._see(record)
                if own.rows_in == 1 and file.is_table and chosen is None:
                    _refuse_columns(record, file)
                format, sure = (chosen, True) if chosen else _detected(record)
                conversation = _conversation(record, format, began, raw.name, layout.roles)
            except Malformed as fault:
                if fault.reason == "not UTF-8" and not tally.fixes and not file.kind.startswith(("Parquet", "Arrow")):
                    fault.fix = opened.to_utf8(file.path)
                tally._fault(_where(file.name, raw), _id_of(raw), fault)
                continue
            if sure:
                chosen = format
            last_good = conversation.id
            tally.formats[format] += 1
            own.formats[format] += 1
            for note in sorted({*notes, *raw.notes, *ignored(record, format), *seen(record, conversation.messages)}):
                tally._note(note)
            reason = "marked as not desired (label false)" if desired(record, format) is False else _useless(conversation)
            if reason:
                tally._drop(_where(file.name, raw), conversation.id, reason)
                continue
            tally._keep(conversation, raw)
            yield conversation
    except Damaged as damage:
        after = f"the last good record before it is {quote(last_good)}" if last_good is not None else "there is no good record before it"
        raise BadData(
            f"the {file.kind} is damaged, and records beyond the damage cannot be found: {damage}; {after}",
            where=f"{file.path} line {damage.line}",
            fix=AGAIN,
        ) from None


def _detected(record: dict) -> tuple[str, bool]:
    try:
        return detect(record)
    except Malformed as fault:
        fault.fix = columns_.proposed(record)
        raise


def _refuse_columns(record: dict, file: kinds.File) -> None:
    """Raises BadData where no row of a table can be in a layout, whatever its cells say."""
    if not fits(record):
        way = columns_.proposed(record)
        raise BadData(
            f"its columns fit no layout: {', '.join(quote(key) for key in record)}",
            where=str(file.path),
            fix=([way] if way else [])
            + ["data.columns={prompt:NAME,response:NAME} says what is what (in quotes; all names: docs/data.md)"],
        )


def _listing(rows: int, count: int, faults: list[RecordFault]) -> str:
    lines = [f"{count} of {rows} records are malformed", *(f"  {fault}" for fault in faults)]
    listed = sum(fault.count for fault in faults)
    return "\n".join(lines + [f"  and {count - listed} more"] * (count > listed))


def _where(file: str, raw: RawRecord) -> str:
    own = _own_id(raw.value) if isinstance(raw.value, dict) else None
    index = raw.name.removeprefix(file)
    record = f"record {quote(own)}" if own else f"record {index}" if index[0] == "#" else ""
    return f"{file} {', '.join(part for part in (f'line {raw.line}' * bool(raw.line), record) if part)}"


def _id_of(raw: RawRecord) -> str:
    return (_own_id(raw.value) if isinstance(raw.value, dict) else None) or raw.name


def _conversation(record: dict, format: str, began: str, name: str, roles: Mapping[str, str]) -> Conversation:
    """The record in normal form. Raises Malformed."""
    try:
        messages, tools, weight = PARSERS[format](record, roles), tools_of(record), weight_of_record(record)
    except Malformed as fault:
        raise _other_format(record, format, began, roles) or fault from None
    if media := [key for key in MEDIA if not is_empty(record.get(key))]:
        raise Malformed("not text", f"the record has {media[0]!r}")
    conversation = Conversation(_own_id(record) or name, tuple(messages), tools, weight)
    if any(_deep(value) for value in [tools, *(message["tool_calls"] for message in messages if "tool_calls" in message)]):
        raise Malformed("nested too deeply", f"over {DEPTH_LIMIT} levels")
    try:
        conversation.to_json().encode()
    except UnicodeEncodeError:
        raise Malformed("half of a surrogate pair", "a \\ud800..\\udfff escape stands alone") from None
    except TypeError as error:
        raise Malformed("ill-typed field", f"no JSON: {error}") from None
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


def _other_format(record: dict, format: str, began: str, roles: Mapping[str, str]) -> Malformed | None:
    """The fault of a record that is sound, but in another format than `format`."""
    try:
        other, sure = detect(record)
        if other == format or not sure:
            return None
        PARSERS[other](record, roles)
    except Malformed:
        return None
    return Malformed("another format", f"record is {other!r} but {began} {format!r}")


def _own_id(record: dict) -> str | None:
    value = record.get("id")
    return str(value) if type(value) in (str, int) and value != "" else None


def _place(control: str, messages: tuple[dict, ...]) -> str:
    return next((f"{m.place} ({m['role']})" for m in messages if control in _encode(m)), "the tools")  # type: ignore[attr-defined]


def _useless(conversation: Conversation) -> str | None:
    """Why nothing can be learned from a well-formed conversation, or None. White space alone teaches nothing."""
    messages = conversation.messages
    said = [m for m in messages if m["content"].strip() or m.get("tool_calls") or m.get("reasoning_content", "").strip()]
    if not said:
        return "no content in any turn"
    answers = [m for m in said if m["role"] == "assistant"]
    if not answers:
        return "every assistant turn is empty" if any(m["role"] == "assistant" for m in messages) else "no assistant turn"
    if not conversation.weight or not any(m.get("weight", 1) for m in answers):
        return "weight 0 on the record" if not conversation.weight else "weight 0 on every assistant turn"
    return None
