"""Read conversations, check and count every record, and split them into train, val and calib.

A record's split follows from a seeded hash of its content alone, so adding rows never moves old ones.
"""

from pathlib import Path

from src.chat.conversations import Tally, read, split_of
from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import BadData, MissingInput
from src.core.log import progress, say, warn
from src.settings.verbs import DataVerb

SPLITS = ("train", "val", "calib")


def find(cfg: DataVerb, run: stage.Run) -> dict[str, Artifact]:
    path = Path(cfg.data.path)
    if not path.is_file():
        raise MissingInput(
            "no such file" if not path.exists() else "not a file", where=str(path), fix="data.path=FILE names a JSON or JSON Lines file"
        )
    return {"conversations": artifact.outside(path, "file", run.cache)}


def data(cfg: DataVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes train.jsonl, val.jsonl and calib.jsonl: one {"id", "messages", "tools"} a line."""
    tally = Tally()
    rows = dict.fromkeys(SPLITS, 0)
    files = {split: open(out / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLITS}
    try:
        records = read(inputs["conversations"].path, format=cfg.data.format, on_fault=cfg.data.on_fault, tally=tally)
        for conversation in progress(records, "records"):
            split = split_of(conversation.digest(), cfg.data.split_seed, cfg.data.val, cfg.data.calib)
            files[split].write(conversation.to_json() + "\n")
            rows[split] += 1
    finally:
        for file in files.values():
            file.close()
    if not rows["train"]:
        raise BadData("no record is left to train on", where=cfg.data.path, fix="see the counts above")
    report(tally, rows)
    return {
        "rows_in": tally.rows_in,
        "rows_kept": tally.kept,
        "dropped": dict(tally.dropped),
        "formats": dict(tally.formats),
        "notes": dict(tally.notes),
        **{f"{split}_rows": count for split, count in rows.items()},
    }


def report(tally: Tally, rows: dict[str, int]) -> None:
    """Say what was read, kept, dropped and inferred."""
    say(f"data: {tally.rows_in} records in ({', '.join(tally.formats)}), {tally.kept} kept: " + ", ".join(f"{rows[s]} {s}" for s in SPLITS))
    for reason, count in tally.dropped.most_common():
        say(f"data: dropped {count}: {reason}")
    for note, count in tally.notes.most_common():
        say(f"data: {note} ({count})")
    for split in ("val", "calib"):
        if not rows[split]:
            warn(f"the {split} split is empty; raise data.{split}, or add records")


STAGE = stage.Stage(verb="data", version=1, schema=DataVerb, kind="dataset", find=find, run=data, doc=__doc__)

if __name__ == "__main__":
    stage.main(STAGE)
