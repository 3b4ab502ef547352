"""Plain text as documents, from files of any kind: of a .txt what stands between separators, of other files each record's column `text`.

A document longer than PIECE comes in pieces, cut at the end of a line where there is one, so that memory does not follow its size.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from src.core.artifact import Artifact, outside
from src.core.errors import AGAIN, BadData, UserError
from src.core.log import say
from src.core.stage import Run
from src.records.json_stream import Damaged, Malformed, RawRecord, quote
from src.records.sources import kinds, opened
from src.records.sources.found import found

TINYSTORIES = "roneneldan/TinyStories"
"""Eldan and Li 2023, arXiv:2305.07759"""
PIECE = 1 << 20
"""characters of a document that are handled at a time"""
MARK = "<|endoftext|>"
"""what stands between documents in GPT-2's and TinyStories' files"""
LISTED = 5
BLANK_LINE = r"\n[ \t\r]*\n"


ANYTHING = "text=PATH names a file, a folder, a glob such as 'books/*.txt', or a data set of the hub"


def find(given: str, run: Run) -> Artifact:
    """The files that `text` names, by content; of a folder or data set with splits those of train, and that is said. Raises a UserError where there are none."""
    path = TINYSTORIES if given == "tinystories" and not Path(given).exists() else given
    try:
        there = found(path, subset=None, split="train", revision=None, download=not run.dry)
    except UserError as error:  # which names settings of data
        raise type(error)(error.what, where=error.where, fix=ANYTHING) from error
    if there.revision:
        say(f"text: {path} is read as of {there.revision}")
    if there.left:
        say(
            f"text: of {path}, the split train alone is read; not {', '.join(there.left[:LISTED])}"
            + " and more" * (len(there.left) > LISTED)
        )
    return outside(there.root, "file", run.cache, there.files)


class Piece(NamedTuple):
    """A document, or a part of one. place: where it lies, as file:line or file#record. first, last: whether it begins and ends the document."""

    place: str
    text: str
    first: bool
    last: bool


def pieces(source: Artifact, separator: str) -> Iterator[Piece]:
    """The documents of an input's files, in order; those without a letter are left out. separator: see settings.verbs.

    Raises BadData at the first that is damaged, not UTF-8, or a record without text.
    """
    for file in kinds.files(source.path, source.files):
        if file.kind == "plain text":
            yield from _plain(file, separator)
        else:
            yield from _records(file)


def parted_by(source: Artifact, separator: str) -> list[str]:
    """How the documents of an input are told apart, in words, for each of its first files."""
    files = kinds.files(source.path, source.files)
    more = [f"and {len(files) - LISTED} more files"] * (len(files) > LISTED)
    return [f"{file.name}: {_said(file, separator)}" for file in files[:LISTED]] + more


def size(source: Artifact) -> int:
    """Bytes of its files."""
    return sum(file["size"] for file in source.files.values())


def _said(file: kinds.File, separator: str) -> str:
    if file.kind != "plain text":
        return f"each record's `text` is a document ({file.kind})"
    pattern = _pattern(file, separator)
    if pattern is None:
        return "the file is one document"
    return "documents are parted by " + (
        "blank lines" if pattern == BLANK_LINE else MARK if pattern == re.escape(MARK) else quote(separator)
    )


def _pattern(file: kinds.File, separator: str) -> str | None:
    """What parts the documents of a .txt, as a regular expression; None: nothing does."""
    if separator == "auto":
        with opened.text(file.path) as text:
            return re.escape(MARK) if MARK in text.read(PIECE) else None
    return {"file": None, "blank_line": BLANK_LINE}.get(separator, re.escape(separator))


def _plain(file: kinds.File, separator: str) -> Iterator[Piece]:
    pattern = _pattern(file, separator)
    with opened.text(file.path) as text:
        for line, part, first, last in _parts(text, re.compile(pattern) if pattern else None, 2 * len(pattern or "")):
            place = f"{file.name}:{line}"
            yield Piece(place, _checked(part.removeprefix("\ufeff") if line == 1 else part, place), first, last)


def _parts(file: TextIO, separator: re.Pattern | None, longest: int) -> Iterator[tuple[int, str, bool, bool]]:
    """(line it begins at, text, whether it is a document's first part, whether its last) of what stands between separators, white space around it left
    out. longest: characters that a separator may have, which no cut goes through."""
    waiting, line, first, ended = "", 1, True, False
    while not ended:
        text = file.read(PIECE)
        ended = not text
        waiting += text
        at = 0
        for mark in separator.finditer(waiting) if separator else ():
            part = waiting[at : mark.start()]
            if part.strip() or not first:
                yield _begin(line, part), part.strip() if first else part.rstrip(), first, True
            line, at, first = line + waiting.count("\n", at, mark.end()), mark.end(), True
        waiting = waiting[at:]
        if first and not waiting.strip():
            continue
        if ended:
            yield _begin(line, waiting), waiting.strip() if first else waiting.rstrip(), first, True
        elif len(waiting) > 2 * PIECE:
            cut = _cut(waiting, len(waiting) - max(PIECE, longest))
            yield _begin(line, waiting), waiting[:cut].lstrip() if first else waiting[:cut], first, False
            line, waiting, first = line + waiting.count("\n", 0, cut), waiting[cut:], False


def _begin(line: int, text: str) -> int:
    """The line of the first letter."""
    return line + text[: len(text) - len(text.lstrip())].count("\n")


def _cut(text: str, most: int) -> int:
    """Where to cut, at `most` or before it: behind a line, else before a word, else anywhere."""
    line = text.rfind("\n", 0, most) + 1
    return line or max(text.rfind(" ", 0, most), 0) or most


def _records(file: kinds.File) -> Iterator[Piece]:
    try:
        for record in file.records(("text",)):
            text = _text_of(record).strip()
            first = True
            while len(text) > 2 * PIECE:
                cut = _cut(text, PIECE)
                yield Piece(record.name, text[:cut], first, False)
                text, first = text[cut:], False
            if text:
                yield Piece(record.name, text, first, True)
    except Damaged as error:
        raise BadData(str(error), where=f"{file.path}, line {error.line}", fix=AGAIN) from None


def _text_of(record: RawRecord) -> str:
    value = record.value
    if isinstance(value, Malformed):
        raise BadData(str(value), where=record.name, fix="mend the record, or take it out")
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        there = f"it has {', '.join(map(str, list(value)[:8])) or 'none'}" if isinstance(value, dict) else "it is no object"
        raise BadData(f"the record has no text under `text`; {there}", where=record.name, fix="call the column with the text `text`")
    return _checked(text, record.name)


def _checked(text: str, place: str) -> str:
    """The text. Raises BadData where it is not UTF-8."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            line = text.count("\n", 0, error.start)
            what = f"not UTF-8: byte 0x{ord(text[error.start]) & 0xFF:02x}" + f", {line} lines on" * bool(line)
            raise BadData(what, where=place, fix=opened.UTF_8) from None
    return text
