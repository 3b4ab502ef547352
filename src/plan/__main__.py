"""Say what a model needs before anything is run: memory, speed and lengths on a board, or memory and time of training on GPUs.

First whether it fits, then settings with which it would, then every figure with its equation. Boards and GPUs are YAML files in configs/target and
configs/gpu; what deploy or finetune would refuse is refused here, by the same rules. Several models, targets and GPUs are compared in a table:

    python -m src.plan model=[FOLDER,HUB_ID] target=[ax650,ax630c] gpu=[rtx4090,h100_80g]

docs/planner.md compares what is said here with published measurements.
"""

from pathlib import Path

from src.core import compose, log, stage
from src.core.errors import ConfigError, UserError
from src.core.log import say, shown, size, warn
from src.models.folder import locate_config
from src.plan.answer import Answer, where_of
from src.plan.machine import machine_lines
from src.plan.ways import answer_of, ways
from src.settings.verbs import PlanVerb
from src.sizing.chart import draw, table
from src.sizing.config_reader import read_config, shape_of
from src.sizing.shape import ModelShape

LISTS = ("model", "target", "gpu")
"""settings that may be lists"""
TRAINING = ("gpus", "tuner", "deepspeed", "train")
"""groups of settings that plan training alone"""


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
    shape = shape_of(config, where)
    lines = [*out, "", *model_lines(shape), "", *answer.lines, "", *machine_lines(shape, cfg), ""]
    print("\n".join([*map(shown, lines), *table(answer.points)]))
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
        raise ConfigError(f"{plots[0]}: a picture is of one plan", fix="name one model, and one target or one GPU")
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
            reason = f"{first} {'; '.join(more)}".strip() + "".join(f"; {way}" for way in error.fix[:1])
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


if __name__ == "__main__":
    stage.main_uncomposed("plan", __doc__, PlanVerb, plan)
