"""A judge on pairs of answers, each pair seen in both orders."""

from collections import Counter

from src.distill.agreement import Agreement, unequal
from src.distill.pipeline import Answer, Record, Records, SetAside, Work
from src.distill.requests import TEXT, ask_all, given, obj, request
from src.distill.texts import derive, fill, transcript
from src.settings.recipes import Compare

BOTH, AGAINST, TIE, DISAGREE, MISSING = (
    "chosen in both orders",
    "rejected in both orders",
    "tie in both orders",
    "orders disagree",
    "no verdict",
)
MEANING = {("first", "second"): BOTH, ("second", "first"): AGAINST, ("tie", "tie"): TIE}
"""what the verdicts on (chosen, rejected) and on (rejected, chosen) say together; all else disagrees"""


async def compare(records: Records, settings: Compare, work: Work) -> Records:
    """Keeps the pairs whose chosen answer the judge prefers in both orders, by more votes than the rejected one.

    A vote counts only if both orders agree (judges favour positions: Wang et al. 2023, arXiv:2305.17926); ties are an answer of their own.
    """
    agreement = Agreement(unequal)

    async def judge(record: Record) -> Record:
        if not {"chosen", "rejected"} <= record.data.keys():
            raise SetAside("no pair to compare")
        orders = [(record.data["chosen"], record.data["rejected"]), (record.data["rejected"], record.data["chosen"])]
        prompts = [
            fill(settings.prompt, conversation=transcript(record.messages[:-1]), first=first, second=second) for first, second in orders
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
        return derive(record, *answers, verdicts=outcomes)

    async for record in work.each(records, judge):
        outcomes = record.data["verdicts"]
        for outcome in outcomes:
            work.count(outcome)
        agreement.add(outcomes)
        if reason := _against(Counter(outcomes)):
            work.set_aside(record, reason)
        else:
            yield record
    agreement.report(work, "votes agree")


def _outcome(one: Answer | SetAside, other: Answer | SetAside) -> str:
    """What the verdicts on (chosen, rejected) and (rejected, chosen) say together."""
    if isinstance(one, SetAside) or isinstance(other, SetAside):
        return MISSING
    return MEANING.get((one.value["verdict"], other.value["verdict"]), DISAGREE)


def _against(outcomes: Counter) -> str | None:
    """Why a pair does not stay; None where it does."""
    if outcomes[BOTH] > max(outcomes[AGAINST], outcomes[TIE]):
        return None
    if outcomes[AGAINST] > outcomes[BOTH]:
        return "the judge prefers the rejected answer"
    return "a tie" if outcomes[TIE] else "the judge follows the order" if outcomes[DISAGREE] else "no verdict"
