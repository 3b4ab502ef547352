"""Judges: ratings by aspect, and pairs seen in both orders."""

import statistics
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass

from src.distill.agreement import Agreement, squared, unequal
from src.distill.requests import TEXT, array, ask_all, given, obj, request, whole
from src.distill.texts import fill, grown, kept, listed, part, transcript
from src.distill.work import Answer, Row, SetAside, Work
from src.recipes import Compare, Rate


@dataclass(frozen=True)
class Vote:
    """One judge's ratings of all answers in one aspect. order: the answers' numbers as the judge saw them. keys: of the requests."""

    aspect: str
    order: list[int]
    critiques: list[str]
    scores: list[int]
    answers: list[Answer]


async def rate(rows: AsyncIterator[Row], settings: Rate, work: Work) -> AsyncIterator[Row]:
    """Mean scores by aspect, as UltraFeedback has them (Cui et al. 2023, arXiv:2310.01377): the judge sees all answers to a prompt together.

    Into data["ratings"], one {aspect: mean} for each of data["answers"]; where there are none, into data["scores"] for the conversation as it is.
    The votes themselves stay in data["votes"]. Unlike UltraFeedback, every vote shows the answers in another order, the critique is asked before the
    score, and a score that does not follow from its critique (by a second question) does not count; an answer left without one is left out.
    """
    agreement = Agreement(squared)

    async def judge(row: Row) -> Row:
        candidates = row.data.get("answers") or [part(row.messages, "answer") or "(not answered yet)"]
        votes = await _votes(row, candidates, settings, work)
        scores = {aspect: [[] for _ in candidates] for aspect in settings.aspects}
        for vote in await _consistent(votes, settings, work):
            for number, score in zip(vote.order, vote.scores):
                if score is not None:
                    scores[vote.aspect][number].append(score)
        rated = [i for i in range(len(candidates)) if all(of_all[i] for of_all in scores.values())]
        if len(rated) < len(candidates):
            work.count("answers without a score", len(candidates) - len(rated))
        if len(rated) < min(2, len(candidates)):
            raise SetAside("scores do not follow from critiques")
        means = [{aspect: round(statistics.mean(of_all[i]), 3) for aspect, of_all in scores.items()} for i in rated]
        if "answers" in row.data:
            found = {"answers": [candidates[i] for i in rated], "ratings": means}
        else:
            found = {"scores": {**row.data.get("scores", {}), **means[0]}}
        counted = {aspect: [of_all[i] for i in rated] for aspect, of_all in scores.items()}
        return grown(row, *(answer for vote in votes for answer in vote.answers), votes=counted, **found)

    async for row in work.each(rows, judge):
        for of_all in row.data["votes"].values():
            for of_one in of_all:
                agreement.add(of_one)
        yield row
    agreement.report(work, "votes agree")


async def _votes(row: Row, candidates: list[str], settings: Rate, work: Work) -> list[Vote]:
    """A vote for each aspect and number that the judge answered. Raises SetAside where an aspect has none."""
    conversation = (
        row.messages[:-1] if "answers" not in row.data and row.messages[-1:] and row.messages[-1]["role"] == "assistant" else row.messages
    )
    places = [(aspect, vote) for aspect in settings.aspects for vote in range(settings.votes)]
    orders = [_shuffled(len(candidates), work, work.step, row.id, aspect, vote) for aspect, vote in places]
    entry = obj(critique=TEXT, score=whole(settings.lowest, settings.highest))
    schema = obj(ratings=array(entry, len(candidates), len(candidates)))
    requests = [
        request(
            fill(
                settings.prompt,
                conversation=transcript(conversation),
                answers=listed((candidates[i] for i in order), "answer"),
                aspect=settings.aspects[aspect],
                lowest=settings.lowest,
                highest=settings.highest,
                count=len(candidates),
            ),
            settings.teacher,
            settings.sampling,
            seed=vote,
            schema=schema,
        )
        for (aspect, vote), order in zip(places, orders)
    ]
    results = await ask_all(work, requests)
    if missing := sum(isinstance(result, SetAside) for result in results):
        work.count("votes missing", missing)
    for aspect in settings.aspects:
        given([result for (of, _), result in zip(places, results) if of == aspect])
    return [
        Vote(
            aspect, order, [_sound(r["critique"]) for r in result.value["ratings"]], [r["score"] for r in result.value["ratings"]], [result]
        )
        for (aspect, _), order, result in zip(places, orders, results)
        if isinstance(result, Answer)
    ]


def _sound(critique: str) -> str:
    """The critique as it can be shown to a judge; empty where it holds what no text holds."""
    try:
        return kept(critique)
    except SetAside:
        return ""


def _shuffled(count: int, work: Work, *words: str | int) -> list[int]:
    order = list(range(count))
    work.draw(*words).shuffle(order)
    return order


async def _consistent(votes: list[Vote], settings: Rate, work: Work) -> list[Vote]:
    """The votes with None for each score that is further than `tolerance` from the one its critique deserves, or whose critique says nothing."""
    if settings.check is None:
        return votes
    requests = [
        request(
            fill(
                settings.check,
                critiques=listed(vote.critiques, "critique"),
                aspect=settings.aspects[vote.aspect],
                lowest=settings.lowest,
                highest=settings.highest,
                count=len(vote.critiques),
            ),
            settings.teacher,
            settings.sampling,
            schema=obj(scores=array(whole(settings.lowest, settings.highest), len(vote.critiques), len(vote.critiques))),
        )
        for vote in votes
    ]
    checked = []
    for vote, result in zip(votes, await ask_all(work, requests)):
        if isinstance(result, SetAside):
            work.count("checks missing")
            continue
        vote.answers.append(result)
        scores = [
            score if critique and abs(score - deserved) <= settings.tolerance else None
            for score, critique, deserved in zip(vote.scores, vote.critiques, result.value["scores"])
        ]
        work.count("scores against their critique", scores.count(None))
        work.count("scores checked", len(scores))
        checked.append(Vote(vote.aspect, vote.order, vote.critiques, scores, vote.answers))
    return checked


async def compare(rows: AsyncIterator[Row], settings: Compare, work: Work) -> AsyncIterator[Row]:
    """Keeps the pairs whose chosen answer the judge prefers in both orders, by more votes than the rejected one.

    A vote counts only if both orders agree (judges favour positions: Wang et al. 2023, arXiv:2305.17926); ties are an answer of their own.
    """
    agreement = Agreement(unequal)

    async def judge(row: Row) -> Row:
        orders = [(row.data["chosen"], row.data["rejected"]), (row.data["rejected"], row.data["chosen"])]
        prompts = [
            fill(settings.prompt, conversation=transcript(row.messages[:-1]), first=first, second=second) for first, second in orders
        ]
        schema = obj(reasoning=TEXT, verdict={"type": "string", "enum": ["first", "second", "tie"]})
        requests = [
            request(prompt, settings.teacher, settings.sampling, seed=vote, schema=schema)
            for vote in range(settings.votes)
            for prompt in prompts
        ]
        results = await ask_all(work, requests)
        answers = given(results)
        outcomes = [_outcome(one, other) for one, other in zip(results[::2], results[1::2])]
        return grown(row, *answers, verdicts=outcomes)

    async for row in work.each(rows, judge):
        outcomes = row.data["verdicts"]
        for outcome in outcomes:
            work.count(outcome)
        agreement.add(outcomes)
        if reason := _against(Counter(outcomes)):
            work.set_aside(row, reason)
        else:
            yield row
    agreement.report(work, "votes agree")


BOTH, AGAINST, TIE, DISAGREE, MISSING = (
    "chosen in both orders",
    "rejected in both orders",
    "tie in both orders",
    "orders disagree",
    "no verdict",
)
_MEANING = {("first", "second"): BOTH, ("second", "first"): AGAINST, ("tie", "tie"): TIE}


def _outcome(one: Answer | SetAside, other: Answer | SetAside) -> str:
    """What the verdicts on (chosen, rejected) and (rejected, chosen) say together."""
    if isinstance(one, SetAside) or isinstance(other, SetAside):
        return MISSING
    return _MEANING.get((one.value["verdict"], other.value["verdict"]), DISAGREE)


def _against(outcomes: Counter) -> str | None:
    """Why a pair does not stay; None where it does."""
    if outcomes[BOTH] > max(outcomes[AGAINST], outcomes[TIE]):
        return None
    if outcomes[AGAINST] > outcomes[BOTH]:
        return "the judge prefers the rejected answer"
    return "a tie" if outcomes[TIE] else "the judge follows the order" if outcomes[DISAGREE] else "no verdict"
