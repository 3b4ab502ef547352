"""Narrowing trained weights to 16 bits without losing what was learnt.

A base lies on the grid of its dtype. A trained weight W + d with |d| below half a step of that grid rounds back to W, so nearest rounding loses most
of a small update, and always in the same direction. Stochastic rounding goes to the upper neighbour with the probability of the distance from the
lower one: the expected value is the exact one, and what is left is noise that matrix products average out (Gupta et al. 2015, arXiv:1502.02551;
measured in docs/fidelity.md). A value that lies on the grid stays as it is.

The draws are those of a counter, not of a sequence: SplitMix64 (Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195) of the tensor's name and the
value's position, 16 bits for each value. So equal values give equal bytes on any machine, with any number of threads, in blocks of any size.
"""

import hashlib
import json
import math
import threading
from pathlib import Path

import numpy as np

from src.core.errors import AGAIN, BadData
from src.core.files import read_json

CHUNK = 1 << 17
"""values rounded at a time, whose draws stay in a processor's cache"""
STEP = np.uint64(0x9E3779B97F4A7C15)
"""SplitMix64's increment, 2^64 over the golden ratio"""
_own = threading.local()


def narrow(values, dtype, name: str, *, start: int = 0, rounding: str = "stochastic", out=None):
    """`values` (fp32, or what converts to it) as `dtype`, of the same shape. Memory of fp32 values may be used up.

    name: of the tensor in its file. start: position of the first value in that tensor, counted in values. rounding: stochastic, or nearest (ties to
    even, as torch and peft do it); it matters where dtype has 16 bits and the values have more. out: where to write, contiguous, of `dtype`.
    Raises BadData where a value is not finite, or beyond the largest of dtype.
    """
    import torch

    if values.dtype == dtype or dtype not in (torch.bfloat16, torch.float16) or not values.is_floating_point():
        return values.to(dtype) if out is None else out.copy_(values)
    values = values.detach().float()
    check_range(values, dtype, name)
    if rounding == "nearest":
        return values.to(dtype) if out is None else out.copy_(values)
    given = values.cpu().contiguous()
    rounded = torch.empty(given.shape, dtype=dtype) if out is None or out.is_cuda else out
    into = rounded.view(torch.int16).numpy().view(np.uint16).reshape(-1)
    work = _bfloat16 if dtype == torch.bfloat16 else _float16
    flat, key = given.numpy().reshape(-1), key_of(name)
    for at in range(0, flat.size, CHUNK):
        part = flat[at : at + CHUNK]
        work(part, draws(key, start + at, part.size), into[at : at + CHUNK])
    return rounded.to(values.device) if out is None else out if rounded is out else out.copy_(rounded)


def check_range(values, dtype, name: str) -> None:
    """Raises BadData where a value of a float tensor is not finite, or beyond the largest of dtype."""
    import torch

    if not values.numel():
        return
    low, high = (end.item() for end in torch.aminmax(values))
    largest = torch.finfo(dtype).max
    if not (-largest <= low and high <= largest):  # not a number compares with nothing
        kind = str(dtype).removeprefix("torch.")
        raise BadData(
            f"'{name}' has values from {low:.3g} to {high:.3g}, and {kind} ends at {largest:.3g}",
            fix="dtype=float32 has the range of the base" if math.isfinite(low) and math.isfinite(high) else AGAIN,
        )


def key_of(name: str) -> int:
    """64 bits that stand for a tensor's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def draws(key: int, start: int, count: int) -> np.ndarray:
    """uint16 (count,), uniform: the draws of positions start, start + 1, ... The array is this thread's own, and used again by the next call.

    Four values share the 64 bits at counter position // 4, the lowest 16 first.
    """
    first, last = start // 4, (start + count + 3) // 4
    size = last - first
    if getattr(_own, "size", 0) < size:
        _own.size, _own.steps = size, np.arange(1, size + 1, dtype=np.uint64) * STEP
        _own.bits, _own.shifted = np.empty(size, np.uint64), np.empty(size, np.uint64)
    bits, shifted = _own.bits[:size], _own.shifted[:size]
    np.add(_own.steps[:size], np.uint64((key + first * int(STEP)) % (1 << 64)), out=bits)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        np.right_shift(bits, np.uint64(shift), out=shifted)
        np.bitwise_xor(bits, shifted, out=bits)
        np.multiply(bits, np.uint64(factor), out=bits)
    np.right_shift(bits, np.uint64(31), out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    return bits.view(np.uint16)[start - 4 * first :][:count]


def _bfloat16(values: np.ndarray, random: np.ndarray, out: np.ndarray) -> None:
    """bf16 is the upper half of fp32's bits: adding 16 random ones carries into it as often as the lower half says."""
    if getattr(_own, "sums", None) is None:
        _own.sums = np.empty(CHUNK, np.uint32)
    sums = _own.sums[: values.size]
    np.copyto(sums, random)
    np.add(sums, values.view(np.uint32), out=sums)
    np.right_shift(sums, np.uint32(16), out=sums)
    np.copyto(out, sums, casting="unsafe")


def _float16(values: np.ndarray, random: np.ndarray, out: np.ndarray) -> None:
    """fp16 keeps 10 of fp32's 23 bits; below 2^-14 its values are the multiples of 2^-24. `values` is used up."""
    small = np.abs(values) < 2.0**-14
    multiples = np.floor(values[small].astype(np.float64) * 2.0**24 + random[small] / 65536.0) * 2.0**-24
    bits = values.view(np.uint32)
    np.add(bits, random >> 3, out=bits)
    np.bitwise_and(bits, np.uint32(0xFFFFE000), out=bits)
    values[small] = multiples
    out[:] = values.astype(np.float16).view(np.uint16)


def cast_folder(path: Path, dtype: str, how: str) -> None:
    """Rewrite a saved model's shards in `dtype`, one shard in memory at a time, where they differ from it; its config says so too.

    how: see `narrow`.
    """
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    wanted = getattr(torch, dtype)
    for file in sorted(path.glob("model*.safetensors")):
        with safe_open(file, "pt") as weights:
            tensors = {name: weights.get_tensor(name) for name in weights.keys()}
        if any(t.is_floating_point() and t.dtype != wanted for t in tensors.values()):
            tensors = {name: narrow(t, wanted, name, rounding=how) if t.is_floating_point() else t for name, t in tensors.items()}
            save_file(tensors, file, metadata={"format": "pt"})
        file.chmod(0o644)  # DeepSpeed leaves 0600
    config = read_json(path / "config.json")
    config["dtype"] = dtype
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
