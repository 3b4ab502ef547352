"""What each family of models calls its sizes in config.json, and how its layers differ from Llama's.

Llama's layer is the rule (Touvron et al. 2023, arXiv:2302.13971): q, k, v, o, gate, up, down, two RMS norms. `FAMILIES` says where a family
differs, by its modelling code in transformers or, for those that bring their code along, in their hub repository.
"""

from src.sizing.decoder import Family, gemma4_layer, gemma4_outside, hybrid_layer, latent_layer

# ---- families

QWEN2 = Family(qkv_bias=True, out_bias=False, mlp_bias=False, full_below="max_window_layers")
QWEN3 = Family(mlp_bias=False, qk_norm=True, full_below="max_window_layers")

FAMILIES = {
    "llama": Family(),
    "mistral": Family(qkv_bias=False, out_bias=False, mlp_bias=False, full_every=0),
    "qwen": Family(
        qkv_bias=True,
        out_bias=False,
        mlp_bias=False,
        fused=("qkv",),
        mlp_share=0.5,
        note="Qwen-1's intermediate_size is twice the width of its MLP, and is halved here",
    ),
    "qwen2": QWEN2,
    "qwen2_vl": QWEN2,
    "qwen2_vl_text": QWEN2,
    "qwen2_5_vl": QWEN2,
    "qwen2_5_vl_text": QWEN2,
    "qwen3": QWEN3,
    "qwen3_vl_text": Family(mlp_bias=False, qk_norm=True),
    "phi": Family(qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, norms=1, norm_bias=True, mlp=2),
    "phi3": Family(qkv_bias=False, out_bias=False, mlp_bias=False, fused=("qkv", "gate_up"), full_every=0),
    "gemma": Family(defaults={"head_dim": 256}, mlp_bias=False, tied=True),
    "gemma2": Family(defaults={"head_dim": 256, "sliding_window": 4096}, mlp_bias=False, norms=4, tied=True, full_every=2),
    "gemma3_text": Family(
        defaults={
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        mlp_bias=False,
        norms=4,
        qk_norm=True,
        tied=True,
        full_every=6,
    ),
    "gemma4_text": Family(
        defaults={"head_dim": 256, "sliding_window": 512},
        tied=True,
        qk_norm=True,
        full_every=6,
        layer=gemma4_layer,
        outside=gemma4_outside,
    ),
    "qwen3_5_text": Family(
        defaults={"head_dim": 256},
        qk_norm=True,
        layer=hybrid_layer,
        note="linear-attention layers keep a state of fixed size instead of a KV cache; the multi-token prediction head is not counted",
    ),
    "minicpm": Family(qkv_bias=False, out_bias=False, mlp_bias=False, tied=True),
    "minicpm3": Family(
        tied=True,
        layer=latent_layer,
        note="latent attention: keys and values are counted expanded, as transformers caches them; a runtime that caches the latent needs less",
    ),
    "baichuan": Family(fused=("qkv",), qkv_bias=False, out_bias=False, mlp_bias=False),
    "internlm2": Family(fused=("qkv",), qkv_bias="bias", out_bias="bias", mlp_bias=False),
    "smollm3": Family(tied=True),
    "granite": Family(),
    "glm": Family(defaults={"head_dim": 128, "attention_bias": True}, out_bias=False, mlp_bias=False, fused=("gate_up",)),
    "glm4": Family(defaults={"head_dim": 128, "attention_bias": True}, out_bias=False, mlp_bias=False, fused=("gate_up",), norms=4),
    "chatglm": Family(
        names={
            "layers": "num_layers",
            "intermediate": "ffn_hidden_size",
            "kv_heads": "multi_query_group_num",
            "head_dim": "kv_channels",
            "vocab": "padded_vocab_size",
            "max_positions": "seq_length",
        },
        qkv_bias="add_qkv_bias",
        out_bias="add_bias_linear",
        mlp_bias="add_bias_linear",
        fused=("qkv", "gate_up"),
    ),
    "exaone": Family(names={"layers": "num_layers"}, qkv_bias=False, out_bias=False, mlp_bias=False),
    "exaone4": Family(qkv_bias=False, out_bias=False, mlp_bias=False, qk_norm=True, full_every=4),
    "cohere2": Family(defaults={"sliding_window": 4096}, mlp_bias=False, norms=1, tied=True, full_every=4),
    "hunyuan_v1_dense": Family(mlp_bias=False, qk_norm=True),
    "starcoder2": Family(
        defaults={"use_bias": True},
        qkv_bias="use_bias",
        out_bias="use_bias",
        mlp_bias="use_bias",
        norm_bias=True,
        tied=True,
        mlp=2,
        full_every=0,
    ),
}
