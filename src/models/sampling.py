"""A next token drawn by temperature and top-p, each conversation by a generator of its own.

The generator is seeded from the conversation alone, one number a token, so an answer does not follow from which others share its batch. What may follow
from that is the last bits of the logits; in a batch of one not even those.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol

COLDEST = 1e-6
"""a temperature below which the likeliest token is as good as certain, and fp32 overflows"""


class Draws(Protocol):
    """How tokens are drawn. temperature: 0 takes the likeliest each time. top_p: of the likeliest tokens that together hold this probability."""

    @property
    def temperature(self) -> float: ...

    @property
    def top_p(self) -> float: ...


def generator(seed: int, ids: list[int]):
    """torch's generator for the answer to a prompt of these token ids."""
    import torch

    words = hashlib.sha256(f"{seed} {ids}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(words[:7], "big"))


def drawn(generators: list, rows: Sequence[Draws]):
    """A logits processor that draws each row's next token by the row's own generator, from temperature and top-p (Holtzman et al. 2019,
    arXiv:1904.09751), and leaves nothing else to choose."""
    import torch
    from transformers import LogitsProcessor

    class Drawn(LogitsProcessor):
        def __call__(self, input_ids, scores):
            chosen = [_draw(row, generator, draws) for row, generator, draws in zip(scores, generators, rows)]
            only = torch.full_like(scores, -torch.inf)
            only[torch.arange(len(chosen)), chosen] = 0.0
            return only

    return Drawn()


def _draw(scores, generator, draws: Draws) -> int:
    import torch

    if draws.temperature < COLDEST:
        return int(scores.argmax())
    chances, order = (scores.float() / draws.temperature).softmax(-1).sort(descending=True, stable=True)
    sums = chances.double().cumsum(-1).cpu()
    kept = int((sums - chances.double().cpu() < draws.top_p).sum())
    place = torch.rand((), generator=generator, dtype=torch.float64) * sums[kept - 1]
    return int(order[min(int(torch.searchsorted(sums, place, right=True)), kept - 1)])
