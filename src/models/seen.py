"""What a model says at the trained tokens of some rows: its loss, its likeliest tokens and their log-probabilities.

A model that is in memory is asked with `whole`, one whose layers stay on disk with `by_layer`; both give logits a few tokens at a time, and no more of
them is ever held. What is kept of a row is a few kilobytes, so it can go from process to process and into a file.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from src.chat.encoding import IGNORE, Encoded
from src.core.log import progress

TOP_K = 64
"""likeliest tokens kept of a distribution; the others count together, which makes KL a little smaller than it is, never larger"""

TOGETHER = 1 << 14
"""tokens of which KL is computed together"""

Reader = Callable[[list[Encoded]], Iterator[tuple[np.ndarray, Any]]]
"""asks a model for rows: (which of the rows' trained tokens, counted through, int64 (n,); logits at the positions before them, (n, vocabulary)), in
any order"""


@dataclass(frozen=True)
class Seen:
    """What a model says at each trained token of some rows, in their order.

    losses: nats, fp64 (tokens,). top_k_ids: int64 (tokens, k), and log_probs of them, fp64. likeliest: int64 (tokens,).
    """

    losses: np.ndarray
    top_k_ids: np.ndarray
    log_probs: np.ndarray
    likeliest: np.ndarray

    def __len__(self) -> int:
        return len(self.losses)

    def __getitem__(self, tokens: slice) -> "Seen":
        return Seen(*(getattr(self, each.name)[tokens] for each in fields(self)))


def save(file: Path, seen: Seen, **more) -> None:
    """Write what was seen, and further arrays, in 32 bits each."""
    narrow = {each.name: getattr(seen, each.name) for each in fields(seen)}
    np.savez(file, **{name: v.astype(np.float32 if v.dtype.kind == "f" else np.int32) for name, v in narrow.items()}, **more)


def load(file: Path) -> tuple[Seen, dict[str, np.ndarray]]:
    """(what was seen, the further arrays) of a file that `save` wrote; arrays only, no pickle."""
    with np.load(file, allow_pickle=False) as stored:
        names = [each.name for each in fields(Seen)]
        wide = {name: stored[name].astype(np.float64 if stored[name].dtype.kind == "f" else np.int64) for name in names}
        return Seen(**wide), {name: stored[name] for name in stored.files if name not in names}


def targets_of(rows: list[Encoded]) -> np.ndarray:
    """The rows' trained tokens, int64 (tokens,)."""
    return np.array([label for row in rows for label in row.labels[1:] if label != IGNORE], dtype=np.int64)


def kept(row: Encoded) -> list[int]:
    """Positions before a row's trained tokens."""
    return [at for at, label in enumerate(row.labels[1:]) if label != IGNORE]


def observe(read: Reader, rows: list[Encoded], at: np.ndarray | None = None, top_k: int = TOP_K, below: int | None = None) -> Seen:
    """What a model says at the trained tokens of `rows`.

    at: ids to take log_probs of, (tokens, k), from an observation of the same rows; None: this model's `top_k` likeliest. below: takes those from ids
    under it alone, all that another model knows which will be asked for them.
    """
    import torch

    targets = torch.from_numpy(targets_of(rows))
    width = top_k if at is None else at.shape[1]
    count = len(targets)
    ids_kept = np.empty((count, width), np.int64) if at is None else at
    seen = Seen(np.empty(count), ids_kept, np.empty((count, width)), np.empty(count, np.int64))
    for places, logits in read(rows):
        with torch.no_grad():
            logits = logits.float()
            total = logits.logsumexp(-1, keepdim=True)
            known = min(width, below or width, logits.shape[-1])
            ids = logits[:, :below].topk(known).indices if at is None else torch.from_numpy(at[places]).to(logits.device)
            log_probs_of = lambda ids: (logits.gather(1, ids) - total).double().cpu()
            seen.losses[places] = -log_probs_of(targets[places].to(logits.device)[:, None])[:, 0]
            seen.log_probs[places, :known] = log_probs_of(ids)
            if at is None:
                seen.top_k_ids[places, :known] = ids.cpu()
            seen.likeliest[places] = logits.argmax(-1).cpu()
    return seen if at is not None or not count else Seen(seen.losses, seen.top_k_ids[:, :known], seen.log_probs[:, :known], seen.likeliest)


def divergence(before: Seen, after: Seen) -> np.ndarray:
    """KL(before || after) at each token, nats, fp64 (tokens,); `after` was asked for `before`'s top_k_ids."""
    found = np.empty(len(before))
    for at in range(0, len(before), TOGETHER):
        log_p, log_q = (seen.log_probs[at : at + TOGETHER] for seen in (before, after))
        p = np.exp(log_p)
        rest_p, rest_q = (np.clip(1 - probs.sum(1), 1e-12, 1) for probs in (p, np.exp(log_q)))
        found[at : at + TOGETHER] = (p * (log_p - log_q)).sum(1) + rest_p * np.log(rest_p / rest_q)
    return found


def one_by_one(logits_of: Callable, what: str) -> Reader:
    """Rows in turn. logits_of(row): logits at the positions before its trained tokens, (trained tokens, vocabulary)."""

    def read(rows: list[Encoded]) -> Iterator[tuple[np.ndarray, Any]]:
        begin = 0
        for row in progress(rows, what):
            logits = logits_of(row)
            yield np.arange(begin, begin + len(logits)), logits
            begin += len(logits)

    return read


def whole(model, what: str) -> Reader:
    """Of a model that is in memory."""
    import torch

    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    takes_positions = "logits_to_keep" in inspect.signature(inner.forward).parameters

    def logits_of(row: Encoded):
        device = next(model.parameters()).device
        keep, ids = torch.tensor(kept(row), device=device), torch.tensor([row.input_ids], device=device)
        with torch.no_grad():
            if takes_positions:
                return model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits[0]
            return model(input_ids=ids, use_cache=False).logits[0, keep]

    return one_by_one(logits_of, what)


def by_layer(model, what: str) -> Reader:
    """Of a ByLayer. Rows go in rounds whose hidden states take no more than HIDDEN bytes; in each the model is read once."""
    import torch

    from src.models.by_layer import HIDDEN

    def read(rows: list[Encoded]) -> Iterator[tuple[np.ndarray, Any]]:
        starts = np.cumsum([0, *(len(kept(row)) for row in rows)])
        room = HIDDEN // (4 * model.width)
        rounds: list[list[int]] = [[]]
        left = room
        for i, row in enumerate(rows):
            if rounds[-1] and len(row.input_ids) > left:
                rounds.append([])
                left = room
            rounds[-1].append(i)
            left -= len(row.input_ids)
        for number, some in enumerate(rounds, 1):
            told = what if len(rounds) == 1 else f"{what}, {number} of {len(rounds)}"
            hidden = model.run([rows[i].input_ids for i in some], told)
            hidden = torch.cat([states[kept(rows[i])] for i, states in zip(some, hidden)])
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in some])
            with model.held("head"):
                for at in range(0, len(places), model.chunk):
                    yield places[at : at + model.chunk], model.logits(hidden[at : at + model.chunk])

    return read
