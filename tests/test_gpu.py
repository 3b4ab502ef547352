"""What only a GPU shows: packed rows in one kernel, 16-bit precision, and a run through the whole stage."""

import pytest
import torch
from conftest import go, make_base

from src import finetune
from src.core import artifact
from src.training import attention

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("proofs_in_this_process")]


@pytest.mark.parametrize("heads,kv_heads", [(8, 8), (8, 2)])
@pytest.mark.parametrize("window", [None, 24])
def test_the_kernel_over_packed_rows_equals_each_row_alone(monkeypatch, heads, kv_heads, window):
    torch.manual_seed(0)
    lengths, size = [3, 70, 1, 130], 64
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device="cuda")
    made = [
        torch.randn(1, n, sum(lengths), size, dtype=torch.bfloat16, device="cuda", requires_grad=True) for n in (heads, kv_heads, kv_heads)
    ]

    def results():
        out, _ = attention.attention(None, *made, None, scaling=0.1, sliding_window=window, cu_seq_lens_q=bounds, max_length_q=max(lengths))
        weight = torch.linspace(0, 1, out.numel(), device="cuda", dtype=out.dtype).view_as(out)
        return [out, *torch.autograd.grad((out * weight).sum(), made)]

    assert attention.fused(made[0])
    kernel = results()
    monkeypatch.setattr(attention, "fused", lambda query: False)
    for ours, alone in zip(kernel, results()):
        assert ours.shape == alone.shape
        assert (ours.float() - alone.float()).norm() / alone.float().norm() < 2e-2


@pytest.mark.parametrize("tuner", ["lora", "full", "qlora"])
def test_a_run_in_16_bits_learns(tmp_path, eighty, tuner, capsys):
    argv = [f"outputs={tmp_path}", f"source={eighty}", f"model.path={make_base(tmp_path / 'base')}", f"tuner={tuner}"]
    assert go(finetune, *argv, "tuner.learning_rate=3e-3", "train.max_steps=25") == 0
    said, metrics = capsys.readouterr().err, artifact.open_artifact(tmp_path / "default" / "finetune").metrics
    assert metrics["precision"] == "bf16" and metrics["packed"] and "attention rows" in said
    assert metrics["val_loss"] < 0.7 * metrics["val_loss_first"]
