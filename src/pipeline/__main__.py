"""Walk a whole road in one command: every stage of a recipe in its order, each in a process of its own.

A recipe is a list of stages, each as one would type it (configs/pipeline, or recipe=FILE.yaml). Their settings are changed as STAGE.key=value
(finetune.tuner.rank=16), or as key=value for every stage that has one. First the plan is shown: what will run, what is skipped and why, how long it took before,
memory and disk. Killed at any moment, the same command goes on. A gate that fails ends the road.

    python -m src.pipeline recipe=lora_llama2c run=mine model.path=FOLDER data.path=FILE
    python -m src.pipeline --multirun run=ranks finetune.tuner.rank=4,8,16     (docs/pipeline.md)
"""

from src.core import compose, stage
from src.pipeline import recipe, run, sweep
from src.settings.verbs import PipelineVerb


def pipeline(overrides: list[str]) -> int:
    """One road, or several that differ in what is swept over."""
    flags = [text for text in overrides if text in sweep.FLAGS]
    mine, others = apart([text for text in overrides if text not in flags])
    if flags:
        return sweep.sweep(others, mine)
    cfg = compose.compose("pipeline", mine, PipelineVerb)
    ahead = run.plan(cfg, *recipe.assigned(recipe.read(cfg.recipe), others))
    run.show(ahead)
    return 0 if cfg.dry_run else run.walk(ahead) or max(run.start(verb, run.named(cfg)) for verb in ("summary", "report"))


def apart(overrides: list[str]) -> tuple[list[str], list[str]]:
    """The pipeline's own settings, and those of its stages; what is none at all counts as its own, to be refused as such."""
    mine = [text for text in overrides if "=" not in text or text.partition("=")[0] in PipelineVerb.model_fields]
    return mine, [text for text in overrides if text not in mine]


if __name__ == "__main__":
    stage.main_uncomposed("pipeline", __doc__, PipelineVerb, pipeline)
