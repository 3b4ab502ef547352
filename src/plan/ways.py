"""Settings with which a model would fit, each planned before it is shown."""

from collections.abc import Iterator

from src.core import compose
from src.core.errors import UserError
from src.core.log import size
from src.plan.answer import Answer
from src.plan.boards import board_answer
from src.plan.gpus import gpu_answer
from src.settings.verbs import PlanVerb
from src.sizing import budget, takes
from src.sizing.config_reader import shape_of


def answer_of(cfg: PlanVerb, config: dict, where: str, *, brief: bool = False) -> Answer:
    """Raises what finetune or deploy would, for what they refuse. brief: without longest, lines and points."""
    if cfg.gpu:
        return gpu_answer(shape_of(config, where), cfg, cfg.gpu, where, brief=brief)
    return board_answer(takes.check(config, cfg.target, where=where), cfg)


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
    boards = {name: option.get("board") or {} for name, option in compose.options("target").items() if name != cfg.target.name}
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
    larger = sorted((memory, name) for name, gpu in compose.options("gpu").items() if (memory := gpu.get("memory") or 0) > cfg.gpu.memory)
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
