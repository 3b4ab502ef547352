"""Is what was saved what was trained? Told in what people would lose: loss, KL divergence and the likeliest token on held-out conversations.

Logits of random tokens move by a few percent where a tuned model loses half of what it learnt (docs/fidelity.md), so they only tell whether the
right weights are in the right places. What one model says at each trained token is kept as its loss and its k likeliest tokens, a few megabytes that
go from process to process; the other is then asked for the same tokens.
"""

import inspect
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.artifact import Artifact, is_finished, open_artifact
from src.core.errors import ProofFailed, UserError
from src.core.log import progress, say, warn
from src.models import complete
from src.models.folder import has_tokenizer, trust_of
from src.models.generation import logits
from src.models.loading import load_any

TOP_K = 64
"""likeliest tokens kept of a distribution; the others count together, which makes KL a little smaller than it is, never larger"""
MUCH = 0.1
"""nats; int8 was measured to lose less than a tenth of it, int4 about half (docs/fidelity.md)"""
TOKENS, LONGEST = 4096, 1024
"""tokens of the conversations that are compared, all together and each"""


@dataclass(frozen=True)
class Seen:
    """What a model says at each trained token of some rows, in their order.

    losses: nats, fp64 (tokens,). top_k_ids: int64 (tokens, k), and log_probs of them, fp64. likeliest: int64 (tokens,).
    """

    losses: np.ndarray
    top_k_ids: np.ndarray
    log_probs: np.ndarray
    likeliest: np.ndarray


@dataclass(frozen=True)
class Change:
    """From one model to another on the same tokens.

    before, after: mean losses in nats. kl: mean KL(before || after) in nats. loss_waver, kl_waver: twice the standard error of the difference and of
    the KL, by which other rows would have moved them. agreement: share of tokens with the same likeliest one.
    """

    rows: int
    tokens: int
    before: float
    after: float
    loss_waver: float
    kl: float
    kl_waver: float
    agreement: float

    @property
    def loss(self) -> float:
        return self.after - self.before

    def told(self, one: str, other: str) -> str:
        return (
            f"loss {self.before:.4f} {one}, {self.after:.4f} {other} ({self.loss:+.4f}), KL {self.kl:.4f} nats, same likeliest token at "
            f"{self.agreement:.1%} of {self.tokens:,} held-out tokens"
        )

    def metrics(self) -> dict:
        return {
            "proof_rows": self.rows,
            "proof_tokens": self.tokens,
            "loss_before": self.before,
            "loss_after": self.after,
            "loss_waver": self.loss_waver,
            "kl": self.kl,
            "kl_waver": self.kl_waver,
            "agreement": self.agreement,
        }


def dataset_of(made: Artifact) -> Path | None:
    """The dataset behind a fine-tune or its merge, where it still is what it was."""
    for role in ("dataset", "adapter"):
        record = made.parent(role)
        if not record or not is_finished(path := made.path_of(record)):
            continue
        try:
            found = open_artifact(path)
        except UserError:  # damaged since
            continue
        if found.key == record["key"]:
            return path if role == "dataset" else dataset_of(found)
    return None


def within(rows: Iterable[encoding.Encoded], longest: int = LONGEST) -> list[encoding.Encoded]:
    """The first rows that fit into TOKENS together, those over `longest` tokens left out."""
    found: list[encoding.Encoded] = []
    tokens = 0
    for row in rows:
        if not row.trained or len(row.input_ids) > longest:
            continue
        if len(row.input_ids) > TOKENS - tokens:
            break
        found, tokens = [*found, row], tokens + len(row.input_ids)
    return found


def held_out(dataset: Path | None, tokenizer, config: dict) -> list[encoding.Encoded]:
    """Conversations of a dataset's val split, or of its calib split where that has none, `within` bounds; empty, and said, without any.

    config: of the model, whose positions bound the rows too.
    """

    found: list[encoding.Encoded] = []
    if dataset:
        encoding.ensure_chat(tokenizer)
        longest = min(LONGEST, config.get("max_position_embeddings") or config.get("n_positions") or LONGEST)
        splits = (within(_encoded(dataset / f"{split}.jsonl", tokenizer), longest) for split in ("val", "calib"))
        found = next(splits) or next(splits)
    if not found:
        warn("no dataset is known to compare on, so what is lost on held-out conversations is not measured")
    return found


def _encoded(file: Path, tokenizer) -> Iterator[encoding.Encoded]:
    with open(file, encoding="utf-8") as lines:
        yield from (row for _, row in rows_of(map(json.loads, lines), tokenizer, "held-out conversations"))


def observe(logits_of: Callable, rows: list[encoding.Encoded], what: str, at: np.ndarray | None = None) -> Seen:
    """What a model says at the trained tokens of `rows`.

    logits_of(row): logits, (trained tokens, vocabulary), at the positions before each trained token. at: ids to take log_probs of, (tokens, k), from
    an observation of the same rows; None: this model's likeliest.
    """
    import torch

    parts, begin = [], 0
    for row in progress(rows, what):
        targets = torch.tensor([label for label in row.labels[1:] if label != encoding.IGNORE])
        with torch.no_grad():
            log_probs = logits_of(row).float().log_softmax(-1)
            ids = (
                log_probs.topk(min(TOP_K, log_probs.shape[-1])).indices
                if at is None
                else torch.from_numpy(at[begin : begin + len(targets)])
            )
            ids = ids.to(log_probs.device)
            losses = -log_probs.gather(1, targets.to(log_probs.device)[:, None])[:, 0]
            found = (losses.double(), ids, log_probs.gather(1, ids).double(), log_probs.argmax(-1))
        parts.append([tensor.cpu().numpy() for tensor in found])
        begin += len(targets)
    return Seen(*(np.concatenate(values) for values in zip(*parts)))


def trained_logits(model, row: encoding.Encoded):
    """Logits (trained tokens, vocabulary) at the positions before each trained token of a row."""
    import torch

    device = next(model.parameters()).device
    keep = torch.tensor([at for at, label in enumerate(row.labels[1:]) if label != encoding.IGNORE], device=device)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    ids = torch.tensor([row.input_ids], device=device)
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        return model(input_ids=ids, logits_to_keep=keep, use_cache=False).logits[0]
    return model(input_ids=ids, use_cache=False).logits[0, keep]


def compare(before: Seen, after: Seen, rows: int) -> Change:
    """The change from one model to another; `after` was asked for `before`'s top_k_ids."""
    difference = after.losses - before.losses
    tokens = len(difference)
    p, q = (np.exp(seen.log_probs) for seen in (before, after))
    rest_p, rest_q = (np.clip(1 - x.sum(1), 1e-12, 1) for x in (p, q))
    kl = (p * (before.log_probs - after.log_probs)).sum(1) + rest_p * np.log(rest_p / rest_q)
    return Change(
        rows=rows,
        tokens=tokens,
        before=float(before.losses.mean()),
        after=float(after.losses.mean()),
        loss_waver=2 * float(difference.std()) / math.sqrt(tokens),
        kl=float(kl.mean()),
        kl_waver=2 * float(kl.std()) / math.sqrt(tokens),
        agreement=float((before.likeliest == after.likeliest).mean()),
    )


def reload(
    artifact: Artifact,
    dtype: str,
    device: str,
    rows: list[encoding.Encoded],
    at: np.ndarray | None,
    base: Path | None,
    probes: list[list[int]] | None = None,
    streamed: bool = False,
) -> tuple:
    """(token ids of aux_files' probes, logits of the rows `probes` or of random tokens, what the model says at `rows` or None). Made to run in a fresh process.

    at: see observe. base: of an adapter, where it is. streamed: see load_any.
    """
    model, _ = load_any(artifact, dtype=dtype, device=device, base=base, streamed=streamed)
    folder = artifact.path if has_tokenizer(artifact.path) or not base else base
    ids = complete.token_ids(folder, trust_of(artifact))
    seen = observe(partial(trained_logits, model), rows, "proof", at) if rows else None
    return ids, logits(model, probes), seen


def judge(verb: str, change: Change, limit: float, where: Path, fix: list[str], setting: str | None = "max_loss_change") -> None:
    """Says what was lost. Raises ProofFailed where the loss moved, either way, or KL grew by more than `limit` nats and what other rows would explain.

    fix: ways out beside the limit itself, which `setting` raises.
    """
    told = change.told("as trained", "as saved")
    over = (abs(change.loss) - change.loss_waver, change.kl - change.kl_waver)
    if not all(nats <= limit for nats in over):  # not a number is over it too
        raise ProofFailed(
            f"what is saved is not what was trained: {told}",
            where=f"{where}, limit {limit:g} nats beside what other conversations would explain ({change.loss_waver:.4f} of the loss, {change.kl_waver:.4f} of KL)",
            fix=[*fix, *([f"{setting}={max(over) * 1.1:.2g} if you accept it"] if setting else [])],
        )
    say(f"{verb}: {told}")


def report(verb: str, change: Change, other: str, fix: str) -> dict:
    """Says what fewer bits lost, with a warning and a way out (`fix`) where it is more than MUCH; returns the figures for the manifest.

    other: what the weights are now, such as "in int4".
    """
    say(f"{verb}: {change.told('before', other)}")
    if change.loss - change.loss_waver > MUCH:
        warn(f"{change.loss:.2f} nats are much to lose: answers will differ from those of the model this was made from; {fix}")
    return change.metrics()
