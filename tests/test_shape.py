"""Shapes: parameter counts equal transformers' own, the KV cache is counted by heads, and what is no shape is refused."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, SHARED, each_kind

from src.core.errors import BadData, MissingInput, WrongKind
from src.sizing.config_reader import read_shape, shape_of
from src.sizing.families import FAMILIES

QWEN2_05B = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "head_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
# What a family of transformers can be set to beyond SMALL; one model is counted for each.
VARIANTS = {
    "llama": [{}, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}, {"head_dim": None}],
    "mistral": [{}],
    "qwen2": [{"head_dim": None}],
    "qwen3": [{}, {"attention_bias": True}],
    "phi": [{"head_dim": None}],
    "phi3": [{"head_dim": None}],
    "gemma": [{}],
    "gemma2": [{}],
    "gemma3_text": [{}],
    "gemma4_text": [
        {
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
        },
        {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 0},
    ],
    "qwen3_5_text": [{"linear_num_value_heads": 8, "linear_num_key_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 24}],
    "minicpm3": [{"head_dim": None, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}],
    "smollm3": [{"head_dim": None}],
    "granite": [{"head_dim": None}],
    "glm": [{}, {"attention_bias": False}],
    "glm4": [{}],
    "exaone4": [{"head_dim": None}],
    "cohere2": [{"head_dim": None}],
    "hunyuan_v1_dense": [{}],
    "starcoder2": [{"head_dim": None}],
}
CASES = [(family, more) for family, variants in VARIANTS.items() for more in variants]


def counted(config: dict) -> tuple[int, int]:
    """Parameters of the meta-device model transformers makes of a config, tied ones once, and of its first layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return model.num_parameters(), sum(p.numel() for p in model.model.layers[0].parameters())


@pytest.mark.parametrize("family, more", CASES, ids=[f"{family}-{i}" for i, (family, _) in enumerate(CASES)])
def test_parameters_equal_transformers_own(family, more):
    config = {"model_type": family, **SMALL, **more}
    config = {key: value for key, value in config.items() if value is not None}
    shape = shape_of(config, "here")
    assert (shape.params, shape.stack[0].params) == counted(config)


def test_every_family_is_counted_by_transformers_or_by_its_published_total():
    flat = {"qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text"}  # qwen2's and qwen3's own layers
    published = {"qwen", "baichuan", "internlm2", "minicpm", "chatglm", "exaone"}  # code of their own on the hub: PUBLISHED below
    assert set(FAMILIES) == set(VARIANTS) | flat | published
    assert FAMILIES["qwen2_vl"] is FAMILIES["qwen2"]


def test_counts_equal_transformers_on_published_configs(shared):
    """Every config there whose family transformers has, with its real sizes."""
    checked = 0
    for file in sorted((shared / "configs").glob("*.json")):
        config, shape = json.loads(file.read_text()), read_shape(file)
        config = next((config[key] for key in ("text_config", "llm_config") if key in config), config)
        if shape.model_type in VARIANTS:
            config = {"model_type": shape.model_type, "tie_word_embeddings": shape.tied, **config}
            assert shape.params == counted(config)[0], file.name
            checked += 1
    assert checked >= 18


# Of the same families, a model with SMALL's sizes counted by hand: (settings, weights and biases of a layer without its two norms, tables).
WHOLE = {"head_dim": None, "num_key_value_heads": None}
BY_HAND = {
    "qwen": (WHOLE, 4 * 64 * 64 + 3 * 64 + 3 * 64 * 48, 2),
    "baichuan": (WHOLE, 4 * 64 * 64 + 3 * 64 * 96, 2),
    "internlm2": ({"head_dim": None, "bias": False}, 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96, 2),
    "internlm2 with biases": ({"head_dim": None, "bias": True}, 65 * (64 + 2 * 32) + 64 * 64 + 64 + 3 * 64 * 96, 2),
    "minicpm": ({"head_dim": None}, 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96, 1),
    "exaone": ({"head_dim": None, "num_layers": 6, "num_hidden_layers": None}, 64 * (64 + 2 * 32 + 64) + 3 * 64 * 96, 2),
    "chatglm": (
        {
            **{
                "num_layers": 6,
                "ffn_hidden_size": 96,
                "multi_query_group_num": 2,
                "kv_channels": 32,
                "padded_vocab_size": 128,
                "seq_length": 512,
            },
            **{"add_qkv_bias": True, "add_bias_linear": False},
            **dict.fromkeys(["num_hidden_layers", "intermediate_size", "num_key_value_heads", "head_dim", "vocab_size"]),
        },
        65 * (128 + 2 * 64) + 128 * 64 + 3 * 64 * 96,
        2,
    ),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_counts_of_families_with_code_of_their_own_by_hand(name):
    more, layer, tables = BY_HAND[name]
    config = {key: value for key, value in {"model_type": name.split()[0], **SMALL, **more}.items() if value is not None}
    shape = shape_of(config, "here")
    assert shape.stack[0].params == layer + 2 * 64
    assert shape.params == 6 * (layer + 2 * 64) + 64 + tables * 128 * 64


# Totals from the models' cards and safetensors indexes on the Hugging Face hub, of families whose code is not in transformers.
PUBLISHED = {
    "qwen1-1.8b-chat.json": 1_836_828_672,
    "qwen1-7b-chat.json": 7_721_324_544,
    "chatglm3-6b.json": 6_243_584_000,
    "glm4-9b-chat.json": 9_399_951_360,
    "baichuan2-7b.json": 7_505_973_248,
    "internvl2-2b_internlm2-inside.json": 1_889_146_880,
}


@each_kind([], PUBLISHED)
def test_counts_of_families_with_code_of_their_own(name):
    assert read_shape(SHARED / "configs" / name).params == PUBLISHED[name]


def test_qwen2_by_hand():
    shape = shape_of(QWEN2_05B, "here")
    assert shape.params == 494_032_768
    assert shape.layers * shape.stack[0].params == shape.layer_params == 357_897_216
    assert shape.kv_bytes_per_token() == 12_288
    assert shape.kv_bytes(1000) == 12_288_000
    # With the hidden size in place of KV heads x head dimension the cache would come out seven times as large.
    assert 2 * 2 * shape.layers * shape.hidden == 7 * shape.kv_bytes_per_token()


def test_llama2_13b_keeps_3125_gib_for_4096_tokens():
    shape = shape_of(
        QWEN2_05B | {"num_hidden_layers": 40, "hidden_size": 5120, "num_attention_heads": 40, "num_key_value_heads": 40}, "here"
    )
    assert shape.kv_bytes(4096) == 3.125 * 2**30


def test_qwen1_halves_its_intermediate_size():
    shape = shape_of({"model_type": "qwen", **SMALL, "head_dim": None, "num_key_value_heads": None}, "here")
    assert shape.intermediate == 48 and any("twice" in note for note in shape.notes)
    assert shape.kv_heads == 4


def test_sliding_windows_stop_the_cache_from_growing():
    gemma = shape_of({"model_type": "gemma3_text", **SMALL, "sliding_window": 100}, "here")
    assert [layer.kind for layer in gemma.stack] == ["sliding"] * 5 + ["full"]
    per_layer = 2 * 2 * 2 * 32
    assert gemma.kv_bytes_per_token() == 6 * per_layer
    assert gemma.kv_bytes(1000) == per_layer * (5 * 100 + 1000)
    assert (
        shape_of({"model_type": "qwen2", **SMALL, "sliding_window": 100, "use_sliding_window": False}, "here").kv_bytes(1000)
        == 6000 * per_layer
    )


def test_linear_attention_keeps_a_state_and_no_cache():
    shape = shape_of({"model_type": "qwen3_5_text", **SMALL, **VARIANTS["qwen3_5_text"][0]}, "here")
    assert [layer.kind for layer in shape.stack].count("full") == shape.attending == 1
    assert shape.kv_bytes(10) - shape.kv_bytes(9) == shape.kv_bytes_per_token() == 2 * 2 * 2 * 32
    assert shape.kv_bytes(0) == 2 * 5 * (8 * 16 * 24 + (2 * 4 * 16 + 8 * 24) * 4)


def test_layers_that_use_anothers_cache_keep_none():
    shape = shape_of({"model_type": "gemma4_text", **SMALL, **VARIANTS["gemma4_text"][0]}, "here")
    assert [layer.kv_values > 0 for layer in shape.stack] == [True] * 4 + [False] * 2 and shape.attending == 4


def test_a_vision_language_model_is_its_text_part():
    shape = shape_of({"model_type": "qwen2_5_vl", "vision_config": {}, "text_config": QWEN2_05B, "tie_word_embeddings": True}, "here")
    assert shape.params == 494_032_768 and "text_config" in shape.notes[0]


def test_a_quantized_model_says_how():
    block = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "desc_act": False}
    found = shape_of(QWEN2_05B | {"quantization_config": block}, "here").quantization
    assert (found.method, found.bits, found.group_size, found.symmetric, found.act_order) == ("gptq", 4, 128, True, False)


def test_an_unknown_family_is_counted_aloud():
    shape = shape_of(QWEN2_05B | {"model_type": "newcomer"}, "here")
    assert any("newcomer" in note and "Llama" in note for note in shape.notes)


@pytest.mark.parametrize(
    "change, error, words",
    [
        ({"num_hidden_layers": None}, BadData, "num_hidden_layers"),
        ({"hidden_size": "896"}, BadData, "hidden_size"),
        ({"hidden_size": -1}, BadData, "hidden_size"),
        ({"num_hidden_layers": 10**9}, BadData, "1000000000 layers"),
        ({"num_attention_heads": 0}, BadData, "0 heads"),
        ({"vocab_size": True}, BadData, "vocab_size"),
        ({"model_type": None}, BadData, "model_type"),
        ({"layer_types": ["full_attention"]}, BadData, "layer_types"),
        ({"num_experts": 8}, WrongKind, "mixture of experts"),
        ({"is_encoder_decoder": True}, WrongKind, "decoder-only"),
    ],
)
def test_what_is_no_shape_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        shape_of(QWEN2_05B | change, "here")


def test_a_path_without_a_config_is_refused(tmp_path):
    with pytest.raises(MissingInput):
        read_shape(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(WrongKind, match="adapter"):
        read_shape(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_05B))
    assert read_shape(tmp_path) == read_shape(tmp_path / "config.json")
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(BadData):
        read_shape(tmp_path)


def test_reading_a_shape_needs_no_torch(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN2_05B))
    code = f"import sys; from src.sizing.config_reader import read_shape; read_shape({str(tmp_path)!r}); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
