"""What a run is taught, and how what it has learnt is looked at: what conversations (chats.py) and plain text (plain_text.py) have in common for a trainer."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.chat.encoding import Encoded
from src.training.batches import Rows
from src.training.teacher import TeacherProbs


@dataclass(frozen=True)
class Lesson:
    """What a run is taught.

    chat: of conversations, not of plain text. train, val: its rows. held: those that a proof compares. eos_id: of the token that ends a turn or a document.
    source: where the rows came from. named(row): what of it a row of `train` is. metrics: what the manifest says of them.
    prompts: (shown, token ids) to go on from at each evaluation.
    control: ids that a chat template writes, learns_control: whether those the model never learnt are trained. added: tokens that are new to it.
    teacher_probs, alpha: what a teacher holds likely at the trained tokens of `train`, and its weight.
    """

    chat: bool
    train: Rows
    val: Rows
    held: list[Encoded]
    eos_id: int
    source: Path
    named: Callable[[int], str]
    metrics: dict[str, Any]
    prompts: list[tuple[str, list[int]]]
    control: list[int] = field(default_factory=list)
    learns_control: bool = False
    added: list[str] = field(default_factory=list)
    teacher_probs: TeacherProbs | None = None
    alpha: float = 0.0
