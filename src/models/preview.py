"""What a model says in a board's numbers, before anything is compiled: loss, KL and likeliest tokens on held-out conversations against the model as it is, how
far each layer is off, and what it answers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import ConfigError, UserError, WrongKind
from src.core.log import say
from src.models import fidelity, gates, seen
from src.models.loading import tokenizer_of
from src.settings.evaluations import Gate
from src.settings.targets import Target
from src.sizing import numerics
from src.sizing.config_reader import read_shape
from src.sizing.numerics import Numerics

GATED = ("kl", "agreement", "perplexity_ratio")
"""what gates can limit of one kind of numbers"""
Ask = Callable[[Any], list[dict]]
"""what gives a model's answers"""
UNKEPT = "Keys and values are not rounded: this family's attention hands them to no cache."


@dataclass(frozen=True)
class Preview:
    """change: from the model as it is. layers: see on_board.layers. kept: whether keys and values were rounded. answers: see evaluation.answer."""

    how: Numerics
    change: fidelity.Change
    layers: list[dict[str, float]]
    kept: bool
    answers: list[dict]

    @property
    def assumed(self) -> tuple[str, ...]:
        return self.how.assumed + (() if self.kept or self.how.kv == numerics.FP32 else (UNKEPT,))

    @property
    def worst(self) -> int:
        """The layer whose own numbers move its output most."""
        return max(range(len(self.layers)), key=lambda number: self.layers[number]["error"])


def previews(
    model: Artifact, kinds: list[Numerics], rows: list[encoding.Encoded], *, layers: bool = True, ask: Ask | None = None
) -> tuple[list[Preview], list[dict]]:
    """(the model in each of the kinds, its answers as it is). Memory is that of a layer in fp32, and of all of them where there is something to `ask`. Raises
    WrongKind for a model that cannot be taken so.

    layers: False saves two of the three times that each layer is read for a kind of numbers.
    """
    from src.models import by_layer, on_board

    if not (loaded := by_layer.load(model)):
        raise WrongKind(
            "this model cannot be taken layer by layer, which a board's numbers are tried in",
            where=str(model.path),
        )
    walk, _ = loaded
    before, plain = seen.observe(seen.by_layer(walk, "as it is"), rows), _answers(walk, ask, model.path)
    found: list[Preview] = []
    for how in kinds:
        same = next((one for one in found if one.how.words() == how.words()), None)
        if same:
            found.append(replace(same, how=how, answers=[dict(row) for row in same.answers]))
            continue
        with on_board.computing(walk, how) as keeps:
            after = seen.observe(seen.by_layer(walk, how.name), rows, before.top_k_ids)
            answers = _answers(walk, ask, model.path)
        off = on_board.layers(walk, how, [row.input_ids for row in rows]) if layers else []
        found.append(Preview(how, fidelity.compare(before, after, len(rows)), off, keeps.used, answers))
    return found, plain


def _answers(walk, ask: Ask | None, folder: Path) -> list[dict]:
    """What is answered with all of the weights in memory."""
    if not ask:
        return []
    from transformers import GenerationConfig

    with walk.whole() as model:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return ask(model)


def before_compile(model: Artifact, target: Target, dataset: Path | None, count: int, gate: Gate) -> dict[str, float]:
    """Tries the model in the target's numbers on `count` held-out conversations, and says what they lose; returns it as metrics, empty where it was not
    tried, which is said too. Raises what `judge` does."""
    tried = _tried(model, target, dataset, count)
    judge(gate, tried, str(model.path))
    return tried


def judge(gate: Gate, tried: dict[str, float], where: str) -> None:
    """Raises GateFailed where the model loses more in a board's numbers than the limits allow, ConfigError where that is not known."""
    if not gates.limits(gate):
        return
    if not tried.keys() >= {f"preview_{name}" for name in GATED}:
        raise ConfigError(
            "gate limits what the model loses in the target's numbers, and it was not tried in them", where=where, fix="gate=none"
        )
    gates.judge(gate, {name: tried[f"preview_{name}"] for name in GATED} | {"intervals": dict.fromkeys(GATED)}, where, "deploy")


def _tried(model: Artifact, target: Target, dataset: Path | None, count: int) -> dict[str, float]:
    if not count or dataset is None:
        say(f"not tried in the numbers of {target.name}: {'preview=0' if not count else 'no dataset is known'}")
        return {}
    try:
        how = numerics.of(read_shape(model.path), target)
        if not (rows := fidelity.held_out(dataset, tokenizer_of(model), model.path)[:count]):
            return {}
        change = previews(model, [how], rows, layers=False)[0][0].change
    except UserError as error:
        say(f"not tried in the numbers of {target.name}: {error.what}")
        return {}
    say(f"{how.name}, before the compile: {change.told('as it is', 'in its numbers')}")
    return {f"preview_{name}": value for name, value in gated(change).items()}


def gated(change: fidelity.Change) -> dict[str, float]:
    """The figures of GATED."""
    return dict(zip(GATED, (change.kl, change.agreement, math.exp(min(change.loss, 700)))))
