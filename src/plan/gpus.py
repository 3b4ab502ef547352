"""Training on GPUs: what memory and time it takes by the settings as finetune would carry them out, by the same rules (training/rules.py)."""

import dataclasses
import typing
from math import ceil

from src.core.errors import ConfigError
from src.core.log import size
from src.plan.answer import Answer, where_of
from src.settings.training import FullTuner, QloraTuner
from src.settings.verbs import Gpu, PlanVerb
from src.sizing.chart import Point
from src.sizing.gpu import ADAPTERS, AUTOCAST, CONTEXT, ZERO, Job, Training, kept_per_token, trained_values, training
from src.sizing.shape import ModelShape
from src.training import rules
from src.training.deepspeed_config import GPU_BUCKET


def gpu_answer(shape: ModelShape, cfg: PlanVerb, gpu: Gpu, where: str, *, brief: bool) -> Answer:
    limit = gpu.memory * 1e9
    job = job_of(shape, cfg, gpu, cfg.train.max_length, where)
    result = training(shape, job, gpu)
    fits = result.total.value <= limit
    reach = shape.max_positions or 2**20
    planned = lambda length: training(shape, job_of(shape, cfg, gpu, length, where), gpu)
    longest = None if brief else largest(planned, limit, reach)
    zero = rules.zero_name(job.stage, job.offload)
    lines = [
        f"{job.method} on {job.gpus} x {gpu.name}, {zero}, 16 bit, {job.micro_batch} x {job.length:,} tokens a pass, "
        f"{job.accumulation} pass{'es' * (job.accumulation > 1)} a step, as if every conversation had {job.length:,} tokens",
        f"activations {'recomputed' if job.checkpointing else 'kept'} (train.gradient_checkpointing={str(cfg.train.gradient_checkpointing).lower()}), "
        f"train.micro_batch_size={cfg.train.micro_batch_size}: as finetune chooses them by what fits",
        f"trained = {trained_words(job)} = {result.trained:,} of {shape.params:,}",
        *map(str, result.parts),
        str(result.peak),
        f"{result.total}: {'fits' if fits else 'does NOT fit'} in {size(limit)}",
        *([str(result.host)] if job.offload else []),
        f"longest conversation that fits: {longest or 0:,} tokens",
        "step: not known, since what goes over the link to the host's memory is not modelled"
        if job.offload
        else f"{result.seconds} = {result.tokens_per_second:,.0f} tokens/s, padding included",
    ]
    lengths = [] if brief else [n for n in (256 * 2**i for i in range(14)) if n <= min(reach, 8 * max(job.length, 2048))]
    verdict = f"fits {gpu.name}: {size(result.total.value)} of {size(limit)}"
    if not fits:
        verdict = f"does NOT fit {gpu.name}: {size(result.total.value)} are needed, {size(limit)} are there"
    verdict += f" on each of {job.gpus} GPUs" if job.gpus > 1 else ""
    speed, wait = (None, None) if job.offload else (result.tokens_per_second, result.seconds.value)
    return Answer(
        on=where_of(cfg),
        fits=fits,
        needed=result.total.value,
        available=limit,
        host=result.host.value,
        speed=speed,
        wait=wait,
        longest=longest,
        words=verdict + (f"; {speed:,.0f} tokens/s, {wait:,.2f} s a step" if speed and wait else ""),
        lines=lines,
        points=[point(planned(n), n, limit, timed=not job.offload) for n in lengths],
    )


def point(result: Training, length: int, limit: float, *, timed: bool) -> Point:
    speed, wait = (result.tokens_per_second, result.seconds.value) if timed else (None, None)
    return Point(length, result.total.value, limit, speed, wait)


def trained_words(job: Job) -> str:
    return "every weight" if not job.rank else f"rank {job.rank} x (rows + columns) of every adapted matrix"


def largest(result: typing.Callable[[int], Training], limit: float, top: int) -> int:
    """The largest n up to `top` with which training fits; 0: not even 1."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if result(middle).total.value <= limit else (low, middle - 1)
    return low


def job_of(shape: ModelShape, cfg: PlanVerb, gpu: Gpu, length: int, where: str) -> Job:
    """The settings as src/finetune.py would carry them out, for conversations of `length` tokens. Raises ConfigError or WrongKind where it would refuse
    them."""
    tuner, zero, train = cfg.tuner, cfg.deepspeed, cfg.train
    lora = None if isinstance(tuner, FullTuner) else tuner
    qlora = tuner if isinstance(tuner, QloraTuner) else None
    gptq = shape.quantization
    rules.check(tuner, zero_stage=zero.stage, quantization=gptq.method if gptq else None, where=where)
    rules.check_length(train.max_length, shape.max_positions, where=where)
    rules.check_batch(train.global_batch_size, cfg.gpus, fewer="gpus")
    if lora:
        tables = {"embed_tokens", "lm_head"}
        if others := sorted({name.rsplit(".", 1)[-1] for name in lora.modules_to_save} - tables):
            raise ConfigError(
                f"tuner.modules_to_save={','.join(others)}: the plan knows the memory of {' and '.join(sorted(tables))} only",
                fix="leave it out: the plan then lacks the memory of these layers",
            )
    targets = (
        frozenset(name.removesuffix("_proj") for name in lora.target_modules) if lora and lora.target_modules != "all-linear" else None
    )
    known = {m.name for layer in shape.stack for m in layer.matrices}
    if targets and targets - known:
        raise ConfigError(f"tuner.target_modules: the model has {', '.join(sorted(known))}, not {', '.join(sorted(targets - known))}")
    nf4 = 0.5 + (1 / 64 + 4 / (64 * 256) if qlora and qlora.double_quant else 4 / 64)
    widths = ZERO if zero.stage else ADAPTERS if lora else AUTOCAST
    if train.optimizer == "adamw_8bit":
        widths = dataclasses.replace(widths, states=widths.states - 6)
    job = Job(
        method=tuner.kind,
        rank=lora.rank if lora else 0,
        targets=targets,
        dropout=lora is not None and lora.dropout > 0,
        base=2,
        quantized=None if not qlora else (gptq.bits or 4) / 8 + 2.5 / 128 if gptq else nf4,
        upcast=qlora is not None and not gptq,
        token_tables=lora is not None and bool(lora.modules_to_save),
        stage=zero.stage,
        offload=zero.offload,
        bucket=GPU_BUCKET if zero.bucket_size == "auto" else zero.bucket_size,
        gpus=cfg.gpus,
        micro_batch=1,
        accumulation=1,
        length=length,
        checkpointing=False,
        widths=widths,
        logits=None if shape.scales_logits or train.chunked_loss is False else 3 * rules.LOGITS,
    )
    share = train.global_batch_size // cfg.gpus
    resident = next(part.value for part in training(shape, job, gpu).parts if part.name == "weights")
    left, trained = gpu.memory * 1e9 - CONTEXT - resident, trained_values(shape, job)
    shards = cfg.gpus if zero.stage else 1

    def tokens(checkpointing: bool) -> int:
        kept = sum(kept_per_token(shape, job, checkpointing=checkpointing))
        return rules.tokens_that_fit(left, kept, trained=trained, shards=shards, offload=zero.offload)

    capacity, checkpointing = rules.layout(
        share=share,
        longest=length,
        micro_batch=train.micro_batch_size,
        checkpointing=train.gradient_checkpointing,
        partitioned=zero.stage == 3,
        useful=share * length,
        fits=tokens,
    )
    together = capacity // length
    return dataclasses.replace(job, micro_batch=together, accumulation=ceil(share / together), checkpointing=checkpointing)
