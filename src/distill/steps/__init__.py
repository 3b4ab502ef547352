"""The steps of recipes by their kind: each takes records, its settings and the run's Work, and gives records."""

from src.distill.pipeline import StepFunction
from src.distill.steps import (
    choose,
    classify,
    code,
    compare,
    documents,
    evolve,
    filters,
    magpie,
    rate,
    respond,
    select,
    self_instruct,
    translate,
)

STEPS: dict[str, StepFunction] = {
    "respond": respond.respond,
    "best_of": choose.best_of,
    "rate": rate.rate,
    "pair": choose.pair,
    "compare": compare.compare,
    "self_instruct": self_instruct.self_instruct,
    "instances": self_instruct.instances,
    "evolve": evolve.evolve,
    "magpie": magpie.magpie,
    "translate": translate.translate,
    "select": select.select,
    "classify": classify.classify,
    "exercise": code.exercise,
    "run_code": code.run_code,
    "chunk": documents.chunk,
    "questions": documents.questions,
    "ground": documents.ground,
    "length": filters.length,
    "language": filters.language,
    "refusal": filters.refusal,
    "repetition": filters.repetition,
    "near_duplicates": filters.near_duplicates,
    "overlap": filters.overlap,
}
