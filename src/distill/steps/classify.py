"""The teacher scores a sample, a classifier trained on its scores filters all (phi-1, Gunasekar et al. 2023, arXiv:2306.11644)."""

import heapq
from collections.abc import AsyncIterator, Iterable

from src.core.errors import BadData
from src.distill.classifier import Classifier, held_out
from src.distill.disk_rows import Spool
from src.distill.pipeline import Row, SetAside, Work
from src.distill.requests import TEXT, obj, request, stream, whole
from src.distill.texts import fill, grown, text_of
from src.settings.recipes import Classify

AT_ONCE = 256


async def classify(rows: AsyncIterator[Row], settings: Classify, work: Work) -> AsyncIterator[Row]:
    """Keeps the texts that the classifier finds good; how well it tells those it did not learn from is reported.

    The paper's classifier is a random forest over a code model's embeddings; here it is a logistic regression over hashed tokens, which needs no
    model. Where the sample is all there is, the scores themselves decide.
    """
    with Spool() as spool:
        drawn = []
        async for row in rows:
            heapq.heappush(drawn, (-work.draw(work.step, row.id).random(), spool.add(row)))
            if len(drawn) > settings.sample:
                heapq.heappop(drawn)
        sample = [spool[number] for number in sorted(number for _, number in drawn)]
        scores = await _scores(sample, settings, work)
        judge = _from_scores(scores, settings) if len(spool) == len(sample) else _from_classifier(sample, scores, settings, work)
        for first in range(0, len(spool), AT_ONCE):
            batch = [spool[number] for number in range(first, min(first + AT_ONCE, len(spool)))]
            for row, reason in zip(batch, judge(batch)):
                if reason:
                    work.set_aside(row, reason)
                else:
                    yield grown(row, scores={**row.data.get("scores", {}), "educational": scores[row.id]}) if row.id in scores else row


async def _scores(rows: list[Row], settings: Classify, work: Work) -> dict[str, int]:
    """{row id: score} of those the teacher scored; one it did not score stays in the run, unlabelled."""
    schema = obj(reasoning=TEXT, score=whole(settings.lowest, settings.highest))

    async def score(row: Row) -> Row:
        prompt = fill(settings.prompt, text=text_of(row), lowest=settings.lowest, highest=settings.highest)
        try:
            answer = await work.ask(request(prompt, settings.teacher, settings.sampling, schema=schema))
        except SetAside:
            return row
        return grown(row, answer, label=answer.value["score"])

    scored = {row.id: row.data["label"] async for row in work.each(stream(rows), score) if "label" in row.data}
    work.count("texts scored", len(scored))
    work.count("texts scored good", sum(score >= settings.good for score in scored.values()))
    if len(scored) < len(rows):
        work.count("scores missing", len(rows) - len(scored))
    return scored


def _from_scores(scores: dict[str, int], settings: Classify):
    def judge(rows: list[Row]) -> Iterable[str | None]:
        for row in rows:
            if row.id not in scores:
                yield "not scored"
            else:
                yield None if scores[row.id] >= settings.good else f"scored under {settings.good}"

    return judge


def _from_classifier(sample: list[Row], scores: dict[str, int], settings: Classify, work: Work):
    """Trains on the scored texts. Raises BadData where they teach nothing."""
    texts = [text_of(row) for row in sample if row.id in scores]
    good = [scores[row.id] >= settings.good for row in sample if row.id in scores]
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

    def judge(rows: list[Row]) -> Iterable[str | None]:
        for probability in classifier.probabilities([text_of(row) for row in rows]):
            yield None if probability >= settings.at_least else f"good with a probability under {settings.at_least:g}"

    return judge
