"""Filters: what makes a row unfit is in src/distill/filters.py and near.py; here is which part of a row is looked at."""

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from src.core.errors import BadData
from src.core.log import warn
from src.distill import filters
from src.distill.near_duplicates import CodeOverlap, NearDuplicates, NgramOverlap
from src.distill.pipeline import Row, Work
from src.distill.texts import part, text_of
from src.settings.recipes import InLanguage, Length, Overlap, Refusal, Repetition
from src.settings.recipes import NearDuplicates as NearDuplicateSettings


async def sift(rows: AsyncIterator[Row], fault: Callable[[Row], str | None], work: Work) -> AsyncIterator[Row]:
    """The rows without a fault; the others are set aside with it."""
    async for row in rows:
        if reason := fault(row):
            work.set_aside(row, reason)
        else:
            yield row


def looked_at(row: Row, of: str) -> str:
    """The part of a row's messages; where it has none yet, the document it stands for."""
    return part(row.messages, of) if row.messages else text_of(row)


def length(rows: AsyncIterator[Row], settings: Length, work: Work) -> AsyncIterator[Row]:
    def fault(row: Row) -> str | None:
        if settings.unit == "turns":
            return filters.bounded(len(row.messages), "turns", settings.min, settings.max)
        return filters.length(looked_at(row, settings.of), settings.unit, settings.min, settings.max)

    return sift(rows, fault, work)


def language(rows: AsyncIterator[Row], settings: InLanguage, work: Work) -> AsyncIterator[Row]:
    """Of a translated row the language it was translated to counts."""

    def fault(row: Row) -> str | None:
        wanted = [row.data["language"]] if "language" in row.data else settings.languages
        return filters.language(looked_at(row, settings.of), wanted, settings.share)

    return sift(rows, fault, work)


def refusal(rows: AsyncIterator[Row], settings: Refusal, work: Work) -> AsyncIterator[Row]:
    return sift(rows, lambda row: filters.refusal(part(row.messages, "answer"), settings.phrases, settings.within), work)


def repetition(rows: AsyncIterator[Row], settings: Repetition, work: Work) -> AsyncIterator[Row]:
    return sift(rows, lambda row: filters.repetition(looked_at(row, settings.of), settings.n, settings.share, settings.run), work)


def near_duplicates(rows: AsyncIterator[Row], settings: NearDuplicateSettings, work: Work) -> AsyncIterator[Row]:
    """Of every row that went on a signature is kept, on disk, not its text."""
    index = NearDuplicates(n=settings.n, permutations=settings.permutations, similarity=settings.similarity)
    return sift(
        rows, lambda row: "a near-duplicate of an earlier row" if index.near(looked_at(row, settings.of)) is not None else None, work
    )


def overlap(rows: AsyncIterator[Row], settings: Overlap, work: Work) -> AsyncIterator[Row]:
    if not settings.sets:
        warn(f"{work.step}: no evaluation set is named (recipe.steps.{work.step}.sets), so nothing is compared with one")
        return rows
    texts = [text for path in settings.sets for text in evaluation_texts(Path(path))]
    words = NgramOverlap(texts, n=settings.n, shortest=settings.shortest)
    code = CodeOverlap(texts if settings.code else [], nodes=settings.nodes, match=settings.match)

    def fault(row: Row) -> str | None:
        text = looked_at(row, "all")
        if words.shared(text):
            return f"shares {settings.n} words in a row with an evaluation set"
        return "holds a function of an evaluation set" if code.shared(text) else None

    return sift(rows, fault, work)


def evaluation_texts(path: Path) -> Iterator[str]:
    """Every string in a file of JSON lines (.jsonl), or in a .json; else the file's lines and the file as a whole. Raises BadData."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            values = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            values = [json.loads(text)]
        else:
            values = [text, *text.splitlines()]
    except (ValueError, RecursionError) as error:
        raise BadData(f"no evaluation set: {error}", where=str(path), fix="give JSON lines or plain text in UTF-8") from None
    for value in values:
        yield from _strings(value)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _strings(inner)
