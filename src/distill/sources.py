"""What a recipe begins with, read as records: prompts, conversations, seed tasks or texts. A file is read twice, first whole for its faults and its count,
so that nothing is spent on a file that turns out to be damaged, then as a stream.

A record's id is the one it has in the file and its number there, so that it is unique whatever the records say.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from src.core.errors import BadData, MissingInput
from src.distill.pipeline import Record
from src.records import prompts
from src.records.conversations import FAULTS_LISTED
from src.records.formats import as_object
from src.records.json_stream import Malformed

LARGEST_TEXT = 64 << 20
"""bytes of a document at most"""


@dataclass
class Survey:
    """What a source holds: records that can be used, faults of the others, where each was found."""

    records: int = 0
    faults: list[tuple[str, Malformed]] = field(default_factory=list)


def records(path: Path | None, takes: str, count: int | None) -> Iterator[Record | tuple[str, Malformed]]:
    """The records of a source in order, at most `count` of them; a record that cannot be used comes as (its place, what is wrong).

    takes: "prompts": messages up to the last user turn, data["reference"] the answer that followed; "conversations": messages whole;
    "seeds": data instruction, input, output, classification; "texts": data["text"]; "nothing": no records.
    Raises BadData where nothing more can be read.
    """
    found = iter(()) if path is None else _texts(path) if path.is_dir() else _records(path, takes)
    given = 0
    for record in found:
        if count is not None and given == count:
            return
        given += isinstance(record, Record)
        yield record


def survey(path: Path | None, takes: str, count: int | None, on_fault: str) -> Survey:
    """Read the whole source once. Raises BadData for a source without records, and for malformed records unless they are to be dropped."""
    found, faults = Survey(), 0
    for record in records(path, takes, count):
        if isinstance(record, Record):
            found.records += 1
            continue
        faults += 1
        if len(found.faults) < FAULTS_LISTED:
            found.faults.append(record)
    if faults and on_fault == "error":
        listed = [f"{faults} of {faults + found.records} records cannot be used", *(f"  {place}: {fault}" for place, fault in found.faults)]
        raise BadData(
            "\n".join(listed + [f"  and {faults - len(found.faults)} more"] * (faults > len(found.faults))),
            where=str(path),
            fix=["mend the lines that are named", "prompts.on_fault=drop sets them aside, and counts them"],
        )
    if path is not None and not found.records:
        raise BadData("there is nothing to begin with", where=str(path), fix="name a file of prompts, or a folder of text")
    return found


def check(path: Path | None, takes: str) -> None:
    """Raises MissingInput where a recipe lacks what it begins with, or cannot use it."""
    if takes == "nothing":
        if path is not None:
            raise MissingInput("this recipe draws its own prompts and takes no file", where=str(path), fix="prompts.path=null")
    elif path is None:
        what = "a folder of text" if takes == "texts" else f"a file of {takes}"
        raise MissingInput(f"this recipe begins with {what}", fix=f"prompts.path={'FOLDER' if takes == 'texts' else 'FILE'} names it")
    elif not path.exists():
        raise MissingInput("no such file or folder", where=str(path), fix="name one that is there")
    elif path.is_dir() and takes != "texts":
        raise MissingInput(
            f"a folder, and this recipe begins with a file of {takes}", where=str(path), fix="prompts.path=FILE names one in it"
        )


def _texts(folder: Path) -> Iterator[Record | tuple[str, Malformed]]:
    """A record for each file that is no hidden one."""
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = path.relative_to(folder)
        if not any(part.startswith(".") for part in inside.parts):
            yield _document(path, inside.as_posix())


def _document(path: Path, name: str) -> Record | tuple[str, Malformed]:
    try:
        if path.stat().st_size > LARGEST_TEXT:
            raise Malformed("text too large", f"over {LARGEST_TEXT >> 20} MiB")
        record = Record(name, [], {"text": path.read_bytes().decode("utf-8-sig"), "path": name})
        if "\0" in record.data["text"]:
            raise Malformed("not text", "it holds zero bytes")
        prompts.check_sound([record.id, record.messages, record.data])
        return record
    except UnicodeDecodeError as error:
        return name, Malformed("not UTF-8", f"at byte {error.start}")
    except Malformed as fault:
        return name, fault


def _records(path: Path, takes: str) -> Iterator[Record | tuple[str, Malformed]]:
    if path.suffix == ".txt" and takes == "texts":
        yield _document(path, path.name)
        return
    for number, raw in enumerate(prompts.raw_records(path)):
        try:
            yield _record(as_object(raw.value), takes, number)
        except Malformed as fault:
            yield f"{path.name} line {raw.line}", fault


def _record(record: dict, takes: str, number: int) -> Record:
    """Raises Malformed."""
    id = prompts.id_of(record, number)
    if takes == "texts":
        found = Record(id, [], {"text": prompts.text_of(record, "text")})
    elif takes == "seeds":
        found = Record(id, [], _seed(record))
    else:
        messages, data = prompts.messages_of(record)
        found = Record(id, messages, data) if takes == "conversations" else _prompt(id, messages, data)
    prompts.check_sound([found.id, found.messages, found.data])
    return found


def _prompt(id: str, messages: list[dict], data: dict) -> Record:
    """Turns up to the last user's, and as reference the answer that followed."""
    asked = prompts.asked(messages)
    answer = next((m["content"] for m in messages[len(asked) :] if m["role"] == "assistant" and m["content"]), None)
    return Record(id, asked, data | ({"reference": answer} if answer else {}))


def _seed(record: dict) -> dict:
    """A task of Self-Instruct's seed file (github.com/yizhongw/self-instruct, data/seed_tasks.jsonl), or any record with an instruction."""
    first = record["instances"][0] if isinstance(record.get("instances"), list) and record["instances"] else record
    if not isinstance(first, dict):
        raise Malformed("ill-typed field", "'instances' holds no objects")
    return {
        "instruction": prompts.text_of(record, "instruction"),
        "input": prompts.text_of(first, "input") if first.get("input") is not None else "",
        "output": prompts.text_of(first, "output") if first.get("output") is not None else "",
        "classification": record.get("is_classification") is True,
    }
