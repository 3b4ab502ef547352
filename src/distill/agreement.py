"""How far judges agree: Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's Alpha-Reliability")."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from src.distill.pipeline import Work

Value = TypeVar("Value", bound=Hashable)


def squared(a: float, b: float) -> float:
    """Difference of two scores."""
    return (a - b) ** 2


def unequal(a: Hashable, b: Hashable) -> float:
    """Difference of two names."""
    return float(a != b)


class Agreement(Generic[Value]):
    """Alpha over units that several judges, or one several times, gave a value each: 1 where all agree, 0 where they agree as chance would.

    difference: `squared` for scores, `unequal` for names. Memory follows the number of different values, not of units.
    """

    def __init__(self, difference: Callable[[Value, Value], float]):
        self._difference = difference
        self._pairs: dict[tuple[Value, Value], float] = defaultdict(float)

    def add(self, values: Sequence[Value]) -> None:
        """The values of one unit; fewer than two say nothing of agreement."""
        counts = Counter(values)
        for a, n in counts.items():
            for b, m in counts.items():
                if pairs := n * (m - (a == b)):
                    self._pairs[a, b] += pairs / (len(values) - 1)

    def alpha(self) -> float | None:
        """None where nothing was judged twice, or all values are one."""
        totals: dict[Value, float] = defaultdict(float)
        for (a, _), n in self._pairs.items():
            totals[a] += n
        total = sum(totals.values())
        expected = sum(n * m * self._difference(a, b) for a, n in totals.items() for b, m in totals.items())
        observed = sum(n * self._difference(a, b) for (a, b), n in self._pairs.items())
        return 1 - (total - 1) * observed / expected if expected else None

    def report(self, work: Work, name: str) -> None:
        """Alpha into the report, where there is one."""
        if (alpha := self.alpha()) is not None:
            work.measure(f"{name} (Krippendorff's alpha)", round(alpha, 3))
