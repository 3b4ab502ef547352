"""One of several answers becomes the record's, or two become a preference. No teacher is asked."""

import re
import statistics
from collections import Counter

from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.rouge import rouge_l
from src.distill.texts import append_answer, derive
from src.records.near_duplicates import words
from src.settings.recipes import BestOf, Pair


async def best_of(records: Records, settings: BestOf, work: Work) -> Records:
    """The answer with the highest mean rating, or the one the others agree with; of equals the first.

    Agreement is self-consistency (Wang et al. 2022, arXiv:2203.11171) where `final` finds what has to agree, else the answer nearest to all others by
    ROUGE-L.
    """

    async def choose(record: Record) -> Record:
        answers = _answers(record)
        values = _means(record) if settings.by == "ratings" else _agreement(answers, settings.final)
        best = max(range(len(answers)), key=lambda i: values[i])
        if values[best] < settings.at_least:
            raise SetAside(f"best answer below {settings.at_least:g} by {settings.by}")
        scores = record.data["ratings"][best] if settings.by == "ratings" else {"agreement": round(values[best], 3)}
        return derive(
            record,
            messages=append_answer(record.messages, answers[best], record.data.get("reasoning", {}).get(answers[best], "")),
            scores=scores,
        )

    async for record in work.each(records, choose):
        yield record


async def pair(records: Records, settings: Pair, work: Work) -> Records:
    """Chosen: the answer rated best. Rejected: the lowest, or as Zephyr does (Tunstall et al. 2023, arXiv:2310.16944) a random other one."""

    async def choose(record: Record) -> Record:
        answers, means = _answers(record), _means(record)
        best = max(range(len(answers)), key=lambda i: means[i])
        others = [
            i
            for i in range(len(answers))
            if means[best] - means[i] >= settings.margin and means[i] < means[best] and answers[i] != answers[best]
        ]
        if not others:
            raise SetAside("no two answers differ enough")
        lowest = min(others, key=lambda i: means[i])
        other = lowest if settings.rejected == "lowest" else work.draw(work.step, record.id).choice(others)
        scores = {**record.data["ratings"][best], "chosen": round(means[best], 3), "rejected": round(means[other], 3)}
        return derive(
            record,
            messages=append_answer(record.messages, answers[best], record.data.get("reasoning", {}).get(answers[best], "")),
            scores=scores,
            chosen=answers[best],
            rejected=answers[other],
        )

    async for record in work.each(records, choose):
        yield record


def _answers(record: Record) -> list[str]:
    """The answers to choose from. Raises SetAside where there is no choice."""
    answers = record.data.get("answers", [])
    if len(answers) < 2:
        raise SetAside("fewer than two answers to choose from")
    return answers


def _means(record: Record) -> list[float]:
    """Mean over aspects of each answer's ratings."""
    if "ratings" not in record.data:
        raise SetAside("not rated")
    return [statistics.mean(rating.values()) for rating in record.data["ratings"]]


def _agreement(answers: list[str], final: str | None) -> list[float]:
    """For each answer the share of all that end as it does, or its mean ROUGE-L with the others. Answers without an end agree with none."""
    if final is None:
        parts = [words(answer) for answer in answers]
        return [statistics.mean(rouge_l(a, b) for j, b in enumerate(parts) if j != i) for i, a in enumerate(parts)]
    ends = [_end(answer, final) for answer in answers]
    counts = Counter(end for end in ends if end is not None)
    return [counts[end] / len(answers) if end is not None else 0.0 for end in ends]


def _end(answer: str, final: str) -> str | None:
    """The last match of `final`: its first group, or all of it where it has none; white space and case do not count."""
    found = list(re.finditer(final, answer))
    if not found:
        return None
    return " ".join((found[-1][1] if found[-1].re.groups else found[-1][0]).split()).casefold()
