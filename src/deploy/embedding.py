"""The embedding table of a model folder, found by its header and streamed from its shard: no model is loaded, and no torch."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from src.core.errors import AGAIN, BadData, WrongKind
from src.deploy.vendor import whole
from src.models import safetensors_io
from src.models.safetensors_io import Entry

# The keys AXERA's extract_embed.py knows, in its order, then those that newer transformers give to models with a vision part
# (Qwen3.5, Gemma 3), ChatGLM's, InternLM2's and Qwen-1's.
KEYS = (
    "model.embed_tokens.weight",
    "llm.model.embed_tokens.weight",
    "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
    "language_model.embed_tokens.weight",
    "model.text_model.embed_tokens.weight",
    "transformer.embedding.word_embeddings.weight",
    "model.tok_embeddings.weight",
    "language_model.model.tok_embeddings.weight",
    "transformer.wte.weight",
)
CHUNK = 1 << 20
"""bytes read at a time: what stays in a processor's cache between reading, converting and writing"""


def find_embedding(model_dir: Path) -> Entry:
    """The embedding table's entry, (vocabulary rows, hidden size). Raises WrongKind where no known key is there or its dtype is not a float."""
    entries = safetensors_io.entries(model_dir)
    found = next((entries[key] for key in KEYS if key in entries), None)
    if found is None:
        named = [name for name in entries if "emb" in name.lower()][:3]
        raise WrongKind(
            "the model's embedding table is under none of the known names" + (f"; similar: {', '.join(named)}" if named else ""),
            where=str(model_dir),
        )
    if found.dtype not in ("BF16", "F16", "F32") or len(found.shape) != 2:
        raise WrongKind(
            f"'{found.name}' is {found.dtype} {list(found.shape)}, not a table of 16- or 32-bit floats",
            where=str(found.file),
        )
    return found


def chunks(entry: Entry) -> Iterator[memoryview]:
    """The stored bytes of a tensor, CHUNK at a time; each piece is overwritten by the next."""
    buffer = memoryview(bytearray(CHUNK))
    with open(entry.file, "rb", buffering=0) as file:
        file.seek(entry.start)
        left = entry.size
        while left:
            count = file.readinto(buffer[: min(CHUNK, left)])
            if not count:
                raise _cut(entry)
            left -= count
            yield buffer[:count]


def _cut(entry: Entry) -> BadData:
    return BadData("the file became shorter while it was read", where=str(entry.file), fix=AGAIN)


def bf16_truncated(data: bytes | memoryview, dtype: str) -> bytes | memoryview:
    """Values of `dtype` (BF16, F16, F32; little endian) as bf16 by truncation: the upper half of the fp32 bits, as AXERA's fp32_to_bf16 has it."""
    if dtype == "BF16":
        return data
    if dtype == "F16":
        return _bf16_of_fp16().take(np.frombuffer(data, "<u2")).data
    return np.frombuffer(data, "<u2")[1::2].copy().data


@cache
def _bf16_of_fp16() -> np.ndarray:
    """bf16 bits of each of fp16's 65,536 values: looking them up is several times faster than numpy's conversion."""
    return np.arange(1 << 16, dtype="<u2").view("<f2").astype("<f4").view("<u2")[1::2].copy()


def write_bf16(entry: Entry, path: Path) -> int:
    """Write the table to `path` as raw bf16, little endian, row major, without a header; returns its bytes.

    Through a buffer of CHUNK bytes even where nothing is converted: the kernel's own copy (sendfile, copy_file_range) takes 1.4 times as long, since a
    tensor does not begin at a page of its shard.
    """
    with whole(path) as partial, open(partial, "wb") as out:
        for data in chunks(entry):
            out.write(bf16_truncated(data, entry.dtype))
    return path.stat().st_size
