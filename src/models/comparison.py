"""A model against the one it was made from, row by row on the same tokens and prompt by prompt: figures, their intervals, and what they are evidence of."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from src.chat.encoding import Encoded
from src.core.log import table
from src.models import seen
from src.models.bootstrap import FEWEST, RESAMPLES, Interval, intervals, quantile, verdict
from src.models.generation import leading
from src.models.seen import Seen

ALIKE = 0.01
"""nats a token within which a row counts as neither better nor worse"""
WORST = 5
"""rows that are named"""
PARTS = (("", "validation"), ("general_", "general"))
"""prefixes of figures, and what their rows are of"""


@dataclass(frozen=True)
class Figures:
    """values, and an interval of each."""

    values: dict[str, float]
    intervals: dict[str, Interval]


def over_rows(figures, rows: int) -> Figures:
    """figures(weights): see bootstrap.intervals."""
    return Figures(figures(np.ones(rows)), intervals(figures, rows))


class Rows:
    """What a model says at the trained tokens of rows, and its parent, if any, at the same. What is kept of a row is of its tokens together.

    tokens (rows,) counts; loss and parent_loss are means in nats, kl is the mean of KL(parent || model), agreement the share of tokens with the same
    likeliest one; all (rows,). There is no KL where the parent's likeliest tokens were not asked for, as an endpoint cannot be.
    """

    def __init__(self, prefix: str, rows: list[tuple[str, Encoded]], model: Seen, parent: Seen | None = None):
        """prefix: of what their figures are called, one of PARTS. rows: with the id of each."""
        self.of, self.ids, self.has_parent = dict(PARTS)[prefix], [id for id, _ in rows], parent is not None
        self.has_kl = parent is not None and parent.top_k_ids.shape[1] > 0
        of = np.repeat(np.arange(len(rows)), [len(seen.kept(row)) for _, row in rows])
        self.tokens = np.bincount(of, minlength=len(rows))
        mean = lambda values: np.bincount(of, weights=values, minlength=len(rows)) / self.tokens
        self.loss = mean(model.losses)
        if parent:
            self.parent_loss, self.agreement = mean(parent.losses), mean(parent.likeliest == model.likeliest)
            if self.has_kl:
                kl = seen.divergence(parent, model)
                order = np.argsort(kl)
                self.kl, self._kl, self._of = mean(kl), kl[order], of[order]

    @property
    def difference(self) -> np.ndarray:
        """Nats a token by which the model's loss is above its parent's, (rows,)."""
        return self.loss - self.parent_loss

    def figures(self, weights: np.ndarray) -> dict[str, float]:
        """Means over the tokens of rows that count so often."""
        tokens = weights * self.tokens
        mean = lambda values: float(tokens @ values / tokens.sum())
        found = {"loss": mean(self.loss), "perplexity": _exp(mean(self.loss))}
        if not self.has_parent:
            return found
        share = lambda which: float(weights @ which / weights.sum())
        return found | {
            "parent_loss": mean(self.parent_loss),
            "parent_perplexity": _exp(mean(self.parent_loss)),
            "loss_difference": mean(self.difference),
            "perplexity_ratio": _exp(mean(self.difference)),
            **({"kl": mean(self.kl), "kl_p99": quantile(self._kl, weights[self._of], 0.99)} if self.has_kl else {}),
            "agreement": mean(self.agreement),
            "rows_worse": share(self.difference > ALIKE),
            "rows_better": share(self.difference < -ALIKE),
        }

    def worst(self) -> dict[str, list[dict]]:
        """By each figure that a gate may limit, the rows that are farthest from the parent, that of the farthest first."""
        farthest = {"agreement": -self.agreement, "loss_difference": self.difference} | ({"kl": self.kl} if self.has_kl else {})
        return {name: [self.line(i) for i in np.argsort(-by, kind="stable")[:WORST]] for name, by in farthest.items()}

    def lines(self) -> Iterator[dict[str, Any]]:
        """Every row's own figures."""
        return ({"of": self.of, **self.line(i)} for i in range(len(self.ids)))

    def line(self, i: int) -> dict[str, Any]:
        """A row's own figures."""
        line = {"id": self.ids[i], "tokens": int(self.tokens[i]), "loss": float(self.loss[i])}
        more = {"parent_loss": self.parent_loss, "loss_difference": self.difference, "agreement": self.agreement} if self.has_parent else {}
        more |= {"kl": self.kl} if self.has_kl else {}
        return line | {name: float(values[i]) for name, values in more.items()}


def _exp(nats: float) -> float:
    return math.exp(min(nats, 700))


def of_answers(mine: list[dict], theirs: list[dict], tokenizer) -> Figures:
    """same_answers: the share of prompts that both answer alike; parts_at: tokens before their answers part, the median over prompts, all where they do not."""
    pairs = list(zip(mine, theirs))
    same = np.array([a["answer"] == b["answer"] and a["ended"] == b["ended"] for a, b in pairs])
    at = np.array([leading(tokenizer, a["answer"], b["answer"])[0] for a, b in pairs])
    order = np.argsort(at)
    figures = lambda weights: {"same_answers": float(weights @ same / weights.sum()), "parts_at": quantile(at[order], weights[order], 0.5)}
    return over_rows(figures, len(pairs))


def of_task(right: Mapping[str, Sequence[float] | np.ndarray]) -> Figures:
    """task: the share of answers that are right, or the mean of another figure of each; parent_task and task_difference where there is a parent, prompt by prompt."""
    by = {role: np.array(each, float) for role, each in right.items()}

    def figures(weights: np.ndarray) -> dict[str, float]:
        share = {role: float(weights @ each / weights.sum()) for role, each in by.items()}
        parent = {"parent_task": share["parent"], "task_difference": share["model"] - share["parent"]} if "parent" in share else {}
        return {"task": share["model"], **parent}

    return over_rows(figures, len(by["model"]))


def report(parts: Iterable[tuple[str, Figures]]) -> dict[str, Any]:
    """Figures under one name each, prefix first, with their intervals and what each difference is evidence of."""
    found: dict[str, Any] = {"intervals": {}, "evidence": {}, "resamples": RESAMPLES}
    for prefix, part in parts:
        found |= {prefix + name: value for name, value in part.values.items()}
        found["intervals"] |= {prefix + name: interval for name, interval in part.intervals.items()}
    for name, interval in found["intervals"].items():
        if name.endswith("_difference"):
            found["evidence"][name] = verdict(interval, less_is_better=name.endswith("loss_difference"))
    return found


# ---- in words


def shown(metrics: dict, name: str, form: str = "{:.4f}") -> str:
    """A figure with its interval: 0.0123 [0.0100, 0.0150]."""
    interval = metrics["intervals"][name]
    return form.format(metrics[name]) + (f" [{form.format(interval[0])}, {form.format(interval[1])}]" if interval else "")


def in_words(metrics: dict) -> list[str]:
    """Lines about a model and its parent: a table of losses, how far what it says is from what its parent says, and how many answers are right."""
    lines = []
    if "loss_difference" in metrics:
        head = ("rows of", "rows", "parent's loss", "loss", "difference", "perplexity ratio", "rows worse", "rows better", "evidence")
        rows = [row for prefix, of in PARTS if f"{prefix}loss_difference" in metrics for row in _rows(metrics, prefix, of)]
        lines += table(head, rows, right=(1, 2, 3, 6, 7)).splitlines()
        kl = f"KL to the parent {shown(metrics, 'kl')} nats, 99th percentile {shown(metrics, 'kl_p99')}, " if "kl" in metrics else ""
        lines.append(f"{kl}same likeliest token {shown(metrics, 'agreement', '{:.1%}')}")
    if "parts_at" in metrics:
        same, at = shown(metrics, "same_answers", "{:.0%}"), shown(metrics, "parts_at", "{:.0f}")
        lines.append(f"greedy answers: {same} of {metrics['prompts']} the same, alike for {at} tokens (median)")
    if "task" in metrics:
        lines.append(_task(metrics))
    about = f"in brackets 95 % intervals, by {RESAMPLES:,} bootstrap resamples of rows and of prompts; of fewer than {FEWEST} there is none"
    return [*lines, about] if lines else []


def _rows(metrics: dict, prefix: str, of: str) -> list[tuple[str, ...]]:
    """The rows of the table, of the general ones those that got worst too. prefix: of the names of figures; of: what their rows are of."""
    own = lambda name: metrics[prefix + name]
    losses = lambda of: (f"{of['parent_loss']:.4f}", f"{of['loss']:.4f}")
    whole = (
        of,
        str(own("rows")),
        *losses({name: own(name) for name in ("parent_loss", "loss")}),
        shown(metrics, f"{prefix}loss_difference", "{:+.4f}"),
        shown(metrics, f"{prefix}perplexity_ratio", "{:.3f}"),
        f"{own('rows_worse'):.0%}",
        f"{own('rows_better'):.0%}",
        metrics["evidence"][f"{prefix}loss_difference"],
    )
    worst = [row for row in metrics["worst"]["general_loss_difference"] if row["loss_difference"] > ALIKE] if prefix else []
    return [whole, *((f"  worst: {row['id']}", "", *losses(row), f"{row['loss_difference']:+.4f}", "", "", "", "") for row in worst)]


def _task(metrics: dict) -> str:
    """How many of the answers that were checked are right."""
    line = f"{metrics['task_check']}: {shown(metrics, 'task', '{:.1%}')} of {metrics['task_prompts']} answers right"
    if "parent_task" in metrics:
        line += f", parent's {shown(metrics, 'parent_task', '{:.1%}')}, difference {shown(metrics, 'task_difference', '{:+.1%}')}"
        line += f": {metrics['evidence']['task_difference']}"
    if "false_calls" in metrics:
        line += f"; {metrics['false_calls']} false calls" + (
            f", parent's {metrics['parent_false_calls']}" if "parent_task" in metrics else ""
        )
    return line
