"""Safetensors as a stream: read the headers of a folder, write a folder tensor by tensor. Never more than a few tensors in memory; no torch at import.

Tensors are read into memory, not mapped: the pages of a mapped file count as the process's own for as long as it is open.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from src.core.errors import AGAIN, BadData

ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
INSIDE = re.compile(r"\.\d+\.")
"""in the name of a tensor that belongs to one of a model's layers"""
WORKERS = 4
"""tensors made and written at a time, at most one for each of torch's threads; a tensor alone uses several threads poorly"""
PIECE = 1 << 18
"""bytes read and written at a time; Linux was measured to take larger ones at a third of the speed"""
NAME = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class Entry:
    """One tensor as a header describes it. dtype is safetensors' name, such as BF16; file is the shard that holds it, start the byte there at
    which its data begins (0 for one that is yet to be written)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int = 0

    @property
    def size(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * ITEM[self.dtype]


def entries(folder: Path, pattern: str = "model*.safetensors") -> dict[str, Entry]:
    """{name: Entry} of every tensor in a folder's shards, from their headers alone.

    The layout is that of the safetensors README: u64 header length, JSON header, data. Raises BadData where a file is cut off or not one.
    """
    from safetensors import SafetensorError, safe_open

    found: dict[str, Entry] = {}
    for file in sorted(folder.glob(pattern)) or sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        with open(file, "rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else size + 1
            if length > size - 8:
                raise BadData("not a whole safetensors file: its header is longer than the file", where=str(file), fix=AGAIN)
            try:
                header = json.loads(stream.read(length))
                header.pop("__metadata__", None)
                end = 8 + length + max((e["data_offsets"][1] for e in header.values()), default=0)
                found |= {
                    name: Entry(name, e["dtype"], tuple(map(int, e["shape"])), file, 8 + length + int(e["data_offsets"][0]))
                    for name, e in header.items()
                }
                for e in header.values():
                    begin, stop = e["data_offsets"]
                    if begin < 0 or (e["dtype"] in ITEM and stop - begin != math.prod(e["shape"]) * ITEM[e["dtype"]]):
                        raise ValueError("a tensor's bytes do not fit its shape")
            except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError):
                raise BadData("not a safetensors file: its header is damaged", where=str(file), fix=AGAIN) from None
        if end != size:
            raise BadData("the safetensors file is cut off, or longer than its header says", where=str(file), fix=AGAIN)
        try:
            with safe_open(file, "np"):
                pass
        except SafetensorError as error:  # what the library that loads it does not take: tensors that overlap, other metadata
            raise BadData(f"not a safetensors file: {error}", where=str(file), fix=AGAIN) from None
    return found


@contextlib.contextmanager
def opened(file: Path) -> Iterator:
    """A file as the safetensors library opens it, for its metadata."""
    from safetensors import safe_open

    with safe_open(file, "np") as stored:
        yield stored


def load(entry: Entry):
    """The tensor an entry describes, as a torch tensor in memory of its own."""
    import torch

    raw = torch.empty(entry.size, dtype=torch.uint8)
    left = memoryview(raw.numpy().data)
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.start)
        while left:
            left = left[_some(stream.readinto(left), entry) :]
    return raw.view(getattr(torch, TORCH[entry.dtype])).reshape(entry.shape)


def load_wide(entry: Entry, into=None):
    """The tensor an entry describes in fp32, exactly where it is stored in 16 bits; no other form of the whole is in memory.

    into: fp32 of its shape, whose memory is taken; a new tensor without one.
    """
    import torch

    wide = torch.empty(entry.shape) if into is None else into
    flat, dtype = wide.view(-1), getattr(torch, TORCH[entry.dtype])
    piece = torch.empty(min(PIECE, entry.size), dtype=torch.uint8)
    view, at = memoryview(piece.numpy().data), 0
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.start)
        while at < len(flat):
            part = view[: (len(flat) - at) * ITEM[entry.dtype]]
            rest = part
            while rest:
                rest = rest[_some(stream.readinto(rest), entry) :]
            values = piece[: len(part)].view(dtype)
            flat[at : at + len(values)] = values
            at += len(values)
    return wide


def copy(entry: Entry, out: int, at: int) -> None:
    """Copy the bytes of a stored tensor into an open file (its descriptor) from byte `at` on."""
    buffer, done = memoryview(bytearray(min(PIECE, entry.size))), 0
    with open(entry.file, "rb", buffering=0) as stream:
        stream.seek(entry.start)
        while done < entry.size:
            count = _some(stream.readinto(buffer[: entry.size - done]), entry)
            _put(out, buffer[:count], at + done)
            done += count


def _some(count: int, entry: Entry) -> int:
    if not count:
        raise BadData(f"'{entry.name}' ends before its header says", where=str(entry.file), fix=AGAIN)
    return count


def _put(out: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(out, data[:PIECE], at)
        data, at = data[count:], at + count


def write(
    out: Path, plan: Iterable[Entry], tensor: Callable[[str], "object"], shard_size: int, tick: Callable[[], None] = lambda: None
) -> None:
    """Write model*.safetensors into `out` in the order of `plan`, taking each tensor from `tensor(name)` when its turn comes.

    tensor: gives a torch tensor, or the Entry of one stored elsewhere whose bytes are copied as they are; called from up to WORKERS threads at a time.
    shard_size: bytes per file at most, a larger single tensor excepted. More than one file gets the index transformers looks for.
    """
    groups: list[list[Entry]] = []
    room = 0
    for entry in plan:
        if not groups or entry.size > room:
            groups.append([])
            room = shard_size
        groups[-1].append(entry)
        room -= entry.size
    index: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = out / ("model.safetensors" if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors")
        _write_shard(file, group, tensor, tick)
        index |= {entry.name: file.name for entry in group}
    if len(groups) > 1:
        total = sum(entry.size for group in groups for entry in group)
        (out / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2) + "\n"
        )


def _write_shard(file: Path, group: list[Entry], tensor: Callable, tick: Callable) -> None:
    import torch

    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begins, offset = {}, 0
    for entry in group:
        header[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, offset + entry.size]}
        begins[entry.name], offset = offset, offset + entry.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text

    def put(entry: Entry) -> None:
        value, at = tensor(entry.name), len(head) + begins[entry.name]
        dtype = value.dtype if isinstance(value, Entry) else NAME.get(str(value.dtype).removeprefix("torch."), entry.dtype)
        if tuple(value.shape) != entry.shape or dtype != entry.dtype:
            raise ValueError(f"{entry.name}: planned {entry.dtype} {entry.shape}, got {value.dtype} {tuple(value.shape)}")
        if isinstance(value, Entry):
            copy(value, stream.fileno(), at)
        else:
            _put(stream.fileno(), memoryview(value.contiguous().reshape(-1).view(torch.uint8).numpy()), at)

    with open(file, "wb", buffering=0) as stream:
        _put(stream.fileno(), memoryview(head), 0)
        stream.truncate(len(head) + offset)
        with _workers(len(group)) as pool:
            for _ in pool.map(put, group):
                tick()


@contextlib.contextmanager
def _workers(tasks: int) -> Iterator[concurrent.futures.Executor]:
    """Threads that share torch's among them; what has not begun when one fails is left."""
    import torch

    threads = torch.get_num_threads()
    count = max(1, min(WORKERS, threads, tasks))
    pool = concurrent.futures.ThreadPoolExecutor(count)
    torch.set_num_threads(threads // count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def parse_size(text: str) -> int:
    """Bytes of 5GB or 500MB."""
    return int(float(text[:-2]) * {"MB": 10**6, "GB": 10**9}[text[-2:]])
