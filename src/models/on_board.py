"""A model taken layer by layer with the numbers a board computes in: weights are rounded as each layer is read, and what passes between operations is
rounded by hooks, so that memory stays that of a layer. See sizing/numerics.py for the formats."""

import contextlib
import inspect
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from src.models.by_layer import ByLayer, Pass, Place
from src.sizing.numerics import Floats, Integers, Numerics, Values

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
BLOCK = 1 << 20
"""values of a matrix that are rounded at a time"""
SCALES = [1 - 0.05 * i for i in range(1, 9)]
"""shares of a group's largest value that a search tries beside the whole of it"""
FEW = 256
"""tokens that layers are compared on"""
LINEAR = (nn.Linear, Conv1D)
CACHE = "past_key_values"
"""what transformers' layers call the cache that they are given"""


def rounded(x: torch.Tensor, values: Values) -> torch.Tensor:
    """fp32 values (..., n) as they are after being stored as `values`; groups are of the last dimension. May be `x` itself."""
    return _floats(x, values) if isinstance(values, Floats) else _integers(x, values)


def _floats(x: torch.Tensor, values: Floats) -> torch.Tensor:
    if values.dtype == "fp32":
        return x
    if values.cut:  # the upper half of fp32's bits
        return (x.contiguous().view(torch.int32) & -0x10000).view(torch.float32)
    dtype = DTYPES[values.dtype]
    if not values.scaled:
        return x.to(dtype).float()
    scale = _nonzero(x.abs().amax(-1, keepdim=True) / torch.finfo(dtype).max)
    return (x / scale).to(dtype).float() * scale


def _integers(x: torch.Tensor, values: Integers) -> torch.Tensor:
    levels, scale = integers(x, values)
    return levels.mul_(scale).reshape(x.shape)


def integers(x: torch.Tensor, values: Integers) -> tuple[torch.Tensor, torch.Tensor]:
    """(whole numbers in fp32, scales as they are stored), (..., groups, group) and (..., groups, 1), or with a scale for each row (..., n) and (..., 1)."""
    groups = x if values.group == -1 else x.reshape(*x.shape[:-1], -1, values.group)
    half = 1 << (values.bits - 1)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if values.levels == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = _nonzero((high - low) / (2 * half - 1))
        zero = torch.round(-low / scale).clamp_(0, 2 * half - 1)
        return (torch.round(groups / scale) + zero).clamp_(0, 2 * half - 1) - zero, _stored(scale, values)
    largest = torch.where(-low >= high, -low, -high) if values.levels == "signed" else torch.maximum(-low, high)
    levels, scale = _levels(groups, largest, values)
    if values.search:
        error = (levels * scale - groups).square_().sum(-1, keepdim=True)
        for share in SCALES:
            others, smaller = _levels(groups, share * largest, values)
            less = (others * smaller - groups).square_().sum(-1, keepdim=True)
            better = less < error
            levels, scale, error = (
                torch.where(better, others, levels),
                torch.where(better, smaller, scale),
                torch.where(better, less, error),
            )
    return levels, scale


def _levels(groups: torch.Tensor, largest: torch.Tensor, values: Integers) -> tuple[torch.Tensor, torch.Tensor]:
    """`integers` by a scale that has `largest` at the largest level."""
    top = (1 << (values.bits - 1)) - 1
    if values.levels == "signed":
        scale = _nonzero(largest / (top + 1))
        return torch.round(groups / scale).clamp_(-top - 1, top), _stored(scale, values)
    scale = largest / top
    return torch.round(groups / scale.clamp_min(torch.finfo(scale.dtype).tiny)).clamp_(-top, top), _stored(scale, values)


def _nonzero(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale.abs() < torch.finfo(scale.dtype).eps, torch.finfo(scale.dtype).eps, scale)


def _stored(scale: torch.Tensor, values: Integers) -> torch.Tensor:
    return scale.half().float() if values.scale == "fp16" else scale


def round_weight(weight: torch.Tensor, values: Values, *, turned: bool = False) -> torch.Tensor:
    """A matrix, (..., out, in) or (in, out) where turned, rounded in place, a block of its rows at a time."""
    rows = weight.T if turned else weight.flatten(0, -2)
    step = max(1, BLOCK // rows.shape[1])
    for begin in range(0, len(rows), step):
        rows[begin : begin + step] = rounded(rows[begin : begin + step], values)
    return weight


# ---- a model


@contextlib.contextmanager
def computing(model: ByLayer, how: Numerics) -> Iterator["Keeps"]:
    """The model computes with these numbers within the block, which is given what becomes of keys and values."""
    keeps, hooks = Keeps(how.kv), []

    def weight(what: int | str, place: Place, tensor: torch.Tensor) -> torch.Tensor:
        values = how.of_weight(place.full) if isinstance(what, int) else how.embedding if what == "embedding" else how.head
        if tensor.ndim < 2:
            return rounded(tensor, how.hidden)
        return round_weight(tensor, values, turned=isinstance(place.module, Conv1D)) if values else tensor

    def take_in(module, given):
        if given and isinstance(given[0], torch.Tensor) and given[0].dtype == torch.float32:
            # In place: what a norm is given is what the residual stream goes on with.
            x = given[0].copy_(rounded(given[0], how.hidden)) if how.hidden.dtype != "fp32" else given[0]
            return (rounded(x, how.inputs), *given[1:]) if isinstance(module, LINEAR) else None
        return None

    def give_out(module, given, out):
        values = how.logits if module is last else how.hidden
        return rounded(out, values) if isinstance(out, torch.Tensor) and out.dtype == torch.float32 else None

    def keep(module, args, kwargs):
        at = list(inspect.signature(type(module).forward).parameters).index(CACHE) - 1
        there = args[at] if len(args) > at else kwargs.get(CACHE)
        keeps.cache = there.cache if isinstance(there, Keeps) else there  # one that a pass has noted
        return ((*args[:at], keeps, *args[at + 1 :]), kwargs) if len(args) > at else (args, {**kwargs, CACHE: keeps})

    last = model.model.get_output_embeddings()
    for name, module in model.model.named_modules():
        if not any(module.children()) and "rotary" not in name:
            hooks += [module.register_forward_pre_hook(take_in), module.register_forward_hook(give_out)]
    for layer in model.layers:
        takes = CACHE in inspect.signature(type(layer).forward).parameters
        if takes and getattr(layer, "layer_type", "") != "linear_attention":  # which keeps a state of another kind
            hooks += [layer.register_forward_pre_hook(keep, with_kwargs=True)]
    model.changed = weight
    try:
        yield keeps
    finally:
        model.changed = None
        for hook in hooks:
            hook.remove()


class Keeps:
    """Stands where a KV cache does, before the one that there is, if any: what is kept of a pass's keys and values, (..., head dimension), is what its attention
    sees. used: whether any were."""

    def __init__(self, values: Values):
        self.values, self.used, self.cache = values, False, None

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        self.used = True
        keys, values = rounded(keys, self.values), rounded(values, self.values)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["cache"], name)


def layers(model: ByLayer, how: Numerics, rows: list[list[int]]) -> list[dict[str, float]]:
    """For each layer how far its output is from that of the same layer unchanged, mean over the tokens of rows of ids: {"cosine", "error"} where it is
    given the unchanged hidden states, and {"cosine_so_far", "error_so_far"} where it is given what the layers before made. error: |difference| / |output|.

    Rows beyond FEW tokens are left out, but for the first; none is padded.
    """
    kept: list[list[int]] = []
    tokens = 0
    for row in rows:
        if not kept or tokens + len(row) <= FEW:
            kept, tokens = [*kept, row], tokens + len(row)
    with model.held("embedding"):
        plain = [model.start([row]) for row in kept]
    with computing(model, how), model.held("embedding"):
        board = [model.start([row]) for row in kept]
    found = []
    for number in range(len(model.layers)):
        before = [each.hidden.clone() for each in plain]
        with model.held(number):
            model.through(number, plain)
        with computing(model, how), model.held(number):
            alone = [Pass(each.ids, each.mask, hidden, each.calls) for each, hidden in zip(plain, before)]
            model.through(number, alone)
            model.through(number, board)
        one, so_far = _apart(plain, alone), _apart(plain, board)
        found.append({"cosine": one[0], "error": one[1], "cosine_so_far": so_far[0], "error_so_far": so_far[1]})
    return found


def _apart(plain: list[Pass], other: list[Pass]) -> tuple[float, float]:
    """(cosine, relative error) of hidden states, mean over tokens."""
    x, y = (torch.cat([each.hidden.flatten(0, 1) for each in passes]) for passes in (plain, other))
    return float(F.cosine_similarity(x, y).mean()), float(((y - x).norm(dim=1) / x.norm(dim=1)).mean())
