"""How far a figure over rows would move had other rows been drawn: bootstrap intervals of 95 %.

Rows are drawn, not tokens, for the tokens of a row stand or fall together. Every figure sees the same draws, so a difference of two is one of pairs.
"""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np

RESAMPLES = 1000
FEWEST = 6
"""rows below which there is no interval: all of five lie on one side of the truth in one case of sixteen"""
NOTHING = 1e-5
"""differences that rounding in fp32 alone may make, in nats and in shares"""
NO_EVIDENCE = "no evidence"

Interval = list[float] | None
"""low and high; None of too few rows"""


def intervals(figures: Callable[[np.ndarray], dict[str, float]], rows: int, seed: int = 0) -> dict[str, Interval]:
    """The interval of each figure. figures(weights): their values where each row counts so often, (rows,)."""
    if rows < FEWEST:
        return dict.fromkeys(figures(np.ones(rows)))
    draw = np.random.default_rng(seed)
    found = [figures(np.bincount(draw.integers(rows, size=rows), minlength=rows)) for _ in range(RESAMPLES)]
    tail = _tail(rows)
    return {name: np.quantile([one[name] for one in found], [tail, 1 - tail]).tolist() for name in found[0]}


def _tail(rows: int) -> float:
    """Share of the resampled figures to leave out on each side. With 2.5 % of few rows the interval comes out too narrow: it lacks Student's t for the normal
    and divides by n for n - 1 (Hesterberg, What Teachers Should Know about the Bootstrap, 2015, "expanded percentile interval")."""
    z, degrees = NormalDist().inv_cdf(0.975), rows - 1
    t = z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    return NormalDist().cdf(-math.sqrt(rows / degrees) * t)


def verdict(interval: Interval, *, less_is_better: bool) -> str:
    """What a difference, of the model from its parent, is evidence of: "better", "worse" or "no evidence"."""
    if interval is None or (interval[0] <= NOTHING and interval[1] >= -NOTHING):
        return NO_EVIDENCE
    return "better" if (interval[1] < 0) == less_is_better else "worse"


def quantile(values: np.ndarray, weights: np.ndarray, share: float) -> float:
    """The least of rising `values` that at least this share of the weights does not exceed."""
    reached = np.cumsum(weights)
    return float(values[np.searchsorted(reached, share * reached[-1])])
