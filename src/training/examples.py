"""Conversations as token rows: made once, by several processes where that pays, kept by content and memory-mapped.

Imports torch only inside functions, since a process that tokenizes has to be there in no time.
"""

import contextlib
import functools
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from src.chat import encoding, long_rows, template, unseen
from src.chat.template import Unteachable
from src.core.artifact import Artifact, key_of, package_versions
from src.core.cache import kept_or_made
from src.core.errors import BadData
from src.core.files import read_json, sha256, write_json
from src.core.log import rank, ticks, warn
from src.core.processes import end_with_parent, import_quietly
from src.settings.verbs import FinetuneVerb
from src.training.chat_tokenizer import chat_tokenizer, template_text

PORTION = 256
"""conversations per task"""
WORTH_A_PROCESS = 5.0
"""seconds of work that it takes to start a process for it, which itself costs 1.5"""


@dataclass(frozen=True)
class Example:
    """One conversation: input_ids and labels, int32 of shape (tokens,); labels are -100 where the loss does not count, first token always.

    weights: of each token in the loss, fp32 of the same shape; None where all are 1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of one split, read from disk as they are needed.

    offsets: int64 of shape (rows + 1,); row i is tokens offsets[i] to offsets[i + 1]. lines: number of each row's record in the split's file, from 1.
    weights: of every token in the loss, fp32; None where all are 1. notes: what is not taught, see chat.unseen; answers: assistant turns in all.
    key: of the content the rows were made from.
    """

    input_ids: np.ndarray
    trained: np.ndarray
    weights: np.ndarray | None
    offsets: np.ndarray
    lines: np.ndarray
    counts: long_rows.Counts
    notes: Counter[str]
    named: dict[str, list[str]]
    answers: int
    key: str

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> Example:
        span = slice(self.offsets[i], self.offsets[i + 1])
        ids = np.asarray(self.input_ids[span])
        labels = np.where(self.trained[span], ids, encoding.IGNORE)
        return Example(ids, labels, None if self.weights is None else np.asarray(self.weights[span]))

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

    @functools.cached_property
    def trained_weight(self) -> np.ndarray:
        """Sum of the weights of each row's trained tokens, float64."""
        if self.weights is None:
            return self.trained_tokens.astype(np.float64)
        return np.diff(np.concatenate([[0], np.cumsum(np.where(self.trained, self.weights, 0), dtype=np.float64)])[self.offsets])


def examples_of(cfg: FinetuneVerb, dataset: Artifact, base: Artifact, split: str, cache: Path) -> Examples:
    """The rows of one split under the settings' length policy. Rank 0 makes them if `cache` does not hold them; the others read what it made.

    Raises BadData where a template refuses a conversation, or where more rows are lost than train.long_share allows.
    """
    from src.training.checkpoints import from_first

    folder = cache / content_key(cfg, dataset, base, split)
    if rank() == 0:
        folder = kept_or_made(folder, partial(make, cfg, dataset.path / f"{split}.jsonl", base.path, split), open_examples)
    examples = open_examples(from_first(folder))
    for line in unseen.report(examples.notes, split):
        warn(line)
    unseen.check(examples.notes, examples.answers, examples.named, policy=cfg.unseen, split=split)
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
        "chat": [cfg.legacy_mask, template_text(cfg), cfg.template, cfg.reasoning, cfg.today],
        "code": [sha256(Path(module)) for module in (template.__file__, encoding.__file__, long_rows.__file__, __file__)],
        "packages": {name: package_versions()[name] for name in ("tokenizers", "transformers")},
    }
    return key_of("tokens", 1, settings, {})


def make(cfg: FinetuneVerb, source: Path, base: Path, split: str, folder: Path) -> None:
    """Tokenize a split into `folder`."""
    portions = list(line_portions(source))
    counts, lengths, lines, answers = long_rows.Counts(), [0], [], 0
    notes: Counter[str] = Counter()
    named: dict[str, list[str]] = {}
    weighted: list[tuple[int, np.ndarray]] = []
    with (
        open(folder / "input_ids.bin", "wb") as ids,
        open(folder / "trained.bin", "wb") as trained,
        encoded(portions, cfg, base, source) as made,
        ticks(sum(count for _, _, count in portions), f"tokenizing {split}") as tick,
    ):
        for portion, (_, _, count) in zip(made, portions):
            tick(count)
            portion.input_ids.tofile(ids)
            portion.trained.tofile(trained)
            if portion.weights is not None:
                weighted.append((sum(lengths), portion.weights))
            lengths += portion.lengths
            lines += portion.lines
            counts += portion.counts
            notes += portion.notes
            answers += portion.answers
            for why, names in portion.named.items():
                named[why] = [*named.get(why, []), *names][: long_rows.NAMED]
    if weighted:
        weights = np.lib.format.open_memmap(folder / "weights.npy", "w+", np.float32, (sum(lengths),))
        weights[:] = 1
        for begin, some in weighted:
            weights[begin : begin + len(some)] = some
        weights.flush()
    np.save(folder / "offsets.npy", np.cumsum(lengths, dtype=np.int64))
    np.save(folder / "lines.npy", np.array(lines, dtype=np.int64))
    write_json(folder / "counts.json", {"rows": vars(counts), "notes": dict(notes), "named": named, "answers": answers})


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
    weights = np.load(folder / "weights.npy", mmap_mode="r") if (folder / "weights.npy").is_file() else None
    return Examples(
        **flat,
        weights=weights,
        offsets=offsets,
        lines=np.load(folder / "lines.npy"),
        counts=counts,
        notes=Counter(kept["notes"]),
        named=kept["named"],
        answers=kept["answers"],
        key=folder.name,
    )


# ---- in parallel


@dataclass(frozen=True)
class Portion:
    """The rows of a stretch of the split's file: flat tokens, which of them are trained and their weights, tokens per row, line of each row's record,
    and what was left out or not shown by the template, with the ids of the first such records."""

    input_ids: np.ndarray
    trained: np.ndarray
    weights: np.ndarray | None
    lengths: list[int]
    lines: list[int]
    counts: long_rows.Counts
    notes: Counter[str]
    named: dict[str, list[str]]
    answers: int


def line_portions(source: Path) -> Iterator[tuple[int, int, int]]:
    """(byte where it begins, number of its first line, lines) of each stretch of PORTION lines."""
    with open(source, "rb") as file:
        start, first = 0, 1
        while batch := list(itertools.islice(file, PORTION)):
            yield start, first, len(batch)
            start, first = start + sum(map(len, batch)), first + len(batch)


@contextlib.contextmanager
def encoded(portions: list, *given) -> Iterator[Iterator[Portion]]:
    """The portions' results in order: from this process, and from as many as there are cores once its speed shows that they pay."""
    encoder, begun = Encoder(*given), 0.0
    with contextlib.ExitStack() as stack:

        def results() -> Iterator[Portion]:
            nonlocal begun
            for done, portion in enumerate(portions):
                if done == 1:  # the first is slower: its template has to be learnt
                    begun = time.process_time()
                elif done and (count := processes_for((time.process_time() - begun) / (done - 1) * (len(portions) - done))) > 1:
                    pool = ProcessPoolExecutor(
                        count, mp_context=get_context("spawn"), initializer=start_worker, initargs=(os.getpid(), *given)
                    )
                    stack.callback(pool.shutdown, cancel_futures=True)
                    yield from pool.map(work, portions[done:])
                    return
                yield encoder(portion)

        yield results()


def processes_for(seconds: float) -> int:
    """How many processes are worth starting for so much work."""
    return min(os.cpu_count() or 1, int(seconds / WORTH_A_PROCESS))


_ENCODERS: list["Encoder"] = []
"""a worker process's own"""


def start_worker(parent: int, *given) -> None:
    end_with_parent(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    import_quietly("transformers.models.auto.tokenization_auto", without=["torch"])  # which tokenizers do without
    _ENCODERS.append(Encoder(*given))


def work(portion: tuple[int, int, int]) -> Portion:
    return _ENCODERS[0](portion)


class Encoder:
    """Reads a portion of the split's file and tokenizes it."""

    def __init__(self, cfg: FinetuneVerb, base: Path, source: Path):
        self.cfg, self.source = cfg, source
        self.tokenizer, _ = chat_tokenizer(cfg, base)

    def __call__(self, portion: tuple[int, int, int]) -> Portion:
        start, first, count = portion
        ids, trained, weights, lengths, lines, counts = [], [], [], [], [], long_rows.Counts()
        notes, named, answers = Counter[str](), dict[str, list[str]](), 0
        with open(self.source, "rb") as file:
            file.seek(start)
            for number, line in enumerate(itertools.islice(file, count), first):
                record = json.loads(line)
                examples, found, missed = self.examples(record)
                counts, notes = counts + found, notes + missed
                answers += sum(message["role"] == "assistant" for message in record["messages"])
                share = float(record.get("weight", 1))
                for why in missed:
                    if len(named.setdefault(why, [])) < long_rows.NAMED:
                        named[why].append(str(record["id"]))
                for example in examples:
                    ids += example.input_ids
                    # Nothing stands before a first token to predict it from.
                    trained += [False, *(label != encoding.IGNORE for label in example.labels[1:])]
                    weights += [share * weight for weight in example.weights] if example.weights else [share] * len(example.input_ids)
                    lengths.append(len(example.input_ids))
                    lines.append(number)
        own = np.array(weights, dtype=np.float32)
        kept = own if (own != 1).any() else None
        flat = np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_), kept
        return Portion(*flat, lengths, lines, counts, notes, named, answers)

    def examples(self, record: dict) -> tuple[list[encoding.Encoded], long_rows.Counts, Counter[str]]:
        """A record's rows, what became of it for its length, and what of it is not taught."""
        t, notes = self.cfg.train, Counter[str]()

        def encode(messages: Sequence[dict]) -> list[encoding.Encoded]:
            notes.clear()
            if self.cfg.legacy_mask == "qwen":
                if any(m["role"] == "tool" or m.keys() & {"tool_calls", "reasoning_content", "weight"} for m in messages):
                    notes["legacy"] += sum(message["role"] == "assistant" for message in messages)
                    return []
                return [encoding.encode_qwen_legacy(self.tokenizer, messages, eos_id=encoding.turn_end(self.tokenizer))]
            taught = encoding.teach(self.tokenizer, messages, record.get("tools"), each=t.hidden_turns == "rows")
            notes.update(taught.notes)
            return taught.rows

        try:
            made = encode(record["messages"])
        except Unteachable:
            return [], long_rows.Counts(), Counter(refused=sum(m["role"] == "assistant" for m in record["messages"]))
        except BadData as error:
            raise BadData(error.what, where=f"record '{record['id']}'", fix=error.fix) from None
        whole = notes.copy()
        if not made:
            return [], long_rows.Counts(), whole

        def part(messages: Sequence[dict]) -> list[encoding.Encoded]:
            with contextlib.suppress(Unteachable):  # a template may refuse a part of what it takes whole
                return encode(messages)
            return []

        rows, counts = long_rows.fit_rows(made, record, policy=t.long_rows, max_length=t.max_length, encode=part)
        return rows, counts, whole
