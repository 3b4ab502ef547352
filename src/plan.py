"""Say what a model needs before anything is run: memory, speed and lengths on a board, or memory and time of training on GPUs.

First whether it fits, then settings with which it would, then every figure with its equation. Boards and GPUs are YAML files in configs/target and
configs/gpu; what deploy or finetune would refuse is refused here, by the same rules. Several models, targets and GPUs are compared in a table:

    python -m src.plan model=[FOLDER,HUB_ID] target=[ax650,ax630c] gpu=[rtx4090,h100_80g]

docs/planner.md compares what is said here with published measurements.
"""

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import yaml

from src.core import compose, log, stage
from src.core.compose import CONFIGS
from src.core.errors import ConfigError, UserError
from src.core.log import say, shown, size, warn
from src.models.folder import locate_config
from src.settings.verbs import FullTuner, Gpu, PlanVerb, QloraTuner
from src.sizing import budget, takes
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
from src.sizing.config_reader import read_config, shape_of
from src.sizing.gpu import ADAPTERS, AUTOCAST, CONTEXT, ZERO, Job, Training, kept_per_token, trained_values, training
from src.sizing.shape import ModelShape
from src.sizing.speed import decode_ms, first_token_ms, rates_of, speed_lines
from src.training import rules

LISTS = ("model", "target", "gpu")
"""settings that may be lists"""
TRAINING = ("gpus", "tuner", "deepspeed", "train")
"""groups of settings that plan training alone"""


@dataclass(frozen=True)
class Answer:
    """What a plan comes to.

    on: the board or the GPUs. fits: None where the memory there is not known. needed, available: bytes, of one GPU or of the board's NPU; None: not known.
    host: bytes of the machine's memory that offloading takes.
    speed: tokens per second; wait: seconds to the first token, or of an optimizer step. longest: tokens of context or of a conversation that fit.
    words: the verdict. lines: the equations. points: memory and speed by length.
    """

    on: str
    fits: bool | None
    needed: float
    available: float | None
    host: float
    speed: float | None
    wait: float | None
    longest: int | None
    words: str
    lines: list[str]
    points: list[Point]


def plan(overrides: list[str]) -> int:
    """One plan in full, or several as a table."""
    asked = spread(overrides)
    if len(asked) > 1:
        return compare(asked)
    overrides = next(iter(asked), overrides)
    cfg = compose.compose("plan", overrides, PlanVerb)
    if not cfg.gpu and (idle := [text for text in overrides if group_of(text) in TRAINING]):
        warn(f"{' '.join(idle)}: of training, and so without effect on {cfg.target.name}; gpu=NAME plans training")
    config, where = read(cfg)
    answer = answer_of(cfg, config, where)
    out = [answer.words, *(f"  {'way out:' if i == 0 else 'or:     '} {way}" for i, way in enumerate(ways(cfg, overrides, config, answer)))]
    print("\n".join([*map(shown, [*out, "", *model_lines(shape_of(config, where)), "", *answer.lines, ""]), *table(answer.points)]))
    if cfg.plot and cfg.dry_run:
        say(f"would draw {cfg.plot}")
    elif cfg.plot:
        draw(answer.points, f"{name_of(cfg.model)}, {answer.on}", Path(cfg.plot))
        say(f"drew {cfg.plot}")
    return 0


def read(cfg: PlanVerb) -> tuple[dict, str]:
    """(config.json of the model, its path)."""
    config, file = read_config(locate_config(cfg.model, cfg.revision, download=not cfg.dry_run))
    return config, str(file)


def answer_of(cfg: PlanVerb, config: dict, where: str, *, brief: bool = False) -> Answer:
    """Raises what finetune or deploy would, for what they refuse. brief: without longest, lines and points."""
    if cfg.gpu:
        return gpu_answer(shape_of(config, where), cfg, cfg.gpu, where, brief=brief)
    return board_answer(takes.check(config, cfg.target, where=where), cfg)


def name_of(model: str) -> str:
    return Path(model).stem if model.endswith(".json") else Path(model).name


# ---- several at once


def spread(overrides: list[str]) -> list[list[str]]:
    """The overrides of each plan that is asked for: of every model on every target, and on every GPU. Empty for an empty list."""
    named = {group_of(text) for text in overrides if text != "gpu=none"}
    kinds = [overrides]
    if {"target", "gpu"} <= named:
        kinds = [[text for text in overrides if group_of(text) != other] for other in ("gpu", "target")]
    every = [each for kind in kinds for each in compose.each(kind, *LISTS)]
    plots = [text for text in overrides if group_of(text) == "plot"]
    if plots and len(every) > 1:
        raise ConfigError(f"{plots[0]}: a picture is of one plan", fix="leave it out, or name one model and one target or GPU")
    return every


def group_of(override: str) -> str:
    """target of target.weight_type=s4 and of target=ax650."""
    return override.partition("=")[0].partition(".")[0]


def compare(asked: list[list[str]]) -> int:
    """Print a row for each plan; what deploy or finetune would refuse has its reason under the table."""
    rows: list[list[str]] = []
    reasons: list[str] = []
    for overrides in asked:
        cfg = compose.compose("plan", overrides, PlanVerb)
        try:
            rows.append(row(cfg, answer_of(cfg, *read(cfg))))
        except UserError as error:
            first, *more = (line.strip(" -") for line in error.what.splitlines())
            reason = f"{first} {'; '.join(more)}".strip()
            reasons += [reason] if reason not in reasons else []
            rows.append([name_of(cfg.model), where_of(cfg), f"refused ({reasons.index(reason) + 1})", *[""] * 5])
    print(log.table(["model", "on", "", "memory", "of", "tokens/s", "seconds", "longest"], rows, right=(3, 4, 5, 6, 7)))
    print("\nseconds: to the first token on a board, of a step on GPUs; longest: context, or conversation, in tokens that fit")
    print("".join(shown(f"({i}) {reason}\n") for i, reason in enumerate(reasons, 1)), end="")
    return 0


def row(cfg: PlanVerb, answer: Answer) -> list[str]:
    shown = lambda value, form: "?" if value is None else format(value, form)
    return [
        name_of(cfg.model),
        answer.on,
        {True: "fits", False: "does NOT fit", None: "not known"}[answer.fits],
        size(answer.needed),
        size(answer.available) if answer.available else "?",
        shown(answer.speed, ",.1f"),
        shown(answer.wait, ",.2f"),
        shown(answer.longest, ","),
    ]


def where_of(cfg: PlanVerb) -> str:
    if not cfg.gpu:
        return cfg.target.name
    return f"{f'{cfg.gpus} x ' if cfg.gpus > 1 else ''}{cfg.gpu.name}, {cfg.tuner.kind}"


# ---- ways out


def ways(cfg: PlanVerb, overrides: list[str], config: dict, answer: Answer) -> Iterator[str]:
    """Settings to add to the command so that the model fits, each with what a plan with them comes to; none is shown that was not planned."""
    if answer.fits is not False:
        return
    none = True
    for tried in gpu_ways(cfg) if cfg.gpu else board_ways(cfg, config):
        for change in tried:
            try:
                then = answer_of(compose.compose("plan", [*overrides, *change], PlanVerb), config, cfg.model, brief=True)
            except UserError:
                continue
            if then.fits:
                none = False
                yield f"{' '.join(change)}{' if your board has so much' if 'target.board.' in change[0] else ''}: {figures(then)}"
                break
    if none:
        yield "a smaller model; no setting known here makes this one fit"


def figures(answer: Answer) -> str:
    speed = f", {answer.speed:,.1f} tokens/s" if answer.speed else ""
    host = f" and {size(answer.host)} of the machine's" if answer.host else ""
    return f"{size(answer.needed)} of {size(answer.available or 0)}{host}{speed}"


Tried = list[list[str]]
"""changes of one kind, of which the first that fits is shown"""


def board_ways(cfg: PlanVerb, config: dict) -> list[Tried]:
    """Settings of the same board, then the boards with the least memory that take the model."""
    boards = {name: option.get("board") or {} for name, option in options("target").items() if name != cfg.target.name}
    known = sorted((board["npu_memory"], name) for name, board in boards.items() if board.get("npu_memory"))
    same = budget.ways(takes.check(config, cfg.target, where=cfg.model), cfg.target)
    others = [[f"target={name}", *weights] for weights in ([], ["target.weight_type=s4"]) for _, name in known]
    return [*([way] for way in same), others]


def gpu_ways(cfg: PlanVerb) -> list[Tried]:
    """First what changes nothing that is learnt, then fewer bytes of weights, ZeRO, more memory, shorter conversations."""
    assert cfg.gpu is not None
    recomputed = ["train.gradient_checkpointing=true"] if cfg.train.gradient_checkpointing is not True else []
    smallest = ["train.micro_batch_size=1"] if cfg.train.micro_batch_size != 1 else []
    least = [*recomputed, *smallest]
    partitioned = ["deepspeed=zero2"] if cfg.deepspeed.stage == 3 else []  # a 4-bit base cannot be
    tuners = {"full": [["tuner=lora"], ["tuner=qlora", *partitioned]], "lora": [["tuner=qlora", *partitioned]]}.get(cfg.tuner.kind, [])
    larger = sorted((memory, name) for name, gpu in options("gpu").items() if (memory := gpu.get("memory") or 0) > cfg.gpu.memory)
    zero = ("zero2", "zero3") if cfg.gpus > 1 else ()
    return [
        [change for change in (recomputed, smallest, least) if change],
        *([tuner, [*tuner, *least]] for tuner in tuners),
        [[f"deepspeed={name}", *more] for name in zero for more in ([], least)],
        [[f"deepspeed={name}", *more] for name in ("zero2_offload", "zero3_offload") for more in ([], least)],
        [[f"gpus={count}", "deepspeed=zero3", *least] for count in (2, 4, 8) if count > cfg.gpus],
        [[f"gpu={name}"] for _, name in larger],
        [[f"train.max_length={length}"] for length in (2**n for n in range(16, 6, -1)) if length < cfg.train.max_length],
    ]


def options(group: str) -> dict[str, dict]:
    """{name: what is in the file} of a folder of configs/."""
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) or {} for file in sorted((CONFIGS / group).glob("*.yaml"))}


# ---- the model


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


def board_answer(shape: ModelShape, cfg: PlanVerb) -> Answer:
    target, board = cfg.target, board_of(cfg.target)
    form, fit = format_of(shape, target), board_fit(shape, target)
    rates = rates_of(board)
    speed = 1000 / decode_ms(shape, form, rates, form.context) if rates else None
    first = first_token_ms(shape, form, rates, form.prompt) / 1000 if rates else None
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
    said = (
        f"; {speed:,.1f} tokens/s at a context of {form.context:,}, the first token of a prompt of {form.prompt:,} after {first:,.2f} s"
        if rates
        else ""
    )
    return Answer(
        on=target.name,
        fits=fit.fits,
        needed=fit.needed,
        available=fit.available,
        host=0,
        speed=speed,
        wait=first,
        longest=fit.longest,
        words=board_words(fit, target.name) + said,
        lines=lines,
        points=points,
    )


def board_words(fit: Fit, name: str) -> str:
    if fit.available is None:
        return f"not known whether it fits {name}: {size(fit.needed)} are needed, its memory is not known"
    over = fit.needed > fit.available
    if fit.fits:
        return f"fits {name}: {size(fit.needed)} of {size(fit.available)}"
    if over:
        return f"does NOT fit {name}: {size(fit.needed)} are needed, {size(fit.available)} are there"
    return f"does NOT fit {name}: the embedding table of {size(fit.host_needed)} goes into the host's memory, {size(fit.host_available or 0)} are there"


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
                fix="leave it out of the plan",
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
        bucket=zero.bucket_size,
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


if __name__ == "__main__":
    stage.main_uncomposed("plan", __doc__, PlanVerb, plan)
