"""The CPU's kernels give the losses and gradients of the code they take the place of."""

import copy
from collections import Counter

import pytest
import torch
from test_held import close, narrow
from test_lora_variants import settings
from test_packing import tiny
from transformers.models.llama import modeling_llama

from src.models import held, lora
from src.training import kernels


@pytest.fixture(autouse=True)
def rotation(monkeypatch):
    """As transformers has it, whatever ran before, since it is replaced for the whole process."""
    for name in ("llama", "qwen2", "qwen3"):
        module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["x"])
        monkeypatch.setattr(module, "apply_rotary_pos_emb", kernels.ROTATION)


def outcome(model, **changes) -> dict[str, torch.Tensor]:
    """A loss, and the gradients of all that is trained."""
    torch.manual_seed(3)
    ids = torch.arange(40).view(2, 20) % 16
    loss = model(input_ids=ids, labels=ids, use_cache=False, **changes).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2", "gemma3_text", "olmo2"])
def test_losses_and_gradients_are_those_of_the_code_replaced(kind, holds):
    torch.manual_seed(0)
    model = narrow(kind)
    held.hold(model) if holds else model.float()
    model = lora.attach(model, settings(modules_to_save=["norm"] if kind == "qwen2" else []), [], deepspeed=False).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    plain = copy.deepcopy(model)
    theirs = outcome(plain)
    kernels.replace(model)
    replaced = {type(m).__name__ for m in model.modules() if "forward" in vars(m)}
    assert any("MLP" in name for name in replaced) == (kind in ("llama", "qwen2", "qwen3", "olmo2"))
    assert ("Linear" in replaced) == (kind != "gpt2") and any("Norm" in name for name in replaced) == (kind in ("llama", "qwen2", "qwen3"))
    assert (modeling_llama.apply_rotary_pos_emb is kernels.rotate) == (kind == "llama")
    assert close(outcome(model), theirs)


def test_what_is_trained_whole_gets_its_gradients_too():
    model = tiny("llama", torch.float32)
    theirs = outcome(copy.deepcopy(model))
    kernels.replace(model)
    assert close(outcome(model), theirs)


def test_a_pass_keeps_neither_norms_nor_gated_products_nor_masks():
    model = tiny("llama", torch.float32)
    model = lora.attach(model, settings(dropout=0.1), [], deepspeed=False).train()
    plain = copy.deepcopy(model)
    kernels.replace(model)
    kept, theirs = (kept_tensors(one) for one in (model, plain))
    mlp = model.config.intermediate_size
    assert kept[mlp] == model.config.num_hidden_layers * 2 and theirs[mlp] >= 5 * model.config.num_hidden_layers
    assert sum(width * count for width, count in kept.items()) < 0.45 * sum(width * count for width, count in theirs.items())


def kept_tensors(model) -> Counter:
    """{last dimension: tensors of it that a pass over 20 tokens keeps}"""
    kept, owned = {}, {p.data_ptr() for p in model.parameters()}
    ids = torch.arange(20)[None] % 16
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t.detach()), lambda t: t):
        model(input_ids=ids, use_cache=False)
    return Counter(t.shape[-1] for t in kept.values() if t.data_ptr() not in owned)


def test_variants_of_lora_are_left_to_peft():
    model = lora.attach(tiny("llama", torch.float32), settings(dora=True), [], deepspeed=False)
    assert not any(kernels.is_plain_lora(module) for module in model.modules())


def test_dropout_keeps_as_much_as_it_says_and_its_gradient_drops_the_same(monkeypatch):
    torch.manual_seed(0)
    masks = torch.stack([kernels.keep_mask((64, 64), kernels.draw_of(0.05)) for _ in range(400)])
    assert masks.unique().tolist() == [0, 1] and abs(masks.float().mean() - 0.95) < 5e-4
    assert masks.float().mean(0).min() > 0.9
    x, w, a, b = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 5), (4, 5), (2, 5), (4, 2)))
    mask = torch.rand(6, 5) < 0.5
    monkeypatch.setattr(kernels, "keep_mask", lambda shape, draw: mask)
    gate = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    for gates in ((), (gate,)):

        def layer(x, a, b, gate=None):
            return kernels._LoraLinear.apply(x, gate, None, w.detach(), None, a, b, 0.7, 0.5)

        assert torch.autograd.gradcheck(layer, (x, a, b, *gates))


def test_dropout_follows_the_seed():
    torch.manual_seed(1)
    first, other = (kernels.keep_mask((8, 8), kernels.draw_of(0.5)) for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(kernels.keep_mask((8, 8), kernels.draw_of(0.5)), first) and not torch.equal(first, other)


def test_a_rotation_whose_halves_differ_turns_back():
    q, cos, sin = (torch.randn(1, n, 5, 8, dtype=torch.float64) for n in (2, 1, 1))
    q.requires_grad_()
    known = (q * cos) + (modeling_llama.rotate_half(q) * sin)
    assert torch.allclose(kernels._Rotate.apply(q, cos, sin), known)
    assert torch.autograd.gradcheck(lambda q: kernels._Rotate.apply(q, cos, sin), q)
