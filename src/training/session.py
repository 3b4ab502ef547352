"""A training from its lesson to the saved folder: model, layout, trainer, and what the exact weights say at the end. On every process."""

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from src.core.artifact import Artifact
from src.core.log import rank, say
from src.core.processes import Interrupted
from src.models import adapter_files, lora, token_rows
from src.models.held import hold
from src.models.loading import keep_gptq_trainable, load_model, nf4_config
from src.models.vocabulary import grow_vocabulary, vocabulary_rows
from src.settings.training import FullTuner, LoraTuner, QloraTuner
from src.settings.verbs import Trains
from src.training import choices, launch, narrowing, saving
from src.training.batches import BatchPlan, Rows, rows_to_measure
from src.training.checkpoints import Checkpoints, Stop, barrier
from src.training.head import HeadLoss, may_chunk
from src.training.layout import choose_layout
from src.training.lesson import Lesson
from src.training.partitions import InPlace
from src.training.probe import Probe
from src.training.reports import Reports, preview, summary
from src.training.saving import Trained, saved_dtype
from src.training.trainer import ChatTrainer


def run(cfg: Trains, base: Artifact, out: Path, tokenizer, lesson: Lesson, started: tuple[str, str]) -> dict:
    """The whole of it: train, complete the saved folder, prove it, and leave nothing else in `out`. Returns the metrics; on other processes than the first, none.

    started: what choices.start returned.
    """
    trained = train(cfg, base, out, tokenizer, lesson, started)
    if rank() != 0:
        return {}
    keep, eos_id = not lesson.added, lesson.eos_id
    saving.finish(cfg, base.path, tokenizer, eos_id, out, keep_tokenizer=keep, saved=trained.names)
    metrics = trained.metrics | {"added_tokens": lesson.added, "turn_end": eos_id}
    metrics |= saving.prove(cfg, base.path, tokenizer, out, trained, metrics)
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / "layout.json").unlink()
    return metrics


def train(cfg: Trains, base: Artifact, out: Path, tokenizer, lesson: Lesson, started: tuple[str, str]) -> Trained:
    """Train, and save into `out` what was trained; on every process."""
    world, (device, precision) = launch.world_size(cfg.launch), started
    train, val = lesson.train, lesson.val
    preview(train[0], tokenizer)

    # Before the model: under ZeRO-3 making the arguments is what has it loaded in parts.
    total = cfg.train.max_steps * cfg.train.global_batch_size if cfg.train.max_steps else round(len(train) * cfg.train.epochs)
    resume = Checkpoints.last(out / "checkpoints", world)
    steps = math.ceil(total / cfg.train.global_batch_size)
    arguments = choices.arguments(cfg, out, steps, precision, world=world, evaluates=len(val) > 0 and not resume)
    model, rows, nf4 = prepare(cfg, base, tokenizer, device, precision, control=lesson.control, learns=lesson.learns_control)
    lora.describe(model, rows)
    choices.apply_kernels(model, cfg.train.kernels, partitioned=cfg.deepspeed.stage == 3)
    choices.trim_on_the_way(model)
    chosen = choose_layout(cfg, model, train, out, precision)
    plan = BatchPlan(train.lengths, cfg.train.global_batch_size, world, chosen.capacity, chosen.packed, total, cfg.train.seed)
    head = HeadLoss(model, chunked=may_chunk(model, zero_stage=cfg.deepspeed.stage)) if chosen.fused else None
    measured = rows_measured(cfg, plan, val)
    rates = lora.rates(model, cfg.tuner, len(tokenizer) - len(lesson.added))
    run = ChatTrainer(
        model,
        arguments,
        plan,
        train,
        val,
        pad=lesson.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        eos_id=lesson.eos_id,
        rates=rates,
        head=head,
        teacher_probs=lesson.teacher_probs,
        alpha=lesson.alpha,
        eval_rows=measured,
    )
    reports = Reports(run, cfg, out, tokenizer, lesson)
    stop = Stop()
    states = Checkpoints(run, world, cfg.train.checkpoint_minutes, stop)
    for callback in (InPlace(), Probe(run, cfg, out, precision), reports, states):
        run.add_callback(callback)
    with stop, reports.bar:
        run.train(resume_from_checkpoint=str(resume) if resume else None)
    if stop.number:
        reports.trackers.close()
        raise Interrupted(stop.number)
    held = lesson.held
    seen = run.observe(held) if held and precision == "fp32" else None
    how = cfg.tuner.rounding if isinstance(cfg.tuner, FullTuner) else "stochastic"
    saved = narrowing.settle(run, saved_dtype(cfg, base.path), how, precision)
    if held and not seen:  # a pass in 16 bits shows what was learnt only now
        seen = run.observe(held)
    run.finished = True
    run.save_model(str(out))
    reports.trackers.close()
    barrier()
    metrics = summary(run, reports, precision, saved) if rank() == 0 else {}
    metrics |= {"trained_rows": rows} | ({"nf4": nf4} if nf4 else {})
    return Trained(metrics, adapter_files.saved_names(run.model), lora.count(run.model), held, seen)


def rows_measured(cfg: Trains, plan: BatchPlan, val: Rows) -> int:
    """How many validation rows train.eval_rows gives an evaluation; said where they are not all."""
    if (asked := cfg.train.eval_rows) == "auto":
        every = cfg.train.eval_steps
        times = 1 + (plan.steps // every if every else math.ceil(plan.epoch(plan.steps)))
        asked = rows_to_measure(val.lengths, int(plan.lengths.mean() * plan.total), times)
    if asked < len(val):
        say(f"validation: on {asked:,} of {len(val):,} rows (train.eval_rows)")
    return min(asked, len(val))


def prepare(cfg: Trains, base: Artifact, tokenizer, device: str, precision: str, *, control: Sequence[int] = (), learns: bool = True):
    """(model ready to train, vocabulary rows trained beside an adapter, NF4 settings or None).

    control: ids of tokens that the model has to know; learns: whether the rows of those it never learnt are trained.
    """
    gpu = device == "cuda"
    sixteen = gpu and precision != "fp32" and (cfg.deepspeed.stage or not isinstance(cfg.tuner, FullTuner))
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[precision] if sixteen else "float32"
    # PiSSA and OLoRA take their part out of the base, which then needs fp32; DeepSpeed in 16 bits makes weights of its own; ZeRO-3 shares them.
    quantized = base.kind == "quantized"
    holds = not gpu and (quantized or (isinstance(cfg.tuner, LoraTuner) and not cfg.tuner.takes_from_base))
    holds &= cfg.deepspeed.stage == 0 or (cfg.deepspeed.stage == 2 and precision == "fp32")
    if holds:
        dtype = "held"
    nf4: dict[str, Any] | None = None
    if isinstance(cfg.tuner, QloraTuner) and not quantized:
        nf4 = {"double_quant": cfg.tuner.double_quant, "compute_dtype": dtype}
    model = load_model(
        base.path,
        dtype=dtype,
        trust_remote_code=cfg.model.trust_remote_code,
        allow_pickle=cfg.model.allow_pickle,
        quantization=nf4_config(**nf4) if nf4 else None,
        device_map={"": torch.cuda.current_device()} if gpu and isinstance(cfg.tuner, QloraTuner) else None,
    )
    old = vocabulary_rows(model)
    grow_vocabulary(model, len(tokenizer))
    model.config.use_cache = False
    rows = sorted(
        {
            *token_rows.untrained(model, [i for i in control if i < old], min(old, len(tokenizer))),
            *(i for i in control if i >= old),
        }
    )
    if rows:
        names = " ".join(tokenizer.convert_ids_to_tokens(rows))
        say(
            f"finetune: the base never learnt {names}; "
            + ("those rows are trained at a rate of their own" if learns else "train_new_tokens=never leaves it so")
        )
    rows = rows if learns else []
    kernels = getattr(model, "is_quantized", False)  # layers of bitsandbytes or gptqmodel
    if holds and not kernels:
        hold(model)
    if isinstance(cfg.tuner, FullTuner):
        if rows:
            token_rows.split_off(model, rows)
        return placed(model, cfg, device), rows, None
    if kernels:
        from peft import prepare_model_for_kbit_training

        keep_gptq_trainable(model)
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = lora.attach(model, cfg.tuner, rows, deepspeed=bool(cfg.deepspeed.stage))
    return placed(model, cfg, device), rows, nf4


def placed(model, cfg: Trains, device: str):
    """The model where it is trained; ZeRO-3 and quantization have placed theirs."""
    return model if cfg.deepspeed.stage == 3 or isinstance(cfg.tuner, QloraTuner) else model.to(device)
