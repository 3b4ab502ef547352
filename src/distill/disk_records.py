"""Records that a step has to see all of before it can let one go, kept in a file that is gone with the process."""

import json
import tempfile
from array import array

from src.distill.pipeline import Record


class Spool:
    """Records by number, from 0. Memory: 8 bytes a record."""

    def __init__(self):
        self._file = tempfile.TemporaryFile()
        self._places = array("Q")

    def __len__(self) -> int:
        return len(self._places)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def add(self, record: Record) -> int:
        """The record's number."""
        self._places.append(self._file.seek(0, 2))
        self._file.write(json.dumps([record.id, record.messages, record.data, record.asks]).encode() + b"\n")
        return len(self._places) - 1

    def __getitem__(self, number: int) -> Record:
        self._file.seek(self._places[number])
        id, messages, data, asks = json.loads(self._file.readline())
        return Record(id, messages, data, tuple(asks))
