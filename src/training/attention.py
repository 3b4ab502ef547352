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
    outs, lengths = [], cu_seq_lens_q.diff().tolist()
    for q, k, v in zip(*(x.split(lengths, dim=2) for x in (query, key, value))):
        window = _window(q.shape[2], sliding_window, q.device)
        outs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=window, is_causal=window is None, dropout_p=dropout, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None


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
