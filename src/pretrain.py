"""Train a Llama- or Qwen3-shaped model from nothing on plain text, its tokenizer too.

The result is a model as any other, to be fine-tuned, merged, quantized, evaluated and deployed.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from src.core import stage
from src.core.artifact import Artifact, outside
from src.core.log import rank, say
from src.core.room import Needs
from src.models import complete, fresh
from src.models.folder import check_tokenizer, locate
from src.models.loading import load_tokenizer
from src.records import texts
from src.settings.training import Model
from src.settings.verbs import CptVerb, PretrainVerb, TextVerb
from src.sizing import host
from src.sizing.config_reader import shape_of
from src.sizing.shape import ModelShape
from src.training import checks, launch, saving

START = "start"
"""folder of the model before its first step, in an unfinished run"""


def find(cfg: PretrainVerb, run: stage.Run) -> dict[str, Artifact]:
    inputs = {"text": texts.find(cfg.text, run)}
    if cfg.tokenizer:
        folder = locate(cfg.tokenizer, download=not cfg.dry_run)
        check_tokenizer(folder)
        files = [file for pattern in complete.TOKENIZER for file in sorted(folder.glob(pattern))]
        inputs["tokenizer"] = outside(folder, "file", run.cache, files)
    return inputs | checks.deepspeed_file(cfg, run)


def shape(cfg: PretrainVerb, inputs: dict[str, Artifact]) -> ModelShape:
    known = fresh.tokens_of(inputs["tokenizer"].path) if "tokenizer" in inputs else None
    return shape_of(fresh.config_of(cfg.size, known or cfg.size.vocab, {}), "size")


def check(cfg: PretrainVerb, inputs: dict[str, Artifact]) -> list[str]:
    made = shape(cfg, inputs)
    how = checks.check(cfg, "size", None, "rows")
    tokenizer = f"the tokenizer of {inputs['tokenizer'].path}" if "tokenizer" in inputs else "a tokenizer learnt from the text"
    return [
        f"{cfg.size.family} of {made.params:,} parameters, {made.layers} layers of {made.hidden}, {made.vocab:,} tokens by {tokenizer}; {how}",
        *texts.parted_by(inputs["text"], cfg.separator),
    ]


def needs(cfg: PretrainVerb, inputs: dict[str, Artifact]) -> Needs:
    processes, gpus = launch.per_node(cfg.launch), launch.gpu_count()
    made = shape(cfg, inputs)
    needed = host.finetune(made, cfg.tuner, cfg.deepspeed, cfg.train, processes=processes, gpus=gpus)
    needed = replace(
        needed, ways=[tried for tried in needed.ways if not any(way.startswith("tuner=") for way in tried)]
    )  # of a model there is
    return host.with_text(needed, texts.size(inputs["text"]), start=4 * made.params)


def around(cfg: PretrainVerb, argv: list[str]) -> int | None:
    return launch.around("pretrain", argv, cfg.launch, zero_stage=cfg.deepspeed.stage)


def pretrain(cfg: PretrainVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Make a model of random weights, and go on from it as cpt does from any."""
    checks.import_libraries(cfg)
    from src.training import choices, plain_text
    from src.training.checkpoints import barrier

    started = choices.start(cfg)
    start = out / START
    files = inputs["tokenizer"].path if "tokenizer" in inputs else plain_text.learnt_tokenizer(cfg, inputs["text"], plain_text.kept_in(out))
    if rank() == 0:
        shutil.rmtree(start, ignore_errors=True)
        tokenizer = load_tokenizer(files)
        if "tokenizer" in inputs and len(tokenizer) != cfg.size.vocab:
            say(f"pretrain: the vocabulary is the tokenizer's, {len(tokenizer):,}, not size.vocab={cfg.size.vocab}")
        fresh.write_start(start, cfg.size, tokenizer, files, cfg.train.seed)
    barrier()
    given = {name: getattr(cfg, name) for name in TextVerb.model_fields}
    model = Model(path=str(start), revision=None, trust_remote_code=False, allow_pickle=False)
    metrics = plain_text.run(CptVerb(**given, model=model), inputs["text"], Artifact(start, "model", "", None, {}), out, started)
    if rank() == 0:
        shutil.rmtree(start)
    return metrics


STAGE = stage.Stage(
    verb="pretrain",
    version=1,
    schema=PretrainVerb,
    kind="model",
    find=find,
    check=check,
    needs=needs,
    around=around,
    run=pretrain,
    doc=__doc__,
    private=("private", lambda cfg: cfg.private),
    judge=saving.judge,
    resumes=saving.begun,
)

if __name__ == "__main__":
    stage.main(STAGE)
