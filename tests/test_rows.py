"""Token rows with a rate of their own while every weight is trained."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, go
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from src import data, finetune
from src.models import token_rows
from src.models.held import hold_one

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")
IDS = [5, 9, 30]
CONTROL = [1022, 1023]


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=request.param
    )
    return LlamaForCausalLM(config).eval()


def logits(model):
    return model(torch.arange(32)[None]).logits


def test_splitting_off_changes_no_output_and_moves_all_gradient_of_the_rows(model):
    before = logits(model)
    token_rows.split_off(model, IDS)
    # The rows' logits come from a product of their own, whose last bit may differ with how its operands lie in memory.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)
    logits(model).square().sum().backward()
    embedding = model.get_input_embeddings()
    assert (embedding.rows.grad.norm(dim=1) > 0).all()
    others = [i for i in range(32) if i not in IDS]
    assert torch.count_nonzero(embedding.base.weight.grad[IDS]) == 0 and (embedding.base.weight.grad[others].norm(dim=1) > 0).all()


def test_folding_gives_a_plain_model_of_the_same_function(model):
    names = set(model.state_dict())
    token_rows.split_off(model, IDS)
    for layer in {id(m.rows): m for m in (model.get_input_embeddings(), model.get_output_embeddings())}.values():
        torch.nn.init.normal_(layer.rows)
    plain = LlamaForCausalLM(model.config).eval()
    folded = token_rows.folded(model, model.state_dict())
    assert set(folded) == names
    plain.load_state_dict(folded)
    torch.testing.assert_close(logits(plain), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["held", "fp32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_rows_beside_a_frozen_output_layer_are_the_layer_with_these_rows(dtype, bias):
    """The bias among it, which a folded layer has at these tokens too, and every gradient; and no logits are copied on the way back."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 32, bias=bias).to(dtype).requires_grad_(False)
    whole = torch.nn.Linear(16, 32, bias=bias)
    whole.load_state_dict(layer.state_dict())
    hold_one(layer)
    if bias:
        layer.bias.data = layer.bias.data.float()
    split = token_rows.WithRows(layer, torch.nn.Parameter(torch.randn(3, 16)), torch.tensor(IDS))
    whole.weight.data[IDS] = split.rows.data
    x, wanted = torch.randn(7, 16), torch.randn(7, 32)
    found, known = [], []
    for model, into in ((split, found), (whole, known)):
        given = x.clone().requires_grad_()
        out = model(given)
        (out * wanted).sum().backward()
        into += [out.detach(), given.grad, model.rows.grad if model is split else whole.weight.grad[IDS]]
        if model is split:
            assert "IndexAdd" in type(out.grad_fn).__name__
    for one, other in zip(found, known):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The embedded model with its control tokens' rows wiped: a base that never learnt them."""
    folder = Path(shutil.copytree(ROOT / "assets" / "tiny-chat", tmp_path_factory.mktemp("rows") / "base"))
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][CONTROL] = 0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(base) -> Path:
    outputs = base.parent / "outputs"
    chats = base.parent / "chats.json"
    chats.write_text(json.dumps(json.loads((ROOT / "assets" / "conversations.json").read_text())[:60]))
    assert go(data, f"outputs={outputs}", f"data.path={chats}", "data.val=0.1") == 0
    return outputs


def train(run: Path, base: Path, name: str, *argv: str) -> dict:
    code = go(
        finetune,
        f"outputs={run}",
        f"run={name}",
        f"source={run / 'default' / 'data'}",
        f"model.path={base}",
        "tuner=full",
        "train.max_steps=6",
        *argv,
    )
    assert code == 0
    return load_file(run / name / "finetune" / "model.safetensors")


def test_a_full_fine_tune_moves_new_rows_at_their_own_rate_and_saves_a_plain_model(run, base):
    before, after = load_file(base / "model.safetensors"), train(run, base, "full")
    assert after.keys() == before.keys()
    moved = (after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]).abs().amax(1)
    assert moved[CONTROL].min() > 20 * moved[: CONTROL[0]].max(), "1e-5 a step would leave the rows where they were"
    model = AutoModelForCausalLM.from_pretrained(run / "full" / "finetune", local_files_only=True)
    assert torch.equal(model.get_input_embeddings().weight.data, after["model.embed_tokens.weight"])


def test_it_goes_on_from_a_checkpoint_to_the_same_bytes(run, base, monkeypatch):
    from src.training import checkpoints

    whole = train(run, base, "whole", "train.checkpoint_steps=2")
    stop = checkpoints.Checkpoints.on_save

    def killed(self, args, state, control, **kwargs):
        stop(self, args, state, control, **kwargs)
        if state.global_step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(AssertionError):
        patch.setattr(checkpoints.Checkpoints, "on_save", killed)
        train(run, base, "cut", "train.checkpoint_steps=2")
    resumed = train(run, base, "cut", "train.checkpoint_steps=2")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
