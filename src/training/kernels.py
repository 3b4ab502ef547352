"""What a model computes on a CPU beside its large products, in fewer passes over memory: adapters with their base layer, norms, rotation.

A pass over fresh memory costs a CPU more in page faults than in sums, so each kernel writes where it can over what it made itself, and keeps for
the backward pass only what it cannot make again cheaply. They take the place of code they were written for, and of no other.
"""

import inspect
import sys
from functools import partial

import numpy as np
import torch
from transformers.models.llama import modeling_llama

from src.models.held import HeldLinear, product, product_t


def replace(model) -> None:
    """Have a model compute with these kernels."""
    for module in model.modules():
        if is_plain_lora(module):
            module.forward = partial(lora_linear, module)
        elif _same_code(getattr(type(module), "forward", None), NORM):
            module.forward = partial(rms_norm, module)
    for name in {type(module).__module__ for module in model.modules()}:
        if _same_code(getattr(sys.modules[name], "apply_rotary_pos_emb", None), ROTATION):
            sys.modules[name].apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


NORM, ROTATION = modeling_llama.LlamaRMSNorm.forward, modeling_llama.apply_rotary_pos_emb


def _same_code(theirs, known) -> bool:
    """Whether a function is, character for character, the one a kernel was written for."""
    try:
        return theirs is not None and inspect.getsource(theirs) == inspect.getsource(known)
    except (TypeError, OSError):
        return False


# ---- adapters


def is_plain_lora(module) -> bool:
    """Whether a module is a linear layer with one LoRA adapter as in the paper: no variant of it, no bias of its own, no quantized base."""
    from peft.tuners.lora import Linear

    return (
        type(module) is Linear
        and type(module.base_layer) in (torch.nn.Linear, HeldLinear)
        and not module.lora_variant
        and list(module.lora_A) == module.active_adapters == ["default"]
        and not module.lora_bias["default"]
        and getattr(module.lora_dropout["default"], "p", 0) <= 255 / 256  # what a byte can say
    )


def lora_linear(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """peft's forward of such a layer: x W^T + bias + scale dropout(x) A^T B^T, of x (..., in)."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or torch.is_autocast_enabled("cpu"))
    if not (plain and x.dtype == a.dtype == torch.float32):
        return type(layer).forward(layer, x, *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout["default"]
    p = dropout.p if layer.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    out = _LoraLinear.apply(x.reshape(-1, x.shape[-1]), base.weight, base.bias, a, b, layer.scaling["default"], p)
    return out.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, a, b, scale, p):
        kept = keep_mask(x.shape, p) if p else None
        ctx.scale = scale / (1 - p)
        inner = (x if kept is None else x * kept) @ a.T
        out = product_t(x, weight)
        if bias is not None:
            out += bias
        ctx.save_for_backward(x, kept, inner, weight, a, b)
        return out.addmm_(inner, b.T, alpha=ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        x, kept, inner, weight, a, b = ctx.saved_tensors
        into_inner = (gradient @ b).mul_(ctx.scale)
        into_a = into_inner.T @ (x if kept is None else x * kept)
        into_b = (gradient.T @ inner).mul_(ctx.scale)
        into_x = None
        if ctx.needs_input_grad[0]:
            into_x = into_inner @ a
            into_x = product(gradient, weight, onto=into_x if kept is None else into_x.mul_(kept))
        into_bias = gradient.sum(0) if ctx.needs_input_grad[2] else None
        return into_x, None, into_bias, into_a, into_b, None, None


def keep_mask(shape, p: float) -> torch.Tensor:
    """uint8 of a shape, 1 with probability 1 - p, by torch's generator.

    torch's own Bernoulli draws take a CPU longer than a narrow product. Here a byte is compared with a threshold that is itself drawn between the two
    whole ones next to 256 p, so the probability is p to the last bit.
    """
    threshold = int(256 * p) + int(torch.rand(()) < 256 * p % 1)
    draw, count = np.random.SFC64(int(torch.randint(1 << 62, ()))), int(np.prod(shape))
    octets = draw.random_raw(-(-count // 8)).view(np.uint8)[:count].reshape(shape)
    return torch.from_numpy(octets).ge_(threshold)


# ---- norms


def rms_norm(layer, x: torch.Tensor) -> torch.Tensor:
    """Llama's RMSNorm of x (..., width)."""
    if x.dtype != torch.float32 or layer.weight.dtype != x.dtype:
        return type(layer).forward(layer, x)
    return _RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon):
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        return (x * root).mul_(weight)

    @staticmethod
    def backward(ctx, gradient):
        x, weight, root = ctx.saved_tensors
        into_x = gradient * weight
        along = torch.linalg.vecdot(into_x, x).unsqueeze(-1).mul_(root.pow(3)).div_(-x.shape[-1])
        into_x.mul_(root).addcmul_(x, along)
        into_weight = (gradient * x).mul_(root).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return into_x, into_weight, None


# ---- rotation


def rotate(q, k, cos, sin, unsqueeze_dim=1):
    """Llama's rotary embedding of queries and keys (..., head dimension)."""
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return _Rotate.apply(q, cos, sin), _Rotate.apply(k, cos, sin)


class _Rotate(torch.autograd.Function):
    """x cos + (-x2, x1) sin, of x = (x1, x2); its gradient turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, sin.roll(sin.shape[-1] // 2, -1), -1.0), None, None


def _turned(x, cos, sin, sign: float):
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out
