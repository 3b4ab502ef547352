"""Say what a model needs before anything is run: memory, speed and lengths on a board, or memory and time of training on GPUs.

Every figure is printed with its equation. Boards and GPUs are YAML files in configs/target and configs/gpu; docs/planner.md compares what is said
here with published measurements.
"""

import dataclasses
import typing
from math import ceil
from pathlib import Path

from src.core import stage
from src.core.errors import ConfigError
from src.core.log import say, shown, size
from src.settings.verbs import FullTuner, Gpu, PlanVerb, QloraTuner
from src.sizing.budget import (
    Fit,
    Format,
    Quantity,
    board_fit,
    board_of,
    device_parts,
    embedding_bytes,
    format_of,
    head_bytes,
    host_needs,
    kv_cache_bytes,
    largest_batch,
    layer_bytes,
)
from src.sizing.chart import Point, draw, table
from src.sizing.config_reader import read_shape
from src.sizing.gpu import ADAPTERS, AUTOCAST, ZERO, Job, Training, training
from src.sizing.shape import ModelShape
from src.sizing.speed import decode_ms, first_token_ms, rates_of, speed_lines
from src.training import rules


def plan(cfg: PlanVerb) -> int:
    shape = read_shape(cfg.model)
    lines, points = gpu_plan(shape, cfg, cfg.gpu) if cfg.gpu else board_plan(shape, cfg)
    print("\n".join([*map(shown, [*model_lines(shape), "", *lines, ""]), *table(points)]))
    if cfg.plot and cfg.dry_run:
        say(f"would draw {cfg.plot}")
    elif cfg.plot:
        draw(points, f"{Path(cfg.model).stem if cfg.model.endswith('.json') else Path(cfg.model).name}, {where(cfg)}", Path(cfg.plot))
        say(f"drew {cfg.plot}")
    return 0


def where(cfg: PlanVerb) -> str:
    return f"{cfg.tuner.kind} on {cfg.gpus} x {cfg.gpu.name}" if cfg.gpu else f"{cfg.target.name}"


def model_lines(shape: ModelShape) -> list[str]:
    """What the model is, and the sum of its parameters."""
    kinds = {kind: sum(layer.kind == kind for layer in shape.stack) for kind in ("full", "sliding", "linear")}
    mixed = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    each = sorted({layer.params for layer in shape.stack})
    layers = f"{shape.layers} layers x {each[0]:,}" if len(each) == 1 else f"{shape.layers} layers {shape.layer_params:,}"
    terms = [layers, f"embedding {shape.vocab:,} x {shape.hidden:,}", *([] if shape.tied else [f"output layer {shape.head:,}"])]
    terms += [f"further token tables {shape.extra_embedding:,}"] if shape.extra_embedding else []
    alike = len({layer.kv_values for layer in shape.stack}) == 1
    per_token = f"2 x 2 B x {shape.layers} layers x {shape.kv_heads} KV heads x {shape.head_dim}"
    if not alike or shape.stack[0].kv_values != 2 * shape.kv_heads * shape.head_dim:
        per_token = f"2 B x {shape.kv_values:,} values in {shape.attending} of {shape.layers} layers"
    quantization = shape.quantization
    stored = f", {quantization.method} {quantization.bits} bit" if quantization else ""
    return [
        f"{shape.model_type}: {shape.layers} layers ({mixed} attention) of width {shape.hidden:,}, {shape.heads} heads of {shape.head_dim}, "
        f"{shape.kv_heads} for keys and values, MLP {shape.intermediate:,}, vocabulary {shape.vocab:,}{' tied' if shape.tied else ''}{stored}",
        *(f"note: {note}" for note in shape.notes),
        f"parameters = {' + '.join(terms)} + other {shape.outside:,} = {shape.params:,}",
        f"KV cache per token, 16 bit = {per_token} = {shape.kv_bytes_per_token():,} B",
        f"longest context by the model's own word: {f'{shape.max_positions:,} tokens' if shape.max_positions else 'not said'}",
    ]


# ---- boards


def board_plan(shape: ModelShape, cfg: PlanVerb) -> tuple[list[str], list[Point]]:
    target, board = cfg.target, board_of(cfg.target)
    form, fit = format_of(shape, target), board_fit(shape, target)
    rates = rates_of(board)
    lines = [
        f"{target.name} ({target.kind}): weights {form.name}, context {form.context:,}, prompt {form.prompt:,} in chunks of {form.chunk}",
        *weight_lines(shape, cfg),
        f"KV cache = {form.kv} B x {shape.kv_values:,} values x {form.context:,} tokens = {size(kv_cache_bytes(shape, form, form.context))} for one sequence",
        *fit.lines,
        *length_lines(fit, form, target.name),
        *speed_lines(shape, form, board, form.context, form.prompt),
        *batch_lines(shape, cfg, form, fit),
        *host_needs(shape, target)[2],
    ]
    longest = shape.max_positions or form.context
    contexts = [n for n in (256 * 2**i for i in range(14)) if n <= min(longest, max(form.context, 32768))]
    points = [
        Point(
            length=n,
            memory=sum(device_parts(shape, target, form, n, min(form.prompt, n)).values()),
            limit=fit.available,
            speed=1000 / decode_ms(shape, form, rates, n) if rates else None,
            wait=first_token_ms(shape, form, rates, n) / 1000 if rates else None,
        )
        for n in contexts
    ]
    return lines, points


def weight_lines(shape: ModelShape, cfg: PlanVerb) -> list[str]:
    """Bytes of the weights in each type the target can be given."""
    setting = "weight_type" if "weight_type" in type(cfg.target).model_fields else "format"
    if setting not in type(cfg.target).model_fields:
        return []
    names = [n for n in typing.get_args(type(cfg.target).model_fields[setting].annotation) if n != "auto"]
    forms = {name: format_of(shape, cfg.target.model_copy(update={setting: name})) for name in names}
    width = max(map(len, names))
    return [
        f"  {name:<{width}}  layers {size(layer_bytes(shape, f)):>8}  output layer {size(head_bytes(shape, f)):>8}  embedding {size(embedding_bytes(shape, f)):>8}"
        for name, f in forms.items()
    ]


def length_lines(fit: Fit, form: Format, name: str) -> list[str]:
    if fit.longest is None or fit.longest_prompt is None:
        return []
    if not fit.longest:
        return [f"no context fits {name}"]
    return [
        f"longest context that fits with this prompt: {fit.longest:,} tokens",
        f"longest prompt within it: {fit.longest_prompt:,} tokens, {fit.longest_prompt // form.chunk:,} chunks",
    ]


def batch_lines(shape: ModelShape, cfg: PlanVerb, form: Format, fit: Fit) -> list[str]:
    """The best batch, up to which another sequence costs little, and the largest that memory allows."""
    if fit.available is None or not fit.fits:
        return []
    most = largest_batch(shape, cfg.target, form, fit.available, form.context, form.prompt)
    kv = kv_cache_bytes(shape, form, form.context)
    return [
        str(Quantity("largest batch", most, "sequences", f"KV caches of {size(kv)} in what {size(fit.available)} leave beside the weights"))
    ]


# ---- GPUs


def gpu_plan(shape: ModelShape, cfg: PlanVerb, gpu: Gpu) -> tuple[list[str], list[Point]]:
    job = job_of(shape, cfg)
    result, limit = training(shape, job, gpu), gpu.memory * 1e9
    fits = result.total.value <= limit
    verdict = "fits" if fits else "does NOT fit"
    batch = largest(lambda n: training(shape, dataclasses.replace(job, micro_batch=n), gpu), limit, 1024)
    length = largest(lambda n: training(shape, dataclasses.replace(job, length=n), gpu), limit, shape.max_positions or 2**20)
    lines = [
        f"{job.method} on {job.gpus} x {gpu.name}, {rules.zero_name(job.stage, job.offload)}, 16 bit, {job.micro_batch} x {job.length:,} tokens a pass, "
        f"{job.accumulation} passes a step, gradient checkpointing {'on' if job.checkpointing else 'off'}",
        f"trained = {trained_words(job)} = {result.trained:,} of {shape.params:,}",
        *map(str, result.parts),
        str(result.peak),
        f"{result.total}: {verdict} in {size(limit)}",
        *([str(result.host)] if job.offload else []),
        f"largest micro batch at {job.length:,} tokens: {batch:,}; longest conversation at micro batch {job.micro_batch}: {length:,} tokens",
        f"{result.seconds} = {result.tokens_per_second:,.0f} tokens/s, padding included",
    ]
    longest = shape.max_positions or 32768
    lengths = [n for n in (256 * 2**i for i in range(14)) if n <= min(longest, 8 * max(job.length, 2048))]
    return lines, [point(training(shape, dataclasses.replace(job, length=n), gpu), n, limit) for n in lengths]


def point(result: Training, length: int, limit: float) -> Point:
    return Point(length, result.total.value, limit, result.tokens_per_second, result.seconds.value)


def trained_words(job: Job) -> str:
    return "every weight" if not job.rank else f"rank {job.rank} x (rows + columns) of every adapted matrix"


def largest(result: typing.Callable[[int], Training], limit: float, top: int) -> int:
    """The largest n up to `top` with which training fits; 0: not even 1."""
    low, high = 0, top
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if result(middle).total.value <= limit else (low, middle - 1)
    return low


def job_of(shape: ModelShape, cfg: PlanVerb) -> Job:
    """The settings as src/finetune.py would carry them out. Raises ConfigError or WrongKind where it would refuse them."""
    tuner, zero, train = cfg.tuner, cfg.deepspeed, cfg.train
    lora = None if isinstance(tuner, FullTuner) else tuner
    qlora = tuner if isinstance(tuner, QloraTuner) else None
    method = shape.quantization.method if shape.quantization else None
    rules.check(tuner, zero_stage=zero.stage, quantization=method, where=cfg.model)
    if lora:
        tables = {"embed_tokens", "lm_head"}
        if others := sorted({name.rsplit(".", 1)[-1] for name in lora.modules_to_save} - tables):
            raise ConfigError(
                f"tuner.modules_to_save={','.join(others)}: the plan knows the memory of {' and '.join(sorted(tables))} only",
                fix="leave it out of the plan",
            )
    each = ceil(train.global_batch_size / cfg.gpus)
    if train.global_batch_size % (cfg.gpus * train.micro_batch_size):
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of {cfg.gpus} GPUs x train.micro_batch_size={train.micro_batch_size}",
            fix=f"train.global_batch_size={ceil(each / train.micro_batch_size) * train.micro_batch_size * cfg.gpus}",
        )
    targets = (
        frozenset(name.removesuffix("_proj") for name in lora.target_modules) if lora and lora.target_modules != "all-linear" else None
    )
    known = {m.name for layer in shape.stack for m in layer.matrices}
    if targets and targets - known:
        raise ConfigError(f"tuner.target_modules: the model has {', '.join(sorted(known))}, not {', '.join(sorted(targets - known))}")
    gptq = shape.quantization
    nf4 = 0.5 + (1 / 64 + 4 / (64 * 256) if qlora and qlora.double_quant else 4 / 64)
    return Job(
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
        bucket=zero.bucket_size,
        gpus=cfg.gpus,
        micro_batch=train.micro_batch_size,
        accumulation=train.global_batch_size // (cfg.gpus * train.micro_batch_size),
        length=train.max_length,
        checkpointing=train.gradient_checkpointing,
        widths=ZERO if zero.stage else ADAPTERS if lora else AUTOCAST,
    )


if __name__ == "__main__":
    stage.main_plain("plan", __doc__, PlanVerb, plan)
