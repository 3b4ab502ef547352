"""Frozen 16-bit weights computed with in fp32 give what an fp32 copy of them gives, and stay what they are."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from test_lora_variants import settings
from test_packing import tiny
from transformers.pytorch_utils import Conv1D

from src.models import held, lora

EQUAL = 1e-5
"""largest difference over the largest value: sums over a matrix's rows are taken block by block"""


def narrow(kind: str, dtype=torch.bfloat16, tied: bool = True):
    model = tiny(kind, torch.float32)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.tie_word_embeddings = tied
    if tied:
        model.tie_weights()
    return model


def outcome(model, rows: list[int]) -> dict[str, torch.Tensor]:
    """The loss of a few tokens, and the gradients of an adapter beside the model."""
    torch.manual_seed(0)
    model = lora.attach(model, settings(), rows, deepspeed=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(40).view(2, 20) % 16
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def close(ours: dict, theirs: dict) -> bool:
    assert ours.keys() == theirs.keys()
    return all(a.dtype == b.dtype and (a - b).abs().max() <= EQUAL * b.abs().max() for a, b in zip(ours.values(), theirs.values()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3_text", "mixtral"])
def test_losses_and_gradients_are_those_of_an_fp32_copy(kind, dtype, monkeypatch):
    monkeypatch.setattr(held, "BLOCK", 1024)
    monkeypatch.setattr(held, "ROWS", 8)
    model = narrow(kind, dtype)
    wide = copy.deepcopy(model).float()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    held.hold(model)
    inside = {name: module for name, module in model.named_modules() if held.is_held(module)}
    assert any(isinstance(module, torch.nn.Linear | Conv1D) for module in inside.values())
    for name, p in model.named_parameters():
        owner = name.rpartition(".")[0]
        assert p.dtype == (dtype if owner in inside and name.endswith(".weight") else torch.float32), name
        assert torch.equal(p, before[name].to(p.dtype))
    rows = [3, 5] if kind in ("llama", "qwen2") else []
    assert close(outcome(model, rows), outcome(wide, rows))


def test_a_tied_output_layer_stays_the_embedding():
    model = narrow("llama")
    held.hold(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.dtype == torch.bfloat16
    assert model(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.float32


def test_a_held_layer_trained_whole_beside_an_adapter_is_fp32():
    model = narrow("llama", tied=False)
    wide = copy.deepcopy(model).float()
    held.hold(model)
    tuner = settings(modules_to_save=["down_proj", "embed_tokens"])
    gradients = []
    for one in (model, wide):
        torch.manual_seed(0)
        attached = lora.attach(one, tuner, [], deepspeed=False)
        attached(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None], use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in attached.named_parameters() if p.requires_grad})
    assert any("modules_to_save" in name for name in gradients[0])
    assert close(*gradients)


def test_autocast_computes_with_the_narrow_weights_themselves(monkeypatch):
    model = narrow("llama")
    held.hold(model)
    monkeypatch.setattr(held, "product_t", None)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=torch.tensor([[1, 2]])).logits.dtype == torch.bfloat16


def test_wide_weights_are_left_alone():
    model = tiny("llama", torch.float32)
    held.hold(model)
    assert not any(held.is_held(module) for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_weights_are_loaded_in_the_dtype_that_all_are_stored_in(tmp_path):
    for name, dtypes, chosen in (("b", ["bfloat16"], "bfloat16"), ("h", ["float16"], "float16"), ("m", ["bfloat16", "float32"], "float32")):
        (tmp_path / name).mkdir()
        for i, dtype in enumerate(dtypes):
            save_file({f"w{i}": torch.ones(2, 2, dtype=getattr(torch, dtype))}, tmp_path / name / f"model-{i}.safetensors")
        assert held.dtype_of(tmp_path / name) == chosen
