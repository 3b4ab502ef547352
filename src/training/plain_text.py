"""Plain text as a run's lesson, for what goes on from a model (cpt) and for what begins with none (pretrain)."""

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from src.chat.encoding import Encoded
from src.core.artifact import Artifact, key_of, package_versions
from src.core.cache import kept_or_made
from src.core.files import sha256
from src.core.log import rank, say
from src.models import fidelity, fresh
from src.models.loading import load_tokenizer
from src.records import texts
from src.settings.verbs import CptVerb, PretrainVerb
from src.training import saving, session, text_rows
from src.training.checkpoints import from_first
from src.training.lesson import Lesson

LEARNT_FROM = 256 << 20
"""characters of text that a tokenizer is learnt from at most, which are the first"""
OPENING = 8
"""tokens of a held-out document from which a sample goes on"""


def run(cfg: CptVerb, text: Artifact, base: Artifact, out: Path, started: tuple[str, str]) -> dict:
    """Train on a text from `base` on; see session.run."""
    tokenizer = load_tokenizer(base.path, trust_remote_code=cfg.model.trust_remote_code)
    if rank() == 0:
        saving.check_tokenizer_kept(cfg, base.path, tokenizer, out, keep=True)
    taught = lesson(cfg, text, base.path, tokenizer, kept_in(out))
    metrics = session.run(cfg, base, out, tokenizer, taught, started)
    return metrics | bits_per_byte(metrics) if metrics else {}


def kept_in(out: Path) -> Path:
    """Where tokens are kept, by content, for all runs."""
    return out.parent.parent / ".cache" / "tokens"


def lesson(cfg: CptVerb, text: Artifact, base: Path, tokenizer, cache: Path) -> Lesson:
    """On every process. cache: where tokens are kept."""
    train, val = text_rows.rows_of(cfg, text, tokenizer, cache)
    text_rows.check(train, val, text)
    least = fidelity.FEWEST_EXACT
    held = (fidelity.within(encoded(rows), most=fidelity.enough(base, least)) for rows in (val, train))
    each = {
        split: {"documents": rows.count, "tokens": rows.tokens, "bytes": rows.text_bytes}
        for split, rows in (("train", train), ("val", val))
    }
    say(
        f"text: {train.count:,} documents of {train.tokens:,} tokens to train on in {len(train):,} rows, {val.count:,} of {val.tokens:,} held out; "
        f"{train.text_bytes / train.tokens:.2f} bytes a token"
    )
    return Lesson(
        chat=False,
        train=train,
        val=val,
        held=next(held) or next(held),
        eos_id=tokenizer.eos_token_id,
        source=text.path,
        named=partial(text_rows.named, train, tokenizer),
        metrics={"text": each},
        prompts=openings(val if len(val) else train, tokenizer, cfg.train.samples),
    )


def encoded(rows: text_rows.TextRows) -> Iterator[Encoded]:
    return (Encoded(row.input_ids.tolist(), row.labels.tolist()) for row in rows)


def openings(rows: text_rows.TextRows, tokenizer, count: int) -> list[tuple[str, list[int]]]:
    """The first tokens of the first documents, to go on from."""
    first = [row for row in range(min(len(rows), 64 * count)) if not row or rows.documents[row] != rows.documents[row - 1]][:count]
    begins = [rows[row].input_ids[:OPENING].tolist() for row in first]
    return [(tokenizer.decode(ids, skip_special_tokens=True), ids) for ids in begins]


def bits_per_byte(metrics: dict) -> dict:
    """The validation loss in bits for each byte of text, which does not depend on the tokenizer."""
    val = metrics["text"]["val"]
    if "val_loss" not in metrics:
        return {}
    return {"val_bits_per_byte": metrics["val_loss"] / math.log(2) * (val["tokens"] - val["documents"]) / val["bytes"]}


# ---- a tokenizer from the text


def learnt_tokenizer(cfg: PretrainVerb, text: Artifact, cache: Path) -> Path:
    """The folder of a tokenizer of size.vocab tokens learnt from the text's training documents, kept by content; rank 0 makes it."""
    settings = {
        "text": text.key,
        "split": [cfg.separator, cfg.val, cfg.split_seed],
        "vocab": [cfg.size.vocab, cfg.size.max_length],
        "code": [sha256(Path(module)) for module in (texts.__file__, fresh.__file__, __file__)],
        "packages": package_versions()["tokenizers"],
    }
    folder = cache / key_of("tokenizer", 1, settings, {})
    if rank() == 0:
        folder = kept_or_made(folder, partial(_learn, cfg, text), lambda made: sha256(made / "tokenizer_config.json"))
    return from_first(folder)


def _learn(cfg: PretrainVerb, text: Artifact, folder: Path) -> None:
    say(f"text: learns a tokenizer of {cfg.size.vocab:,} tokens")
    fresh.learn_tokenizer(_training_texts(cfg, text), cfg.size.vocab, cfg.size.max_length, folder)


def _training_texts(cfg: PretrainVerb, text: Artifact) -> Iterator[str]:
    left, split = LEARNT_FROM, "train"
    for piece in texts.pieces(text, cfg.separator):
        split = text_rows.split_of(cfg, piece.text) if piece.first else split
        if split == "train":
            yield piece.text
            left -= len(piece.text)
        if left <= 0:
            say(f"text: the tokenizer is learnt from the first {LEARNT_FROM >> 20} million characters")
            return
