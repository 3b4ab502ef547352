"""Which rows make up which step, and how they are laid into micro-batches. A row is a conversation, or a stretch of a text.

A step's rows follow from the seed alone. How they are spread over processes and forward passes changes the speed, never what is learnt:
losses are summed over trained tokens and divided by the step's count.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from src.chat import encoding
from src.training.examples import Example

EVAL_SHARE, EVAL_ROWS = 0.02, 64
"""of a training's time that its evaluations may take, and the fewest rows that say something"""
SEARCHED = 20_000
"""steps that can be laid out in about a second"""


@dataclass(frozen=True, eq=False)
class BatchPlan:
    """The order of a whole run.

    lengths: tokens of each row, int64. batch: rows of a step over all processes. world: processes. capacity: tokens a forward pass may hold,
    padding included. packed: whether rows are laid end to end; else the shorter are padded to the longest of their micro-batch.
    total: rows of the whole run, each epoch a permutation of its own.
    """

    lengths: np.ndarray
    batch: int
    world: int
    capacity: int
    packed: bool
    total: int
    seed: int

    @property
    def steps(self) -> int:
        return math.ceil(self.total / self.batch)

    def epoch(self, step: int) -> float:
        """Passes over the rows that are done after so many steps."""
        return min(step * self.batch, self.total) / len(self.lengths)

    def ends_epoch(self, step: int) -> bool:
        """Whether a pass over the rows is completed by this step, counted from 1, or the run is."""
        return step == self.steps or int(self.epoch(step)) > int(self.epoch(step - 1))

    def evaluates(self, step: int, every: int | None) -> bool:
        """Whether the model is measured after this step, counted from 1: every so many steps, or at the end of each epoch, and at the end."""
        return step == self.steps or (step % every == 0 if every else self.ends_epoch(step))

    def examples(self, step: int) -> list[int]:
        """Rows of a step, counted from 0."""
        count, found = len(self.lengths), []
        at, end = step * self.batch, min((step + 1) * self.batch, self.total)
        while at < end:
            epoch, begin = divmod(at, count)
            taken = min(end - at, count - begin)
            found += self._order(epoch)[begin : begin + taken].tolist()
            at += taken
        return found

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.lengths))

    def layout(self, step: int) -> list[list[list[int]]]:
        """[micro-batch][process] -> rows. Every process gets as many micro-batches, as few as their capacity allows; one may be empty in the
        last step of a run.

        Rows are dealt longest first, each to the micro-batch with the fewest tokens, so that the processes finish together.
        """
        examples = sorted(self.examples(step), key=lambda example: (-self.lengths[example], example))
        passes = max(1, math.ceil(int(self.lengths[examples].sum()) / (self.capacity * self.world)))
        while True:
            bins = self._dealt(examples, passes * self.world)
            if max(map(self.size, bins)) <= self.capacity or passes * self.world >= len(examples):
                return [bins[i : i + self.world] for i in range(0, len(bins), self.world)]
            passes += 1

    def _dealt(self, examples: list[int], count: int) -> list[list[int]]:
        bins: list[list[int]] = [[] for _ in range(count)]
        if not self.packed:  # neighbours in length share a micro-batch, so that little is padded
            share = math.ceil(len(examples) / count)
            for i in range(count):
                bins[i] = examples[i * share : (i + 1) * share]
            return bins
        fill = [(0, i) for i in range(count)]
        for example in examples:
            tokens, i = heapq.heappop(fill)
            bins[i].append(example)
            heapq.heappush(fill, (tokens + int(self.lengths[example]), i))
        return bins

    def size(self, examples: list[int]) -> int:
        """Tokens a forward pass over these rows holds, padding included."""
        lengths = self.lengths[examples]
        return int(lengths.sum()) if self.packed else int(lengths.max(initial=0)) * len(examples)

    def longest(self) -> list[int]:
        """Rows of the run's largest forward pass; in very long runs, of one at least as large as far as the capacity allows."""
        if self.steps <= SEARCHED:
            return max((part for step in range(self.steps) for bins in self.layout(step) for part in bins), key=self.size)
        taken: list[int] = []
        for example in np.argsort(-self.lengths, kind="stable").tolist():
            if len(taken) < self.batch and (not taken or self.size([*taken, example]) <= self.capacity):
                taken.append(example)
        return taken


def rows_to_measure(lengths: np.ndarray, trained: int, times: int) -> int:
    """How many validation rows take about EVAL_SHARE of a training when they are measured so often, at least EVAL_ROWS of them.

    lengths: tokens of each row. trained: tokens the training goes through, each at about three times the cost of one that is only measured.
    """
    allowed = EVAL_SHARE * 3 * trained / max(times, 1)
    return min(len(lengths), max(EVAL_ROWS, int(np.searchsorted(np.cumsum(lengths), allowed, side="right"))))


class ExampleSource(Protocol):
    """What a micro-batch is made of: examples by number."""

    def __getitem__(self, i: int, /) -> Example: ...


class Rows(ExampleSource, Protocol):
    """The rows of a split: conversations (examples.py), or stretches of text (text_rows.py).

    lengths: tokens of each, int64. trained_tokens: those of them that the loss counts, int64; trained_weight: the sum of their weights, float64.
    """

    @property
    def lengths(self) -> np.ndarray: ...

    @property
    def trained_tokens(self) -> np.ndarray: ...

    @property
    def trained_weight(self) -> np.ndarray: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Example]: ...


class Steps(torch.utils.data.Dataset):
    """What one process computes in each step: its micro_batches, and how many tokens the step has over all processes: of rows, trained, and laid
    out with padding; and the sum of its tokens' weights."""

    def __init__(self, plan: BatchPlan, examples: Rows, rank: int, pad: int):
        self.plan, self.data, self.rank, self.pad = plan, examples, rank, pad

    def __len__(self) -> int:
        return self.plan.steps

    def __getitem__(self, step: int) -> dict:
        layout, examples = self.plan.layout(step), self.plan.examples(step)
        return {
            "micro_batches": [micro_batch(self.data, bins[self.rank], self.pad, packed=self.plan.packed) for bins in layout],
            "tokens": int(self.plan.lengths[examples].sum()),
            "trained": int(self.data.trained_tokens[examples].sum()),
            "weight": float(self.data.trained_weight[examples].sum()),
            "laid": sum(self.plan.size(bins) for bins in itertools.chain(*layout)),
        }


def micro_batch(data: ExampleSource, examples: list[int], pad: int, *, packed: bool) -> dict:
    """One forward pass over rows, as the model takes it.

    input_ids: int64 (1, tokens) where packed, with position_ids that begin at 0 in every row and where each begins (cu_seq_lens, int32); else
    (rows, longest), padded on the right, with attention_mask. keep: bool of the same shape, true where the next token is trained. targets: those
    tokens, int64 (trained,), row after row; weights: of them, fp32 (trained,), where any is not 1. rows: as given. No rows make a pass over one padding token with nothing trained, for processes that must keep step with others.
    """
    found = [data[example] for example in examples]
    ids = [example.input_ids for example in found] or [np.array([pad], dtype=np.int32)]
    labels = [example.labels for example in found] or [np.array([encoding.IGNORE], dtype=np.int32)]
    after = [np.append(example[1:], encoding.IGNORE) for example in labels]
    if packed:
        lengths = [len(example) for example in ids]
        bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
        batch = {
            "input_ids": torch.from_numpy(np.concatenate(ids)).long()[None],
            "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
            "cu_seq_lens_q": bounds,
            "cu_seq_lens_k": bounds,
            "max_length_q": max(lengths),
            "max_length_k": max(lengths),
        }
        shifted = torch.from_numpy(np.concatenate(after)).long()[None]
    else:
        longest = max(map(len, ids))
        block = lambda parts, fill: torch.tensor([[*part, *[fill] * (longest - len(part))] for part in parts])
        batch = {"input_ids": block(ids, pad), "attention_mask": block([[1] * len(example) for example in ids], 0)}
        shifted = block(after, encoding.IGNORE)
    keep = shifted != encoding.IGNORE
    made = batch | {"keep": keep, "targets": shifted[keep], "examples": examples}
    if any(example.weights is not None for example in found):
        own = [np.ones(len(example.labels), np.float32) if example.weights is None else example.weights for example in found]
        trained = [weights[1:][example.labels[1:] != encoding.IGNORE] for weights, example in zip(own, found)]
        made["weights"] = torch.from_numpy(np.concatenate(trained))
    return made
