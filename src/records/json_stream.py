"""JSON records from a file as a stream: an array or JSON Lines, one record in memory at a time, each with its place.

A record that cannot be used comes as a `Malformed` in place of its value; an array broken beyond reading raises `Damaged`.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from src.core.errors import AGAIN, BadData
from src.records.sources import opened

CHUNK = 1 << 20
RECORD_LIMIT = 64 << 20

SPACE = " \t\r\n"
_SPACES = re.compile(f"[{SPACE}]*")


class Malformed(Exception):
    """One record is unusable. reason: a few words to count by; the message adds the detail; fix: a way out beside those of all malformed records."""

    def __init__(self, reason: str, detail: str = "", fix: str = ""):
        self.reason = reason
        self.fix = fix
        super().__init__(f"{reason}: {detail}" if detail else reason)


class Damaged(Exception):
    """The file cannot be read beyond `line`."""

    def __init__(self, line: int, what: str):
        self.line = line
        super().__init__(what)


class RawRecord(NamedTuple):
    """A record as it lies in the file.

    line: from 1; 0 in a file without lines. name: its id if it brings none. value: the decoded JSON, or why there is none. notes: what was left out of it.
    """

    line: int
    name: str
    value: object
    notes: tuple[str, ...] = ()


def container(path: Path) -> str:
    """Whether the file is an "array" or "lines", by its first character that is not space. Raises as `read` does at once."""
    with open_text(path) as file:
        head = ""
        while not head and (text := file.read(CHUNK)):
            head = text.lstrip(SPACE + "\ufeff")

    if not head:
        raise BadData("the file is empty", where=str(path), fix=AGAIN)
    if head.startswith("version https://git-lfs.github.com/spec/v1"):
        raise BadData(
            "the file is a Git LFS pointer, not the data it stands for", where=str(path), fix="git lfs pull, in the folder it came from"
        )
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
    raise BadData(f"the file begins with {quote(head[:20])}; expected [ or {{", where=str(path), fix=opened.JSON_LINES)


def open_text(path: Path) -> TextIO:
    """The file's text, unpacked where it is packed (sources/opened.py)."""
    return opened.text(path)


def quote(text: str, limit: int = 60) -> str:
    """`text` in quotes, short and printable whatever is in it."""
    return repr(text if len(text) <= limit else text[:limit] + "…")


class Decoder(json.JSONDecoder):
    """Remembers in `constant` the NaN or Infinity that the last value held: Python reads them, but JSON does not have them."""

    constant: str | None

    def __init__(self):
        super().__init__(parse_constant=self._constant)
        self.constant = None

    def _constant(self, name: str) -> None:
        self.constant = name

    def raw_decode(self, s: str, idx: int = 0) -> tuple[object, int]:
        self.constant = None
        return super().raw_decode(s, idx)


def why(error: Exception) -> str:
    """A decoding error in words, without the decoder's line and column, which count from where it was made to begin."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return error.msg if isinstance(error, json.JSONDecodeError) else "a number has too many digits"


def _size(text: str) -> int:
    """Bytes of `text` in its file."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


def _check_text(text: str, line: int, offset: int) -> None:
    """Raise Malformed if the record's text, which begins at that line and byte offset, is too long or not UTF-8."""
    if len(text) > RECORD_LIMIT:
        raise Malformed("record too large", f"over {RECORD_LIMIT >> 20} MiB")
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        before = text[: error.start]
        byte = ord(text[error.start]) - 0xDC00
        raise Malformed(
            "not UTF-8", f"byte 0x{byte:02x} at line {line + before.count(chr(10))}, offset {offset + _size(before)} of the file"
        ) from None


def lines(file: TextIO, name: str) -> Iterator[RawRecord]:
    """The records of JSON Lines; a bad line spoils itself alone."""
    decoder = Decoder()
    line = offset = 0
    while text := file.readline(RECORD_LIMIT + 1):
        line += 1
        start, offset = offset, offset + _size(text)
        if text.strip(SPACE):
            yield RawRecord(line, f"{name}:{line}", _decode_line(decoder, text, line, start))
        while not text.endswith("\n") and (text := file.readline(CHUNK)):
            offset += _size(text)


def _decode_line(decoder: Decoder, text: str, line: int, offset: int) -> object:
    """The line's value, or the Malformed that says why it has none."""
    try:
        _check_text(text, line, offset)
        value = decoder.decode(text.removeprefix("\ufeff") if line == 1 else text)
    except Malformed as fault:
        return fault
    except (ValueError, RecursionError) as error:
        return Malformed("bad JSON", why(error) + (f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""))
    return Malformed("not a JSON number", decoder.constant) if decoder.constant else value


def array(file: TextIO, name: str) -> Iterator[RawRecord]:
    """The records of one JSON array. Raises Damaged where the array itself breaks: what follows cannot be told apart."""
    decoder = Decoder()
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
        except Malformed as fault:
            value = fault
        if decoder.constant:
            value = Malformed("not a JSON number", decoder.constant)
        yield RawRecord(line, f"{name}#{index}", value)
        index += 1
        if window.peek() not in (",", "]"):
            found = window.peek()
            raise Damaged(
                window.place()[0], f"expected , or ] after a record, found {quote(found)}" if found else "the file ends without a ]"
            )
        mark = window.take()
    if window.peek():
        raise Damaged(window.place()[0], "there is more text after its closing ]")


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
            if space := _SPACES.match(self.text, self.at):
                self.at = space.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self, decoder: Decoder) -> tuple[object, str]:
        """The next JSON value and its text, and move beyond it. Raises Damaged if none can be read."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not (self._cut_short(error) and self._more()):
                    raise self._damage(error) from None
            except (ValueError, RecursionError) as error:
                raise Damaged(self.place()[0], why(error)) from None
            else:
                # A number may go on beyond the window's end, where it stands there or its point or exponent has just begun.
                if self.text[end:].strip(".eE+-") or not self._more():
                    text = self.text[self.at : end]
                    self.at = end
                    return value, text

    def _more(self) -> bool:
        """Read on, at least as much as is waiting, so that a long record takes linear time. False at the end of the file."""
        line, _ = self.place()
        waiting = self.text[self.at :]
        if len(waiting) > RECORD_LIMIT:
            raise Damaged(line, f"a record is over {RECORD_LIMIT >> 20} MiB")
        text = self.file.read(max(CHUNK, len(waiting)))
        if text:
            self.text, self.at, self._counted = waiting + text, 0, 0
        return bool(text)

    def _cut_short(self, error: json.JSONDecodeError) -> bool:
        """Whether more text could mend the error: it is at the window's end, give or take the longest word, or in a string without an end."""
        return error.msg.startswith("Unterminated string") or error.pos > len(self.text) - len("-Infinity")

    def _damage(self, error: json.JSONDecodeError) -> Damaged:
        line, offset = self.place()
        line_of_error = line + self.text.count("\n", self.at, error.pos)
        try:
            _check_text(self.text[self.at : error.pos + 1], line, offset)
        except Malformed as fault:
            return Damaged(line_of_error, str(fault))
        if error.msg.startswith("Unterminated string") or error.pos >= len(self.text.rstrip(SPACE)):
            return Damaged(line_of_error, "the file ends in the middle of a record")
        return Damaged(line_of_error, f"{error.msg}, found {quote(self.text[error.pos : error.pos + 20])}")
