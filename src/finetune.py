"""Fine-tune a model on the run's dataset: every weight, LoRA adapters, or LoRA on a 4-bit base; on CPU, one GPU, many, or many machines.

The result is an adapter (tuner=lora, qlora) or a model (tuner=full), complete with tokenizer, chat template and generation config.
"""

from pathlib import Path

from src.chat import template
from src.core import stage
from src.core.artifact import Artifact, outside
from src.core.log import rank, say
from src.core.room import Needs
from src.models.folder import locate, weights_of
from src.settings.training import FullTuner
from src.settings.verbs import FinetuneVerb
from src.sizing import host
from src.sizing.config_reader import read_shape
from src.training import checks, launch, saving
from src.training.chat_tokenizer import chat_tokenizer, template_text
from src.training.chat_tokenizer import check as check_template


def find(cfg: FinetuneVerb, run: stage.Run) -> dict[str, Artifact]:
    more = checks.deepspeed_file(cfg, run)
    base = checks.base_model(cfg, run)
    inputs = {"dataset": stage.data_sources(run, cfg.source), "model": base}
    if cfg.teacher.path:
        folder = locate(cfg.teacher.path, None, download=not cfg.dry_run)
        inputs["teacher"] = run.source(str(folder), kinds={"model", "quantized", "adapter"})
    if cfg.chat_template not in (None, "chatml"):
        template_text(cfg)
        inputs["chat_template"] = outside(Path(cfg.chat_template), "file", run.cache)
    return inputs | more


def early(cfg: FinetuneVerb, run: stage.Run) -> dict[str, Artifact]:
    checks.deepspeed_file(cfg, run)
    return {"model": checks.base_model(cfg, run)}


def check(cfg: FinetuneVerb, inputs: dict[str, Artifact]) -> list[str]:
    """Rules that need more than one setting, all before torch: kinds, batch arithmetic, DeepSpeed's limits."""
    base = inputs["model"].path
    config = checks.base_config(cfg, base)
    check_template(cfg, base)
    method = (config.get("quantization_config") or {}).get("quant_method")
    return [f"{cfg.tuner.kind} on {base}, {checks.check(cfg, str(base), method, 'conversations')}"]


def needs(cfg: FinetuneVerb, inputs: dict[str, Artifact]) -> Needs:
    processes, gpus = launch.per_node(cfg.launch), launch.gpu_count()
    needed = host.finetune(read_shape(inputs["model"].path), cfg.tuner, cfg.deepspeed, cfg.train, processes=processes, gpus=gpus)
    if "teacher" not in inputs or gpus:
        return needed
    rows = host.conversations(inputs["dataset"].path / "train.jsonl").tokens(None, cfg.train.max_length)
    return host.with_teacher(needed, read_shape(weights_of(inputs["teacher"])), rows, processes)


def around(cfg: FinetuneVerb, argv: list[str]) -> int | None:
    return launch.around("finetune", argv, cfg.launch, zero_stage=cfg.deepspeed.stage)


def finetune(cfg: FinetuneVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    checks.import_libraries(cfg)
    base = inputs["model"]
    tokenizer, added = chat_tokenizer(cfg, base.path)
    describe(cfg, tokenizer, added)
    if rank() == 0:
        saving.check_tokenizer_kept(cfg, base.path, tokenizer, out, keep=not added)
    from src.training import chats, choices, session

    started = choices.start(cfg)
    lesson = chats.lesson(cfg, inputs, tokenizer, added, out.parent.parent / ".cache" / "tokens")
    return session.run(cfg, base, out, tokenizer, lesson, started)


def describe(cfg: FinetuneVerb, tokenizer, added: list[str]) -> None:
    """Say what is done to the tokenizer, and what the chat template does that is not seen in it."""
    chat = template.of(tokenizer)
    if added or cfg.chat_template == "chatml":
        say("finetune: the chat template is ChatML" + (f"; added its tokens {' '.join(added)}" if added else ""))
    if chat.dated:
        say(f"finetune: the chat template prints today's date, which is {cfg.today} in all rows (today=)")
    for stop in chat.stops:
        if stop not in chat.known_stops:
            say(f"finetune: answers end with {stop}, which the base does not list among its stop tokens; the result does")


STAGE = stage.Stage(
    verb="finetune",
    version=5,
    schema=FinetuneVerb,
    kind=lambda cfg, inputs: "model" if isinstance(cfg.tuner, FullTuner) else "adapter",
    find=find,
    check=check,
    needs=needs,
    around=around,
    run=finetune,
    judge=saving.judge,
    doc=__doc__,
    resumes=saving.begun,
    early=early,
)

if __name__ == "__main__":
    stage.main(STAGE)
