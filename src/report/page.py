"""The page itself: what a run tells, as tables, plots and text in one HTML file."""

import math
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from pydantic import TypeAdapter

from src import __version__
from src.core import compose
from src.core.artifact import Artifact
from src.core.files import flatten
from src.core.log import duration, shown, size
from src.models import bootstrap, glance
from src.report import plots
from src.report import run as runs
from src.report.run import Finished
from src.settings.targets import AnyTarget
from src.sizing import budget, speed
from src.sizing.config_reader import read_shape

HERE = Path(__file__).parent


def of(folders: Sequence[Path], rows: int) -> str:
    """The page of one run, or of several with a comparison in front. rows: conversations whose lengths are drawn."""
    read = [runs.read(folder) for folder in folders]
    drawn: dict[str, Any] = {}
    first = read[0]
    told: dict[str, Any] = {
        "title": " and ".join(run.name for run in read),
        "made": f"{datetime.now():%Y-%m-%d %H:%M}",
        "version": __version__,
        "runs": [overview(run) for run in read],
        "comparison": comparison(read, drawn) if len(read) > 1 else None,
        "road": runs.road(first),
        "data": data(first, rows, drawn),
        "training": training(read, drawn),
        "steps": steps(first),
        "evaluations": evaluations(first, drawn),
        "changed": changed(first),
        "answers": dict(zip(("names", "rows"), runs.answers(first))),
        "boards": list(boards(first)),
        "commands": runs.commands(first),
    }
    names = dict.fromkeys(name for run in told["runs"] for name, _ in run["cards"])
    told["side_by_side"] = [[name, *(dict(run["cards"]).get(name, "") for run in told["runs"])] for name in names]
    script, places = plots.embedded({name: plot for name, plot in drawn.items() if plot is not None})
    page = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.finalize = lambda value: shown(value) if type(value) is str else value
    return page.get_template("page.html").render(told, script=script, plots=places)


def overview(run: Finished) -> dict[str, Any]:
    """The figures in front: one card each."""
    manifests = [a.manifest for a in run.artifacts.values() if a.manifest]
    cards = [("artifacts", str(len(manifests))), ("time", duration(sum(m["seconds"] for m in manifests)))]
    cards.append(("on disk", size(sum(f["size"] for a in run.artifacts.values() for f in a.files.values()))))
    if dataset := run.dataset:
        cards.append(("conversations", f"{dataset.metrics.get('train_rows', 0):,} train, {dataset.metrics.get('val_rows', 0):,} val"))
    if (tuned := run.trained) and "val_loss" in tuned.metrics:
        cards.append(("validation loss", f"{tuned.metrics['val_loss_first']:.3f} → {tuned.metrics['val_loss']:.3f}"))
    for form, report in runs.evaluations(run)[-1:]:
        if "perplexity" in report.metrics:
            cards.append((f"perplexity, {form}", f"{report.metrics['perplexity']:.3f}"))
        if "kl" in report.metrics:
            cards.append((f"KL to its parent, {form}", f"{report.metrics['kl']:.4f}"))
    git = next((m["git"] for m in manifests if m.get("git")), None)
    return {
        "name": run.name,
        "folder": str(run.folder),
        "cards": cards,
        "git": git,
        "boardwalk": sorted({m["boardwalk"] for m in manifests}),
    }


def data(run: Finished, rows: int, drawn: dict[str, Any]) -> dict[str, Any] | None:
    dataset, tuned = run.dataset, run.first("finetune")
    if dataset is None:
        return None
    m = dataset.metrics
    read = runs.records(dataset, "train", rows)
    limit = tuned.settings["train"]["max_length"] if tuned else None
    found = list(runs.encoded(read, tuned.path)) if tuned else []
    lengths = [one.tokens for one in found] or [sum(len(str(t.get("content") or "")) for t in row["messages"]) for row in read]
    unit = "tokens" if found else "characters"
    drawn["lengths"] = plots.histogram(lengths, limit if found else None, unit) if lengths else None
    at = {f"{p}th percentile": int(np.percentile(lengths, p)) for p in (50, 90, 99)} if lengths else {}
    facts = [("records read", f"{m.get('rows_in', 0):,}"), ("kept", f"{m.get('rows_kept', 0):,}")]
    facts += [(f"{split} split", f"{m.get(f'{split}_rows', 0):,}") for split in ("train", "val", "calib")]
    facts += [(f"{unit}, {name}", f"{value:,}") for name, value in at.items()] + ([("longest", f"{max(lengths):,}")] if lengths else [])
    facts += [("turns of a conversation, mean", f"{np.mean([len(row['messages']) for row in read]):.1f}")] if read else []
    facts += [("writing", ", ".join(f"{name} {share:.0%}" for name, share in glance.writing(read)))] if read else []
    if found:
        facts.append(("tokens that are trained", f"{sum(one.trained for one in found) / sum(one.tokens for one in found):.0%}"))
    dropped = {reason: count for reason, count in m.get("dropped", {}).items() if count}
    rows_told = tuned.metrics.get("rows", {}) if tuned else {}
    told = {"of longer conversations dropped": "dropped", "cut at train.max_length": "cut", "not shown by the template": "unseen"}
    dropped |= {reason: rows_told[key] for reason, key in told.items() if rows_told.get(key)}
    sample = f"of the first {len(read):,} of {m.get('train_rows', 0):,}" if m.get("train_rows", 0) > len(read) else "of all"
    return {"facts": facts, "dropped": dropped, "shown": [one.parts for one in found if one.parts], "sample": sample}


def training(read: Sequence[Finished], drawn: dict[str, Any]) -> list[dict[str, Any]]:
    """Curves of all runs in one, and a table of the figures of each."""
    tuned = [(run.name, found) for run in read if (found := run.trained)]
    points = [(name, found.metrics.get("curve", [])) for name, found in tuned]
    checks = [
        (f"validation, {name}" if len(tuned) > 1 else "validation", found.metrics.get("evaluations", []), "loss") for name, found in tuned
    ]
    named = points if len(tuned) > 1 else [("training", curve) for _, curve in points]
    drawn["loss"] = plots.curves(named, "loss", "loss", [check for check in checks if check[1]])
    for key, title in (("learning_rate", "learning rate"), ("grad_norm", "gradient norm")):
        drawn[key] = plots.curves(points, key, title)
    rows = []
    for name, found in tuned:
        m = found.metrics
        facts = [("steps", f"{m['steps']:,}"), ("processes", str(m.get("processes", 1))), ("precision", str(m.get("precision", "")))]
        if "tokens_seen" in m:
            facts += [
                ("tokens", f"{m['tokens_seen']:,}"),
                ("time in steps", duration(m["train_seconds"])),
                ("tokens/s", f"{m['tokens_per_second']:,.1f}"),
            ]
        facts += [("memory", size(m["memory_bytes"]))] if m.get("memory_bytes") else []
        facts += [("turns ended where they should", f"{m['turns_ended']:.0%}")] if "turns_ended" in m else []
        rows.append({"name": name, "facts": facts})
    return rows


def steps(run: Finished) -> list[list[str]]:
    """What each step lost on held-out conversations, by its own proof."""
    return [
        [
            name,
            f"{m['loss_before']:.4f}",
            f"{m['loss_after']:.4f}",
            f"{m['loss_after'] - m['loss_before']:+.4f}",
            f"{m['kl']:.5f}",
            f"{m['agreement']:.1%}",
            f"{m['proof_tokens']:,}",
        ]
        for name, a in run.artifacts.items()
        if "loss_before" in (m := a.metrics) and a.stage != "evaluate"
    ]


FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.3f}"),
    ("accuracy", "likeliest token right", "{:.1%}"),
    ("turns_ended", "turns ended", "{:.0%}"),
    ("kl", "KL to parent", "{:.4f}"),
    ("kl_p99", "KL, 99th percentile", "{:.4f}"),
    ("agreement", "same likeliest token", "{:.1%}"),
    ("same_answers", "same answers", "{:.0%}"),
    ("task", "answers right", "{:.0%}"),
    ("loss_difference", "loss less the parent's", "{:+.4f}"),
    ("general_loss_difference", "on general text", "{:+.4f}"),
)


def evaluations(run: Finished, drawn: dict[str, Any]) -> dict[str, Any] | None:
    """Every figure of every report side by side, with its interval and verdict."""
    found = [(form, a.metrics) for form, a in runs.evaluations(run)]
    if not found:
        return None
    rows = []
    for key, name, form in FIGURES:
        cells = [_cell(m, key, form) for _, m in found]
        if any(cell["value"] for cell in cells):
            rows.append({"name": name, "cells": cells})
    for key in ("perplexity", "kl"):
        named = [(form, m[key], (m.get("intervals") or {}).get(key)) for form, m in found if key in m]
        drawn[f"evaluated {key}"] = plots.intervals(named, {"kl": "KL to the parent"}.get(key, key), {"kl": "nats a token"}.get(key, key))
    return {"names": [form for form, _ in found], "rows": rows}


def _cell(m: dict[str, Any], key: str, form: str) -> dict[str, str]:
    value = m.get(key)
    if not isinstance(value, int | float):
        return {"value": "", "interval": "", "verdict": ""}
    interval = (m.get("intervals") or {}).get(key)
    between = f"{form.format(interval[0])} to {form.format(interval[1])}" if interval else ""
    return {"value": form.format(value), "interval": between, "verdict": (m.get("evidence") or {}).get(key, "")}


def changed(run: Finished, most: int = 4) -> list[dict[str, Any]]:
    """Of each report the rows that got better and worse most than by the parent, with what was asked."""
    dataset = run.dataset
    asked = {row["id"]: _question(row) for row in runs.records(dataset, "val")} if dataset else {}
    told = []
    for form, report in runs.evaluations(run):
        rows = [row for row in runs.rows_of(report) if row.get("loss_difference") is not None]
        rows.sort(key=lambda row: row["loss_difference"])
        line = lambda row: [
            row["id"],
            asked.get(row["id"], ""),
            f"{row['parent_loss']:.3f}",
            f"{row['loss']:.3f}",
            f"{row['loss_difference']:+.3f}",
        ]
        better = [line(row) for row in rows[:most] if row["loss_difference"] < -bootstrap.NOTHING]
        worse = [line(row) for row in rows[::-1][:most] if row["loss_difference"] > bootstrap.NOTHING]
        if better or worse:
            told.append({"name": form, "better": better, "worse": worse})
    return told


def _question(row: dict[str, Any]) -> str:
    text = next((str(m.get("content") or "") for m in row["messages"] if m["role"] == "user"), "")
    return text if len(text) <= 160 else text[:159] + "…"


def boards(run: Finished) -> Iterator[dict[str, Any]]:
    """Of each bundle what was measured here, and what the planner expects of its board."""
    for name, bundle in run.artifacts.items():
        if bundle.kind == "bundle":
            facts = [
                (key.replace("_", " "), _said(value))
                for key, value in bundle.metrics.items()
                if isinstance(value, int | float | str) and key != "summary"
            ]
            yield {"name": name, "summary": bundle.metrics.get("summary", ""), "facts": facts, "planned": planned(bundle)}


def planned(bundle: Artifact) -> list[tuple[str, str]]:
    """The planner's figures for a bundle's target, where the model it was made from is still there."""
    record = bundle.parent("model")
    if record is None or not (bundle.path_of(record) / "config.json").is_file():
        return []
    own = bundle.settings["target"]
    target: Any = TypeAdapter(AnyTarget).validate_python(compose.options("target").get(own["name"], {}) | own)
    shape = read_shape(bundle.path_of(record))
    fit, form, rates = budget.board_fit(shape, target), budget.format_of(shape, target), speed.rates_of(budget.board_of(target))
    facts = [("memory on the board, planned", size(fit.needed)), ("longest context", f"{form.context:,} tokens")]
    if rates:
        facts.append(("tokens/s, planned", f"{1000 / speed.decode_ms(shape, form, rates, form.context):,.1f}"))
        facts.append(("first token, planned", f"{speed.first_token_ms(shape, form, rates, form.prompt) / 1000:,.2f} s"))
    return facts


def _said(value: Any) -> str:
    return str(value) if isinstance(value, str | bool) else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


# ---- several runs


def comparison(read: Sequence[Finished], drawn: dict[str, Any]) -> dict[str, Any]:
    """The settings that differ, and how far the figures of the others are from the first run's, by pairs of the same rows."""
    flat = [{f"{a.stage}.{key}": value for a in run.artifacts.values() for key, value in flatten(a.settings).items()} for run in read]
    keys = sorted({key for one in flat for key in one if len({str(other.get(key)) for other in flat}) > 1})
    settings = [[key, *(_said(one[key]) if key in one and one[key] is not None else "—" for one in flat)] for key in keys]
    lines, dots = [], []
    for form in runs.FORMS:
        mine = _rows(read[0], form)
        for other in read[1:]:
            theirs = _rows(other, form)
            shared = sorted(mine.keys() & theirs.keys())
            if not shared:
                continue
            value, interval = _difference([mine[i] for i in shared], [theirs[i] for i in shared])
            verdict = bootstrap.verdict(interval, less_is_better=True)
            between = f"{interval[0]:+.4f} to {interval[1]:+.4f}" if interval else "too few rows"
            lines.append([form, other.name, f"{value:+.4f}", between, verdict, str(len(shared))])
            dots.append((f"{form}, {other.name}", value, interval))
    drawn["compared"] = plots.intervals(dots, f"Loss less that of {read[0].name}, on the same rows", "nats a token", zero=True)
    return {"names": [run.name for run in read], "settings": settings, "lines": lines, "first": read[0].name}


def _rows(run: Finished, form: str) -> dict[str, tuple[float, int]]:
    """{row of the validation split: (its loss, its tokens)} by a run's report."""
    report = run.artifacts.get(f"evaluate-{form}")
    rows = runs.rows_of(report) if report else []
    return {row["id"]: (row["loss"], row["tokens"]) for row in rows if row.get("of") == "validation" and math.isfinite(row["loss"])}


def _difference(mine: Sequence[tuple[float, int]], theirs: Sequence[tuple[float, int]]) -> tuple[float, bootstrap.Interval]:
    """(mean difference of loss a token, its interval over rows)"""
    tokens = np.array([count for _, count in mine], dtype=float)
    gaps = np.array([other[0] - one[0] for one, other in zip(mine, theirs, strict=True)])

    def mean(weights: np.ndarray) -> dict[str, float]:
        return {"gap": float((weights * tokens * gaps).sum() / (weights * tokens).sum())}

    return mean(np.ones(len(tokens)))["gap"], bootstrap.intervals(mean, len(tokens))["gap"]
