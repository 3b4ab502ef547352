"""A finished report held against limits: what fails names the figure, its limit and the rows that failed worst."""

from collections.abc import Collection
from typing import NamedTuple

from src.core.errors import ConfigError, GateFailed
from src.core.log import say
from src.models.comparison import shown
from src.settings.evaluations import Gate

PARENT = "parent=FOLDER names the model to compare with"
NAMED = 3
"""rows"""


TAKES = {
    **dict.fromkeys(("kl", "top1", "perplexity_ratio"), PARENT),
    "task_drop": "evaluation.check=number, choice, json or calls, of what the data can check",
    "forgetting": "evaluation.general=FILE of another domain",
}
"""what a figure takes to be measured"""


class Figure(NamedTuple):
    """What a gate limits: its name in a report and in words, its form, whose rows are named, and whether it has to be at least the limit."""

    name: str
    words: str
    form: str = "{:.4f}"
    rows: str = ""
    least: bool = False


FIGURES = {
    "kl": Figure("kl", "KL to the parent in nats", rows="kl"),
    "top1": Figure("agreement", "the share of tokens whose likeliest is the parent's", rows="agreement", least=True),
    "perplexity_ratio": Figure("perplexity_ratio", "perplexity over the parent's", rows="loss_difference"),
    "task_drop": Figure("task_difference", "the share of answers right less the parent's", "{:+.4f}"),
    "forgetting": Figure(
        "general_loss_difference", "loss less the parent's on general rows in nats", "{:+.4f}", rows="general_loss_difference"
    ),
}
"""by the name of a setting of Gate"""


def limits(gate: Gate) -> dict[str, float]:
    """The gates that are set."""
    every = {
        "kl": gate.kl,
        "top1": gate.top1,
        "perplexity_ratio": gate.perplexity_ratio,
        "task_drop": gate.task_drop,
        "forgetting": gate.forgetting,
    }
    return {name: limit for name, limit in every.items() if limit is not None}


def refuse_unmeasured(gate: Gate, measured: Collection[str]) -> None:
    """Raises ConfigError where a gate limits a figure that is not among those `measured`."""
    for name in limits(gate):
        if (figure := FIGURES[name]).name not in measured:
            raise ConfigError(
                f"gate.{name} limits what is not measured here: {figure.words}",
                fix=[TAKES[name], f"gate.{name}=null"],
            )


def judge(gate: Gate, metrics: dict, where: str, verb: str = "evaluate") -> None:
    """Says which limits are kept; raises GateFailed for those that are not, ConfigError for what was not measured. metrics: of a report. where: they are."""
    refuse_unmeasured(gate, metrics)
    failed, accepted = [], {}
    for name, limit in limits(gate).items():
        figure = FIGURES[name]
        value = -metrics[figure.name] if name == "task_drop" else metrics[figure.name]
        told = f"gate.{name}={limit:g}: {figure.words} is {shown(metrics, figure.name, figure.form)}"
        if value >= limit if figure.least else value <= limit:
            say(f"{verb}: keeps {told}")
        else:
            worst = _worst(figure, metrics)
            failed.append(f"  {told}" + (f"; worst: {worst}" if worst else ""))
            accepted[name] = value * 0.99 if figure.least else min(value * 1.01, 1) if name == "task_drop" else value * 1.01
    if failed:
        raise GateFailed(
            f"{len(failed)} of {len(limits(gate))} limits are not kept\n" + "\n".join(failed),
            where=where,
            fix=[f"gate.{name}={value:.3g} if you accept it" for name, value in accepted.items()],
        )


def _worst(figure: Figure, metrics: dict) -> str:
    """The rows that are farthest from the parent by a figure, with their own; for right answers, the prompts that the parent could and the model cannot."""
    if not figure.rows:
        return ", ".join(repr(prompt[:60]) for prompt in metrics["task_lost"][:NAMED])
    name = figure.rows.removeprefix("general_")
    rows = metrics.get("worst", {}).get(figure.rows, [])
    return ", ".join(f"{row['id']} {row[name]:.4f}" for row in rows[:NAMED])
