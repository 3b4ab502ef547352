"""What a data set is, told before anything is trained on it: rows as a model will see them, lengths, writing, and what stands in it twice."""

import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from src.chat import encoding, unseen
from src.chat.rows import parts
from src.chat.template import Unteachable
from src.core.errors import BadData
from src.core.log import mark, out, progress, say, shortened, table, warn
from src.records.conversations import Conversation
from src.records.held_out import NEAR, SAME, SHARED, SIMILARITY, WORDS, Doubles, EvaluationSets, said
from src.records.splits import SPLITS

LIMITS = (512, 1024, 2048, 4096, 8192)
"""lengths in tokens for which it is told what train.max_length would cut"""
SHOWN, SHORT, LETTERS = 3, 700, 500
"""rows that are printed, characters of a part of one, and letters of a message by which its writing is told"""


@dataclass
class Split:
    """One split, read once. tokens, trained: of each row, as a model sees it."""

    turns: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    trained: list[int] = field(default_factory=list)


def tell(folder: Path, tokenizer: Any) -> None:
    """Print all of it. folder: of train.jsonl, val.jsonl and calib.jsonl. tokenizer: transformers', with a chat template."""
    notes: Counter[str] = Counter()
    letters: Counter[str] = Counter()
    splits = {name: Split() for name in SPLITS}
    doubles, again, shown = Doubles("near"), Counter[str](), 0
    for name, row in progress(_rows(folder), "rows"):
        split = splits[name]
        split.turns.append(len(row["messages"]))
        letters.update(_letters(row))
        if double := doubles.of(_record(row)):
            again[double[0]] += 1
        try:
            taught = encoding.teach(tokenizer, row["messages"], row.get("tools"))
        except Unteachable:
            notes["refused"] += 1
            continue
        except BadData as error:
            warn(f"row '{row['id']}': {error.what}")
            continue
        notes += taught.notes
        for one in taught.rows:
            split.tokens.append(len(one.input_ids))
            split.trained.append(one.trained)
            if name == "train" and shown < SHOWN:
                out(f"row '{row['id']}', {len(one.input_ids)} tokens, {one.trained} of them trained:\n{_marked(one, tokenizer)}\n")
                shown += 1
    _print_lengths(splits)
    out("")
    _print_limits(splits["train"])
    out("")
    out("writing: " + ", ".join(f"{script} {share:.1%}" for script, share in _scripts(letters)))
    held = _overlap(folder)
    out(
        f"the same twice: {again[SAME]}; nearly the same ({SIMILARITY:.0%} of {WORDS} words in a row alike): {again[NEAR]}; train rows that share {SHARED} words in a row with val: {held}"
    )
    if notes:
        for line in unseen.report(notes, "preview"):
            say(line)


def _rows(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in SPLITS:
        with open(folder / f"{name}.jsonl", encoding="utf-8") as lines:
            for line in lines:
                yield name, json.loads(line)


def writing(rows: Iterable[dict[str, Any]]) -> list[tuple[str, float]]:
    """[(a script, such as Latin or Hangul, its share of the letters)] of conversations, the most frequent first."""
    return _scripts(Counter(letter for row in rows for letter in _letters(row)))


def _letters(row: dict[str, Any]) -> Iterator[str]:
    return (letter for part in said(row["messages"]) for letter in itertools.islice(filter(str.isalpha, part), LETTERS))


def _scripts(letters: Counter[str]) -> list[tuple[str, float]]:
    """By the first word of each letter's name in Unicode."""
    found: Counter[str] = Counter()
    for letter, count in letters.items():
        found[unicodedata.name(letter, "OTHER").split()[0].title()] += count
    return [(script, count / found.total()) for script, count in found.most_common(5) if count >= 0.0005 * found.total()]


def _marked(row: encoding.Encoded, tokenizer: Any) -> str:
    """A row as text, with what is trained standing out; long parts are shortened in their middle."""
    return "".join(mark(shortened(text, SHORT), trained) for text, trained in parts(row.input_ids, row.labels, tokenizer))


def _print_lengths(splits: dict[str, Split]) -> None:
    rows = []
    for name, split in splits.items():
        if split.tokens:
            at = [f"{int(value):,}" for value in (*np.percentile(split.tokens, (50, 90, 99)), max(split.tokens))]
            rows.append(
                [
                    name,
                    f"{len(split.turns):,}",
                    f"{np.mean(split.turns):.1f}",
                    f"{sum(split.tokens):,}",
                    *at,
                    f"{sum(split.trained) / sum(split.tokens):.0%}",
                ]
            )
    out(table(["split", "rows", "turns", "tokens", "median", "90 %", "99 %", "longest", "trained"], rows, right=range(1, 9)))


def _print_limits(split: Split) -> None:
    """What a limit on length would cost, for the limits that some row is longer than, and the first that none is."""
    rows, whole = [], sum(split.tokens)
    for limit in LIMITS:
        longer = [count for count in split.tokens if count > limit]
        rows.append(
            [
                f"{limit:,}",
                f"{len(longer):,}",
                f"{len(longer) / max(1, len(split.tokens)):.1%}",
                f"{sum(longer) - limit * len(longer):,}",
                f"{sum(count - limit for count in longer) / max(1, whole):.1%}",
            ]
        )
        if not longer:
            break
    out(table(["train.max_length", "longer rows", "", "tokens beyond it", ""], rows, right=range(5)))


def _overlap(folder: Path) -> int:
    """Rows of train that have so many words in a row with one of val."""
    held = EvaluationSets(text for name, row in _rows(folder) if name == "val" for text in said(row["messages"]))
    return sum(held.shared(_record(row)) is not None for name, row in _rows(folder) if name == "train")


def _record(row: dict[str, Any]) -> Conversation:
    tools = row.get("tools")
    return Conversation(row["id"], tuple(row["messages"]), tuple(tools) if tools is not None else None)
