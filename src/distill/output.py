"""What a run writes: records by split, preferences, what was set aside, each record with where it came from."""

import hashlib
import json
import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from src.core.files import canonical
from src.distill.journal import Journal
from src.distill.pipeline import Record, Records, SetAside, Work
from src.distill.texts import append_answer
from src.records.conversations import CONTROL, Conversation, split_of
from src.settings.data import Holdout

SPLITS = ("train", "val", "calib")
_spelled = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
KEPT = ("scores", "parents", "quotes", "tests")
"""of a record's data, what is kept in the result as it is; the rest was for the steps"""


async def keep(records: Records, price: Callable[[str, int, int], float], work: Work, journal: Journal, holdout: Holdout) -> Records:
    """Records fit to be trained on, with data["distill"] (teachers, hash of the prompt, requests, their tokens and cost, what steps said of the record),
    data["split"] and data["line"], the record as it is written.

    price: (teacher's name, prompt tokens, tokens) to USD. Tokens and cost are those of the answers the record is made of; what was tried in vain is in
    the run's totals.
    """

    async def described(record: Record) -> Record:
        if not record.messages or record.messages[-1]["role"] != "assistant" or not record.messages[-1]["content"].strip():
            raise SetAside("no answer at the end")
        conversation = Conversation(record.id, tuple(record.messages), tuple(record.data["tools"]) if record.data.get("tools") else None)
        try:
            text = conversation.to_json()
            text.encode()
        except (ValueError, RecursionError) as error:
            raise SetAside("cannot be written as JSON", str(error)) from None
        if found := CONTROL.search(text):
            raise SetAside("control string", f"{found[0]} would end or forge a turn")
        asked = [await journal.recall(key) for key in record.asks]
        origin = {
            "teachers": sorted({known.teacher for known in asked}),
            "prompt": hashlib.sha256(canonical(record.messages[:-1])).hexdigest(),
            "requests": list(record.asks),
            "tokens": sum(known.prompt_tokens + known.tokens for known in asked),
            "money": round(sum(price(known.teacher, known.prompt_tokens, known.tokens) for known in asked), 9),
            **{name: record.data[name] for name in KEPT if name in record.data},
        }
        split = split_of(conversation.digest(), holdout.split_seed, holdout.val, holdout.calib)
        line = f'{text[:-1]}, "distill": {_spelled(origin)}}}\n'
        return replace(record, data=record.data | {"distill": origin, "split": split, "line": line})

    async for record in work.each(records, described):
        yield record


class Output:
    """The files of an artifact under way; `records`: how many each got."""

    def __init__(self, out: Path):
        self._out = out
        self._files = {split: open(out / f"{split}.jsonl", "w", encoding="utf-8") for split in SPLITS}
        self.records = dict.fromkeys((*SPLITS, "preference"), 0)

    def write(self, record: Record) -> None:
        """Write a record that went through `keep`."""
        self._files[record.data["split"]].write(record.data["line"])
        self.records[record.data["split"]] += 1
        if "chosen" in record.data and "rejected" in record.data:
            self._write_preference(record)

    def _write_preference(self, record: Record) -> None:
        """The columns that trainers of preferences read: prompt, chosen and rejected, each a list of turns."""
        if "preference" not in self._files:
            self._files["preference"] = open(self._out / "preference.jsonl", "w", encoding="utf-8")
        thoughts = record.data.get("reasoning", {})
        answers = {name: append_answer([], record.data[name], thoughts.get(record.data[name], "")) for name in ("chosen", "rejected")}
        self._files["preference"].write(_spelled({"id": record.id, "prompt": record.messages[:-1], **answers}) + "\n")
        self.records["preference"] += 1

    def close(self) -> None:
        for file in self._files.values():
            file.close()


class Rejected:
    """Records set aside, sorted by step and id when they are written, so that the file does not depend on which came first. Kept on disk, not in memory."""

    def __init__(self):
        self._base = sqlite3.connect("", isolation_level=None)  # a temporary file of SQLite's own, gone with the connection
        self._base.execute("CREATE TABLE aside (step TEXT, id TEXT, reason TEXT, detail TEXT, messages TEXT)")
        self._base.execute("BEGIN")

    def __call__(self, record: Record, step: str, reason: str, detail: str) -> None:
        messages = json.dumps(record.messages)
        self._base.execute("INSERT INTO aside VALUES (?, ?, ?, ?, ?)", (step, *map(_writable, (record.id, reason, detail)), messages))

    def write(self, path: Path, steps: list[str]) -> None:
        """One {"step", "id", "reason", "detail", "messages"} a line, steps in this order."""
        with open(path, "w", encoding="utf-8") as file:
            for step in steps:
                found = self._base.execute(
                    "SELECT id, reason, detail, messages FROM aside WHERE step = ? ORDER BY id, reason, detail", (step,)
                )
                for id, reason, detail, messages in found:
                    line = {"step": step, "id": id, "reason": reason, "detail": detail, "messages": json.loads(messages)}
                    file.write(json.dumps(line, ensure_ascii=messages.find("\\ud") >= 0) + "\n")
        self._base.close()


def _writable(text: str) -> str:
    """The text with half surrogate pairs, which no file can hold, replaced."""
    return text.encode("utf-8", "replace").decode()
