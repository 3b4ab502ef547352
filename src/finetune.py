"""Fine-tune a model on the run's dataset: every weight, LoRA adapters, or LoRA on a 4-bit base; on CPU, one GPU, many, or many machines.

The result is an adapter (tuner=lora, qlora) or a model (tuner=full), complete with tokenizer, chat template and generation config.
"""

import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from src import adapters, answering, aux_files, chatml, fidelity, launch, modeling, stage
from src.artifact import Artifact, outside, read_json
from src.config import FinetuneVerb, FullTuner, QloraTuner
from src.errors import ConfigError, MissingInput, WrongKind
from src.log import rank, say
from src.modeling import check_folder, locate
from src.zero import user_deepspeed_json


def find(cfg: FinetuneVerb, run: stage.Run) -> dict[str, Artifact]:
    base = base_model(cfg, run)
    inputs = {"dataset": stage.data_sources(run, cfg.source), "model": base}
    if cfg.teacher.path:
        folder = locate(cfg.teacher.path, None, download=not cfg.dry_run)
        inputs["teacher"] = run.source(str(folder), kinds={"model", "quantized", "adapter"})
    if cfg.deepspeed.config:
        inputs["deepspeed"] = outside(Path(cfg.deepspeed.config), "file", run.cache)
    return inputs


def base_model(cfg: FinetuneVerb, run: stage.Run) -> Artifact:
    if cfg.deepspeed.config and not Path(cfg.deepspeed.config).is_file():
        raise MissingInput(
            "no such DeepSpeed file", where=cfg.deepspeed.config, fix="deepspeed.config=FILE names a JSON file; deepspeed=zero2 needs none"
        )
    folder = locate(cfg.model.path, cfg.model.revision, download=not cfg.dry_run, allow_pickle=cfg.model.allow_pickle)
    return run.source(str(folder), kinds={"model", "quantized"})


def check(cfg: FinetuneVerb, inputs: dict[str, Artifact]) -> list[str]:
    """Rules that need more than one setting, all before torch: kinds, batch arithmetic, DeepSpeed's limits."""
    base = inputs["model"]
    config = check_folder(base.path, allow_pickle=cfg.model.allow_pickle, trust_remote_code=cfg.model.trust_remote_code)
    modeling.check_tokenizer(base.path)
    reach = config.get("max_position_embeddings")
    if reach and cfg.train.max_length > reach:
        raise ConfigError(
            f"train.max_length={cfg.train.max_length} is beyond the {reach} positions the model knows",
            where=str(base.path),
            fix=f"train.max_length={reach}",
        )
    method = (config.get("quantization_config") or {}).get("quant_method")
    if method and not (isinstance(cfg.tuner, QloraTuner) and method == "gptq"):
        raise WrongKind(
            f"the base model is quantized ({method})",
            where=str(base.path),
            fix=["tuner=qlora trains adapters on a GPTQ base", "give the model it was quantized from"],
        )
    if not isinstance(cfg.tuner, FullTuner):
        adapters.check(cfg.tuner, zero_stage=cfg.deepspeed.stage, gptq=method == "gptq")
    if isinstance(cfg.tuner, QloraTuner) and cfg.deepspeed.stage == 3:
        raise ConfigError(
            "tuner=qlora with ZeRO-3: a 4-bit base cannot be partitioned", fix=["deepspeed=zero2", "tuner=lora deepspeed=zero3"]
        )
    if cfg.deepspeed.config:
        user_deepspeed_json(Path(cfg.deepspeed.config), cfg.deepspeed.stage)
        if not cfg.deepspeed.stage:
            raise ConfigError("deepspeed.config is given, but deepspeed=none would ignore it", fix="deepspeed=zero2 or deepspeed=zero3")
    world, batch = launch.world_size(cfg.launch), cfg.train.global_batch_size
    if batch % world:
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be shared by {world} processes",
            fix=[f"train.global_batch_size={-(-batch // world) * world}", "launch.nproc_per_node=N with N a divisor of it"],
        )
    name = {0: "no DeepSpeed", 2: "ZeRO-2", 3: "ZeRO-3"}[cfg.deepspeed.stage] + (" with offload" if cfg.deepspeed.offload else "")
    return [f"{cfg.tuner.kind} on {base.path}, {name}, {world} process{'es' * (world > 1)}, {batch} conversations a step"]


def around(cfg: FinetuneVerb, argv: list[str]) -> int | None:
    """Start the worker processes, unless one without DeepSpeed is all there is or torchrun has started us."""
    if "WORLD_SIZE" in os.environ or (launch.world_size(cfg.launch) == 1 and not cfg.deepspeed.stage):
        return None
    return launch.torchrun("src.finetune", argv, cfg.launch)


def finetune(cfg: FinetuneVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    if not launch.gpu_count():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed finds it too, with a warning
    modeling.import_quietly("peft", "gptqmodel", "transformers.trainer", *(["deepspeed"] if cfg.deepspeed.stage else []))
    base = inputs["model"].path
    tokenizer, end, added = chat_tokenizer(cfg, base)
    trained = train(cfg, inputs, out, tokenizer, end, added)
    if rank() != 0:
        return {}
    finish(cfg, base, tokenizer, end, out, keep_tokenizer=not added, saved=trained.names)
    metrics = trained.metrics | {"added_tokens": added, "turn_end": end}
    metrics |= prove(cfg, base, tokenizer, out, trained, metrics)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "layout.json").unlink()
    return metrics


@dataclass(frozen=True)
class Trained:
    """What is left of a training when its model has been saved and let go.

    metrics: for the manifest. names: of the tensors that were saved. parameters: of the whole model. rows, seen: held-out rows, and what the exact
    weights say at them.
    """

    metrics: dict
    names: set[str]
    parameters: int
    rows: list[chatml.Encoded]
    seen: fidelity.Seen | None


def train(cfg: FinetuneVerb, inputs: dict[str, Artifact], out: Path, tokenizer, end: int, added: list[str]) -> Trained:
    """Train, and save into `out` what was trained; on every process."""
    from src.training import batches, checkpoints, choices, layout, narrowing, probe, reports, teacher, tokens, trainer
    from src.training.head import HeadLoss, may_chunk

    world, records = launch.world_size(cfg.launch), inputs["dataset"].path
    device, precision = choices.start(cfg)
    cache = out.parent.parent / ".cache" / "tokens"
    train, val = (tokens.token_rows(cfg, inputs["dataset"], inputs["model"], split, cache) for split in ("train", "val"))
    if not len(train):
        raise MissingInput("no training row is within train.max_length", where=str(records), fix="raise train.max_length")
    reports.preview(train[0], tokenizer)
    soft = teacher.soft_targets(cfg, inputs["teacher"], train, tokenizer, cache) if "teacher" in inputs else None

    # Before the model: under ZeRO-3 making the arguments is what has it loaded in parts.
    total = cfg.train.max_steps * cfg.train.global_batch_size if cfg.train.max_steps else round(len(train) * cfg.train.epochs)
    resume = checkpoints.Checkpoints.last(out / "checkpoints", world)
    steps = math.ceil(total / cfg.train.global_batch_size)
    arguments = choices.arguments(cfg, out, steps, precision, world=world, evaluates=len(val) > 0 and not resume)
    model, rows, nf4 = prepare(cfg, inputs["model"], tokenizer, end, added, device, precision)
    adapters.describe(model, rows)
    choices.apply_kernels(model, cfg.train.kernels)
    chosen = layout.choose_layout(cfg, model, train, out, precision)
    plan = batches.Plan(train.lengths, cfg.train.global_batch_size, world, chosen.capacity, chosen.packed, total, cfg.train.seed)
    head = HeadLoss(model, chunked=may_chunk(model, zero_stage=cfg.deepspeed.stage)) if chosen.fused else None
    rates = adapters.rates(model, cfg.tuner, len(tokenizer) - len(added))
    told = reports.Reports(cfg, out, tokenizer, records)
    run = trainer.ChatTrainer(
        model,
        arguments,
        plan,
        train,
        val,
        pad=tokenizer.pad_token_id,
        end=end,
        rates=rates,
        head=head,
        soft=soft,
        alpha=cfg.teacher.weight,
        callbacks=[probe.Probe(out, precision, proven=cfg.deepspeed.stage != 3), told, checkpoints.Checkpoints(world)],
    )
    rows_of_val = (chatml.Encoded(row.input_ids.tolist(), row.labels.tolist()) for row in val)
    held = fidelity.within(rows_of_val) or fidelity.held_out(records, tokenizer, read_json(inputs["model"].path / "config.json"))
    run.train(resume_from_checkpoint=resume and str(resume))
    seen = run.observe(held) if held and precision == "fp32" else None
    saved = narrowing.settle(run, saved_dtype(cfg, inputs["model"].path), cfg.tuner, precision)
    if held and not seen:  # a pass in 16 bits shows what was learnt only now
        seen = run.observe(held)
    run.finished = True
    run.save_model(str(out))
    told.trackers.close()
    checkpoints.barrier()
    metrics = reports.summary(run, told, precision, saved) if rank() == 0 else {}
    metrics |= {"trained_rows": rows} | ({"nf4": nf4} if nf4 else {})
    return Trained(metrics, adapters.saved_names(run.model), adapters.count(run.model), held, seen)


def saved_dtype(cfg: FinetuneVerb, base: Path) -> str:
    """Adapters are saved in fp32, whole models in the dtype asked for, or the base's."""
    if not isinstance(cfg.tuner, FullTuner):
        return "float32"
    return modeling.stored_dtype(base) if cfg.tuner.dtype == "auto" else cfg.tuner.dtype


def chat_tokenizer(cfg: FinetuneVerb, base: Path):
    """(the base's tokenizer with a chat template, id of the token that ends a turn, tokens added)."""
    tokenizer = modeling.load_tokenizer(base, trust_remote_code=cfg.model.trust_remote_code)
    added = chatml.ensure_chat(tokenizer)
    if added:
        say(f"finetune: the tokenizer has no chat template; added ChatML and its tokens {' '.join(added)}")
    return tokenizer, chatml.turn_end(tokenizer), added


def prepare(cfg: FinetuneVerb, base: Artifact, tokenizer, end: int, added: list[str], device: str, precision: str):
    """(model ready to train, vocabulary rows trained beside an adapter, NF4 settings or None)."""
    import torch

    from src import rows as token_rows

    gpu = device == "cuda"
    sixteen = gpu and precision != "fp32" and (cfg.deepspeed.stage or not isinstance(cfg.tuner, FullTuner))
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision] if sixteen else "float32"
    nf4 = None
    if isinstance(cfg.tuner, QloraTuner) and base.kind == "model":
        nf4 = {"double_quant": cfg.tuner.double_quant, "compute_dtype": dtype}
    model = modeling.load_model(
        base.path,
        dtype=dtype,
        trust_remote_code=cfg.model.trust_remote_code,
        allow_pickle=cfg.model.allow_pickle,
        quantization=modeling.nf4_config(**nf4) if nf4 else None,
        device_map={"": torch.cuda.current_device()} if gpu and isinstance(cfg.tuner, QloraTuner) else None,
    )
    old = modeling.vocabulary_rows(model)
    modeling.grow_vocabulary(model, len(tokenizer))
    model.config.use_cache = False
    control = sorted(
        {end, *(i for i in tokenizer.convert_tokens_to_ids([chatml.START, chatml.END]) if i is not None and i != tokenizer.unk_token_id)}
    )
    rows = sorted(
        {*adapters.untrained(model, [i for i in control if i < old], min(old, len(tokenizer))), *(i for i in control if i >= old)}
    )
    if rows:
        names = " ".join(tokenizer.convert_ids_to_tokens(rows))
        say(
            f"finetune: the base never learnt {names}; "
            + ("those rows are trained at a rate of their own" if cfg.train_new_tokens == "auto" else "train_new_tokens=never leaves it so")
        )
    rows = rows if cfg.train_new_tokens == "auto" else []
    if isinstance(cfg.tuner, FullTuner):
        if rows:
            token_rows.split_off(model, rows)
        return placed(model, cfg, device), rows, None
    if nf4 or base.kind == "quantized":
        from peft import prepare_model_for_kbit_training

        modeling.keep_gptq_trainable(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = adapters.attach(model, cfg.tuner, rows, deepspeed=bool(cfg.deepspeed.stage))
    return placed(model, cfg, device), rows, nf4


def placed(model, cfg: FinetuneVerb, device: str):
    """The model where it is trained; ZeRO-3 and quantization have placed theirs."""
    return model if cfg.deepspeed.stage == 3 or isinstance(cfg.tuner, QloraTuner) else model.to(device)


def finish(cfg: FinetuneVerb, base: Path, tokenizer, end: int, out: Path, *, keep_tokenizer: bool, saved: set[str]) -> None:
    """Make the saved folder complete and look at what was saved."""
    full = isinstance(cfg.tuner, FullTuner)
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle
    (out / "README.md").unlink(missing_ok=True)  # peft's blank model card
    if not full:
        adapters.tidy(out)
    answering.write_generation_config(out, base, tokenizer, end)
    if keep_tokenizer:
        aux_files.copy(base, out)
    else:
        tokenizer.save_pretrained(out)
        aux_files.copy(base, out, tokenizer=False)
    if full:
        modeling.cast_folder(out, saved_dtype(cfg, base), cfg.tuner.rounding)
        answering.write_stop_token(out / "config.json", end)
    adapters.check_saved(out, moved=not full, expected=saved)


def prove(cfg: FinetuneVerb, base: Path, tokenizer, out: Path, trained: Trained, metrics: dict) -> dict:
    """Load the saved folder in a fresh process: its token ids, and on held-out rows its loss and likeliest tokens, against what was trained.

    Returns the figures. Raises ProofFailed where they differ.
    """
    modeling.give_back_memory()
    device = modeling.device_that_fits(trained.parameters)
    full, compute = isinstance(cfg.tuner, FullTuner), "float32" if metrics["precision"] == "fp32" else "auto"
    made = {"settings": cfg.model_dump(mode="json"), "metrics": metrics, "parents": []}
    saved = Artifact(out, "model" if full else "adapter", "", made, {})
    given = (trained.rows, trained.seen and trained.seen.top_k_ids, None if full else base)
    ids, _, seen = modeling.fresh(fidelity.reload, saved, compute, device, *given)
    aux_files.compare(ids, tokenizer, out)
    if not trained.rows:
        return {}
    change = fidelity.compare(trained.seen, seen, len(trained.rows))
    ways = ["tuner.rounding=stochastic keeps what was learnt"] * (full and cfg.tuner.rounding == "nearest")
    fidelity.judge("finetune", change, cfg.max_loss_change, out, [*ways, *["tuner.dtype=float32 keeps every bit"] * full])
    return change.metrics()


STAGE = stage.Stage(
    verb="finetune",
    version=2,
    schema=FinetuneVerb,
    kind=lambda cfg, inputs: "model" if isinstance(cfg.tuner, FullTuner) else "adapter",
    find=find,
    check=check,
    around=around,
    run=finetune,
    doc=__doc__,
    resumes=lambda partial: any(partial.glob("checkpoints/checkpoint-*/whole")),
    early=lambda cfg, run: check(cfg, {"model": base_model(cfg, run)}),
)

if __name__ == "__main__":
    stage.main(STAGE)
