"""Filters: what makes a record unfit is in src/distill/filters.py and near.py; here is which part of a record is looked at."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from src.core.errors import BadData
from src.core.log import warn
from src.distill import filters
from src.distill.pipeline import Record, Records, Work
from src.distill.texts import part, text_of
from src.records.held_out import strings_in
from src.records.near_duplicates import CodeOverlap, MinHashIndex, NgramOverlap
from src.settings.recipes import InLanguage, Length, NearDuplicates, Overlap, Refusal, Repetition


async def sift(records: Records, fault: Callable[[Record], str | None], work: Work) -> Records:
    """The records without a fault; the others are set aside with it."""
    async for record in records:
        if reason := fault(record):
            work.set_aside(record, reason)
        else:
            yield record


def looked_at(record: Record, of: str) -> str:
    """The part of a record's messages; where it has none yet, the document it stands for."""
    return part(record.messages, of) if record.messages else text_of(record)


def length(records: Records, settings: Length, work: Work) -> Records:
    def fault(record: Record) -> str | None:
        if settings.unit == "turns":
            return filters.bounded(len(record.messages), "turns", settings.min, settings.max)
        return filters.length(looked_at(record, settings.of), settings.unit, settings.min, settings.max)

    return sift(records, fault, work)


def language(records: Records, settings: InLanguage, work: Work) -> Records:
    """Of a translated record the language it was translated to counts."""

    def fault(record: Record) -> str | None:
        wanted = [record.data["language"]] if "language" in record.data else settings.languages
        return filters.language(looked_at(record, settings.of), wanted, settings.share)

    return sift(records, fault, work)


def refusal(records: Records, settings: Refusal, work: Work) -> Records:
    return sift(records, lambda record: filters.refusal(part(record.messages, "answer"), settings.phrases, settings.within), work)


def repetition(records: Records, settings: Repetition, work: Work) -> Records:
    return sift(records, lambda record: filters.repetition(looked_at(record, settings.of), settings.n, settings.share, settings.run), work)


def near_duplicates(records: Records, settings: NearDuplicates, work: Work) -> Records:
    """Of every record that went on a signature is kept, on disk, not its text."""
    index = MinHashIndex(n=settings.n, permutations=settings.permutations, similarity=settings.similarity)
    return sift(
        records,
        lambda record: "a near-duplicate of an earlier record" if index.near(looked_at(record, settings.of)) is not None else None,
        work,
    )


def overlap(records: Records, settings: Overlap, work: Work) -> Records:
    if not settings.sets:
        warn(f"{work.step}: no evaluation set is named (recipe.steps.{work.step}.sets), so nothing is compared with one")
        return records
    texts = [text for path in settings.sets for text in evaluation_texts(Path(path))]
    words = NgramOverlap(texts, n=settings.n, shortest=settings.shortest)
    code = CodeOverlap(texts if settings.code else [], nodes=settings.nodes, match=settings.match)

    def fault(record: Record) -> str | None:
        text = looked_at(record, "all")
        if words.shared(text):
            return f"shares {settings.n} words in a row with an evaluation set"
        return "holds a function of an evaluation set" if code.shared(text) else None

    return sift(records, fault, work)


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
        yield from strings_in(value)
