"""Calibration data for Mobilint's compiler: token sequences as rows of the embedding table, one .npy file each, fp32 (1, tokens, hidden).

The compiler reads embeddings, not text, and every file of one folder; so the files are numbered through, whatever the language.
"""

import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.errors import BadData, ToolFailed, WrongKind
from src.core.log import progress, say, size, warn
from src.deploy.embedding import chunks
from src.deploy.mobilint.plan import CompilePlan, text_file
from src.deploy.vendor import whole
from src.models.safetensors_io import Entry

BARREN = 8
"""drawings in a row that gave no new sequence, after which the split is taken to hold no more"""
LINE = 1 << 10
"""characters taken together at most; a line that is longer is taken in pieces of it, so that it too gives several sequences"""


@dataclass(frozen=True)
class Sequence:
    """Token ids to calibrate on. parts: the conversations they come from, by id; language: None where they come from conversations."""

    ids: list[int]
    parts: tuple[str, ...] = ()
    language: str | None = None


# ---- the table


def write_table(entry: Entry, path: Path) -> None:
    """Write the embedding table as embedding.pt: one plain fp32 tensor (vocabulary, hidden), as torch.save has it. Kept where it is there already.

    It goes through a raw file that is mapped, so memory stays small whatever the table's size.
    """
    if path.exists():
        return
    import torch

    raw = path.with_suffix(".f32")
    with open(raw, "wb") as file:
        for data in chunks(entry):
            file.write(to_fp32(data, entry.dtype).data)
    table = torch.from_file(str(raw), shared=True, size=raw.stat().st_size // 4, dtype=torch.float32).view(*entry.shape)
    with whole(path) as partial:
        torch.save(table, partial)
    del table
    raw.unlink()
    say(f"embedding.pt: fp32 {entry.shape[0]} x {entry.shape[1]}, {size(path.stat().st_size)}, from {entry.dtype} '{entry.name}'")


def to_fp32(data: bytes | memoryview, dtype: str) -> np.ndarray:
    """Values of `dtype` (BF16, F16, F32; little endian) as fp32, exactly."""
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
    return np.frombuffer(data, "<f2" if dtype == "F16" else "<f4").astype("<f4", copy=False)


def open_table(path: Path):
    """The tensor in embedding.pt, mapped: rows are read from disk as they are used."""
    import torch

    return torch.load(path, mmap=True, weights_only=True)


# ---- sequences


def from_conversations(path: Path, tokenizer, low: int, high: int, samples: int) -> tuple[list[Sequence], dict]:
    """(`samples` sequences or fewer, counts) of a calib split, whole conversations through the training template.

    A conversation shorter than `low` tokens is followed by the next ones until it has as many; what goes beyond `high` is cut. Where the split
    is used up before there are `samples`, it is drawn again in another order, so that the joins differ; no sequence comes twice. Raises BadData
    where the split makes not one.
    """
    rows = _conversations(path, tokenizer)
    kept: list[tuple[str, list[int]]] = []
    found: dict[tuple[int, ...], Sequence] = {}
    draws, barren = 1, 0
    counts = {"conversations": 0, "refused": 0, "cut": 0, "joined": 0}

    def take(conversations: Iterable) -> None:
        for ids, parts, cut in join(conversations, low, high):
            if len(found) < samples and tuple(ids) not in found:
                found[tuple(ids)] = Sequence(ids, tuple(parts))
                counts["cut"] += cut
                counts["joined"] += len(parts) > 1
            if len(found) == samples:
                return

    def first() -> Iterator:
        for name, ids in rows:
            if ids is None:
                counts["refused"] += 1
            else:
                kept.append((name, ids))
                yield name, ids

    take(first())
    once = len(found)
    while found and len(found) < samples and barren < BARREN:
        before = len(found)
        take(random.Random(draws).sample(kept, len(kept)))
        barren = 0 if len(found) > before else barren + 1
        draws += 1
    counts |= {"conversations": len(kept), "drawings": draws - barren}
    tokens = sum(len(ids) for _, ids in kept)
    if not found:
        raise BadData(
            f"the calib split holds {tokens:,} tokens in {len(kept)} conversations, which makes no sequence of {low}",
            where=str(path),
            fix=[
                "python -m src.data data.calib=0.2, or more records",
                f"target.min_tokens={max(1, tokens // 4)}",
                "target.languages=[en] target.texts=FOLDER calibrates on text of yours",
            ],
        )
    if counts["refused"]:
        say(f"calibration: left out {counts['refused']} conversations that the chat template refuses")
    if len(found) > once:
        say(
            f"calibration: {once} sequences of the calib split as it is, {len(found) - once} joined anew in {draws - barren - 1} other orders of it"
        )
    if draws > 1:
        warn(
            f"the calib split is small: {tokens:,} tokens in {len(kept)} conversations. It makes {len(found)} different sequences of at least "
            f"{low} tokens, {samples} were asked for; more records, or a larger data.calib, calibrate better"
        )
    return list(found.values()), counts


def join(conversations: Iterable[tuple[str, list[int]]], low: int, high: int) -> Iterator[tuple[list[int], list[str], bool]]:
    """(ids, names, whether it was cut) of sequences of `low` to `high` tokens; a rest shorter than `low` is left over."""
    ids: list[int] = []
    names: list[str] = []
    for name, more in conversations:
        ids, names = ids + more, names + [name]
        if len(ids) >= low:
            yield ids[:high], names, len(ids) > high
            ids, names = [], []


def _conversations(path: Path, tokenizer) -> Iterator[tuple[str, list[int] | None]]:
    """(id, token ids) of each conversation as it is trained on; None where the template refuses it."""
    if added := encoding.ensure_chat(tokenizer):
        raise WrongKind(
            f"the model has no chat template, and its tokenizer lacks ChatML's {', '.join(added)}: conversations cannot be rendered for it",
            where=str(tokenizer.name_or_path),
            fix=["target.languages=[en] target.texts=FOLDER calibrates on plain text", "fine-tune it first"],
        )
    with open(path, encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            try:
                yield record["id"], encoding.encode(tokenizer, record["messages"], record.get("tools")).input_ids
            except BadData:
                yield record["id"], None


def from_texts(folder: Path, languages: tuple[str, ...], tokenizer, low: int, high: int, samples: int) -> tuple[list[Sequence], dict]:
    """(`samples` sequences, counts), as many of each language, of texts as the tokenizer takes them by themselves.

    A text shorter than `low` tokens is left out, and counted; none is joined to another. A long one gives several sequences of up to `high` tokens, or of
    fewer where there would be too few sequences. Raises BadData where the texts do not make enough.
    """
    found, counts = [], {"cut": 0}
    for number, language in enumerate(languages):
        path, wanted = text_file(folder, language), samples // len(languages) + (number < samples % len(languages))
        length = high
        while len((made := _cut_up(path, tokenizer, low, length, high, wanted))[0]) < wanted and length > low:
            length = max(low, length // 2)
        sequences, short, cut = made
        if len(sequences) < wanted:
            raise BadData(
                f"the text makes {len(sequences)} sequences of at least {low} tokens; {wanted} are wanted of '{language}'"
                + (f"; {short} texts are shorter than that" if short else ""),
                where=str(path),
                fix=["more text", f"target.samples={max(1, len(sequences)) * len(languages)}", f"target.min_tokens={max(1, low // 4)}"],
            )
        if short:
            say(f"calibration: left out {short} texts of '{language}' that are shorter than {low} tokens")
        counts |= {"cut": counts["cut"] + cut, language: len(sequences)} | ({f"{language}, too short": short} if short else {})
        found += [Sequence(ids, language=language) for ids in sequences]
    return found, counts


def _cut_up(path: Path, tokenizer, low: int, length: int, high: int, wanted: int) -> tuple[list[list[int]], int, int]:
    """(`wanted` sequences or fewer, texts that were too short, sequences cut at `high`) of a file's texts in pieces of about `length` tokens."""
    found: list[list[int]] = []
    short = before = 0
    pieces: list[str] = []
    tokens = 0

    def take() -> None:
        nonlocal pieces, tokens
        if tokens >= low and len(ids := tokenizer("".join(pieces)).input_ids) >= low:
            found.append(ids)
            pieces, tokens = [], 0

    for piece, ends in _pieces(path):
        more = len(tokenizer(piece, add_special_tokens=False).input_ids)
        if tokens + more > length:
            take()
        pieces, tokens = [*pieces, piece], tokens + more
        if ends or tokens >= length:
            take()
        if ends:
            short += len(found) == before and any(map(str.strip, pieces))
            pieces, tokens, before = [], 0, len(found)
        if len(found) >= wanted:
            break
    found = found[:wanted]
    return [ids[:high] for ids in found], short, sum(len(ids) > high for ids in found)


def _pieces(path: Path) -> Iterator[tuple[str, bool]]:
    """(some of a text, whether the text ends with it) of a file: a record of .jsonl is a text; in .txt two blank lines or more lie between texts."""
    try:
        with open(path, encoding="utf-8") as file:
            if path.suffix == ".jsonl":
                for number, line in enumerate(file, 1):
                    text = _text_of(line, f"{path}, line {number}") if line.strip() else ""
                    parts = [line[k : k + LINE] for line in text.splitlines(keepends=True) for k in range(0, len(line), LINE)]
                    yield from ((part, place == len(parts)) for place, part in enumerate(parts, 1))
                return
            before, blank = "", 0
            while line := file.readline(LINE):
                if line.strip():
                    if before:
                        yield before, blank > 1
                    before, blank = line, 0
                else:
                    before, blank = (before + line if before else ""), blank + 1
            if before:
                yield before, True
    except UnicodeDecodeError as error:
        raise BadData(f"not UTF-8 near byte {error.start} of a block", where=str(path), fix="save it as UTF-8") from None


def _text_of(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise BadData("not a JSON object with a 'text'", where=where, fix='one record a line: {"text": "..."}')
    return record["text"]


# ---- files


def sequences(plan: CompilePlan, tokenizer) -> tuple[list[Sequence], dict]:
    """The sequences a plan asks for, from conversations or from texts, and what is to be known of them."""
    if plan.languages:
        return from_texts(plan.source, plan.languages, tokenizer, plan.low, plan.high, plan.samples)
    return from_conversations(plan.source, tokenizer, plan.low, plan.high, plan.samples)


def write(found: list[Sequence], table, folder: Path) -> list[dict]:
    """Write inputs_embeds_<k>.npy for each sequence, with its language in front where it has one, as Mobilint's generate_calib.py of 1.3 does; whole ones
    of an earlier run are kept, anything else in the folder goes.

    table: fp32 (vocabulary, hidden). Returns a record per file: its name, tokens, language, conversations and a hash of the ids.
    Raises WrongKind where a token id has no row.
    """
    folder.mkdir(exist_ok=True)
    largest = max(max(sequence.ids) for sequence in found)
    if largest >= table.shape[0]:
        raise WrongKind(
            f"the tokenizer gives id {largest}, the embedding table has {table.shape[0]} rows",
            where=str(folder),
            fix="a model whose tokenizer and weights belong together",
        )
    names = [
        f"{sequence.language}_inputs_embeds_{k}.npy" if sequence.language else f"inputs_embeds_{k}.npy" for k, sequence in enumerate(found)
    ]
    for stray in set(folder.iterdir()) - {folder / name for name in names}:
        stray.unlink()
    records, kept = [], 0
    for name, sequence in progress(list(zip(names, found)), "calibration files"):
        shape = (1, len(sequence.ids), table.shape[1])
        if header(folder / name) == ("float32", shape):
            kept += 1
        else:
            with whole(folder / name) as partial, open(partial, "wb") as file:
                np.save(file, table[sequence.ids].numpy().reshape(shape))
        records.append(
            {
                "file": name,
                "tokens": len(sequence.ids),
                "language": sequence.language,
                "conversations": list(sequence.parts),
                "ids": hashlib.sha256(np.array(sequence.ids, "<u4").tobytes()).hexdigest(),
            }
        )
    tokens = [len(sequence.ids) for sequence in found]
    say(
        f"calibration: {len(records)} files of {min(tokens)} to {max(tokens)} tokens, {sum(tokens):,} tokens in all"
        + (f"; {kept} were there from an earlier run" if kept else "")
    )
    return records


def header(path: Path) -> tuple[str, tuple] | None:
    """(dtype, shape) of a .npy file whose data is whole; None where it is not there or not one."""
    if not path.is_file():
        return None
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError):
        return None
    return str(array.dtype), array.shape


def check(folder: Path, records: list[dict], low: int, high: int, hidden: int) -> None:
    """What the compiler will find: just the recorded files, each fp32 (1, low..high, hidden). Raises ToolFailed at the first that differs."""
    there = {file.name for file in folder.iterdir()}
    odd = [f"'{name}' is not one of them" for name in sorted(there - {record["file"] for record in records})]
    for record in records:
        dtype, shape = header(folder / record["file"]) or ("nothing", ())
        if (dtype, shape) != ("float32", (1, record["tokens"], hidden)) or not low <= record["tokens"] <= high:
            odd.append(f"'{record['file']}' is {dtype} {shape}")
    if odd:
        raise ToolFailed(f"the calibration folder is not as it was written: {odd[0]}", where=str(folder), fix="run the same command again")
