"""The records of one file, whatever kind of file it is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from src.core.errors import BadData
from src.records import json_stream
from src.records.json_stream import RECORD_LIMIT, Malformed, RawRecord
from src.records.sources import opened, tables

BY_NAME = {".csv": "CSV", ".tsv": "TSV", ".tab": "TSV", ".txt": "plain text"}
"""kinds that no first byte tells; by content a file of such a name may still be JSON"""


@dataclass(frozen=True)
class File:
    """A file of records. name: what its records are named by; kind: JSON array, JSON Lines, CSV, TSV, plain text, Parquet, Arrow or Arrow stream."""

    path: Path
    name: str
    kind: str

    @property
    def is_table(self) -> bool:
        """Whether all its records have the same columns."""
        return self.kind not in ("JSON array", "JSON Lines")

    def records(self, known: Sequence[str]) -> Iterator[RawRecord]:
        """The records in order. known: names of columns, which tell a CSV's delimiter. Raises BadData or Damaged where nothing more can be read."""
        if self.kind == "Parquet":
            yield from tables.parquet(self.path, self.name)
        elif self.kind in ("Arrow", "Arrow stream"):
            yield from tables.arrow(self.path, self.name, self.kind)
        else:
            with json_stream.open_text(self.path) as file:
                yield from self._of_text(file, known)

    def _of_text(self, file: TextIO, known: Sequence[str]) -> Iterator[RawRecord]:
        if self.kind in tables.DELIMITERS:
            return tables.separated(file, self.path, self.name, self.kind, known)
        if self.kind == "plain text":
            return _plain_lines(file, self.name)
        return (json_stream.array if self.kind == "JSON array" else json_stream.lines)(file, self.name)


def file(path: Path, name: str | None = None) -> File:
    """What kind of file of records it is, named `name`, or as the file is. Raises MissingInput if there is no such file; BadData if it is none of records."""
    if kind := opened.table(path):
        return File(path, name or path.name, kind)
    by_name = BY_NAME.get(Path(opened.name_within(path)).suffix.lower())
    if by_name and not _looks_like_json(path):
        return File(path, name or path.name, by_name)
    try:
        return File(path, name or path.name, {"array": "JSON array", "lines": "JSON Lines"}[json_stream.container(path)])
    except BadData as error:
        if "begins with" in error.what:
            error.fix.append("name it .csv, .tsv or .txt, if that is what it is")
        raise


def files(root: Path, names: Iterable[str]) -> list[File]:
    """The files of these names below a folder, or the one file that `root` is."""
    return [file(root if root.is_file() else root / name, name) for name in names]


def _looks_like_json(path: Path) -> bool:
    """Whether a file named as a table or text is JSON, or holds nothing at all, which is said of JSON."""
    with json_stream.open_text(path) as file:
        begin = file.read(json_stream.CHUNK).lstrip(json_stream.SPACE + "\ufeff")
    return not begin or begin.startswith(("[{", '{"', "version https://git-lfs"))


def _plain_lines(file: TextIO, name: str) -> Iterator[RawRecord]:
    """A record {"text"} for each line of text that is not empty."""
    number = 0
    while text := file.readline(RECORD_LIMIT + 1):
        number += 1
        line = text.removeprefix("\ufeff").rstrip("\r\n") if number == 1 else text.rstrip("\r\n")
        if line.strip():
            yield RawRecord(number, f"{name}:{number}", _text_record(line))


def _text_record(line: str) -> object:
    if len(line) > RECORD_LIMIT:
        return Malformed("record too large", f"over {RECORD_LIMIT >> 20} MiB")
    if not line.isascii() and any("\udc80" <= letter <= "\udcff" for letter in line):
        return Malformed("not UTF-8", "the line holds bytes that are no UTF-8")
    return {"text": line}
