"""The steps of recipes by their kind: each takes rows, its settings and the run's Work, and gives rows."""

from src.distill.steps import choose, classify, code, documents, evolve, filters, judge, magpie, respond, select, self_instruct, translate

STEPS = {
    "respond": respond.respond,
    "best_of": choose.best_of,
    "rate": judge.rate,
    "pair": choose.pair,
    "compare": judge.compare,
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
