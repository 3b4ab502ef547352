"""What a training set must not hold: text of evaluation sets, and, where that is asked, what it holds already.

A record is looked at by what its turns say: contents, reasoning and calls. System texts are left out, since many records share one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from src.core.errors import AGAIN, BadData
from src.records.conversations import Conversation
from src.records.formats import KNOWN
from src.records.json_stream import Damaged, Malformed
from src.records.near_duplicates import MinHashIndex, NgramOverlap
from src.records.sources import kinds

WORDS, SIMILARITY = 3, 0.7
"""words in a feature, and the share of features from which two records are nearly the same; as distill's recipes have them"""
SHARED, SHORTEST = 13, 8
"""words in a row that no record shares with an evaluation set: GPT-3's (Brown et al. 2020, arXiv:2005.14165); a text of fewer counts whole from SHORTEST on"""
QUOTED = 200
SAME, NEAR = "a duplicate of an earlier record", "a near-duplicate of an earlier record"


def said(messages: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """What the turns of a conversation say, system texts aside."""
    for message in messages:
        if message["role"] != "system":
            yield str(message.get("content") or "")
            yield message.get("reasoning_content") or ""
            for call in message.get("tool_calls") or ():
                yield f"{call['function']['name']} {json.dumps(call['function']['arguments'], ensure_ascii=False)}"


class Doubles:
    """Finds records that say again what an earlier one said.

    kind: "exact", the same messages and tools; "near": also those with so many words in a row alike. Memory: a digest and an id a record; signatures of near ones lie on disk.
    """

    def __init__(self, kind: Literal["exact", "near"]):
        self._index = MinHashIndex(n=WORDS, permutations=128, similarity=SIMILARITY) if kind == "near" else None
        self._same: dict[int, str] = {}
        self._indexed: list[str] = []

    def of(self, record: Conversation) -> tuple[str, str] | None:
        """(reason, the earlier record's id) of a record; None, and it is remembered, where it says something new."""
        key = int(record.digest()[:16], 16)
        if key in self._same:
            return SAME, f"of {self._same[key]}"
        if self._index:
            if (number := self._index.near("\n".join(said(record.messages)))) is not None:
                return NEAR, f"of {self._indexed[number]}"
            self._indexed.append(record.id)
        self._same[key] = record.id
        return None


class EvaluationSets:
    """Texts of evaluation sets, of which no record may share so many words in a row."""

    def __init__(self, texts: Iterable[str]):
        self._known = NgramOverlap(texts, n=SHARED, shortest=SHORTEST)

    def shared(self, record: Conversation) -> str | None:
        """The first words in a row that a conversation shares with one of them; None where it shares none."""
        return next((found[:QUOTED] for text in said(record.messages) if (found := self._known.shared(text))), None)


def strings(file: kinds.File) -> Iterator[str]:
    """Every string in a file's records. Raises BadData where one cannot be read: a set read in part would let the rest through."""
    try:
        for record in file.records(KNOWN):
            if isinstance(record.value, Malformed):
                raise BadData(
                    f"a record of an evaluation set cannot be read: {record.value}", where=f"{file.path} line {record.line}", fix=AGAIN
                )
            yield from strings_in(record.value)
    except Damaged as damage:
        raise BadData(f"the evaluation set is damaged: {damage}", where=f"{file.path} line {damage.line}", fix=AGAIN) from None


def strings_in(value: object) -> Iterator[str]:
    """Every string in a value of JSON; names of fields are none."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings_in(inner)
