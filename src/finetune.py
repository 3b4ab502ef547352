"""Fine-tune a model on the run's dataset: every weight, LoRA adapters, or LoRA on a 4-bit base; on CPU, one GPU, many, or many machines.

The result is an adapter (tuner=lora, qlora) or a model (tuner=full), complete with tokenizer, chat template and generation config.
"""

import os
import shutil
from pathlib import Path

from src.chat import encoding, template
from src.core import stage
from src.core.artifact import Artifact, outside
from src.core.errors import ConfigError, MissingInput
from src.core.log import rank, say
from src.core.processes import import_quietly
from src.core.room import Needs
from src.models.folder import check_folder, check_tokenizer, locate, weights_of
from src.models.loading import import_peft
from src.settings.verbs import FinetuneVerb, FullTuner
from src.sizing import host
from src.sizing.config_reader import read_shape
from src.training import launch, rules, saving
from src.training.chat_tokenizer import chat_tokenizer, template_text
from src.training.chat_tokenizer import check as check_template
from src.training.deepspeed_config import user_deepspeed_json


def find(cfg: FinetuneVerb, run: stage.Run) -> dict[str, Artifact]:
    base = base_model(cfg, run)
    inputs = {"dataset": stage.data_sources(run, cfg.source), "model": base}
    if cfg.teacher.path:
        folder = locate(cfg.teacher.path, None, download=not cfg.dry_run)
        inputs["teacher"] = run.source(str(folder), kinds={"model", "quantized", "adapter"})
    if cfg.chat_template not in (None, "chatml"):
        template_text(cfg)
        inputs["chat_template"] = outside(Path(cfg.chat_template), "file", run.cache)
    if cfg.deepspeed.config:
        inputs["deepspeed"] = outside(Path(cfg.deepspeed.config), "file", run.cache)
    return inputs


def base_model(cfg: FinetuneVerb, run: stage.Run) -> Artifact:
    if cfg.deepspeed.config and not Path(cfg.deepspeed.config).is_file():
        raise MissingInput(
            "no such DeepSpeed file",
            where=cfg.deepspeed.config,
            fix=["give a JSON file that is there", "deepspeed=zero2 or deepspeed=zero3 needs none"],
        )
    folder = locate(cfg.model.path, cfg.model.revision, download=not cfg.dry_run, allow_pickle=cfg.model.allow_pickle)
    return run.source(str(folder), kinds={"model", "quantized"})


def check(cfg: FinetuneVerb, inputs: dict[str, Artifact]) -> list[str]:
    """Rules that need more than one setting, all before torch: kinds, batch arithmetic, DeepSpeed's limits."""
    base = inputs["model"]
    config = check_folder(base.path, allow_pickle=cfg.model.allow_pickle, trust_remote_code=cfg.model.trust_remote_code)
    check_tokenizer(base.path, trust_remote_code=cfg.model.trust_remote_code)
    check_template(cfg, base.path)
    rules.check_length(cfg.train.max_length, config.get("max_position_embeddings"), where=str(base.path))
    method = (config.get("quantization_config") or {}).get("quant_method")
    rules.check(cfg.tuner, zero_stage=cfg.deepspeed.stage, quantization=method, where=str(base.path))
    if cfg.deepspeed.config:
        user_deepspeed_json(Path(cfg.deepspeed.config), cfg)
        if not cfg.deepspeed.stage:
            raise ConfigError(
                "deepspeed.config is given, but deepspeed=none would ignore it",
                fix="name its stage too: deepspeed=zero2 or deepspeed=zero3",
            )
    world, batch = launch.world_size(cfg.launch), cfg.train.global_batch_size
    rules.check_batch(batch, world, fewer="launch.nproc_per_node", machines=cfg.launch.nnodes)
    name = rules.zero_name(cfg.deepspeed.stage, cfg.deepspeed.offload)
    return [f"{cfg.tuner.kind} on {base.path}, {name}, {world} process{'es' * (world > 1)}, {batch} conversations a step"]


def needs(cfg: FinetuneVerb, inputs: dict[str, Artifact]) -> Needs:
    processes, gpus = launch.per_node(cfg.launch), launch.gpu_count()
    needed = host.finetune(read_shape(inputs["model"].path), cfg.tuner, cfg.deepspeed, cfg.train, processes=processes, gpus=gpus)
    if "teacher" not in inputs or gpus:
        return needed
    rows = host.conversations(inputs["dataset"].path / "train.jsonl").tokens(None, cfg.train.max_length)
    return host.with_teacher(needed, read_shape(weights_of(inputs["teacher"])), rows, processes)


def around(cfg: FinetuneVerb, argv: list[str]) -> int | None:
    """Start the worker processes, unless one without DeepSpeed is all there is or torchrun has started us."""
    if "WORLD_SIZE" in os.environ or (launch.world_size(cfg.launch) == 1 and not cfg.deepspeed.stage):
        return None
    return launch.torchrun("src.finetune", argv, cfg.launch)


def finetune(cfg: FinetuneVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    if not launch.gpu_count():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, with a warning
    import_peft()
    import_quietly("transformers.trainer", *(["deepspeed"] if cfg.deepspeed.stage else []), without=["datasets"])
    base = inputs["model"].path
    tokenizer, added = chat_tokenizer(cfg, base)
    eos_id = encoding.turn_end(tokenizer)
    describe(cfg, tokenizer, added)
    if rank() == 0:
        saving.check_tokenizer_kept(cfg, base, tokenizer, out, keep=not added)
    from src.training.session import train

    trained = train(cfg, inputs, out, tokenizer, eos_id, added)
    if rank() != 0:
        return {}
    saving.finish(cfg, base, tokenizer, eos_id, out, keep_tokenizer=not added, saved=trained.names)
    metrics = trained.metrics | {"added_tokens": added, "turn_end": eos_id}
    metrics |= saving.prove(cfg, base, tokenizer, out, trained, metrics)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "layout.json").unlink()
    return metrics


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
    resumes=lambda partial: any(partial.glob("checkpoints/checkpoint-*/whole")),
    early=lambda cfg, run: {"model": base_model(cfg, run)},
)

if __name__ == "__main__":
    stage.main(STAGE)
