"""A judge's scores of answers, by aspect."""

import statistics
from dataclasses import dataclass

from src.distill.agreement import Agreement, squared
from src.distill.pipeline import Answer, Record, Records, Request, SetAside, Work
from src.distill.requests import TEXT, array, ask_all, given, obj, request, whole
from src.distill.texts import derive, fill, listed, part, transcript, usable
from src.settings.recipes import Rate

Scores = dict[str, list[list[int]]]
"""{aspect: for each candidate the scores that count}"""


@dataclass
class Vote:
    """One rating of all candidates in one aspect.

    order: the candidates' numbers as the judge saw them; critiques and scores come in it. scores: None where one does not count.
    asked: the answers it rests on.
    """

    aspect: str
    order: list[int]
    critiques: list[str]
    scores: list[int | None]
    asked: list[Answer]


async def rate(records: Records, settings: Rate, work: Work) -> Records:
    """Mean scores by aspect, as UltraFeedback has them (Cui et al. 2023, arXiv:2310.01377): the judge sees all answers to a prompt together.

    Into data["ratings"], one {aspect: mean} for each of data["answers"]; where there are none, into data["scores"] for the conversation as it is.
    The votes themselves stay in data["votes"]. Unlike UltraFeedback, every vote shows the answers in another order, the critique is asked before the
    score, and a score that does not follow from its critique (by a second question) does not count; an answer left without one is left out.
    """
    agreement = Agreement(squared)

    async def judge(record: Record) -> Record:
        if not record.messages:
            raise SetAside("nothing to rate")
        candidates = record.data.get("answers") or [part(record.messages, "answer") or "(not answered yet)"]
        votes = await _votes(record, candidates, settings, work)
        if settings.check is not None:
            votes = await _checked(votes, settings.check, settings, work)
        scores = _by_candidate(votes, list(settings.aspects), len(candidates))
        return derive(record, *(answer for vote in votes for answer in vote.asked), **_found(record, candidates, scores, work))

    async for record in work.each(records, judge):
        for of_all in record.data["votes"].values():
            for of_one in of_all:
                agreement.add(of_one)
        yield record
    agreement.report(work, "votes agree")


async def _votes(record: Record, candidates: list[str], settings: Rate, work: Work) -> list[Vote]:
    """The votes that the judge gave. Raises SetAside where an aspect has none."""
    answered = "answers" not in record.data and record.messages[-1]["role"] == "assistant"
    conversation = transcript(record.messages[:-1] if answered else record.messages)
    ballots = [(aspect, vote) for aspect in settings.aspects for vote in range(settings.votes)]
    orders = [_shuffled(len(candidates), work, record.id, aspect, vote) for aspect, vote in ballots]
    requests = [
        _rating(conversation, [candidates[i] for i in order], aspect, vote, settings) for (aspect, vote), order in zip(ballots, orders)
    ]
    results = await ask_all(work, requests)
    if missing := sum(isinstance(result, SetAside) for result in results):
        work.count("votes missing", missing)
    for aspect in settings.aspects:
        given([result for (of, _), result in zip(ballots, results) if of == aspect])
    return [_vote(aspect, order, result) for (aspect, _), order, result in zip(ballots, orders, results) if isinstance(result, Answer)]


def _shuffled(count: int, work: Work, *words: str | int) -> list[int]:
    order = list(range(count))
    work.draw(work.step, *words).shuffle(order)
    return order


def _rating(conversation: str, shown: list[str], aspect: str, vote: int, settings: Rate) -> Request:
    """The request for one vote on the candidates as shown."""
    prompt = fill(
        settings.prompt,
        conversation=conversation,
        answers=listed(shown, "answer"),
        aspect=settings.aspects[aspect],
        lowest=settings.lowest,
        highest=settings.highest,
        count=len(shown),
    )
    entry = obj(critique=TEXT, score=whole(settings.lowest, settings.highest))
    return request(prompt, settings.teacher, settings.sampling, seed=vote, schema=obj(ratings=array(entry, len(shown), len(shown))))


def _vote(aspect: str, order: list[int], answer: Answer) -> Vote:
    ratings = answer.value["ratings"]
    return Vote(aspect, order, [_sound(r["critique"]) for r in ratings], [r["score"] for r in ratings], [answer])


def _sound(critique: str) -> str:
    """The critique as it can be shown to a judge; empty where it holds what no text holds."""
    try:
        return usable(critique)
    except SetAside:
        return ""


async def _checked(votes: list[Vote], check: str, settings: Rate, work: Work) -> list[Vote]:
    """The votes whose critiques were read anew, with None for each score further than `tolerance` from what its critique deserves."""
    checked = []
    for vote, result in zip(votes, await ask_all(work, [_reading(vote, check, settings) for vote in votes])):
        if isinstance(result, SetAside):
            work.count("checks missing")
            continue
        scores = [
            score if critique and abs(score - deserved) <= settings.tolerance else None
            for score, critique, deserved in zip(vote.scores, vote.critiques, result.value["scores"])
        ]
        work.count("scores against their critique", scores.count(None))
        work.count("scores checked", len(scores))
        checked.append(Vote(vote.aspect, vote.order, vote.critiques, scores, [*vote.asked, result]))
    return checked


def _reading(vote: Vote, check: str, settings: Rate) -> Request:
    """The request for the scores that a vote's critiques deserve, read alone."""
    count = len(vote.critiques)
    prompt = fill(
        check,
        critiques=listed(vote.critiques, "critique"),
        aspect=settings.aspects[vote.aspect],
        lowest=settings.lowest,
        highest=settings.highest,
        count=count,
    )
    schema = obj(scores=array(whole(settings.lowest, settings.highest), count, count))
    return request(prompt, settings.teacher, settings.sampling, schema=schema)


def _by_candidate(votes: list[Vote], aspects: list[str], count: int) -> Scores:
    scores: Scores = {aspect: [[] for _ in range(count)] for aspect in aspects}
    for vote in votes:
        for number, score in zip(vote.order, vote.scores):
            if score is not None:
                scores[vote.aspect][number].append(score)
    return scores


def _found(record: Record, candidates: list[str], scores: Scores, work: Work) -> dict:
    """What the record learns: means of the candidates that have a score in each aspect, and those scores. Raises SetAside where too few have."""
    rated = [i for i in range(len(candidates)) if all(of_all[i] for of_all in scores.values())]
    if len(rated) < len(candidates):
        work.count("answers without a score", len(candidates) - len(rated))
    if len(rated) < min(2, len(candidates)):
        raise SetAside("scores do not follow from critiques")
    votes = {aspect: [of_all[i] for i in rated] for aspect, of_all in scores.items()}
    means = [{aspect: round(statistics.mean(of_all[i]), 3) for aspect, of_all in scores.items()} for i in rated]
    if "answers" in record.data:
        return {"votes": votes, "answers": [candidates[i] for i in rated], "ratings": means}
    return {"votes": votes, "scores": {**record.data.get("scores", {}), **means[0]}}
