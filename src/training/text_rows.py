"""Plain text as rows: tokenized once into shards on disk, kept by content, memory-mapped; cut into rows as a run asks for them.

A document is its tokens between the tokenizer's begin token, where it writes one, and its end token. A row is a stretch of at most `max_length` tokens of one
document, so no row holds two: each begins at position 0, as a text does for whoever generates one, and sees itself alone. Neighbouring rows of a document
share a token, the last of one and the first of the next, so that each token but a document's first is learnt exactly once in an epoch.
"""

import bisect
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.artifact import Artifact, key_of, package_versions
from src.core.cache import kept_or_made
from src.core.errors import BadData
from src.core.files import read_json, sha256, write_json
from src.core.log import rank, ticks, warn
from src.records import texts
from src.records.conversations import place_of
from src.records.texts import Piece
from src.settings.verbs import TextVerb
from src.training.checkpoints import from_first
from src.training.examples import Example

SHARD = 1 << 28
"""tokens of a file at most, but for a document that is longer"""
TOGETHER = 1 << 22
"""characters that are tokenized at a time, by as many threads of `tokenizers` as there are cores"""
NAMED = 12
"""tokens of a row that tell which it is"""
NARROW = 1 << 16
"""ids that fit 16 bits"""


@dataclass(frozen=True, eq=False)
class TextRows:
    """The rows of one split, read from disk as they are needed.

    shards: uint16 or uint32 token ids, document after document; starts: tokens before each shard. begins: int64 (rows,), tokens before each row;
    lengths: int64 (rows,). documents: int64 (rows,), number of each row's document, of which there are `count`. text_bytes: of all documents.
    """

    shards: list[np.ndarray]
    starts: list[int]
    begins: np.ndarray
    lengths: np.ndarray
    documents: np.ndarray
    count: int
    text_bytes: int

    def __len__(self) -> int:
        return len(self.begins)

    def __getitem__(self, i: int) -> Example:
        begin, length = int(self.begins[i]), int(self.lengths[i])
        shard = bisect.bisect_right(self.starts, begin) - 1
        at = begin - self.starts[shard]
        ids = self.shards[shard][at : at + length].astype(np.int32)
        labels = ids.copy()
        labels[0] = encoding.IGNORE  # nothing stands before it to tell it from
        return Example(ids, labels)

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def trained_tokens(self) -> np.ndarray:
        return self.lengths - 1

    @functools.cached_property
    def trained_weight(self) -> np.ndarray:
        return self.trained_tokens.astype(np.float64)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.shards))


def rows_of(cfg: TextVerb, text: Artifact, tokenizer, cache: Path) -> tuple[TextRows, TextRows]:
    """(train, val): rank 0 tokenizes the text where `cache` does not hold it; the others read what it made."""
    folder = cache / content_key(cfg, text, tokenizer)
    read = partial(open_rows, max_length=cfg.train.max_length)
    if rank() == 0:
        folder = kept_or_made(folder, partial(make, cfg, text, tokenizer), lambda made: (read(made, "train"), read(made, "val")))
    folder = from_first(folder)
    return read(folder, "train"), read(folder, "val")


def content_key(cfg: TextVerb, text: Artifact, tokenizer) -> str:
    """sha256 hex of all that decides the tokens: the text's bytes, the tokenizer, the settings, this code and the library it calls."""
    own = getattr(tokenizer, "backend_tokenizer", None)
    settings = {
        "text": text.key,
        "split": [cfg.separator, cfg.val, cfg.split_seed],
        "tokenizer": own.to_str() if own else sorted(tokenizer.get_vocab().items()),
        "ends": ends(tokenizer),
        "code": [sha256(Path(module)) for module in (texts.__file__, __file__)],
        "packages": {name: package_versions()[name] for name in ("tokenizers", "transformers")},
    }
    return key_of("text-tokens", 1, settings, {})


def ends(tokenizer) -> tuple[list[int], list[int]]:
    """Ids that open and close a document. Raises BadData for a tokenizer without an end token."""
    if tokenizer.eos_token_id is None:
        raise BadData("the tokenizer has no end token, which parts documents", fix="name one as eos_token in its tokenizer_config.json")
    bos = tokenizer.bos_token_id
    writes = bos is not None and tokenizer("").input_ids[:1] == [bos]
    return [bos] * writes, [tokenizer.eos_token_id]


def split_of(cfg: TextVerb, text: str) -> str:
    """The split of a document that begins so; by its content alone."""
    return "val" if place_of(text, cfg.split_seed) / 2**64 < cfg.val else "train"


def make(cfg: TextVerb, text: Artifact, tokenizer, folder: Path) -> None:
    """Tokenize the text into `folder`. A document's words are never control tokens, whatever they spell."""
    opening, closing = ends(tokenizer)
    dtype = np.uint16 if len(tokenizer) <= NARROW else np.uint32
    splits = {name: _Writer(folder, name, dtype) for name in ("train", "val")}
    split = "train"
    with ticks(sum(file["size"] for file in text.files.values()), "bytes tokenized") as tick:
        for portion in portions(texts.pieces(text, cfg.separator)):
            encoded = tokenizer(
                [piece.text for piece in portion], add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
            ).input_ids
            size = 0
            for piece, ids in zip(portion, encoded):
                split = split_of(cfg, piece.text) if piece.first else split
                length = len(piece.text.encode())
                size += length
                splits[split].add([*opening * piece.first, *ids, *closing * piece.last], length, first=piece.first)
            tick(size)
    for writer in splits.values():
        writer.close()


def portions(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Together about TOGETHER characters each."""
    some: list[Piece] = []
    size = 0
    for piece in pieces:
        some.append(piece)
        size += len(piece.text)
        if size >= TOGETHER:
            yield some
            some, size = [], 0
    if some:
        yield some


class _Writer:
    """The shards of a split under way."""

    def __init__(self, folder: Path, split: str, dtype: type):
        self._folder, self._split, self._dtype = folder, split, dtype
        self._begins, self._shards, self._tokens, self._bytes = [0], list[int](), 0, 0
        self._open()

    def _open(self) -> None:
        self._file = open(self._folder / f"{self._split}-{len(self._shards):05d}.bin", "wb")
        self._shards.append(0)

    def add(self, ids: list[int], text_bytes: int, *, first: bool) -> None:
        if first:
            if self._shards[-1] and self._shards[-1] + len(ids) > SHARD:
                self._file.close()
                self._open()
            self._begins.append(self._begins[-1])
        np.array(ids, self._dtype).tofile(self._file)
        self._begins[-1] += len(ids)
        self._shards[-1] += len(ids)
        self._bytes += text_bytes

    def close(self) -> None:
        self._file.close()
        np.save(self._folder / f"{self._split}-documents.npy", np.array(self._begins, np.int64))
        write_json(
            self._folder / f"{self._split}.json", {"shards": self._shards, "dtype": np.dtype(self._dtype).name, "text_bytes": self._bytes}
        )


def open_rows(folder: Path, split: str, *, max_length: int) -> TextRows:
    """The rows of a split kept in a folder. Raises OSError, ValueError or KeyError where one of its files is missing or not as long as it should be."""
    kept, bounds = read_json(folder / f"{split}.json"), np.load(folder / f"{split}-documents.npy")
    dtype = np.dtype(kept["dtype"])
    shards = [
        np.memmap(folder / f"{split}-{i:05d}.bin", dtype, "r", shape=(tokens,)) if tokens else np.empty(0, dtype)
        for i, tokens in enumerate(kept["shards"])
    ]
    lengths, step = np.diff(bounds), max_length - 1
    counts = ((lengths - 2) // step + 1).clip(min=0)
    documents = np.repeat(np.arange(len(lengths)), counts)
    place = np.arange(len(documents)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = bounds[:-1][documents] + place * step
    return TextRows(
        shards=shards,
        starts=[0, *np.cumsum(kept["shards"])[:-1].tolist()],
        begins=begins,
        lengths=np.minimum(bounds[1:][documents] - begins, max_length),
        documents=documents,
        count=len(lengths),
        text_bytes=kept["text_bytes"],
    )


def named(rows: TextRows, tokenizer, row: int) -> str:
    """What a row begins with, to be looked for in the text."""
    return f"'{tokenizer.decode(rows[row].input_ids[:NAMED], skip_special_tokens=True)}...'"


def check(train: TextRows, val: TextRows, text: Artifact) -> None:
    """Raises BadData where nothing is left to train on; says where nothing is held out."""
    if not len(train):
        raise BadData(
            "no document is left to train on", where=str(text.path), fix=["more text", *["val=0 holds none out"] * bool(len(val))]
        )
    if not len(val):
        warn(
            f"none of {train.count:,} documents is held out; a higher val holds out more, separator=blank_line makes each paragraph a document"
        )
