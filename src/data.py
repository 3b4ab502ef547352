"""Read conversations, check and count every record, and split them into train, val and calib; with preview=MODEL show what they are, and make nothing.

A record's split follows from a seeded hash of its content alone, so adding rows never moves old ones.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

from src.chat import encoding
from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import BadData
from src.core.log import progress, say, warn
from src.core.room import Needs
from src.models.folder import check_tokenizer, locate
from src.records.conversations import Conversation, RecordLayout, Tally, read
from src.records.held_out import SHARED, Doubles, EvaluationSets, strings
from src.records.sources import kinds, opened
from src.records.sources.found import found
from src.records.splits import SPLITS, Splits, times
from src.settings.data import Data
from src.settings.verbs import DataVerb
from src.sizing import host

EXAMPLE, FILES_LISTED = "assets/conversations.json", 10
HELD_OUT, SHARES, NOT_DRAWN = "also in data.val", f"{SHARED} words in a row are also in data.unseen", "not drawn, by data.weights"


def find(cfg: DataVerb, run: stage.Run) -> dict[str, Artifact]:
    """The files of each path, by content; their roles are conversations, conversations 2, ..., val for a file of one's own, and unseen, unseen 2, ..."""
    inputs = {}
    for number, path in enumerate(cfg.data.paths, 1):
        inputs["conversations" if number == 1 else f"conversations {number}"] = _files(path, cfg.data, run)
    if isinstance(cfg.data.val, str):
        inputs["val"] = _files(cfg.data.val, cfg.data, run)
    for number, path in enumerate(cfg.data.unseen, 1):
        inputs["unseen" if number == 1 else f"unseen {number}"] = _files(path, cfg.data, run)
    return inputs


def _files(path: str, d: Data, run: stage.Run) -> Artifact:
    if path == EXAMPLE:
        say(f"data: {EXAMPLE} is an example of the project's own; data.path=YOURS reads yours")
    there = found(path, subset=d.subset, split=d.hub_split, revision=d.revision, download=not run.dry)
    if there.revision:
        say(f"data: {path} is read as of {there.revision}")
    if there.left:
        more = f" and {len(there.left) - FILES_LISTED} more" * (len(there.left) > FILES_LISTED)
        say(f"data: of {path}, data.hub_split={d.hub_split} alone is read; not {', '.join(there.left[:FILES_LISTED])}{more}")
    return artifact.outside(there.root, "file", run.cache, there.files)


def check(cfg: DataVerb, inputs: dict[str, Artifact]) -> list[str]:
    """What is read, by kind. Raises where a file is none of records."""
    files = [file for role in inputs for file in _records(inputs[role])]
    more = [f"and {len(files) - FILES_LISTED} more files"] * (len(files) > FILES_LISTED)
    return [f"reads {file.name} ({file.kind})" for file in files[:FILES_LISTED]] + more


def _records(source: Artifact) -> list[kinds.File]:
    return kinds.files(source.path, source.files)


def needs(cfg: DataVerb, inputs: dict[str, Artifact]) -> Needs:
    files = [file.path for source in inputs.values() for file in _records(source)]
    return host.data(
        sum(path.stat().st_size for path in files), packed=sum(path.stat().st_size for path in files if opened.is_packed(path))
    )


def data(cfg: DataVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes train.jsonl, val.jsonl and calib.jsonl, one {"id", "messages", "tools"} and "weight" where it is not 1 a line; dropped.jsonl where records
    were dropped."""
    d, tally, held_out = cfg.data, Tally(), set()
    own_val = isinstance(d.val, str)
    doubles = Doubles(d.dedupe) if d.dedupe != "none" else None
    sets = (file for role in inputs if role.startswith("unseen") for file in _records(inputs[role]))
    unseen = EvaluationSets(text for file in sets for text in strings(file))
    splits = Splits(out, seed=d.split_seed, val=0 if isinstance(d.val, str) else d.val, calib=d.calib, exact=d.split == "exact")
    with open(out / "dropped.jsonl", "w", encoding="ascii") as tally.log:
        try:
            for conversation in _read(d, inputs["val"], tally) if own_val else ():
                held_out.add(conversation.digest())
                if doubles:
                    doubles.of(conversation)
                splits.write("val", conversation)
            for role, weight in zip((role for role in inputs if role.startswith("conversations")), d.weights or [1.0] * len(inputs)):
                for conversation in _read(d, inputs[role], tally):
                    if conversation.digest() in held_out:
                        tally.set_aside(conversation, HELD_OUT)
                    elif shared := unseen.shared(conversation):
                        tally.set_aside(conversation, SHARES, shared)
                    elif doubles and (double := doubles.of(conversation)):
                        tally.set_aside(conversation, *double)
                    elif count := times(conversation.digest(), weight, d.split_seed):
                        splits.add(conversation, count)
                    else:
                        tally.set_aside(conversation, NOT_DRAWN)
            rows = splits.finish()
        finally:
            splits.close()
    if not tally.dropped:
        (out / "dropped.jsonl").unlink()
    if not rows["train"]:
        why = "; ".join(f"dropped {count}: {reason}" for reason, count in tally.ordered("dropped")[:3]) or "all are held out"
        raise BadData(f"no record is left to train on ({why})", where=", ".join(d.paths), fix=_ways_to_some(tally))
    report(tally, rows)
    return tally.metrics() | {f"{split}_rows": count for split, count in rows.items()}


def _read(d: Data, source: Artifact, tally: Tally) -> Iterator[Conversation]:
    layout = RecordLayout(d.format, d.columns, d.roles)
    return progress(read(_records(source), format=layout, on_fault=d.on_fault, tally=tally), "records")


def _ways_to_some(tally: Tally) -> list[str]:
    """What brings records back where all are gone."""
    ways = {
        HELD_OUT: "data.val=0.05 holds out a share of data.path instead",
        SHARES: "data.unseen=[] lets them in; dropped.jsonl names the words",
        NOT_DRAWN: "data.weights=null draws none out",
    }
    found = [*tally.fixes, *(way for reason, way in ways.items() if tally.dropped[reason])]
    return found + ["data.on_fault=error lists what is wrong"] * bool(tally.fault_count) or ["more records"]


def report(tally: Tally, rows: dict[str, int]) -> None:
    """Say what was read, kept, dropped and inferred, in an order that follows from the counts alone."""
    for file in tally.files[:FILES_LISTED]:
        say(
            f"data: {file.name} ({file.kind}, {', '.join(file.formats) or 'no layout'}): {file.rows_in} records in, {file.kept} kept; {file.seen()}"
        )
    if len(tally.files) > FILES_LISTED:
        say(f"data: and {len(tally.files) - FILES_LISTED} more files")
    say(f"data: {tally.rows_in} records in ({', '.join(tally.formats)}), {tally.kept} kept: " + ", ".join(f"{rows[s]} {s}" for s in SPLITS))
    for reason, count in tally.ordered("dropped"):
        say(f"data: dropped {count}: {reason}")
    if tally.dropped:
        say("data: each dropped record is named in dropped.jsonl")
    for note, count in tally.ordered("notes"):
        say(f"data: {note} ({count})")
    for split in ("val", "calib"):
        if not rows[split]:
            warn(f"the {split} split is empty; raise data.{split}, or add records")


def preview(cfg: DataVerb, run: stage.Run) -> int | None:
    """The data set, made in a folder that goes again, as a model sees it."""
    if cfg.preview is None:
        return None
    folder = locate(cfg.preview)
    check_tokenizer(folder)
    inputs = find(cfg, run)
    check(cfg, inputs)
    from src.models import glance
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if added := encoding.ensure_chat(tokenizer):
        say(f"data: {cfg.preview} has no chat template; shown through ChatML, with its tokens {' '.join(added)}")
    with tempfile.TemporaryDirectory() as made:
        data(cfg, inputs, Path(made))
        glance.tell(Path(made), tokenizer)
    return 0


STAGE = stage.Stage(
    verb="data",
    version=2,
    schema=DataVerb,
    kind="dataset",
    find=find,
    check=check,
    needs=needs,
    instead=preview,
    run=data,
    doc=__doc__,
    private=("data.private", lambda cfg: cfg.data.private),
)

if __name__ == "__main__":
    stage.main(STAGE)
