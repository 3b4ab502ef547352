"""The rows that a quantizer looks at: conversations of the calib split rendered as in training, over all lengths alike, and general text beside them."""

import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.errors import BadData
from src.core.log import progress, say, warn
from src.records.sources import opened
from src.settings.quantizers import Calibration

FEW = 4096
"""tokens below which a Hessian of a model's width is mostly guessed"""

TEXT = 0.25
"""part of the tokens that general text gives, unless said"""


@dataclass(frozen=True)
class Rows:
    """chats: conversations with what is trained of them. text: token ids of general text."""

    chats: list[encoding.Encoded]
    text: list[list[int]]

    @property
    def ids(self) -> list[list[int]]:
        return [row.input_ids for row in self.chats] + self.text

    @property
    def tokens(self) -> int:
        return sum(map(len, self.ids))


def read(how: Calibration, split: Path, text: Path | None, tokenizer) -> Rows:
    """Up to how.rows conversations of a split, cut at how.max_length tokens; text until it is how.text_share of the tokens. What was taken is said."""
    encoding.ensure_chat(tokenizer)
    lines = [line for line in open(split, encoding="utf-8") if line.strip()]
    some = [json.loads(lines[at]) for at in drawn([len(line) for line in lines], how.rows, how.seed)]
    chats, cut = [], 0
    for _, row in progress(rows_of(some, tokenizer, "calibration"), "tokenizing calibration", len(some)):
        cut += len(row.input_ids) > how.max_length
        chats.append(encoding.Encoded(row.input_ids[: how.max_length], row.labels[: how.max_length]))
    found = Rows(chats[: how.rows], [])
    told = f"quantize: calibrates on {len(found.chats)} of {len(lines):,} conversations, {found.tokens:,} tokens"
    told += f"; {cut} were cut at {how.max_length} tokens" if cut else ""
    if text:
        share = TEXT if how.text_share == "auto" else how.text_share
        wanted = int(found.tokens * share / (1 - share))
        found = Rows(found.chats, list(_of_text(text, tokenizer, how.max_length, wanted)))
        general = sum(map(len, found.text))
        told += f"; and on {general:,} tokens of {text}"
        if general < wanted:
            warn(f"{text} has {general:,} tokens, fewer than the {wanted:,} that calibration.text_share={share:g} asks for")
    say(told)
    if found.tokens < FEW:
        warn(f"{found.tokens:,} calibration tokens are few; more records, or a larger data.calib, quantize better")
    return found


def check_text(path: Path) -> None:
    """Raises BadData where a file begins as no text, or has none."""
    if not opened.begins(path).strip():
        raise BadData("calibration.text is empty", where=str(path), fix="calibration.text=null leaves it out")


def drawn(lengths: list[int], count: int, seed: int) -> list[int]:
    """Which of some rows to take, in their order: one of each of `count` strata of equally many rows, from the shortest to the longest."""
    if len(lengths) <= count:
        return list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    draw = random.Random(seed)
    edges = [len(order) * i // count for i in range(count + 1)]
    return sorted(order[draw.randrange(begin, end)] for begin, end in itertools.pairwise(edges))


def _of_text(path: Path, tokenizer, longest: int, tokens: int) -> Iterator[list[int]]:
    """Rows of at most `longest` tokens from the beginning of a text, `tokens` in all. Bytes that are no UTF-8 are left out."""
    left: list[int] = []
    with opened.text(path) as file:
        while tokens > 0 and (piece := file.read(1 << 16)):
            left += tokenizer(piece.encode(errors="ignore").decode(), add_special_tokens=False)["input_ids"]
            while tokens > 0 and len(left) >= min(longest, tokens):
                row, left = left[: min(longest, tokens)], left[min(longest, tokens) :]
                tokens -= len(row)
                yield row
    if tokens > 0 and left:
        yield left
