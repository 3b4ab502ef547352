"""The rows of a split, as every stage but training reads them."""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from src.chat import encoding, unseen
from src.chat.template import Unteachable
from src.core.errors import BadData
from src.core.log import warn


def rows_of(records: Iterable[dict], tokenizer, what: str) -> Iterator[tuple[dict, encoding.Encoded]]:
    """Each record of a split with its row. A record that teaches nothing is left out; behind the last that is asked for that is said, with what else
    is not taught. Plain text is a row as it stands for a model that has no template of its own.

    what: "calibration", in front of what is said. Raises BadData, naming the record, where a text holds a control token.
    """
    notes: Counter[str] = Counter()
    try:
        for record in records:
            text = encoding.text_alone(record["messages"], record.get("tools")) if hasattr(tokenizer, "of_plain_text") else None
            if text is not None:
                yield record, encoding.of_text(text, tokenizer)
                continue
            try:
                taught = encoding.teach(tokenizer, record["messages"], record.get("tools"))
            except Unteachable:
                notes["refused"] += sum(message["role"] == "assistant" for message in record["messages"])
                continue
            except BadData as error:
                raise BadData(error.what, where=f"record '{record['id']}'", fix=error.fix) from None
            notes += taught.notes
            yield from ((record, row) for row in taught.rows)
    finally:
        for line in unseen.report(notes, what):
            warn(line)


def parts(input_ids: Sequence[int], labels: Sequence[int], tokenizer) -> list[tuple[str, bool]]:
    """A row as text, in (stretch, whether it is trained) parts."""
    pairs = zip(input_ids, labels, strict=True)
    stretches = itertools.groupby(pairs, key=lambda pair: pair[1] != encoding.IGNORE)
    return [(tokenizer.decode([token for token, _ in stretch]), trained) for trained, stretch in stretches]
