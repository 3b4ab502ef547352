"""What a model computes on a CPU beside its large products, in fewer passes over memory: adapters with their base layer, gated MLPs,
norms, rotation.

A pass over fresh memory costs a CPU more in page faults than in sums, so each kernel writes where it can over what it made itself or into memory that
it uses again, and keeps for the backward pass only what it cannot make again cheaply. They take the place of code they were written for, and of no other.
"""

import inspect
import sys
import threading
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation
from transformers.models.llama import modeling_llama

from src.models.held import HeldLinear, product, product_t


def replace(model) -> None:
    """Have a model compute with these kernels."""
    for module in model.modules():
        theirs = getattr(type(module), "forward", None)
        if is_plain_lora(module):
            module.forward = partial(lora_linear, module)
        elif _same_code(theirs, NORM):
            module.forward = partial(rms_norm, module)
        elif _same_code(theirs, MLP) and isinstance(module.act_fn, (torch.nn.SiLU, SiLUActivation)):
            module.forward = partial(swiglu_mlp, module)
    for name in {type(module).__module__ for module in model.modules()}:
        if _same_code(getattr(sys.modules[name], "apply_rotary_pos_emb", None), ROTATION):
            sys.modules[name].apply_rotary_pos_emb = rotate  # type: ignore[attr-defined]


NORM, MLP, ROTATION = modeling_llama.LlamaRMSNorm.forward, modeling_llama.LlamaMLP.forward, modeling_llama.apply_rotary_pos_emb


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


def lora_linear(layer, x: torch.Tensor, *args, gate: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    """peft's forward of such a layer: x W^T + bias + scale dropout(x) A^T B^T, of x (..., in), or of silu(gate) x where gate (..., in) is given."""
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    plain = not (args or kwargs or layer.disable_adapters or layer.merged or torch.is_autocast_enabled("cpu"))
    if not (plain and x.dtype == a.dtype == torch.float32):
        return type(layer).forward(layer, x if gate is None else _SwiGLU.apply(gate, x), *args, **kwargs)
    base, dropout = layer.base_layer, layer.lora_dropout["default"]
    p = dropout.p if layer.training and isinstance(dropout, torch.nn.Dropout) else 0.0
    rows = [None if t is None else t.reshape(-1, x.shape[-1]) for t in (x, gate)]
    out = _LoraLinear.apply(*rows, getattr(x, "made_of", None), base.weight, base.bias, a, b, layer.scaling["default"], p)
    return out.view(*x.shape[:-1], -1)


class _LoraLinear(torch.autograd.Function):
    """Keeps what its input is made of where that is kept anyway, and the seed of its dropout instead of the mask."""

    @staticmethod
    def forward(ctx, x, gate, made_of, weight, bias, a, b, scale, p):
        ctx.scale, ctx.draw = scale / (1 - p), draw_of(p) if p else None
        given = x if gate is None else swiglu(gate, x, out=scratch("product", x))
        inner = (given if ctx.draw is None else dropped(given, keep_mask(given.shape, ctx.draw))) @ a.T
        out = product_t(given, weight)
        if bias is not None:
            out += bias
        ctx.save_for_backward(gate, inner, weight, a, b, *(made_of or (x,)))
        return out.addmm_(inner, b.T, alpha=ctx.scale)

    @staticmethod
    def backward(ctx, gradient):
        gate, inner, weight, a, b, *made_of = ctx.saved_tensors
        x = made_of[0] if len(made_of) == 1 else normed(*made_of, out=scratch("normed", made_of[0])).view(-1, a.shape[1])
        given = x if gate is None else swiglu(gate, x, out=scratch("product", x))
        kept = None if ctx.draw is None else keep_mask(given.shape, ctx.draw)
        into_inner = (gradient @ b).mul_(ctx.scale)
        into_a = into_inner.T @ (given if kept is None else dropped(given, kept))
        into_b = (gradient.T @ inner).mul_(ctx.scale)
        into_x = into_gate = None
        if ctx.needs_input_grad[0]:
            into_x = into_inner @ a
            into_x = product(gradient, weight, onto=into_x if kept is None else into_x.mul_(kept))
            if gate is not None:
                into_gate, into_x = swiglu_gradients(into_x, gate, x)
        into_bias = gradient.sum(0) if ctx.needs_input_grad[4] else None
        return into_x, into_gate, None, None, into_bias, into_a, into_b, None, None


def draw_of(p: float) -> tuple[int, int]:
    """(seed, threshold) of a dropout of probability p, by torch's generator.

    torch's own Bernoulli draws take a CPU longer than a narrow product. Here a byte is compared with a threshold that is itself drawn between the two
    whole ones next to 256 p, so the probability is p to the last bit.
    """
    threshold = int(256 * p) + int(torch.rand(()) < 256 * p % 1)
    return int(torch.randint(1 << 62, ())), threshold


def keep_mask(shape, draw: tuple[int, int]) -> torch.Tensor:
    """uint8 of a shape: 0 where a draw drops, else 1."""
    (seed, threshold), count = draw, int(np.prod(shape))
    octets = np.random.SFC64(seed).random_raw(-(-count // 8)).view(np.uint8)[:count].reshape(shape)
    return torch.from_numpy(octets).ge_(threshold)


def dropped(x: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """x where a mask keeps it, else 0; valid until the next call."""
    return torch.mul(x, kept, out=scratch("dropped", x))


_local = threading.local()


def scratch(name: str, like: torch.Tensor) -> torch.Tensor:
    """Memory of a tensor's shape and dtype for what a kernel needs for a moment, valid until the name is asked for again.

    Allocated for each layer anew, it would leave holes between what the forward pass keeps.
    """
    buffer, count = getattr(_local, name, None), like.numel()
    if buffer is None or buffer.numel() < count or buffer.dtype != like.dtype:
        buffer = torch.empty(count, dtype=like.dtype)
        setattr(_local, name, buffer)
    return buffer[:count].view(like.shape)


# ---- gated MLPs


def swiglu_mlp(mlp, x: torch.Tensor) -> torch.Tensor:
    """Llama's MLP of x (..., width): down(silu(gate(x)) up(x))."""
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    return lora_linear(down, up, gate=gate) if is_plain_lora(down) else down(_SwiGLU.apply(gate, up))


def swiglu(gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    return (F.silu(gate) if out is None else torch.ops.aten.silu.out(gate, out=out)).mul_(up)


def swiglu_gradients(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(gate's gradient, up's) of that of silu(gate) up, which is written over."""
    into_up = F.silu(gate).mul_(gradient)
    return torch.ops.aten.silu_backward(gradient.mul_(up), gate), into_up


class _SwiGLU(torch.autograd.Function):
    """Keeps the two it is made of alone."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx, gradient):
        return swiglu_gradients(gradient.clone(), *ctx.saved_tensors)


# ---- norms


def rms_norm(layer, x: torch.Tensor) -> torch.Tensor:
    """Llama's RMSNorm of x (..., width)."""
    if x.dtype != torch.float32 or layer.weight.dtype != x.dtype:
        return type(layer).forward(layer, x)
    out, root = _RMSNorm.apply(x, layer.weight, layer.variance_epsilon)
    out.made_of = (x, root, layer.weight)  # for the layers it is given to, which would keep it otherwise
    return out


def normed(x: torch.Tensor, root: torch.Tensor, weight: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    return torch.mul(x, root, out=out).mul_(weight)


class _RMSNorm(torch.autograd.Function):
    """(norm of x, the inverse of x's root mean square (..., 1))"""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        root = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, root)
        ctx.mark_non_differentiable(root)
        return normed(x, root, weight), root

    @staticmethod
    def backward(ctx, gradient, _):
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
