"""What a plan comes to, for a board or for GPUs alike."""

from dataclasses import dataclass

from src.settings.verbs import PlanVerb
from src.sizing.chart import Point


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


def where_of(cfg: PlanVerb) -> str:
    """What a plan is for, in a word or two."""
    if not cfg.gpu:
        return cfg.target.name
    return f"{f'{cfg.gpus} x ' if cfg.gpus > 1 else ''}{cfg.gpu.name}, {cfg.tuner.kind}"
