"""Memory and speed against length, in the terminal as bars, on paper as curves; size against what is lost, on paper."""

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from src.core import log
from src.core.errors import ConfigError
from src.core.log import on_terminal, size

WIDTH = 28
INK, ACCENT = "#30343b", "#1f77b4"
SMALLEST = 1e-6
"""nats of KL at which a logarithmic axis begins"""


@dataclass(frozen=True)
class Point:
    """One length in tokens: bytes needed of `limit` there are (None: not known), tokens per second and seconds to wait (None: not known)."""

    length: int
    memory: float
    limit: float | None
    speed: float | None
    wait: float | None


def table(points: list[Point]) -> list[str]:
    """A line per length with a bar for memory, full at the limit or else at the most that is needed, and one for speed."""
    if not points:
        return []
    block = "█" if on_terminal() and sys.stdout.isatty() else "#"
    limit, highest, fastest = points[0].limit, max(p.memory for p in points), max(p.speed or 0 for p in points)
    most = min(limit or highest, highest)
    head, rows = ["tokens", "memory", "", *(["speed", "tokens/s", "seconds"] if fastest else []), ""], []
    for p in points:
        filled = min(round(WIDTH * p.memory / most), WIDTH)
        bar = "|" + block * filled + " " * (WIDTH - filled) + ("|" if p.memory <= most else ">")
        speed = (
            [block * round(WIDTH / 2 * p.speed / fastest), f"{p.speed:,.1f}", f"{p.wait:,.2f}"] if p.speed and p.wait is not None else []
        )
        rows.append([f"{p.length:,}", bar, size(p.memory), *speed, f"above {size(limit)}" if limit and p.memory > limit else ""])
    return log.table(head, rows, right=(0, 2, *((4, 5) if fastest else ()))).split("\n")


def draw(points: list[Point], title: str, file: Path) -> None:
    """The same as a PNG, written beside its place and then renamed. Raises ConfigError for another ending, OSError where it cannot be written."""
    if file.suffix.lower() != ".png":
        raise ConfigError(f"plot={file}: the picture is a PNG", fix=f"plot={file.with_suffix('.png')}")
    pyplot = _pyplot()
    curves = {"memory, GB": [p.memory / 1e9 for p in points]}
    if speeds := [p.speed for p in points if p.speed is not None]:
        curves["tokens/s"] = speeds
    figure, axes = pyplot.subplots(1, len(curves), figsize=(9 if speeds else 5, 3.4), layout="constrained", squeeze=False)
    lengths, limit = [p.length for p in points], points[0].limit
    for axis, (label, values) in zip(axes[0], curves.items()):
        axis.plot(lengths, values, color=ACCENT, marker="o", markersize=4, linewidth=1.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else str(n) for n in lengths])
        axis.minorticks_off()
        axis.set_ylim(0, 1.15 * max(*values, limit / 1e9 if limit and label.startswith("memory") else 0))
        axis.set_title(label, loc="left", fontsize=10, color=INK)
        axis.set_xlabel("tokens", color=INK)
        axis.grid(axis="y", color="#e3e5e8")
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, length=0)
    if limit:
        axes[0][0].axhline(limit / 1e9, color="#c0392b", linewidth=1.2, linestyle="--")
        axes[0][0].annotate(
            f"{limit / 1e9:.1f} GB on the device",
            (lengths[0], limit / 1e9),
            (0, 4),
            textcoords="offset points",
            fontsize=8,
            color="#c0392b",
        )
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    _save(figure, file)


def draw_choices(choices: list[tuple[str, float, float]], title: str, file: Path) -> None:
    """Sizes in bytes against KL in nats, as a PNG: (name, size, KL) of each; those than which another is smaller and loses less are pale."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6.4, 4), layout="constrained")
    for name, count, kl in choices:
        beaten = any(s <= count and k <= kl and (s, k) != (count, kl) for _, s, k in choices)
        axis.plot(count / 1e6, max(kl, SMALLEST), color=ACCENT, marker="o", markersize=5, alpha=0.35 if beaten else 1)
        axis.annotate(name, (count / 1e6, max(kl, SMALLEST)), (5, 3), textcoords="offset points", fontsize=7, color=INK)
    axis.set_yscale("log")
    axis.set_ylabel("KL, nats", color=INK)
    axis.set_xlabel("weights, MB", color=INK)
    axis.margins(x=0.18)
    axis.grid(color="#e3e5e8")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, length=0)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, color=INK)
    _save(figure, file)


def draw_runs(runs: list[tuple[str, float]], figure_name: str, file: Path) -> None:
    """A figure of several runs as a PNG: (what a run differs in, the figure) of each, the smallest first."""
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(6.4, 1.2 + 0.32 * len(runs)), layout="constrained")
    for place, (_, value) in enumerate(reversed(runs)):
        axis.plot(value, place, color=ACCENT, marker="o", markersize=6)
        axis.annotate(f"{value:.4g}", (value, place), (7, -3), textcoords="offset points", fontsize=8, color=INK)
    axis.set_yticks(range(len(runs)), [name for name, _ in reversed(runs)])
    axis.margins(x=0.15, y=0.1)
    axis.grid(axis="y", color="#e3e5e8")
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(colors=INK, length=0)
    axis.set_title(figure_name, loc="left", fontsize=11, color=INK)
    _save(figure, file)


def _pyplot():
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure, file: Path) -> None:
    """Written beside its place and then renamed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(suffix=".png", prefix=".", dir=file.parent)
    os.close(handle)
    try:
        figure.savefig(partial, dpi=144)
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    finally:
        Path(partial).unlink(missing_ok=True)
        _pyplot().close(figure)
