"""Conversations as token rows: made once, by several processes, kept by content and memory-mapped."""

import contextlib
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from src.chat import encoding, long_rows
from src.core.artifact import Artifact, key_of, package_versions
from src.core.cache import kept_or_made
from src.core.errors import BadData
from src.core.files import read_json, sha256, write_json
from src.core.log import progress, rank, warn
from src.core.processes import end_with_parent
from src.models.loading import load_tokenizer
from src.settings.verbs import FinetuneVerb
from src.training.checkpoints import from_first

PORTION = 256
"""conversations per task; fewer than four tasks are not worth starting processes for"""


@dataclass(frozen=True)
class Example:
    """One conversation: input_ids and labels, int32 of shape (tokens,); labels are -100 where the loss does not count, first token always."""

    input_ids: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of one split, read from disk as they are needed.

    offsets: int64 of shape (rows + 1,); row i is tokens offsets[i] to offsets[i + 1]. lines: number of each row's record in the split's file, from 1.
    key: of the content the rows were made from.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    offsets: np.ndarray
    lines: np.ndarray
    counts: long_rows.Counts
    unseen: dict[str, int]
    key: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Example:
        span = slice(self.offsets[i], self.offsets[i + 1])
        ids = np.asarray(self.input_ids[span])
        return Example(ids, np.where(self.trained[span], ids, encoding.IGNORE))

    def __iter__(self) -> Iterator[Example]:
        return (self[i] for i in range(len(self)))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64."""
        return np.diff(self.offsets)

    @functools.cached_property
    def trained_tokens(self) -> np.ndarray:
        """Tokens of each row that the loss counts, int64."""
        return np.diff(np.concatenate([[0], np.cumsum(self.trained, dtype=np.int64)])[self.offsets])


def examples_of(cfg: FinetuneVerb, dataset: Artifact, base: Artifact, split: str, cache: Path) -> Examples:
    """The rows of one split under the settings' length policy. Rank 0 makes them if `cache` does not hold them; the others read what it made.

    Raises BadData where a template refuses a conversation, or where more rows are lost than train.long_share allows.
    """
    folder = cache / content_key(cfg, dataset, base, split)
    if rank() == 0:
        folder = kept_or_made(folder, partial(make, cfg, dataset.path / f"{split}.jsonl", base.path, split), open_examples)
    examples = open_examples(from_first(folder))
    if tools := examples.unseen.get("tools"):
        warn(f"{split}: the chat template ignores the tools of {tools} rows")
    if turns := examples.unseen.get("turns"):
        warn(
            f"{split}: {turns} earlier answers are not trained, since the chat template takes their reasoning out of history; train.hidden_turns=rows trains each in a row of its own"
        )
    t = cfg.train
    for line in long_rows.report(examples.counts, split, f"train.max_length={t.max_length}"):
        warn(line)
    long_rows.check(examples.counts, t.long_share, policy=t.long_rows, max_length=t.max_length, split=split)
    return examples


def content_key(cfg: FinetuneVerb, dataset: Artifact, base: Artifact, split: str) -> str:
    """sha256 hex of all that decides the rows: the split's bytes, the tokenizer's files, the settings, this code and the libraries it calls."""
    settings = {
        "split": dataset.files[f"{split}.jsonl"]["sha256"],
        "tokenizer": {name: f["sha256"] for name, f in base.files.items() if not name.endswith((".safetensors", ".bin"))},
        "train": {name: getattr(cfg.train, name) for name in ("max_length", "long_rows", "hidden_turns")},
        "legacy_mask": cfg.legacy_mask,
        "code": [sha256(Path(module)) for module in (encoding.__file__, long_rows.__file__, __file__)],
        "packages": {name: package_versions()[name] for name in ("tokenizers", "transformers")},
    }
    return key_of("tokens", 1, settings, {})


def make(cfg: FinetuneVerb, source: Path, base: Path, split: str, folder: Path) -> None:
    """Tokenize a split into `folder`."""
    portions = list(line_portions(source))
    counts, lengths, lines = long_rows.Counts(), [0], []
    unseen: Counter[str] = Counter()
    with (
        open(folder / "input_ids.bin", "wb") as ids,
        open(folder / "trained.bin", "wb") as trained,
        encoded(portions, cfg, base, source) as made,
    ):
        for portion in progress(made, f"tokenizing {split}", total=len(portions)):
            portion.input_ids.tofile(ids)
            portion.trained.tofile(trained)
            lengths += portion.lengths
            lines += portion.lines
            counts += portion.counts
            unseen += portion.unseen
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    np.save(folder / "lines.npy", np.array(lines, dtype=np.int64))
    write_json(folder / "counts.json", {"rows": vars(counts), "unseen": dict(unseen)})


def open_examples(folder: Path) -> Examples:
    """The rows kept in a folder, memory-mapped. Raises OSError, ValueError or KeyError where one of its files is missing or not as long as it should be."""
    offsets = np.load(folder / "offsets.npy")
    tokens = int(offsets[-1])
    flat = {
        name: np.memmap(folder / f"{name}.bin", dtype, "r", shape=(tokens,)) if tokens else np.empty(0, dtype)
        for name, dtype in (("input_ids", np.int32), ("trained", np.bool_))
    }
    kept = read_json(folder / "counts.json")
    lengths = Counter({int(length): count for length, count in kept["rows"]["lengths"].items()})
    counts = long_rows.Counts(**kept["rows"] | {"lengths": lengths, "named": tuple(map(tuple, kept["rows"]["named"]))})
    return Examples(**flat, offsets=offsets, lines=np.load(folder / "lines.npy"), counts=counts, unseen=kept["unseen"], key=folder.name)


# ---- in parallel


@dataclass(frozen=True)
class Portion:
    """The rows of a stretch of the split's file: flat tokens, which of them are trained, tokens per row, line of each row's record, and what was
    left out or not shown by the template."""

    input_ids: np.ndarray
    trained: np.ndarray
    lengths: list[int]
    lines: list[int]
    counts: long_rows.Counts
    unseen: Counter


def line_portions(source: Path) -> Iterator[tuple[int, int, int]]:
    """(byte where it begins, number of its first line, lines) of each stretch of PORTION lines."""
    with open(source, "rb") as file:
        start, first = 0, 1
        while batch := list(itertools.islice(file, PORTION)):
            yield start, first, len(batch)
            start, first = start + sum(map(len, batch)), first + len(batch)


@contextlib.contextmanager
def encoded(portions: list, *given) -> Iterator[Iterator[Portion]]:
    """The portions' results in order, from as many processes as there are cores, or from this one where there is little to do."""
    count = min(os.cpu_count() or 1, len(portions) // 4)
    if count < 2:
        yield map(Encoder(*given), portions)
        return
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(), *given))
    try:
        yield pool.map(work, portions)
    finally:
        pool.shutdown(cancel_futures=True)


_ENCODERS: list["Encoder"] = []
"""a worker process's own"""


def start_worker(parent: int, *given) -> None:
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _ENCODERS.append(Encoder(*given))


def work(portion: tuple[int, int, int]) -> Portion:
    return _ENCODERS[0](portion)


class Encoder:
    """Reads a portion of the split's file and tokenizes it."""

    def __init__(self, cfg: FinetuneVerb, base: Path, source: Path):
        self.cfg, self.source = cfg, source
        self.tokenizer = load_tokenizer(base, trust_remote_code=cfg.model.trust_remote_code)
        encoding.ensure_chat(self.tokenizer)
        self.eos_id = encoding.turn_end(self.tokenizer)

    def __call__(self, portion: tuple[int, int, int]) -> Portion:
        start, first, count = portion
        ids, trained, lengths, lines, counts = [], [], [], [], long_rows.Counts()
        unseen: Counter[str] = Counter()
        with open(self.source, "rb") as file:
            file.seek(start)
            for number, line in enumerate(itertools.islice(file, count), first):
                record = json.loads(line)
                examples, found = self.examples(record)
                counts, unseen = counts + found, unseen + self.unseen(record, examples)
                for example in examples:
                    ids += example.input_ids
                    # Nothing stands before a first token to predict it from.
                    trained += [False, *(label != encoding.IGNORE for label in example.labels[1:])]
                    lengths.append(len(example.input_ids))
                    lines.append(number)
        return Portion(np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_), lengths, lines, counts, unseen)

    def examples(self, record: dict) -> tuple[list[encoding.Encoded], long_rows.Counts]:
        t, encode = self.cfg.train, lambda messages: self.encode(messages, record.get("tools"))
        try:
            made = encode(record["messages"])
            return long_rows.fit_rows(made, record, policy=t.long_rows, max_length=t.max_length, encode=encode)
        except BadData as error:
            raise BadData(
                error.what, where=f"record '{record['id']}'", fix="mend the record, or use a model whose template takes such turns"
            ) from None

    def encode(self, messages: list[dict], tools: list | None) -> list[encoding.Encoded]:
        if self.cfg.legacy_mask == "qwen":
            return [encoding.encode_qwen_legacy(self.tokenizer, messages, tools, eos_id=self.eos_id)]
        if self.cfg.train.hidden_turns == "rows":
            return encoding.encode_turns(self.tokenizer, messages, tools, eos_id=self.eos_id)
        return [encoding.encode(self.tokenizer, messages, tools, eos_id=self.eos_id)]

    def unseen(self, record: dict, examples: list[encoding.Encoded]) -> Counter:
        """What of a record is not trained on as it stands there: tools that its template does not show, answers it shows otherwise as history."""
        tools, messages = record.get("tools"), record["messages"]
        ignored = tools and encoding.render(self.tokenizer, messages) == encoding.render(self.tokenizer, messages, tools)
        hidden = sum(example.untrained for example in examples) if self.cfg.train.hidden_turns == "skip" else 0
        return Counter({"tools": int(bool(ignored)), "turns": hidden})
