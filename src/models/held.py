"""Frozen 16-bit weights that stay 16-bit in memory and are computed with in fp32. For CPUs, on which fp32 is the dtype of the sums.

Widening bf16 or fp16 to fp32 is exact, so the products are those of an fp32 copy of the model in half its memory. A matrix is widened by blocks of
rows into one buffer that stays in the cache and is used again, so it costs 1 to 3 % of the product over 512 tokens; fresh memory for every matrix
would cost more in page faults than the sums. The output layer, tied or not, is a matrix like the others: a block of it is widened for each
chunk of tokens, where an fp32 copy would be a quarter more memory at 0.5B.
"""

import threading
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from src.models import safetensors_io

BLOCK, ROWS = 1 << 20, 512
"""weights that are widened at a time, and the fewest rows of them: narrower products are slower"""

_local = threading.local()


def hold(model: nn.Module) -> None:
    """Have a model with 16-bit weights compute in fp32 from them, and freeze those it holds.

    Held are the matrices of plain linear layers, GPT-2's among them, and of embeddings. Every other 16-bit tensor (norms, biases, experts that are
    one tensor, layers of classes of their own) becomes fp32. Quantized layers and fp32 weights stay as they are.
    """
    elsewhere = {id(p) for module in model.modules() if type(module) not in KINDS for p in module.parameters(recurse=False)}
    held: set[int] = set()
    for module in model.modules():
        if kind := KINDS.get(type(module)):
            weight = module.get_parameter("weight")
            if _is_narrow(weight) and id(weight) not in elsewhere:
                module.__class__ = kind
                held.add(id(weight.requires_grad_(False)))
    for module in model.modules():
        if not hasattr(module, "quant_state"):  # bitsandbytes' layers compute in a dtype of their own
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if _is_narrow(tensor) and id(tensor) not in held:
                    tensor.data = tensor.data.float()


def hold_one(module: nn.Module) -> None:
    """Have a module compute in fp32 from a weight of whatever dtype it will have, if it is of a kind that can."""
    module.__class__ = KINDS.get(type(module), type(module))


def dtype_of(folder: Path) -> str:
    """The dtype to load a folder's weights in so that none is changed: the 16-bit one that all are stored in, else float32."""
    stored = {entry.dtype for entry in safetensors_io.entries(folder).values()}
    return {"BF16": "bfloat16", "F16": "float16"}.get(stored.pop(), "float32") if len(stored) == 1 else "float32"


def is_held(module: nn.Module) -> bool:
    return isinstance(module, tuple(KINDS.values()))


class HeldLinear(nn.Linear):
    """A linear layer whose frozen weight is narrower than what it computes with."""

    compute_dtype = torch.float32
    """by which peft makes what is trained beside it"""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class HeldConv1D(Conv1D):
    """GPT-2's linear layer, whose weight is (in, out)."""

    compute_dtype = torch.float32

    def forward(self, x):
        return linear(x, self.weight, self.bias, turned=True)


class HeldEmbedding(nn.Embedding):
    """An embedding that is looked up narrow and gives fp32."""

    compute_dtype = torch.float32

    def forward(self, ids):
        return super().forward(ids).float()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, turned: bool = False) -> torch.Tensor:
    """x W^T + bias of x (..., in) and W (out, in), or (in, out) where turned.

    In W's own dtype where x has it or autocast asks for 16 bits, else in x's; then W gets a gradient only if it is trained.
    """
    if weight.requires_grad or x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type):
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
        return F.linear(x, weight.T if turned else weight, bias)
    out = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias, turned)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], -1)  # what is written into a view costs two copies of its gradient


class _Linear(torch.autograd.Function):
    """Keeps the narrow weight alone for the backward pass, and widens it again there."""

    @staticmethod
    def forward(ctx, x, weight, bias, turned):
        ctx.save_for_backward(weight)
        ctx.turned = turned
        out = product(x, weight) if turned else product_t(x, weight)
        return out if bias is None else out.add_(bias)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        into_x = product_t(gradient, weight) if ctx.turned else product(gradient, weight)
        return into_x, None, gradient.sum(0) if ctx.needs_input_grad[2] else None, None


def product_t(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x W^T, fp32 (tokens, out), of x, fp32 (tokens, in), and W (out, in)."""
    if weight.dtype == x.dtype:
        return x @ weight.T
    out = x.new_empty(len(x), len(weight))
    for begin, block in _widened(weight, x.dtype):
        torch.mm(x, block.T, out=out[:, begin : begin + len(block)])
    return out


def product(x: torch.Tensor, weight: torch.Tensor, *, onto: torch.Tensor | None = None) -> torch.Tensor:
    """x W, fp32 (tokens, in), of x, fp32 (tokens, out), and W (out, in); added onto `onto` where that is given."""
    if weight.dtype == x.dtype:
        return x @ weight if onto is None else onto.addmm_(x, weight)
    out = x.new_empty(len(x), weight.shape[1]) if onto is None else onto
    for begin, block in _widened(weight, x.dtype):
        out.addmm_(x[:, begin : begin + len(block)], block, beta=1 if begin or onto is not None else 0)
    return out


def _widened(weight: torch.Tensor, dtype: torch.dtype):
    """(first row, rows in `dtype`) of a matrix, in blocks of about one size, each valid until the next is asked for."""
    rows, width = weight.shape
    count = -(-rows // max(ROWS, BLOCK // width))
    size = -(-rows // count)
    buffer = getattr(_local, "buffer", None)
    if buffer is None or buffer.numel() < size * width or (buffer.dtype, buffer.device) != (dtype, weight.device):
        buffer = _local.buffer = torch.empty(size * width, dtype=dtype, device=weight.device)
    for begin in range(0, rows, size):
        block = weight[begin : begin + size]
        yield begin, buffer[: block.numel()].view(block.shape).copy_(block)


KINDS: dict[type, type] = {nn.Linear: HeldLinear, Conv1D: HeldConv1D, nn.Embedding: HeldEmbedding}
"""what a module becomes when it is held; a class of its own may do more than the one it is made from"""


def _is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)
