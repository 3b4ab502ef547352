"""What all records will cost, from what a few did: a mean with a 95 % interval by bootstrap (Efron 1979)."""

import random
from dataclasses import dataclass

DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """Of `total` units from `units` of them: (low, mean, high) in tokens and in USD."""

    units: int
    total: int
    tokens: tuple[float, float, float]
    money: tuple[float, float, float]

    def lines(self, paid: bool) -> list[str]:
        """In words; without money where no price is known."""
        found = [f"about {self.tokens[1]:,.0f} tokens for all {self.total:,} (95 %: {self.tokens[0]:,.0f} to {self.tokens[2]:,.0f})"]
        if paid:
            found.append(f"about ${self.money[1]:,.4f} for all (95 %: ${self.money[0]:,.4f} to ${self.money[2]:,.4f})")
        return found


def estimate(costs: list[tuple[float, float]], total: int, draw: random.Random) -> Estimate:
    """costs: (tokens, USD) of each unit worked on, one that asked nothing included."""
    means = []
    for _ in range(DRAWS):
        drawn = draw.choices(costs, k=len(costs))
        means.append([sum(column) / len(costs) * total for column in zip(*drawn)])
    mean = [sum(column) / len(costs) * total for column in zip(*costs)]
    ends = [sorted(column) for column in zip(*means)]
    low, high = int(DRAWS * 0.025), int(DRAWS * 0.975)
    return Estimate(len(costs), total, *((e[low], m, e[high]) for e, m in zip(ends, mean)))


def by_root(costs: dict[str, tuple[int, float]], roots: list[str]) -> list[tuple[float, float]]:
    """(tokens, USD) of each root: what was asked for it and for records made from it, whose ids extend its own. What was asked for no record is shared by all."""
    found = {root: [0.0, 0.0] for root in roots}
    shared = [0.0, 0.0]
    for id, (tokens, money) in costs.items():
        root = id
        while root not in found and "/" in root:
            root = root.rpartition("/")[0]
        account = found.get(root, shared)
        account[0] += tokens
        account[1] += money
    share = [part / max(len(roots), 1) for part in shared]
    return [(tokens + share[0], money + share[1]) for tokens, money in found.values()]
