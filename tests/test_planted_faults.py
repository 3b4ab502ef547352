"""Folders that load and talk, and are not the model rounded: each is refused by the proof of quantize, which names the tensor where it is one."""

import functools
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
from src.models import awq, gptq
from src.settings.verbs import QuantizeVerb

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
Q, UP, NEXT = (f"model.layers.{place}_proj" for place in ("1.self_attn.q", "1.mlp.up", "2.mlp.up"))

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    here = tmp_path_factory.mktemp("faults")
    assert go(data, f"outputs={here}", "run=q", f"data.path={ROOT / 'assets' / 'conversations.json'}", "data.calib=0.1") == 0
    return artifact.open_artifact(here / "q" / "data")


@pytest.fixture(scope="module")
def making(dataset, tmp_path_factory):
    """making(*settings) -> (settings, what was made, folder) of a model quantized so; made once."""

    @functools.cache
    def make(source: Path, *settings: str):
        cfg = compose("quantize", ["run=q", f"source={source}", "calibration.rows=24", *settings], QuantizeVerb)
        out = tmp_path_factory.mktemp("out")
        return cfg, quantize.make(cfg, {"model": artifact.open_any(source), "dataset": dataset}, out), out

    return make


@pytest.fixture
def made(making):
    return making(TINY, "quantizer.group_size=32")


@pytest.fixture(scope="module")
def shorter(tmp_path_factory):
    """The embedded model's first two layers."""
    folder = tmp_path_factory.mktemp("shorter")
    AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True, num_hidden_layers=2).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(TINY / name, folder)
    return folder


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
    t[f"{UP}.qweight"] = (
        t[f"{UP}.qweight"].view(torch.uint8).bitwise_right_shift(4).bitwise_or_(t[f"{UP}.qweight"].view(torch.uint8) << 4).view(torch.int32)
    )


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
    assert WHERE.get(fault, UP) in refused(made, TINY, fault, tmp_path / "out")


def refused(made: tuple, source: Path, fault, copy: Path) -> str:
    """What the proof says of a copy of a folder with a fault in it."""
    cfg, found, out = made
    shutil.copytree(out, copy)
    tensors = load_file(file := copy / "model.safetensors")
    fault(tensors)
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises((ProofFailed, BadData)) as told:
        quantize.prove(cfg, found, source, copy)
    return f"{told.value.what} {told.value.where}"


def proven(made: tuple, source: Path, copy: Path) -> dict:
    cfg, found, out = made
    return quantize.prove(cfg, found, source, Path(shutil.copytree(out, copy)))


def test_without_a_fault_it_is_proven(made, tmp_path):
    figures = proven(made, TINY, tmp_path / "out")
    assert figures["kl"] < 0.05 and figures["agreement"] > 0.9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True, dtype=torch.float32)
    assert hasattr(model.get_submodule(UP), "qweight")


# ---- AWQ and bitsandbytes

DOWN, NORM = "model.layers.1.mlp.down_proj", "model.layers.1.post_attention_layernorm"


def awq_values(t, name, change):
    t[f"{name}.qweight"] = awq.pack(change(awq.unpack(t[f"{name}.qweight"])))


def awq_shuffled(t):
    t[f"{UP}.scales"] = t[f"{UP}.scales"].roll(1, 1)


def awq_zeroed(t):
    t[f"{DOWN}.scales"].fill_(2**-20)


def awq_zero_point(t):
    t[f"{UP}.qzeros"] = awq.pack((awq.unpack(t[f"{UP}.qzeros"]).int() + 1).clamp_(max=15).to(torch.uint8))


def awq_gptqs_order(t):
    awq_values(t, Q, lambda v: v.view(len(v), -1, 8)[:, :, list(awq.ORDER)].reshape(v.shape))


def awq_next_layers(t):
    for suffix in awq.SUFFIXES:
        t[f"{UP}.{suffix}"] = t[UP.replace("layers.1", "layers.0") + f".{suffix}"].clone()


def awq_one_output(t):
    t[f"{DOWN}.scales"][:, 7] *= 3


def awq_not_a_number(t):
    t[f"{DOWN}.scales"][0, 0] = torch.nan


def awq_norm_unscaled(t):
    t[f"{NORM}.weight"] = torch.ones_like(t[f"{NORM}.weight"])


AWQ = {
    **{awq_shuffled: UP, awq_zeroed: DOWN, awq_zero_point: UP, awq_gptqs_order: Q, awq_next_layers: UP, awq_one_output: DOWN},
    **{awq_not_a_number: DOWN, awq_norm_unscaled: NORM, other_embedding: "model.embed_tokens"},
}


@pytest.mark.parametrize("fault", [None, *AWQ], ids=lambda f: f.__name__ if f else "none")
def test_faults_of_an_awq_folder_are_refused_by_the_tensor(making, shorter, fault, tmp_path):
    made = making(shorter, "quantizer=awq_int4", "quantizer.group_size=32")
    if fault is None:
        assert proven(made, shorter, tmp_path / "out")["kl"] < 0.1
    else:
        assert AWQ[fault] in refused(made, shorter, fault, tmp_path / "out")


def nf4_shuffled(t):
    t[f"{UP}.weight.absmax"] = t[f"{UP}.weight.absmax"].roll(1)


def nf4_zeroed(t):
    t[f"{UP}.weight"].fill_(0x77)  # the seventh of NF4's sixteen values is zero


def nf4_halves_of_a_byte(t):
    t[f"{Q}.weight"] = t[f"{Q}.weight"].bitwise_right_shift(4).bitwise_or_(t[f"{Q}.weight"] << 4)


def nf4_next_layers(t):
    for name in [name for name in t if name.startswith(f"{UP}.weight")]:
        t[name] = t[name.replace("layers.1", "layers.0")].clone()


def nf4_one_block(t):
    t[f"{UP}.weight.absmax"][9] = 0


def int8_shuffled(t):
    t[f"{UP}.SCB"] = t[f"{UP}.SCB"].roll(1)


def int8_one_output(t):
    t[f"{UP}.SCB"][7] *= 1.05


def int8_transposed(t):
    t[f"{Q}.weight"] = t[f"{Q}.weight"].T.contiguous()


def int8_not_a_number(t):
    t[f"{UP}.SCB"][7] = torch.nan


BNB = {
    "bnb_nf4": {
        nf4_shuffled: UP,
        nf4_zeroed: UP,
        nf4_halves_of_a_byte: Q,
        nf4_next_layers: UP,
        nf4_one_block: UP,
        other_norm: "model.norm",
    },
    "bnb_int8": {int8_shuffled: UP, int8_one_output: UP, int8_transposed: Q, int8_not_a_number: UP, other_embedding: "model.embed_tokens"},
}


@pytest.mark.parametrize("name, fault", [(name, fault) for name, faults in BNB.items() for fault in [None, *faults]])
def test_faults_of_a_bitsandbytes_folder_are_refused_by_the_tensor(making, shorter, name, fault, tmp_path):
    made = making(shorter, f"quantizer={name}")
    if fault is None:
        assert proven(made, shorter, tmp_path / "out")["kl"] < 0.1
    else:
        assert BNB[name][fault] in refused(made, shorter, fault, tmp_path / "out")
