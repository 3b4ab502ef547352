"""What a GGUF says of a model beside its weights, and how its tensors differ from transformers', by family.

Sources: llama.cpp's src/models and its convert_hf_to_gguf (2026-10), transformers' modelling code; each is held to llama.cpp's own logits in
tests/test_gguf.py.
"""

import math
from typing import Any

from src.sizing.takes import GGUF

INTERLEAVED = {"llama", "mistral", "smollm3"}
"""model types whose rotary pairs lie side by side in llama.cpp, where transformers has the two halves of a head apart"""
PLUS_ONE = {"gemma", "gemma2", "gemma3_text"}
"""model types whose norms multiply by 1 + weight; llama.cpp multiplies by what is stored"""
WINDOW_LEFT_OUT = {"mistral", "qwen2", "qwen3", "phi3"}
"""model types whose sliding windows llama.cpp leaves out: it attends to all"""
FREQUENCIES, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
"""names of tensors that no checkpoint holds"""


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rope_of(config: Any, layers: str = "full_attention") -> dict[str, Any]:
    """transformers' rope_parameters, of these layers where kinds of them differ."""
    rope = config.rope_parameters
    return rope.get(layers) or ({} if "sliding_attention" in rope or "full_attention" in rope else rope)


def rotary(config: Any) -> int:
    """Values of a head that are turned."""
    share = rope_of(config).get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0
    return int(head_dim(config) * share)


def describe(writer: Any, config: Any, vocabulary: int) -> None:
    """Put the model's sizes and constants into a gguf.GGUFWriter. vocabulary: rows of the embedding table."""
    import gguf

    kind, head, rope = config.model_type, head_dim(config), rope_of(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_vocab_size(vocabulary)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(rotary(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(_original(config))
    if kind == "phi3":
        writer.add_sliding_window(
            config.sliding_window or 0
        )  # 0 too is told: without it llama.cpp takes it for a Phi-3 of 2024-04, whose window it guesses
        writer.add_rope_scaling_orig_ctx_len(_original(config))
        if rope["rope_type"] == "longrope":
            original, longest = _original(config), config.max_position_embeddings
            larger = longest / original
            told = rope.get("attention_factor")
            writer.add_rope_scaling_attn_factors(told or (math.sqrt(1 + math.log(larger) / math.log(original)) if larger > 1 else 1.0))
    if kind in ("gemma2", "gemma3_text", "exaone4") and config.sliding_window:
        writer.add_sliding_window(config.sliding_window)
    if kind == "gemma3_text":
        writer.add_rope_freq_base_swa(rope_of(config, "sliding_attention")["rope_theta"])
    if kind == "exaone4" and config.sliding_window:
        writer.add_sliding_window_pattern([each == "sliding_attention" for each in config.layer_types])
    if attention := getattr(config, "attn_logit_softcapping", None):
        writer.add_attn_logit_softcapping(attention)
    if final := getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(final)


def made_tensors(config: Any) -> dict[str, list[float]]:
    """{name: values} of the tensors that hold a rope scaling: what each frequency is divided by."""
    rope = rope_of(config)
    if rope["rope_type"] == "longrope":
        return {LONG: rope["long_factor"], SHORT: rope["short_factor"]}
    if rope["rope_type"] != "llama3":
        return {}
    low, high, original = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    factors = []
    for i in range(0, rotary(config), 2):
        length = 2 * math.pi * rope["rope_theta"] ** (i / rotary(config))
        smooth = (original / length - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        factors.append(1.0 if length < original / high else float(rope["factor"]) if length > original / low else between)
    return {FREQUENCIES: factors}


def _original(config: Any) -> int:
    """Positions before a scaling of the rotary embedding, which some configurations tell beside it."""
    return int(
        rope_of(config).get("original_max_position_embeddings")
        or getattr(config, "original_max_position_embeddings", None)
        or config.max_position_embeddings
    )


def architecture(model_type: str) -> Any:
    """gguf's MODEL_ARCH of a transformers model_type."""
    import gguf

    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == GGUF[model_type])
