"""Is what was saved what was trained? Told in what people would lose: loss, KL divergence and the likeliest token on held-out conversations.

Logits of random tokens move by a few percent where a tuned model loses half of what it learnt (docs/fidelity.md), so they only tell whether the
right weights are in the right places. What one model says at each trained token is kept as its loss and its k likeliest tokens, a few megabytes that
go from process to process; the other is then asked for the same tokens.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.artifact import Artifact, is_finished, open_artifact
from src.core.errors import ProofFailed, UserError, using
from src.core.files import read_json
from src.core.log import say, size, warn
from src.models import complete, safetensors_io, seen
from src.models.devices import device_that_fits, fits_whole
from src.models.folder import has_tokenizer, trust_of
from src.models.loading import load_any
from src.models.seen import Reader, Seen

MUCH = 0.1
"""nats; int8 was measured to lose less than a tenth of it, int4 about half (docs/fidelity.md)"""
TOKENS, LONGEST = 4096, 1024
"""tokens of the conversations that are compared, all together and each"""
WORK = 3 * 10**11
"""floating-point operations of a pass over them, beyond which fewer are compared: two seconds on two cores"""
FEWEST, FEWEST_EXACT = 1024, 256
"""tokens to compare however large the model: where its weights lost bits, and where none but a rounding changed them, of which fewer tell as much"""
RECORD = "proof.npz"


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

    @classmethod
    def of(cls, metrics: dict) -> "Change":
        """That of a manifest which has its `metrics`."""
        names = ("proof_rows", "proof_tokens", "loss_before", "loss_after", "loss_waver", "kl", "kl_waver", "agreement")
        return cls(*(metrics[name] for name in names))

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


def enough(folder: Path, least: int = FEWEST) -> int:
    """Tokens to compare a model in `folder` on, all together: TOKENS, or so many that a pass over them takes WORK, at least `least`."""
    return max(least, min(TOKENS, WORK // (2 * (_parameters(folder) or 1))))


def within(rows: Iterable[encoding.Encoded], longest: int = LONGEST, most: int = TOKENS) -> list[encoding.Encoded]:
    """The first rows that fit into `most` tokens together, or the first alone; those over `longest` left out."""
    found: list[encoding.Encoded] = []
    tokens = 0
    for row in rows:
        if not row.trained or len(row.input_ids) > longest:
            continue
        if found and len(row.input_ids) > most - tokens:
            break
        found, tokens = [*found, row], tokens + len(row.input_ids)
    return found


def held_out(dataset: Path | None, tokenizer, folder: Path, least: int = FEWEST) -> list[encoding.Encoded]:
    """Conversations of a dataset's val split, or of its calib split where that has none, `within` bounds; empty, and said, without any.

    folder: of the model, whose positions and size bound the rows. least: see `enough`.
    """
    found: list[encoding.Encoded] = []
    if dataset:
        encoding.ensure_chat(tokenizer)
        config = read_json(folder / "config.json")
        longest = min(LONGEST, config.get("max_position_embeddings") or config.get("n_positions") or LONGEST)
        splits = (within(_encoded(dataset / f"{split}.jsonl", tokenizer), longest, enough(folder, least)) for split in ("val", "calib"))
        found = next(splits) or next(splits)
    if not found:
        warn("no dataset is known to compare on, so what is lost on held-out conversations is not measured")
    return found


def _encoded(file: Path, tokenizer) -> Iterator[encoding.Encoded]:
    with open(file, encoding="utf-8") as lines:
        yield from (row for _, row in rows_of(map(json.loads, lines), tokenizer, "held-out conversations"))


def probes(vocabulary: int) -> list[encoding.Encoded]:
    """Rows for a model of which no conversation is known: a fixed random draw, and the vocabulary's last rows, where added tokens live."""
    draw = np.random.default_rng(0).integers(0, vocabulary, (2, 33)).tolist()
    return [encoding.Encoded(row, row) for row in [*draw, [i % vocabulary for i in range(vocabulary - 33, vocabulary)]]]


def distance(before: Seen, after: Seen) -> float:
    """Relative L2 distance of the log-probabilities of `before`'s likeliest tokens: tells whether the right weights are in the right places."""
    return float(np.linalg.norm(before.log_probs - after.log_probs) / np.linalg.norm(before.log_probs))


@dataclass(frozen=True)
class Record:
    """What a model said at the end of its training, kept beside an adapter: rows, and what was seen at them."""

    rows: list[encoding.Encoded]
    seen: Seen

    def save(self, folder: Path) -> None:
        ids, labels = ([token for row in self.rows for token in getattr(row, name)] for name in ("input_ids", "labels"))
        seen.save(
            folder / RECORD,
            self.seen,
            ids=np.array(ids, np.int32),
            labels=np.array(labels, np.int32),
            lengths=[len(row.input_ids) for row in self.rows],
        )

    @classmethod
    def load(cls, folder: Path) -> "Record | None":
        """The record of a folder; None without one."""
        if not (folder / RECORD).is_file():
            return None
        with using("what was seen at the end of training", folder / RECORD):
            found, more = seen.load(folder / RECORD)
            at = np.cumsum(more["lengths"])[:-1]
            parts = zip(np.split(more["ids"], at), np.split(more["labels"], at))
            return cls([encoding.Encoded(ids.tolist(), labels.tolist()) for ids, labels in parts], found)


def compare(before: Seen, after: Seen, rows: int) -> Change:
    """The change from one model to another; `after` was asked for `before`'s top_k_ids."""
    difference = after.losses - before.losses
    tokens = len(difference)
    kl = seen.divergence(before, after)
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


def reader(artifact: Artifact, dtype: str, device: str | None = None, base: Path | None = None, what: str = "proof") -> Reader:
    """Asks a model in the artifact's folder: on a CPU in fp32 layer by layer where that can be, else whole. device: where it fits, if None."""
    from src.models import by_layer

    parameters = _parameters(base or artifact.path)
    device = device or device_that_fits(parameters)
    if device == "cpu" and dtype == "float32" and (found := by_layer.load(artifact, base)):
        return seen.by_layer(found[0], what)
    if dtype == "float32" and not fits_whole(parameters, device):
        say(
            f"{what}: twice the model in fp32, {size(8 * parameters)}, does not fit in memory, so it is computed in the dtype that is stored"
        )
        dtype = "auto"
    return seen.whole(load_any(artifact, dtype=dtype, device=device, base=base)[0], what)


def _parameters(folder: Path) -> int:
    pickled = not any(folder.glob("*.safetensors"))
    return 0 if pickled else sum(math.prod(entry.shape) for entry in safetensors_io.entries(folder).values())


def reload(
    artifact: Artifact, dtype: str, device: str | None, rows: list[encoding.Encoded], at: np.ndarray | None, base: Path | None
) -> tuple:
    """(token ids of aux_files' probes, what the model says at `rows`). Made to run in a fresh process.

    device: see reader. at: see observe. base: of an adapter, where it is.
    """
    folder = artifact.path if has_tokenizer(artifact.path) or not base else base
    ids = complete.token_ids(folder, trust_of(artifact))
    return ids, seen.observe(reader(artifact, dtype, device, base), rows, at) if rows else None


def judge(verb: str, change: Change, limit: float, where: Path, fix: list[str], setting: str | None = "max_loss_change") -> None:
    """Says what was lost. Raises ProofFailed as `hold_loss` does."""
    hold_loss(change, limit, where, fix, setting)
    say(f"{verb}: {_as_saved(change)}")


def hold_loss(change: Change, limit: float, where: Path, fix: list[str], setting: str | None = "max_loss_change") -> None:
    """Raises ProofFailed where the loss moved, either way, or KL grew by more than `limit` nats and what other rows would explain.

    fix: ways out beside the limit itself, which `setting` raises.
    """
    over = (abs(change.loss) - change.loss_waver, change.kl - change.kl_waver)
    if not all(nats <= limit for nats in over):  # not a number is over it too
        raise ProofFailed(
            f"what is saved is not what was trained: {_as_saved(change)}",
            where=f"{where}, limit {limit:g} nats beside what other conversations would explain ({change.loss_waver:.4f} of the loss, {change.kl_waver:.4f} of KL)",
            fix=[*fix, *([f"{setting}={max(over) * 1.1:.2g} if you accept it"] if setting and all(map(math.isfinite, over)) else [])],
        )


def _as_saved(change: Change) -> str:
    return change.told("as trained", "as saved")


def hold(change: Change, kl: float, agreement: float, where: Path, fix: list[str]) -> None:
    """Raises ProofFailed where KL is above its limit, or the share of tokens with the same likeliest one below its own, beside what other rows would explain.

    fix: ways out beside the limits, `max_kl` and `min_agreement`.
    """
    waver = 2 * math.sqrt(change.agreement * (1 - change.agreement) / change.tokens)
    over = [f"max_kl={change.kl * 1.1:.2g}"] * (not change.kl - change.kl_waver <= kl)
    over += [f"min_agreement={change.agreement * 0.95:.2g}"] * (not change.agreement + waver >= agreement)
    if over:
        accepted = [f"{' '.join(over)} if you accept it"] if math.isfinite(change.kl + change.agreement) else []
        raise ProofFailed(
            f"more was lost than bits explain: {change.told('before', 'quantized')}",
            where=f"{where}, limits KL {kl:g} nats and {agreement:.0%} the same likeliest token",
            fix=[*fix, *accepted],
        )


def report(verb: str, change: Change, other: str, fix: str) -> dict:
    """Says what fewer bits lost, with a warning and a way out (`fix`) where it is more than MUCH; returns the figures for the manifest.

    other: what the weights are now, such as "in int4". fix: empty where nothing here loses less.
    """
    say(f"{verb}: {change.told('before', other)}")
    if change.loss - change.loss_waver > MUCH:
        warn(
            f"{change.loss:.2f} nats are much to lose: answers will differ from those of the model this was made from"
            + (f"; {fix}" if fix else "")
        )
    return change.metrics()
