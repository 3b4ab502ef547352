"""Attention over rows laid end to end, each for itself: registered with transformers under the name `rows`.

A packed micro-batch carries the bounds of its rows (cu_seq_lens). With them nothing can look into another row, since the rows are never in one
matrix product, and the cost is the sum of the rows' own. A call without bounds, as in generation, is transformers' own sdpa.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rows"


def attention(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    sliding_window=None,
    cu_seq_lens_q=None,
    max_length_q=None,
    **other,
):
    """(output (1, tokens, heads, head dimension), None) of query, key, value (1, heads, tokens, head dimension), causal within each row."""
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **other)
    if fused(query):
        return _fused(query, key, value, cu_seq_lens_q, max_length_q, scaling, sliding_window), None
    lengths = cu_seq_lens_q.diff().tolist()
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1] and not torch.is_autocast_enabled("cpu")
    if not (query.is_cpu and alike) or dropout:
        return _by_rows(query, key, value, lengths, dropout, scaling, sliding_window), None
    return _Rows.apply(query, key, value, lengths, scaling, sliding_window), None


def _by_rows(query, key, value, lengths, dropout, scaling, sliding_window):
    outs = []
    for q, k, v in _rows(lengths, query, key, value):
        window = _window(q.shape[2], sliding_window, q.device)
        outs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=window, is_causal=window is None, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous()


class _Rows(torch.autograd.Function):
    """The same by the kernels that torch takes on a CPU. What each row gives is kept in the one tensor that is given on: torch would keep it a second time."""

    @staticmethod
    def forward(ctx, query, key, value, lengths, scaling, sliding_window):
        _, heads, tokens, width = query.shape
        out = query.new_empty(1, tokens, heads, width)
        ctx.how = lengths, scaling, sliding_window
        sums = []
        for part, q, k, v in _rows(lengths, out.transpose(1, 2), query, key, value):
            mask = _bias(q, sliding_window)
            given, log_sum = _ATEN(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scaling)
            part.copy_(given)
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        return out

    @staticmethod
    def backward(ctx, gradient):
        lengths, scaling, sliding_window = ctx.how
        query, key, value, out, *sums = ctx.saved_tensors
        into = [torch.empty_like(x) for x in (query, key, value)]
        rows = _rows(lengths, *into, gradient.transpose(1, 2), query, key, value, out.transpose(1, 2))
        for log_sum, (*parts, g, q, k, v, o) in zip(sums, rows):
            mask = _bias(q, sliding_window)
            for part, found in zip(parts, _ATEN_BACKWARD(g, q, k, v, o, log_sum, 0.0, mask is None, attn_mask=mask, scale=scaling)):
                part.copy_(found)
        return *into, None, None, None


_ATEN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATEN_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _rows(lengths: list[int], *tensors: torch.Tensor):
    """Each row's part of tensors (1, heads, tokens, width)."""
    return zip(*(x.split(lengths, dim=2) for x in tensors))


def _bias(query: torch.Tensor, sliding_window: int | None) -> torch.Tensor | None:
    """What a row's scores have added: a window's mask, in numbers; None where the kernel knows it by itself."""
    window = _window(query.shape[2], sliding_window, query.device)
    return None if window is None else torch.zeros_like(window, dtype=query.dtype).masked_fill_(~window, -torch.inf)


def _window(length: int, sliding_window: int | None, device) -> torch.Tensor | None:
    """Mask (length, length) of a causal window, true where a token sees another; None where the window is wider than the row."""
    if sliding_window is None or length <= sliding_window:
        return None
    at = torch.arange(length, device=device)
    apart = at[:, None] - at
    return (apart >= 0) & (apart < sliding_window)


def fused(query) -> bool:
    """Whether torch's variable-length FlashAttention takes it: 16-bit numbers on a GPU of compute capability 8.0 or newer."""
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability(query.device) >= (8, 0)


def _fused(query, key, value, bounds, longest, scaling, sliding_window):
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    out = varlen_attn(q, k, v, bounds, bounds, longest, longest, scale=scaling, window_size=window, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(out, torch.Tensor), "without return_aux it gives nothing else"
    return out[None]


def mask(batch_size, q_length, kv_length, attention_mask=None, local_size=None, **other):
    """None where there is nothing to hide but what comes after, which `attention` knows by itself; else sdpa's mask."""
    if attention_mask is None and q_length == kv_length and (local_size is None or kv_length <= local_size):
        return None
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, attention_mask=attention_mask, local_size=local_size, **other
    )


def register() -> None:
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, mask)
