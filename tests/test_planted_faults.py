"""Folders that load and talk, and are not the model rounded: each is refused by the proof of quantize, which names the tensor where it is one."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import go
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from src import data, quantize
from src.core import artifact
from src.core.compose import compose
from src.core.errors import BadData, ProofFailed
from src.models import gptq
from src.settings.verbs import QuantizeVerb

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
Q, UP, NEXT = (f"model.layers.{place}_proj" for place in ("1.self_attn.q", "1.mlp.up", "2.mlp.up"))

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(settings, what was made, folder) of the embedded model in int4."""
    here = tmp_path_factory.mktemp("faults")
    assert go(data, f"outputs={here}", "run=q", f"data.path={ROOT / 'assets' / 'conversations.json'}", "data.calib=0.1") == 0
    overrides = [f"outputs={here}", "run=q", f"source={TINY}", "calibration.rows=24", "quantizer.group_size=32"]
    cfg = compose("quantize", overrides, QuantizeVerb)
    out = here / "out"
    out.mkdir()
    inputs = {"model": artifact.open_any(TINY), "dataset": artifact.open_artifact(here / "q" / "data")}
    return cfg, quantize.make(cfg, inputs, out), out


def values(tensors: dict, name: str, change) -> None:
    """Change a matrix's integers, uint8 (in, out)."""
    tensors[f"{name}.qweight"] = gptq.pack(change(gptq.unpack(tensors[f"{name}.qweight"], 4)), 4)


def shuffled(t):
    t[f"{UP}.scales"] = t[f"{UP}.scales"][:, torch.randperm(t[f"{UP}.scales"].shape[1], generator=torch.Generator().manual_seed(0))]


def zeroed(t):
    values(t, UP, lambda v: torch.full_like(v, 8))


def wrong_group(t):
    t[f"{UP}.g_idx"] = t[f"{UP}.g_idx"].flip(0)


def transposed(t):
    values(t, Q, lambda v: v.T.contiguous())


def zero_point(t):
    values(t, UP, lambda v: (v.int() + 1).clamp_(max=15).to(torch.uint8))


def one_output(t):
    t[f"{UP}.scales"][:, 7] *= 3


def negated(t):
    values(t, Q, lambda v: (16 - v.int()).clamp_(max=15).to(torch.uint8))


def next_layers(t):
    for suffix in gptq.SUFFIXES:
        t[f"{UP}.{suffix}"] = t[f"{NEXT}.{suffix}"].clone()


def halves_of_a_byte(t):
    t[f"{UP}.qweight"] = t[f"{UP}.qweight"].view(torch.uint8).bitwise_right_shift(4).bitwise_or_(
        t[f"{UP}.qweight"].view(torch.uint8) << 4
    ).view(torch.int32)


def not_a_number(t):
    t[f"{UP}.scales"][0, 0] = torch.nan


def other_embedding(t):
    t["model.embed_tokens.weight"] = t["model.embed_tokens.weight"].roll(1, 0)


def other_norm(t):
    t["model.norm.weight"] = t["model.norm.weight"] * 1.01


WHERE = {transposed: Q, negated: Q, other_embedding: "model.embed_tokens", other_norm: "model.norm"}
FAULTS = [shuffled, zeroed, wrong_group, transposed, zero_point, one_output, negated, next_layers, halves_of_a_byte, not_a_number]


@pytest.mark.parametrize("fault", [*FAULTS, other_embedding, other_norm], ids=lambda f: f.__name__)
def test_a_fault_that_loads_and_talks_is_refused_by_its_tensor(made, fault, tmp_path):
    cfg, found, out = made
    shutil.copytree(out, tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    fault(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((ProofFailed, BadData)) as told:
        quantize.prove(cfg, found, TINY, tmp_path / "out")
    assert WHERE.get(fault, UP) in f"{told.value.what} {told.value.where}"


def test_without_a_fault_it_is_proven(made, tmp_path):
    cfg, found, out = made
    figures = quantize.prove(cfg, found, TINY, Path(shutil.copytree(out, tmp_path / "out")))
    assert figures["kl"] < 0.05 and figures["agreement"] > 0.9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True, dtype=torch.float32)
    assert hasattr(model.get_submodule(UP), "qweight")
