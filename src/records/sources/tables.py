"""Rows of tables as records: CSV and TSV, Parquet, Arrow files and streams. A batch of rows is in memory at a time.

Nothing in a table runs: an Arrow extension type is read as what it is stored as.
"""

import contextlib
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from src.core.errors import AGAIN, BadData, NoMemory
from src.records.json_stream import RECORD_LIMIT, Damaged, Malformed, RawRecord, quote

BATCH_ROWS = 1024
"""rows turned into Python's values at a time at most"""
BATCH_BYTES = 16 << 20
"""bytes of a Parquet file's columns, unpacked, that make a batch of fewer rows"""
DELIMITERS = {"CSV": ",;\t|", "TSV": "\t"}
FILLED_IN = "null members left out of tool calls or tools, as Arrow gives every row the members of all"


# ---- CSV and TSV


def separated(file: TextIO, path: Path, name: str, kind: str, known: Sequence[str]) -> Iterator[RawRecord]:
    """The rows of a CSV or TSV under its header, all cells text. The delimiter is the one by which the header names most of `known`, then most columns.

    A row of another length than the header, or badly quoted, spoils itself alone. Raises BadData for a header without sense; Damaged where a quote is
    never closed.
    """
    csv.field_size_limit(RECORD_LIMIT)
    first = file.readline(RECORD_LIMIT).removeprefix("\ufeff")
    delimiter = max(DELIMITERS[kind], key=lambda mark: _named(first, mark, known))
    rows = csv.reader(_lines(first, file), delimiter=delimiter, strict=True)
    columns = _header(rows, path)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error) or "field limit" in str(error):
                raise Damaged(line, "a quote that opens in this row is never closed") from None
            yield RawRecord(line, f"{name}:{line}", Malformed(f"bad {kind}", str(error)))
            continue
        if row:
            yield RawRecord(line, f"{name}:{line}", _record(columns, row))


def _named(header: str, delimiter: str, known: Sequence[str]) -> tuple[int, int]:
    """By this delimiter: how many of the header's columns are known, and how many there are."""
    try:
        found = next(csv.reader([header], delimiter=delimiter), [])
    except csv.Error:
        return 0, 0
    return sum(column.strip() in known for column in found), len(found)


def _lines(first: str, file: TextIO) -> Iterator[str]:
    """The lines, none longer than a field may be, so that a file without line ends does not fill memory."""
    yield first
    while text := file.readline(RECORD_LIMIT):
        yield text


def _header(rows: Iterator[list[str]], path: Path) -> list[str]:
    try:
        columns = [column.strip() for column in next(rows, [])]
    except csv.Error as error:
        raise BadData(f"the header is no row of a table: {error}", where=f"{path} line 1", fix=AGAIN) from None
    if not any(columns):
        raise BadData("the first line names no columns", where=str(path), fix="put the columns' names into the first line")
    if twice := next((column for column in columns if columns.count(column) > 1), None):
        raise BadData(f"the header names {quote(twice)} twice", where=f"{path} line 1", fix="give each column a name of its own")
    return columns


def _record(columns: list[str], row: list[str]) -> object:
    if len(row) != len(columns):
        return Malformed("row of another length", f"it has {len(row)} fields, the header {len(columns)}")
    if any("\udc80" <= letter <= "\udcff" for cell in row if not cell.isascii() for letter in cell):
        return Malformed("not UTF-8", "the row holds bytes that are no UTF-8")
    return dict(zip(columns, row))


# ---- Parquet and Arrow


def parquet(path: Path, name: str) -> Iterator[RawRecord]:
    """The rows of a Parquet file. Raises BadData for a damaged one."""
    from pyarrow import parquet as pq

    with (
        _arrow_faults(path, "Parquet"),
        pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as file,
    ):
        sizes = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        widest = max((group.total_byte_size // max(1, group.num_rows) for group in sizes), default=1)
        batches = file.iter_batches(batch_size=max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, widest))), use_threads=False)
        yield from _rows(batches, name)


def arrow(path: Path, name: str, kind: str) -> Iterator[RawRecord]:
    """The rows of an Arrow file or stream. Raises BadData for a damaged one."""
    import pyarrow as pa

    with _arrow_faults(path, "Arrow"), pa.OSFile(str(path)) as source:
        if kind == "Arrow":
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(pa.ipc.open_stream(source))
        yield from _rows((batch.slice(i, BATCH_ROWS) for batch in batches for i in range(0, batch.num_rows, BATCH_ROWS)), name)


@contextlib.contextmanager
def _arrow_faults(path: Path, kind: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except MemoryError as error:
        raise NoMemory(
            f"a part of the {kind} file does not fit in memory: {error}",
            where=str(path),
            fix=f"write it with smaller {'row groups' if kind == 'Parquet' else 'record batches'}",
        ) from None
    except (
        pa.ArrowException,
        OSError,
        ValueError,
        OverflowError,
        SystemError,
    ) as error:  # SystemError: offsets of texts that make no sense
        if getattr(error, "errno", None):
            raise
        raise BadData(f"the {kind} file is damaged: {str(error).splitlines()[0]}", where=str(path), fix=AGAIN) from None


def _rows(batches: Iterator[Any], name: str) -> Iterator[RawRecord]:
    index = 0
    for batch in batches:
        for value in _values(batch):
            notes: tuple[str, ...] = ()
            if isinstance(value, dict):
                filled_in: list[bool] = []
                value = {key: _without_nulls(inner, key in ("tools", "arguments"), filled_in) for key, inner in value.items()}
                notes = (FILLED_IN,) if filled_in else ()
            yield RawRecord(0, f"{name}#{index}", value, notes)
            index += 1


def _values(batch: Any) -> Iterator[object]:
    """The rows as Python's values, in place of one with a text that is not UTF-8 the Malformed that says so."""
    import pyarrow as pa

    # Times no one learns from can be ones that Python has no value for; the names of their columns stay.
    times = [field.name for field in batch.schema if pa.types.is_temporal(field.type)]
    if times and len(times) < batch.num_columns:
        for value in _values(batch.drop_columns(times)):
            yield value | dict.fromkeys(times) if isinstance(value, dict) else value
        return
    try:
        batch.validate(full=True)  # the offsets of a damaged file can lead anywhere in memory
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
    else:
        yield from batch.to_pylist()
        return
    for i in range(batch.num_rows):
        row = batch.slice(i, 1)
        try:
            row.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            yield Malformed("not UTF-8", "a text of the row holds bytes that are no UTF-8")
        else:
            yield row.to_pylist()[0]


def _without_nulls(value: Any, counts: bool, found: list[bool]) -> Any:
    """The value without the null members of objects in it: a column's objects all have the members of all of them. found grows where what is left out
    counts, in the arguments of a call or in tools."""
    if isinstance(value, list):
        return [_without_nulls(inner, counts, found) for inner in value]
    if not isinstance(value, dict):
        return value
    if counts and None in value.values():
        found.append(True)
    return {key: _without_nulls(inner, counts or key == "arguments", found) for key, inner in value.items() if inner is not None}
