"""Go on training a model on plain text (continued pre-training): every weight, LoRA adapters, or LoRA on a 4-bit base.

The result is an adapter (tuner=lora, qlora) or a model (tuner=full), with the base's tokenizer.
"""

from pathlib import Path

from src.core import stage
from src.core.artifact import Artifact
from src.core.room import Needs
from src.records import texts
from src.settings.training import FullTuner
from src.settings.verbs import CptVerb
from src.sizing import host
from src.sizing.config_reader import read_shape
from src.training import checks, launch, saving


def find(cfg: CptVerb, run: stage.Run) -> dict[str, Artifact]:
    more = checks.deepspeed_file(cfg, run)
    return {"text": texts.find(cfg.text, run), "model": checks.base_model(cfg, run)} | more


def check(cfg: CptVerb, inputs: dict[str, Artifact]) -> list[str]:
    base = inputs["model"].path
    method = (checks.base_config(cfg, base).get("quantization_config") or {}).get("quant_method")
    return [f"{cfg.tuner.kind} on {base}, {checks.check(cfg, str(base), method, 'rows')}", *texts.parted_by(inputs["text"], cfg.separator)]


def needs(cfg: CptVerb, inputs: dict[str, Artifact]) -> Needs:
    processes, gpus = launch.per_node(cfg.launch), launch.gpu_count()
    needed = host.finetune(read_shape(inputs["model"].path), cfg.tuner, cfg.deepspeed, cfg.train, processes=processes, gpus=gpus)
    return host.with_text(needed, texts.size(inputs["text"]))


def around(cfg: CptVerb, argv: list[str]) -> int | None:
    return launch.around("cpt", argv, cfg.launch, zero_stage=cfg.deepspeed.stage)


def cpt(cfg: CptVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    checks.import_libraries(cfg)
    from src.training import choices, plain_text

    return plain_text.run(cfg, inputs["text"], inputs["model"], out, choices.start(cfg))


STAGE = stage.Stage(
    verb="cpt",
    version=1,
    schema=CptVerb,
    kind=lambda cfg, inputs: "model" if isinstance(cfg.tuner, FullTuner) else "adapter",
    find=find,
    check=check,
    needs=needs,
    around=around,
    run=cpt,
    doc=__doc__,
    private=("private", lambda cfg: cfg.private),
    judge=saving.judge,
    resumes=saving.begun,
)

if __name__ == "__main__":
    stage.main(STAGE)
