"""The best records that are not like one another (DEITA, Liu et al. 2023, arXiv:2312.15685)."""

import math
import zlib
from collections import Counter

import numpy as np

from src.distill.disk_records import Spool
from src.distill.pipeline import Record, Records, Work
from src.distill.texts import part
from src.records.near_duplicates import words
from src.settings.recipes import Select

COLUMNS = 2048


async def select(records: Records, settings: Select, work: Work) -> Records:
    """Goes through all records from the highest product of scores down and takes each that is not like one taken before, until there are enough.

    DEITA scores with models trained for it and compares by a LLaMA's embeddings; here a judge scores (`rate`), and likeness is the cosine of hashed
    tf-idf vectors over words, so that nothing but the records is needed. Records come out in the order they were taken.
    """
    with Spool() as spool:
        order, frequency = [], np.zeros(COLUMNS)
        async for record in records:
            if missing := [aspect for aspect in settings.by if aspect not in record.data.get("scores", {})]:
                work.set_aside(record, f"not rated for {missing[0]}")
                continue
            columns, _ = _counts(record)
            frequency[columns] += 1
            order.append((-math.prod(record.data["scores"][aspect] for aspect in settings.by), spool.add(record)))
        rarity = np.log((1 + len(spool)) / (1 + frequency)) + 1
        taken = np.zeros((min(settings.rows, len(spool)), COLUMNS), np.float32)
        count = 0
        for _, number in sorted(order):
            record = spool[number]
            if count == settings.rows:
                work.set_aside(record, "below the records chosen")
                continue
            vector = _vector(record, rarity)
            if count and (taken[:count] @ vector).max() >= settings.similarity:
                work.set_aside(record, "like a record already chosen")
                continue
            taken[count] = vector
            count += 1
            yield record


def _counts(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(columns, counts) of a record's hashed words."""
    counts = Counter(zlib.crc32(word.encode()) % COLUMNS for word in words(part(record.messages, "all")))
    return np.fromiter(counts.keys(), np.int64, len(counts)), np.fromiter(counts.values(), float, len(counts))


def _vector(record: Record, rarity: np.ndarray) -> np.ndarray:
    """(COLUMNS,) float32 of length 1, or zero for a record without words."""
    columns, counts = _counts(record)
    vector = np.zeros(COLUMNS)
    vector[columns] = (1 + np.log(counts)) * rarity[columns]
    return (vector / (np.linalg.norm(vector) or 1)).astype(np.float32)
