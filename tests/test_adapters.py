"""Which rows count as untrained, and that our way of training rows beside an adapter is peft's in outputs and gradients."""

import importlib.util
import json
import re
from pathlib import Path

import peft.tuners.trainable_tokens.layer as stock_module
import pytest
import torch
from conftest import SHARED, each_kind
from makers import widened_qwen2
from omegaconf import OmegaConf
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from src.core.errors import ConfigError, ProofFailed
from src.models import adapter_files, lora, token_rows
from src.models.loading import load_tokenizer
from src.settings.training import LoraTuner

ROOT = Path(__file__).resolve().parent.parent
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "pad_token_id": None,
}
ROWS = [3, 70, 71]


@pytest.fixture
def stock():
    """peft's own class, read again from its file, out of reach of our replacement."""
    spec = importlib.util.spec_from_file_location("peft.tuners.trainable_tokens.layer_as_shipped", stock_module.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TrainableTokensLayer


def model_of(arch="llama", *, tied, dtype=torch.float32, padded=0):
    torch.manual_seed(0)
    config, cls = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}[arch]
    return cls(config(**(SIZES | {"vocab_size": 80 + padded}), tie_word_embeddings=tied)).to(dtype)


def tuner(**changes):
    """configs/tuner/lora.yaml, small and without dropout."""
    default = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "tuner" / "lora.yaml"))
    return LoraTuner(**(default | {"rank": 4, "alpha": 8.0, "dropout": 0.0} | changes))


# ---- untrained


def test_the_embedded_model_learnt_its_control_tokens():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "tiny-chat", local_files_only=True)
    assert token_rows.untrained(model, [1021, 1022, 1023], 1024) == []


@each_kind(["made"], ["stories260K-w256-qwen2-chatml-hf"])
def test_a_widened_model_with_chatml_tokens_added_did_not(name):
    folder = widened_qwen2() if name == "made" else SHARED / "models" / name
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True), load_tokenizer(folder)
    added = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert token_rows.untrained(model, added, len(tokenizer)) == added
    assert token_rows.untrained(model, [*range(300, 330), *added], len(tokenizer)) == added, "pieces that texts use were learnt"


def test_learnt_rows_are_not_flagged_anywhere_in_the_vocabulary():
    model = AutoModelForCausalLM.from_pretrained(ROOT / "assets" / "tiny-chat", local_files_only=True)
    tokenizer = load_tokenizer(ROOT / "assets" / "tiny-chat")
    seen = {
        i
        for row in json.loads((ROOT / "assets" / "conversations.json").read_text())
        for t in row["conversations"]
        for i in tokenizer(t["value"]).input_ids
    }
    flagged = token_rows.untrained(model, sorted(seen), 1024)
    print(f"{len(flagged)} of {len(seen)} ids that occur in the conversations are flagged")
    assert flagged == []


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("fault", ["zero", "mean", "nearly zero", "as padding", "as noisy padding"])
def test_kinds_of_rows_that_were_only_initialised(fault, tied):
    model = model_of(tied=tied, padded=16)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight.copy_(torch.cat([torch.randn(80, 32), torch.randn(16, 32) * 0.02]))
        for layer in [model.get_input_embeddings()] if tied else [model.get_output_embeddings()]:  # untied: the output row alone is enough
            weight = layer.weight
            weight[80:] = 0.01 if "padding" in fault else torch.randn(16, 32) * 0.02
            if "noisy" in fault:
                weight[80:] += torch.randn(16, 32) * 1e-3
            for row in (70, 71):
                if fault == "zero":
                    weight[row] = 0
                elif fault == "nearly zero":
                    weight[row] = weight[row] * 0.01
                elif fault == "mean":
                    weight[row] = weight[:80].mean(0)
                elif fault == "as padding":
                    weight[row] = weight[85]
                else:
                    weight[row] = 0.01 + torch.randn(32) * 1e-3
    found = token_rows.untrained(model, [3, 40, 70, 71], 80)
    assert found == [70, 71]


def test_a_model_whose_padding_is_as_large_as_its_learnt_rows_flags_what_looks_like_padding_only():
    """Qwen's padding rows are noise of their own scale: rows drawn alike are flagged, rows learnt away from them are not."""
    model = model_of(tied=False, padded=16)
    with torch.no_grad():
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            layer.weight[:80] = torch.randn(80, 32)
            layer.weight[80:] = 0.02 * torch.randn(16, 32)
            layer.weight[71] = 0.02 * torch.randn(32)
    assert token_rows.untrained(model, [3, 70, 71], 80) == [71]


# ---- rows trained beside the adapter


def both_ways(model, batch, stock, monkeypatch):
    """(logits, {parameter: gradient}) with our forward and with peft's, on the same peft model."""
    results = []
    for ours in (True, False):
        with monkeypatch.context() as patch:
            if not ours:
                patch.setattr(TrainableTokensLayer, "forward_adapters", stock.forward_adapters)
            assert TrainableTokensLayer.forward_adapters.__module__ == ("src.models.token_rows" if ours else stock.__module__)
            model.zero_grad()
            out = model(**batch, use_cache=False)
            out.loss.backward()
            results.append(
                (out.logits.detach().clone(), {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None})
            )
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_rows_train_as_in_peft(arch, tied, dtype, stock, monkeypatch):
    model = lora.attach(model_of(arch, tied=tied, dtype=dtype), tuner(), ROWS, deepspeed=False)
    names = [n for n, p in model.named_parameters() if "trainable_tokens_delta" in n and p.requires_grad]
    assert len(names) == (1 if tied else 2)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
                assert parameter.numel(), name
    ids = torch.tensor([[1, 3, 70, 5, 71, 71, 9, 2], [70, 4, 4, 3, 8, 7, 6, 5]])
    labels = ids.clone()
    labels[:, :2] = -100
    ours, peft = both_ways(model, {"input_ids": ids, "labels": labels}, stock, monkeypatch)
    tolerance = 1e-6 if dtype is torch.float32 else 4e-2
    distance = ((ours[0] - peft[0]).float().norm() / peft[0].float().norm()).item()
    assert distance <= tolerance
    assert ours[1].keys() == peft[1].keys() and set(names) <= ours[1].keys()
    worst = max(((ours[1][n] - g).float().norm() / g.float().norm().clamp_min(1e-12)).item() for n, g in peft[1].items())
    print(f"{arch} {'tied' if tied else 'untied'} {dtype}: logits {distance:.1e}, worst gradient {worst:.1e}")
    assert worst <= (1e-5 if dtype is torch.float32 else 8e-2)
    assert all(ours[1][n].abs().sum(1).gt(0).all() for n in names), "every trained row got a gradient"
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    assert not set(frozen) & ours[1].keys()


def test_with_the_adapter_switched_off_the_base_answers():
    base = model_of(tied=False)
    ids = torch.tensor([[1, 3, 70, 71]])
    before = base(ids).logits.detach().clone()
    model = lora.attach(base, tuner(), ROWS, deepspeed=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter += 1
    assert (model(ids).logits - before).abs().max() > 0.1
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, before)


def test_adapters_go_on_every_linear_layer_but_the_output():
    model = lora.attach(model_of(tied=False), tuner(), [], deepspeed=False)
    adapted = {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("trainable_tokens" in n for n, _ in model.named_parameters())


def test_named_layers_only_and_a_wrong_name_says_so():
    model = lora.attach(model_of(tied=False), tuner(target_modules=["q_proj", "v_proj"]), [], deepspeed=False)
    assert {n.split(".lora_A")[0].rsplit(".", 1)[-1] for n, _ in model.named_parameters() if "lora_A" in n} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match="c_attn"):
        lora.attach(model_of(tied=False), tuner(target_modules=["q_proj", "c_attn"]), [], deepspeed=False)


# ---- what was saved


def adapter_folder(folder, **tensors):
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def test_a_saved_adapter_that_learnt_nothing_or_broke_is_refused(tmp_path):
    good = {"q__lora_A__weight": torch.ones(2, 2), "q__lora_B__weight": torch.ones(2, 2)}
    assert adapter_files.check_saved(adapter_folder(tmp_path, **good), moved=True, expected=set()) == 2
    with pytest.raises(ProofFailed, match="learnt nothing"):
        adapter_files.check_saved(adapter_folder(tmp_path, **good | {"q__lora_B__weight": torch.zeros(2, 2)}), moved=True, expected=set())
    with pytest.raises(ProofFailed, match="not finite"):
        adapter_files.check_saved(
            adapter_folder(tmp_path, **good | {"q__lora_A__weight": torch.tensor([float("nan")])}), moved=True, expected=set()
        )
    with pytest.raises(ProofFailed, match="empty"):
        adapter_files.check_saved(adapter_folder(tmp_path, **good | {"q__lora_A__weight": torch.zeros(0, 2)}), moved=True, expected=set())


def test_a_saved_adapter_that_lacks_a_tensor_is_refused(tmp_path):
    model = lora.attach(model_of(tied=False), tuner(modules_to_save=["v_proj"]), ROWS, deepspeed=False)
    names = adapter_files.saved_names(model)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    assert adapter_files.check_saved(tmp_path, moved=False, expected=names) == len(names)
    assert any("trainable_tokens_delta" in n for n in names) and any(n.endswith("v_proj.weight") for n in names)
    gone = min(names)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({n: t for n, t in tensors.items() if n != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ProofFailed, match=re.escape(gone)):
        adapter_files.check_saved(tmp_path, moved=False, expected=names)


def test_an_empty_result_is_refused(tmp_path):
    with pytest.raises(ProofFailed, match="no weights"):
        adapter_files.check_saved(tmp_path, moved=True, expected=set())
