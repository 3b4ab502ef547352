"""Turn prompts, seeds or documents into a ChatML dataset by a teacher: answers, judgements and filters as the steps of a recipe.

Every answer is kept in <outputs>/<run>/distill.journal.sqlite before it is used. Killed anywhere, the same command goes on and makes the same records, and
nothing that was answered is asked again; with another step or filter all earlier answers are used again too.
"""

import asyncio
from pathlib import Path

from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput
from src.core.log import say, warn
from src.core.room import Needs
from src.distill import runner, sources
from src.distill.endpoint import server_of
from src.distill.limits import in_words
from src.models.folder import weights_of
from src.settings.teachers import EndpointTeacher, LocalTeacher
from src.settings.verbs import DistillVerb
from src.sizing import host
from src.sizing.config_reader import read_shape


def find(cfg: DistillVerb, run: stage.Run) -> dict[str, Artifact]:
    path = runner.path_of(cfg)
    sources.check(path, cfg.recipe.takes)
    inputs = {} if path is None else {"prompts": artifact.outside(path, "file", run.cache)}
    for role, teacher in runner.teachers(cfg).items():
        if isinstance(teacher, LocalTeacher):
            inputs[role] = run.source(teacher.path, kinds={"adapter", "model", "quantized"})
    for role, file in cfg.recipe.files().items():
        if not Path(file).is_file():
            raise MissingInput("no such file", where=file, fix=f"name one that is there in recipe.steps.{role.rpartition('_')[0]}")
        inputs[role] = artifact.outside(Path(file), "file", run.cache)
    return inputs


def check(cfg: DistillVerb, inputs: dict[str, Artifact]) -> list[str]:
    """The plan; nothing is sent."""
    stage.refuse_secrets(cfg.model_dump(mode="json"), {t.key_env for t in runner.teachers(cfg).values() if isinstance(t, EndpointTeacher)})
    lines = [f"{cfg.prompts.path or 'no file'} through {' > '.join(cfg.recipe.order)}"]
    for role, teacher in runner.teachers(cfg).items():
        if isinstance(teacher, LocalTeacher):
            lines.append(f"{role}: {inputs[role].path} ({inputs[role].kind}), on this machine")
        else:
            lines.append(f"{role}: {_endpoint(teacher)}")
            if cfg.budget.money is not None and None in (teacher.price.prompt, teacher.price.completion):
                raise ConfigError(
                    f"budget.money needs the price of every token, and {role}.price has null",
                    fix=f"{role}.price.prompt=USD {role}.price.completion=USD, per million tokens",
                )
        if teacher.terms is None:
            warn(f"{role}.terms is not given: whether its maker lets you train on its answers is yours to find out; the card will say so")
    return [*lines, f"budget: {in_words(cfg.budget)}"]


def _endpoint(teacher: EndpointTeacher) -> str:
    server = server_of(teacher)
    how = f"in batches of up to {teacher.batch_size:,}" if teacher.batch else f"up to {teacher.limits.concurrency} requests at a time"
    return f"{teacher.model} at {server.url}, {server.with_key}, {how}"


def needs(cfg: DistillVerb, inputs: dict[str, Artifact]) -> Needs:
    local = {role: teacher for role, teacher in runner.teachers(cfg).items() if isinstance(teacher, LocalTeacher)}
    return host.answers([read_shape(weights_of(inputs[role])) for role in local], max((t.batch_size for t in local.values()), default=1))


def around(cfg: DistillVerb, argv: list[str]) -> int | None:
    """With estimate=k the estimate takes the place of the work."""
    if not cfg.estimate:
        return None
    found = asyncio.run(runner.guess(cfg, find(cfg, stage.Run(Path(cfg.outputs) / cfg.run))))
    say(f"distill: by {found.units:,} of {found.total:,} records, whose answers are kept:")
    for line in found.lines(any(isinstance(t, EndpointTeacher) and t.price.completion is not None for t in runner.teachers(cfg).values())):
        say(f"  {line}")
    say("distill: the same command without estimate= makes the dataset")
    return 0


def distill(cfg: DistillVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes train.jsonl, val.jsonl, calib.jsonl, preference.jsonl where there are pairs, set_aside.jsonl, samples.html and README.md."""
    return asyncio.run(runner.make(cfg, inputs, out))


STAGE = stage.Stage(
    verb="distill",
    version=3,
    schema=DistillVerb,
    kind="dataset",
    find=find,
    check=check,
    needs=needs,
    around=around,
    run=distill,
    doc=__doc__,
    private=("prompts.private", lambda cfg: cfg.prompts.private),
)

if __name__ == "__main__":
    stage.main(STAGE)
