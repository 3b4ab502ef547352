"""The teacher scores a sample, a classifier trained on its scores filters all (phi-1, Gunasekar et al. 2023, arXiv:2306.11644)."""

import heapq
from collections.abc import Iterable

from src.core.errors import BadData
from src.distill.classifier import Classifier, held_out
from src.distill.disk_records import Spool
from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.requests import TEXT, obj, request, stream, whole
from src.distill.texts import derive, fill, text_of
from src.settings.recipes import Classify

AT_ONCE = 256


async def classify(records: Records, settings: Classify, work: Work) -> Records:
    """Keeps the texts that the classifier finds good; how well it tells those it did not learn from is reported.

    The paper's classifier is a random forest over a code model's embeddings; here it is a logistic regression over hashed tokens, which needs no
    model. Where the sample is all there is, the scores themselves decide.
    """
    with Spool() as spool:
        drawn: list[tuple[float, int]] = []
        async for record in records:
            heapq.heappush(drawn, (-work.draw(work.step, record.id).random(), spool.add(record)))
            if len(drawn) > settings.sample:
                heapq.heappop(drawn)
        sample = [spool[number] for number in sorted(number for _, number in drawn)]
        scores = await _scores(sample, settings, work)
        judge = _from_scores(scores, settings) if len(spool) == len(sample) else _from_classifier(sample, scores, settings, work)
        for first in range(0, len(spool), AT_ONCE):
            batch = [spool[number] for number in range(first, min(first + AT_ONCE, len(spool)))]
            for record, reason in zip(batch, judge(batch)):
                if reason:
                    work.set_aside(record, reason)
                else:
                    yield (
                        derive(record, scores={**record.data.get("scores", {}), "educational": scores[record.id]})
                        if record.id in scores
                        else record
                    )


async def _scores(records: list[Record], settings: Classify, work: Work) -> dict[str, int]:
    """{row id: score} of those the teacher scored; one it did not score stays in the run, unlabelled."""
    schema = obj(reasoning=TEXT, score=whole(settings.lowest, settings.highest))

    async def score(record: Record) -> Record:
        prompt = fill(settings.prompt, text=text_of(record), lowest=settings.lowest, highest=settings.highest)
        try:
            answer = await work.ask(request(prompt, settings.teacher, settings.sampling, schema=schema))
        except SetAside:
            return record
        return derive(record, answer, label=answer.value["score"])

    scored = {record.id: record.data["label"] async for record in work.each(stream(records), score) if "label" in record.data}
    work.count("texts scored", len(scored))
    work.count("texts scored good", sum(score >= settings.good for score in scored.values()))
    if len(scored) < len(records):
        work.count("scores missing", len(records) - len(scored))
    return scored


def _from_scores(scores: dict[str, int], settings: Classify):
    def judge(records: list[Record]) -> Iterable[str | None]:
        for record in records:
            if record.id not in scores:
                yield "not scored"
            else:
                yield None if scores[record.id] >= settings.good else f"scored under {settings.good}"

    return judge


def _from_classifier(sample: list[Record], scores: dict[str, int], settings: Classify, work: Work):
    """Trains on the scored texts. Raises BadData where they teach nothing."""
    texts = [text_of(record) for record in sample if record.id in scores]
    good = [scores[record.id] >= settings.good for record in sample if record.id in scores]
    try:
        classifier = Classifier(texts, good, l2=settings.l2)
        accuracy, area = held_out(texts, good, l2=settings.l2)
    except ValueError:
        raise BadData(
            f"of {len(good)} scored texts {sum(good)} are good, which teaches a classifier nothing",
            fix=[f"recipe.steps.{work.step}.sample scores more of them", f"recipe.steps.{work.step}.good moves the line"],
        ) from None
    work.measure("accuracy on texts held out", round(accuracy, 3))
    work.measure("area under the ROC curve, held out", round(area, 3))

    def judge(records: list[Record]) -> Iterable[str | None]:
        for probability in classifier.probabilities([text_of(record) for record in records]):
            yield None if probability >= settings.at_least else f"good with a probability under {settings.at_least:g}"

    return judge
