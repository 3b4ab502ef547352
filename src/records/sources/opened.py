"""What a file is by its first bytes, and its text: unpacked and decoded as it is read, so that memory does not follow its size.

What has one reading is read (gzip, bzip2, xz, zstd, a zip of one file; UTF-8, UTF-16 and UTF-32). What has not is refused with the command that helps.
"""

import contextlib
import errno
import io
import lzma
import re
import shlex
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO, cast

from src.core.errors import AGAIN, BadData, MissingInput, MissingTool

HEAD = 1 << 16
"""bytes looked at to tell what a file is"""
BOMB_SIZE, BOMB_RATIO = 1 << 30, 200
"""a file that unpacks to more than so many bytes, and to more than so many times its own, is refused"""

JSON_LINES = "write it as JSON Lines with the program that made it"
UTF_8 = "save it as UTF-8 with the program that made it"
CSV_UTF_8 = "save it as CSV UTF-8"
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}
READERS = {"gzip": "gzip -dc", "bzip2": "bzip2 -dc", "xz": "xz -dc", "zstd": "zstd -dc", "zip": "unzip -p"}
"""what writes to a pipe what is in a packed file"""
TABLES = {b"PAR1": "Parquet", b"ARROW1\0\0": "Arrow", b"\xff\xff\xff\xff": "Arrow stream"}
FOREIGN = {
    b"\x80\x03": ("a Python pickle, which can run any code when it is read", JSON_LINES),
    b"\x80\x04": ("a Python pickle, which can run any code when it is read", JSON_LINES),
    b"\x80\x05": ("a Python pickle, which can run any code when it is read", JSON_LINES),
    b"SQLite format 3\0": ("an SQLite database", "sqlite3 -json {path} 'SELECT * FROM A_TABLE' > {stem}.json"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", "7z x {path}"),
    b"Rar!": ("a RAR archive", "unrar x {path}"),
    b"PK\x05\x06": ("an empty zip archive", AGAIN),
    b"%PDF": ("a PDF", "convert it to text"),
    b"\xd0\xcf\x11\xe0": ("an old Office document", CSV_UTF_8),
    b"FEA1": ("Feather of version 1", JSON_LINES),
    b"Obj\x01": ("an Avro file", JSON_LINES),
    b"ORC": ("an ORC file", JSON_LINES),
    b"\x89HDF": ("an HDF5 file", JSON_LINES),
}
UNICODE = {b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
OTHERS = {"cp949": "CP949", "gb18030": "GB18030", "cp932": "CP932", "big5": "BIG5", "cp1252": "CP1252"}
"""what a text that is not Unicode may be in: Python's name, iconv's name"""
FOREIGN_LETTERS = 8
"""bytes that are no UTF-8, and more than what is, from which on it is the file that is not UTF-8, and not a record in it"""


def head(path: Path) -> bytes:
    """The first bytes of a file as it lies there. Raises MissingInput where there is none."""
    if not path.is_file():
        raise MissingInput("not a file" if path.exists() else "no such file", where=str(path))
    with open(path, "rb") as file:
        return file.read(HEAD)


def table(path: Path) -> str | None:
    """ "Parquet", "Arrow" or "Arrow stream" where the file is one by its first bytes."""
    return _by_magic(TABLES, head(path))


def is_packed(path: Path) -> bool:
    """Whether what is in the file is more than the file."""
    begin = head(path)
    return _by_magic(PACKED, begin) is not None or _by_magic(TABLES, begin) == "Parquet"


def text(path: Path) -> TextIO:
    """The file's text from its beginning, lines ended as they are. Bytes that are not UTF-8 become lone surrogates: they spoil their record, not the file.

    Raises MissingInput where there is no such file; BadData where it is no text, packed in a way that has no one reading, or in another encoding;
    BadData while reading for damage in what is packed.
    """
    begin = head(path)
    packed = _by_magic(PACKED, begin)
    bytes_ = cast(io.BufferedIOBase, open(path, "rb")) if packed is None else io.BufferedReader(_Unpacked(path, packed), HEAD)
    try:
        if packed:
            begin = _peeked(bytes_)
        _refuse_binary(path, begin, packed)
        encoding = _encoding(path, begin, packed)
        if encoding == "utf-8":
            return io.TextIOWrapper(cast(BinaryIO, bytes_), encoding, errors="surrogateescape", newline="\n")
        return _Strict(path, cast(BinaryIO, bytes_), encoding, newline="\n")
    except BaseException:
        bytes_.close()
        raise


def begins(path: Path) -> str:
    """A text's first letters. Raises what `text` does, and BadData where they are none of a text's."""
    with text(path) as file:
        begin = file.read(HEAD)
    if "\0" in begin:
        raise BadData("the file holds zero bytes, as no text does", where=str(path), fix=UTF_8)
    return begin


def name_within(path: Path) -> str:
    """The file's name without what says that it is packed: chats.csv of chats.csv.gz; of a zip that of the file in it."""
    if _by_magic(PACKED, head(path)) == "zip":
        with _archive(path) as archive:
            return _only_member(path, archive).filename
    return path.stem if path.suffix.lower() in (".gz", ".bz2", ".xz", ".zst", ".zstd") else path.name


class _Strict(io.TextIOWrapper):
    """Text in UTF-16 or UTF-32, where one wrong byte leaves no way on: raises BadData at it."""

    def __init__(self, path: Path, *how, **more):
        super().__init__(*how, **more)
        self._path = path

    def read(self, size: int | None = -1) -> str:
        with self._faults():
            return super().read(size)

    def readline(self, size: int = -1) -> str:  # type: ignore[override]
        with self._faults():
            return super().readline(size)

    def __next__(self) -> str:  # type: ignore[override]
        with self._faults():
            return super().__next__()

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            what = f"the file is not the {error.encoding.upper()} that it begins as: {error.reason}"
            raise BadData(what, where=str(self._path), fix=UTF_8) from None


def _peeked(file: io.BufferedIOBase) -> bytes:
    """The first bytes of what is unpacked, still to be read. A packed file gives them a few at a time."""
    assert isinstance(file, io.BufferedReader)
    return file.peek(HEAD)


def _by_magic(table: dict[bytes, str], begin: bytes) -> str | None:
    return next((name for magic, name in table.items() if begin.startswith(magic)), None)


class _Unpacked(io.RawIOBase):
    """The bytes in a packed file. Raises BadData for damage, and for what unpacks to far more than data does."""

    def __init__(self, path: Path, kind: str):
        self._path, self._kind, self._count = path, kind, 0
        self._limit = max(BOMB_SIZE, BOMB_RATIO * path.stat().st_size)
        self._archive: zipfile.ZipFile | None = None
        with _damage(path, kind):
            self._inner: BinaryIO = self._open()

    def _open(self) -> BinaryIO:
        if self._kind == "gzip":
            import gzip

            return cast(BinaryIO, gzip.open(self._path))
        if self._kind == "bzip2":
            import bz2

            return cast(BinaryIO, bz2.open(self._path))
        if self._kind == "xz":
            return cast(BinaryIO, lzma.open(self._path))
        if self._kind == "zip":
            self._archive = _archive(self._path)
            return cast(BinaryIO, self._archive.open(_only_member(self._path, self._archive)))
        import pyarrow

        return cast(BinaryIO, pyarrow.CompressedInputStream(pyarrow.OSFile(str(self._path)), "zstd"))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        with _damage(self._path, self._kind):
            data = self._inner.read(len(buffer))
        self._count += len(data)
        if self._count > self._limit:
            raise BadData(
                f"the {self._kind} file unpacks to more than {BOMB_RATIO} times its size, which no records do",
                where=str(self._path),
                fix="unpack it yourself, and look at what is in it",
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._inner.close()
            if self._archive:
                self._archive.close()
        super().close()


@contextlib.contextmanager
def _damage(path: Path, kind: str) -> Iterator[None]:
    """What the unpacking libraries raise at damage, as BadData."""
    try:
        yield
    except (EOFError, OSError, ValueError, lzma.LZMAError, zlib.error, zipfile.BadZipFile, NotImplementedError) as error:
        if getattr(error, "errno", None) not in (None, errno.EINVAL):  # EINVAL: a place in the file before its beginning
            raise
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        raise BadData(f"the {kind} file is {'cut off' if cut else f'damaged: {error}'}", where=str(path), fix=AGAIN) from None


def _archive(path: Path) -> zipfile.ZipFile:
    with _damage(path, "zip"):
        return zipfile.ZipFile(path)


def _only_member(path: Path, archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """The one file in a zip, what macOS adds not counted."""
    found = [
        m
        for m in archive.infolist()
        if not m.filename.endswith("/") and not m.filename.startswith("__MACOSX/") and Path(m.filename).name[:1] != "."
    ]
    if any(m.filename == "[Content_Types].xml" for m in found):
        raise BadData("the file is an Office document", where=str(path), fix=CSV_UTF_8)
    if any(m.filename.endswith("data.pkl") for m in found):
        raise BadData("the file is a PyTorch pickle, which can run any code", where=str(path), fix=JSON_LINES)
    if len(found) != 1:
        folder = _beside(path)
        raise BadData(
            f"the zip holds {len(found)} files, and in which order they belong together is not known",
            where=str(path),
            fix=f"unzip {shlex.quote(str(path))} -d {folder}, then data.path={folder}",
        )
    if found[0].flag_bits & 1:
        folder = _beside(path)
        way = f"unzip -P PASSWORD {shlex.quote(str(path))} -d {folder}, then data.path={folder}"
        raise BadData("the zip is encrypted", where=str(path), fix=way)
    return found[0]


def _beside(path: Path) -> str:
    """A folder for what is in an archive, as it is typed in a shell."""
    return shlex.quote(str(path.with_name(f"{path.name.strip('.').partition('.')[0]}-unpacked")))


def _refuse_binary(path: Path, begin: bytes, packed: str | None) -> None:
    quoted = {"path": shlex.quote(str(path)), "stem": shlex.quote(str(path.with_suffix("")))}
    for magic, (what, fix) in FOREIGN.items():
        if begin.startswith(magic):
            raise BadData(f"the file is {what}", where=str(path), fix=fix.format(**quoted))
    if begin[257:262] == b"ustar":
        folder = _beside(path)
        way = f"mkdir {folder} && {READERS.get(str(packed), 'cat')} {quoted['path']} | tar x -C {folder}, then data.path={folder}"
        raise BadData("the file is a tar archive", where=str(path), fix=way)
    within = _by_magic(PACKED | TABLES, begin) if packed else None
    if packed and within:
        target = shlex.quote(str(path.with_name(f"unpacked-{Path(name_within(path)).name}")))
        way = f"{READERS[packed]} {quoted['path']} > {target}, then data.path={target}"
        raise BadData(f"unpacked, the {packed} file is {within}; it is unpacked once", where=str(path), fix=way)


def _encoding(path: Path, begin: bytes, packed: str | None) -> str:
    """The encoding of a text that begins so. Raises BadData where it is none of Unicode's."""
    if marked := _by_magic(UNICODE, begin):
        return marked
    if re.match(rb"[\[{\s\w\"]\0[^\0]\0", begin):
        return "utf-16-le"
    if re.match(rb"\0[\[{\s\w\"]\0[^\0]", begin):
        return "utf-16-be"
    decoded = begin.decode("utf-8", "surrogateescape")
    wrong = len(re.findall("[\udc80-\udcff]", decoded))
    # Some pairs of bytes of any encoding are UTF-8 by chance.
    right = len(re.findall("[\u0080-\ud7ff\ue000-\U0010ffff]", decoded))
    if wrong < FOREIGN_LETTERS or wrong <= 2 * right or b"\0" in begin:
        return "utf-8"
    way = _to_utf8(path, begin, packed)
    raise BadData("the file is not UTF-8", where=str(path), fix=[way, UTF_8])


def to_utf8(path: Path) -> str:
    """The command that writes a text file anew in UTF-8, by the encoding it seems to be in."""
    begin = head(path)
    packed = _by_magic(PACKED, begin)
    if packed:
        with io.BufferedReader(_Unpacked(path, packed), HEAD) as file:
            begin = _peeked(file)
    return _to_utf8(path, begin, packed)


def _to_utf8(path: Path, begin: bytes, packed: str | None) -> str:
    try:
        from charset_normalizer import from_bytes
    except ImportError as error:
        raise MissingTool(f"charset-normalizer is not here: {error}", fix="pip install charset-normalizer") from None
    best = from_bytes(begin, cp_isolation=list(OTHERS)).best()
    source = OTHERS.get(best.encoding if best else "", "CP1252")
    target = shlex.quote(str(path.with_name(f"utf8-{Path(name_within(path)).name}")))
    if packed:
        return f"{READERS[packed]} {shlex.quote(str(path))} | iconv -f {source} -t UTF-8 > {target}"
    return f"iconv -f {source} -t UTF-8 {shlex.quote(str(path))} > {target}"
