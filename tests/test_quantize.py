"""GPTQ: loads in plain transformers, says in its config what was asked for, equal inputs give equal bytes, and adapters train on it."""

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import go, helps, make_base
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from src import data, evaluate, finetune, merge, quantize
from src.chat import encoding
from src.core import artifact, log
from src.core.compose import compose
from src.core.errors import BadData, ConfigError, MissingInput, MissingTool, ProofFailed
from src.models import bnb, by_layer, calibration, complete, fidelity, gptq, loading, packed, safetensors_io, seen, skeleton
from src.models.loading import load_tokenizer
from src.settings.verbs import FinetuneVerb, QuantizeVerb
from src.sizing.budget import bits_with_scale
from src.training import session

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """An outputs folder whose run `q` has a dataset, and a one-layer cut of the embedded model beside it."""
    here = tmp_path_factory.mktemp("quantize")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:80]
    (here / "chats.json").write_text(json.dumps(rows))
    assert go(data, f"outputs={here}", "run=q", f"data.path={here / 'chats.json'}", "data.val=0.1", "data.calib=0.3") == 0
    model = AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True, num_hidden_layers=1)
    model.save_pretrained(here / "model")
    for name in TOKENIZER:
        shutil.copy(TINY / name, here / "model")
    return here


def argv(here, run, bits, *more):
    return [
        f"outputs={here}",
        f"run={run}",
        f"source={here / 'model'}",
        f"dataset={here / 'q' / 'data'}",
        f"quantizer=gptq_int{bits}",
        "calibration.rows=16",
        *more,
    ]


@pytest.fixture(scope="module", params=[4, 8])
def made(request, here):
    """(bits, artifact) of the model quantized to int4 and int8; int8 with the one group width and order of columns that int4 has not."""
    more = [] if request.param == 4 else ["quantizer.group_size=64", "quantizer.act_order=true"]
    assert go(quantize, *argv(here, f"int{request.param}", request.param, *more)) == 0
    return request.param, artifact.open_artifact(here / f"int{request.param}" / "quantize")


@pytest.fixture(scope="module")
def int4(here):
    if not (here / "int4" / "quantize").is_dir():
        assert go(quantize, *argv(here, "int4", 4)) == 0
    return artifact.open_artifact(here / "int4" / "quantize")


def test_it_loads_in_plain_transformers_and_speaks_like_its_source(made, here):
    bits, made = made
    model = AutoModelForCausalLM.from_pretrained(made.path, local_files_only=True).eval()
    source = AutoModelForCausalLM.from_pretrained(here / "model", local_files_only=True).eval()
    ids = load_tokenizer(made.path)("<|im_start|>user\nWhat does a cat say?<|im_end|>\n", return_tensors="pt").input_ids
    with torch.no_grad():
        a, b = model(ids).logits.float(), source(ids).logits
    apart = ((a - b).norm() / b.norm()).item()
    print(
        f"int{bits}: logits {apart:.4f} apart on a prompt, {made.metrics['logit_error']:.4f} by its own proof, module loss {made.metrics['module_loss']:.2e}"
    )
    assert apart < {4: 0.35, 8: 0.03}[bits]
    assert made.metrics["logit_error"] < {4: 0.35, 8: 0.03}[bits]
    assert made.kind == "quantized" and made.metrics["module_loss"] >= 0


def test_it_is_measured_layer_by_layer_from_its_folder_alone(made):
    assert apart_from_kernels(made[1]) < (0.1 if made[0] == 4 else 5e-3)
    config = AutoConfig.from_pretrained(made[1].path, local_files_only=True)
    del config.quantization_config
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    stored = gptq.matrices(safetensors_io.entries(made[1].path))
    tensors = {name: each() if isinstance(each, gptq.Stored) else safetensors_io.load_wide(each) for name, each in stored.items()}
    assert sum(isinstance(each, gptq.Stored) for each in stored.values()) == 7
    assert dense.load_state_dict(tensors, strict=False).unexpected_keys == []
    assert float(abs(said_by_layer(made[1]) - seen.observe(seen.whole(dense, "dense"), ROWS).losses).max()) < 1e-4


ROWS = [encoding.Encoded(list(range(begin, begin + 40)), list(range(begin, begin + 40))) for begin in (5, 60)]


def said_by_layer(model):
    """The losses of ROWS' tokens, layer by layer."""
    return seen.observe(seen.by_layer(by_layer.load(model)[0], "by layer"), ROWS).losses


def apart_from_kernels(model) -> float:
    """How far a token's loss is at most from the one by transformers' kernels, which on a CPU compute 4-bit layers in bf16."""
    return float(
        abs(said_by_layer(model) - seen.observe(seen.whole(loading.load_any(model, dtype="float32")[0], "whole"), ROWS).losses).max()
    )


def test_its_weights_are_the_source_s_rounded_to_the_bits_asked_for(made, here):
    """Unpacked by hand: scale * (q - zero) is within half a step or so of each weight, and no value needs more than the bits."""
    bits, made = made
    group = 128 if bits == 4 else 64
    packed, source = load_file(made.path / "model.safetensors"), load_file(here / "model" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    q, zeros, scales, order = (packed[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales", "g_idx"))
    weight = source[f"{name}.weight"]
    rows, columns = weight.shape
    assert (
        q.shape == (columns * bits // 32, rows)
        and scales.shape == (columns // group, rows)
        and zeros.shape == (columns // group, rows * bits // 32)
    )
    shifts = torch.arange(0, 32, bits)
    values = (q.unsqueeze(1) >> shifts[None, :, None] & (2**bits - 1)).reshape(columns, rows)
    offsets = (zeros.unsqueeze(2) >> shifts & (2**bits - 1)).reshape(columns // group, rows)
    assert len(offsets.unique()) == 1, "symmetric: one zero point for all"
    middle = 2 ** (bits - 1)
    assert offsets.unique().item() in (middle, middle - 1)
    assert (order == torch.arange(columns, dtype=order.dtype) // group).all() == (bits == 4), (
        "columns stay in place unless sorted by activation"
    )
    unpacked = (scales.float()[order.long()] * (values - middle)).T
    steps = ((unpacked - weight).abs() / scales.float()[order.long()].T).median().item()
    print(f"int{bits}: median distance of a weight from its stored value {steps:.2f} steps")
    assert steps < 1
    assert {n for n in packed if n.endswith("_proj.weight")} == set()


def test_the_config_says_what_was_asked_for(made):
    bits, made = made
    config = json.loads((made.path / "config.json").read_text())
    for settings in (config["quantization_config"], json.loads((made.path / "quantize_config.json").read_text())):
        assert (settings["bits"], settings["group_size"], settings["sym"], settings["desc_act"]) == (
            bits,
            128 if bits == 4 else 64,
            True,
            bits == 8,
        )
    assert config["quantization_config"]["quant_method"] == "gptq"
    source = json.loads((made.path.parent.parent / "model" / "config.json").read_text())
    assert {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")} == {
        k: v for k, v in source.items() if k != "dtype"
    }


def test_its_files_are_the_source_s_or_its_own_and_name_no_temporary_folder(made, here):
    _, made = made
    assert set(made.files) == {"README.md", "model.safetensors", "config.json", "quantize_config.json", *TOKENIZER}
    for name in TOKENIZER:
        assert (made.path / name).read_bytes() == (here / "model" / name).read_bytes()
    for name in made.files:
        content = (made.path / name).read_bytes()
        for trace in (b"/tmp", b"gptqmodel_", str(here).encode(), b"offload_to_disk"):
            assert trace not in content, f"{trace} in {name}"
    with safe_open(made.path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_equal_inputs_give_equal_bytes(int4, here):
    assert go(quantize, *argv(here, "again", 4)) == 0
    again = artifact.open_artifact(here / "again" / "quantize")
    assert again.key == int4.key and again.files == int4.files, "same names, sizes and sha256"


@pytest.mark.slow
def test_equal_inputs_give_equal_bytes_in_another_process(int4, here):
    """The other process proves in a fresh one, too."""
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "src.quantize", *argv(here, "elsewhere", 4)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    other = artifact.open_artifact(here / "elsewhere" / "quantize")
    assert other.key == int4.key and other.files == int4.files, "same names, sizes and sha256"


def test_calibration_is_the_calib_split_through_the_template(int4, here, capsys, monkeypatch):
    monkeypatch.setattr(log, "FIRST", 0)
    tokenizer = load_tokenizer(here / "model")
    cfg = compose("quantize", ["calibration.rows=5", "calibration.max_length=30"], QuantizeVerb)
    rows = calibration.read(cfg.calibration, here / "q" / "data" / "calib.jsonl", None, tokenizer)
    records = [json.loads(line) for line in open(here / "q" / "data" / "calib.jsonl")]
    records = [records[i] for i in calibration.drawn([len(json.dumps(r)) for r in records], 5, 0)]
    whole = [tokenizer.apply_chat_template(r["messages"], return_dict=False) for r in records]
    assert rows.ids == [ids[:30] for ids in whole] and rows.tokens == sum(map(len, rows.ids))
    err = capsys.readouterr().err
    assert f"{sum(len(ids) > 30 for ids in whole)} were cut at 30 tokens" in err and "calibration tokens are few" in err
    assert "  tokenizing calibration: 1 of 5, " in err
    assert int4.metrics["calibration_rows"] == 16


# ---- adapters on a GPTQ base


@pytest.fixture(scope="module")
def on_gptq(int4, here):
    more = [
        "tuner=qlora",
        "tuner.rank=4",
        "tuner.learning_rate=3e-3",
        "train.max_steps=8",
        "train.warmup=0",
        "train.log_steps=1",
        "train.eval_steps=8",
    ]
    assert go(finetune, f"outputs={here}", "run=q", f"model.path={int4.path}", *more) == 0
    return artifact.open_artifact(here / "q" / "finetune")


def test_adapters_train_on_a_gptq_base(on_gptq, int4):
    m = on_gptq.metrics
    print(f"qlora on GPTQ: validation loss {m['val_loss_first']:.3f} -> {m['val_loss']:.3f}")
    assert on_gptq.kind == "adapter" and "nf4" not in m and m["val_loss"] < m["val_loss_first"]
    assert abs(m["loss_after"] - m["loss_before"]) < 1e-4 and m["kl"] < 1e-5, "proven on the weights it was trained on"
    assert on_gptq.parent("model")["key"] == int4.key
    names = {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in load_file(on_gptq.path / "adapter_model.safetensors")}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize("by", ["weights made fp16", "gptqmodel's kernels"])
def test_gradients_flow_through_a_gptq_base_after_an_evaluation(int4, by, monkeypatch):
    """gptqmodel's CPU layers lose their gradient for good at the first evaluation, unless kept from it: every adapter must still get the gradient it had."""
    if by == "gptqmodel's kernels":
        monkeypatch.setattr(skeleton, "widened", lambda path: None)
    cfg = compose("finetune", ["tuner=qlora", "tuner.dropout=0", "tuner.rank=4", f"model.path={int4.path}"], FinetuneVerb)
    tokenizer = load_tokenizer(int4.path)
    torch.manual_seed(0)
    model, _, _ = session.prepare(cfg, int4, tokenizer, "cpu", "fp32", control=[1023])
    assert any(hasattr(module, "qweight") for module in model.modules()) == (by == "gptqmodel's kernels")
    ids = tokenizer("<|im_start|>user\nWhat does a cat say?<|im_end|>\n", return_tensors="pt").input_ids

    def gradients():
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
    after = gradients()
    assert len(before) == 14 and all(torch.equal(before[n], after[n]) for n in before)
    assert all(g.any() for n, g in after.items() if "lora_B" in n), "lora_A has none while lora_B is zero"


def test_answers_come_from_the_weights_that_the_folder_says(int4):
    """Whole in 16 bits against layer by layer in fp32: no more apart than a rounding of 2^-12 makes them, and with the folder's own stop tokens."""
    model, _ = loading.load_any(int4, dtype="held")
    whole, layers = (seen.observe(read, ROWS) for read in (seen.whole(model, "whole"), seen.by_layer(by_layer.need(int4), "layers")))
    assert 0 < abs(whole.losses - layers.losses).max() < 2e-3
    assert torch.float16 in {p.dtype for p in model.parameters()}
    stops = json.loads((int4.path / "generation_config.json").read_text())["eos_token_id"]
    assert model.generation_config.eos_token_id == stops and not any(hasattr(module, "qweight") for module in model.modules())


def test_adapters_on_a_gptq_base_are_measured_layer_by_layer(on_gptq):
    assert apart_from_kernels(on_gptq) < 0.1


@pytest.mark.parametrize("fault", ["two bits", "not symmetric", "another method"])
def test_other_quantized_weights_are_taken_whole(int4, tmp_path, fault):
    shutil.copytree(int4.path, tmp_path / "m", ignore=shutil.ignore_patterns("manifest.json"))
    file = next((tmp_path / "m").glob("model*.safetensors"))
    tensors, config = load_file(file), json.loads((tmp_path / "m" / "config.json").read_text())
    for name in [name for name in tensors if name.endswith((".qweight", ".qzeros"))]:
        if fault == "two bits" and name.endswith("qweight"):
            tensors[name] = tensors[name][: len(tensors[name]) // 2].clone()
        if fault == "not symmetric" and name.endswith("qzeros"):
            tensors[name] += 1
    config["quantization_config"]["quant_method"] = "hqq" if fault == "another method" else "gptq"
    save_file(tensors, file, metadata={"format": "pt"})
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    assert by_layer.load(artifact.open_any(tmp_path / "m")) is None


def test_lora_that_is_not_qlora_is_refused_on_a_gptq_base(int4, here, capsys):
    assert go(finetune, f"outputs={here}", "run=plain", f"source={here / 'q' / 'data'}", f"model.path={int4.path}") == 4
    assert "tuner=qlora trains adapters on a GPTQ base" in capsys.readouterr().err


@helps("merge.py", "python -m src.evaluate source={} measures it as it is")
def test_such_an_adapter_is_not_merged_but_measured(on_gptq, here, capsys):
    assert go(merge, f"outputs={here}", "run=q") == 4
    err = capsys.readouterr().err
    assert "no whole weights to merge into" in err and f"python -m src.evaluate source={on_gptq.path} measures it as it is" in err
    assert go(evaluate, f"outputs={here}", "run=q", f"source={on_gptq.path}", "dry_run=true") == 0
    assert go(evaluate, f"outputs={here}", "run=q", "evaluation.rows=4", "evaluation.samples=1", "evaluation.max_new_tokens=4") == 0
    report = json.loads((here / "q" / "evaluate-finetune" / "report.json").read_text())
    assert report["loss"] < report["parent_loss"]


# ---- rounded to the nearest


@pytest.mark.parametrize("bits", [4, 8])
def test_rounded_to_the_nearest_is_what_gptq_has_to_be_better_than(bits, here, capsys):
    """The same layout; each weight within half a step of its source's; without a calib split, and said to use none."""
    argv_of = [each for each in argv(here, f"rtn{bits}", bits, "quantizer.group_size=64") if not each.startswith("quantizer=")]
    assert go(quantize, *argv_of, f"quantizer=rtn_int{bits}") == 0
    said = capsys.readouterr().err
    assert f"RTN int{bits}, group 64" in said and "calibration= is not used" in said and "calibrates on" not in said
    path = here / f"rtn{bits}" / "quantize"
    block = json.loads((path / "config.json").read_text())["quantization_config"]
    assert (block["bits"], block["group_size"], block["desc_act"]) == (bits, 64, False) and "damp_percent" not in block
    source = load_file(here / "model" / "model.safetensors")
    stored = gptq.matrices(safetensors_io.entries(path))
    for name, each in ((name, each) for name, each in stored.items() if isinstance(each, gptq.Stored)):
        step = source[name].float().reshape(len(source[name]), -1, 64).abs().amax(2).repeat_interleave(64, 1) * 2 / ((1 << bits) - 1)
        assert ((each() - source[name].float()).abs() <= (0.51 + 2 ** (bits - 12)) * step).all(), name
    assert artifact.open_artifact(path).metrics["calibration_rows"] == 0


# ---- refused early


@helps("models/loading.py", "pip install -r requirements.txt")
def test_without_gptqmodel_it_is_said_what_brings_it(monkeypatch):
    def missing(*names, without):
        raise ImportError("No module named 'gptqmodel'")

    with monkeypatch.context() as patch, pytest.raises(MissingTool, match="gptqmodel cannot be imported") as told:
        patch.setattr(loading, "import_quietly", missing)
        loading.prepare_gptq()
    assert told.value.fix == ["pip install -r requirements.txt"] and "gptqmodel==" in (ROOT / "requirements.txt").read_text().lower()
    loading.prepare_gptq()


@pytest.mark.parametrize(
    "shape,more,words",
    [
        ((96, 96), [], "group_size=128 does not divide the width 96"),
        ((30, 128), ["quantizer.group_size=64"], "is 30 x 128, which int4 cannot pack by 8"),
    ],
)
def test_shapes_that_cannot_be_packed_are_refused_before_torch(shape, more, words, here, tmp_path):
    from safetensors.torch import save_file

    tensors = load_file(TINY / "model.safetensors") | {"model.layers.0.mlp.up_proj.weight": torch.zeros(shape)}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    cfg = compose("quantize", more, QuantizeVerb)
    with pytest.raises(ConfigError) as error:
        quantize.check(cfg, {"model": artifact.open_any(tmp_path), "dataset": artifact.open_artifact(here / "q" / "data")})
    assert words in str(error.value)
    if not more:
        assert error.value.fix[0] == "quantizer.group_size=32"


def test_an_adapter_is_refused(on_gptq, here, capsys):
    assert go(quantize, f"outputs={here}", "run=q", f"source={on_gptq.path}") == 4
    assert "makes a model of it" in capsys.readouterr().err


def test_what_has_nothing_to_do_with_its_source_fails_the_proof_without_conversations_too(int4, here):
    rows = fidelity.held_out(here / "q" / "data", load_tokenizer(here / "model"), here / "model")[:4]
    start = artifact.open_any(here / "model")
    before = seen.observe(seen.by_layer(by_layer.load(start)[0], "proof"), rows)
    cfg = compose("quantize", [], QuantizeVerb)
    made = quantize.Made(start, {}, rows, before, False, complete.token_ids(here / "model", False), None)
    assert quantize.prove(cfg, made, here / "model", int4.path)["logit_error"] < 0.35
    with pytest.raises(ProofFailed, match="away from the source"):
        quantize.prove(cfg, replace(made, before=replace(before, log_probs=before.log_probs / 5)), here / "model", int4.path)


# ---- two widths, and limits


def mixed_source(here) -> Path:
    """The whole embedded model, in the folder of the tests."""
    if not (here / "whole").is_dir():
        shutil.copytree(TINY, here / "whole")
    return here / "whole"


@pytest.fixture(scope="module")
def mixed(here):
    where = here / "mixed" / "quantize"
    if not where.is_dir():
        argv = [f"outputs={here}", "run=mixed", f"source={mixed_source(here)}", f"dataset={here / 'q' / 'data'}", "calibration.rows=16"]
        assert go(quantize, *argv, "quantizer=mixed", "quantizer.group_size=32", "quantizer.bits_per_weight=5.5") == 0
    return artifact.open_artifact(where)


def test_two_widths_are_the_size_asked_for_and_gptqmodel_reads_them(mixed, here):
    stored = [each for each in gptq.matrices(safetensors_io.entries(mixed.path)).values() if isinstance(each, gptq.Stored)]
    size = sum(each.shape[0] * each.shape[1] * bits_with_scale(each.form.bits, 32) for each in stored)
    weights = sum(each.shape[0] * each.shape[1] for each in stored)
    assert {each.form.bits for each in stored} == {4, 8} and 5.2 < size / weights <= 5.5
    assert mixed.metrics["matrices_in_8_bits"] == sum(each.form.bits == 8 for each in stored)
    config = json.loads((mixed.path / "quantize_config.json").read_text())
    assert config["bits"] == 4 and all(rule == {"bits": 8} for rule in config["dynamic"].values())
    theirs = loading.load_with_kernels(mixed.path, torch.float32)
    ours = loading.load_any(mixed, dtype="held")[0]
    ids = torch.tensor([ROWS[0].input_ids])
    with torch.no_grad():
        one, other = (model(ids).logits.float() for model in (theirs, ours))
    assert (one - other).norm() < 0.02 * other.norm()
    assert (
        theirs.generate(ids, max_new_tokens=8, do_sample=False).tolist() == ours.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    )


def test_what_it_loses_is_between_that_of_its_two_widths(mixed, here):
    kl = {"mixed": mixed.metrics["kl"]}
    for name in ("rtn_int3", "gptq_int3", "gptq_int4", "gptq_int8"):
        argv = [f"outputs={here}", f"run=of-{name}", f"source={here / 'whole'}", f"dataset={here / 'q' / 'data'}", "calibration.rows=16"]
        assert go(quantize, *argv, f"quantizer={name}", "quantizer.group_size=32") == 0
        kl[name] = artifact.open_artifact(here / f"of-{name}" / "quantize").metrics["kl"]
    print(kl)
    assert kl["gptq_int8"] < kl["mixed"] < kl["gptq_int4"] < kl["gptq_int3"] < kl["rtn_int3"]


def test_an_output_layer_of_its_own_gets_its_bits_and_gptqmodel_reads_it(here):
    source = make_base(here / "untied", tied=False, blank=False)
    argv = [
        f"outputs={here}",
        f"source={source}",
        f"dataset={here / 'q' / 'data'}",
        "calibration.rows=16",
        "quantizer=mixed",
        "quantizer.group_size=32",
    ]
    assert go(quantize, *argv, "run=head", "quantizer.bits_per_weight=4.7") == 0
    made = artifact.open_artifact(here / "head" / "quantize")
    stored = [each for each in gptq.matrices(safetensors_io.entries(made.path)).values() if isinstance(each, gptq.Stored)]
    weights = sum(each.shape[0] * each.shape[1] for each in stored)
    assert "lm_head.weight" in {each.name for each in stored}
    assert sum(each.shape[0] * each.shape[1] * bits_with_scale(each.form.bits, 32) for each in stored) <= 4.7 * weights
    assert json.loads((made.path / "config.json").read_text())["quantization_config"]["lm_head"] is True
    theirs, ours = loading.load_with_kernels(made.path, torch.float32), loading.load_any(made, dtype="held")[0]
    assert hasattr(theirs.lm_head, "qweight")
    ids = torch.tensor([ROWS[0].input_ids])
    with torch.no_grad():
        one, other = (model(ids).logits.float() for model in (theirs, ours))
    assert (one - other).norm() < 0.02 * other.norm() and apart_from_kernels(made) < 5e-3


def test_an_output_layer_that_cannot_be_quantized_stays_and_that_is_said(here, capsys):
    q = compose("quantize", ["quantizer=mixed"], QuantizeVerb).quantizer
    model = by_layer.need(artifact.open_any(mixed_source(here)))
    capsys.readouterr()
    assert not quantize.with_head(q, model) and "stays as it is stored: it is the embedding too" in capsys.readouterr().err
    odd = by_layer.need(artifact.open_any(make_base(here / "odd", tied=False, blank=False)))
    assert quantize.with_head(q, odd) and not capsys.readouterr().err
    odd.model.get_output_embeddings().weight = torch.nn.Parameter(torch.empty(1001, 8))
    assert not quantize.with_head(q, odd) and "int4 packs by 8, and it has 1,001 rows" in capsys.readouterr().err
    assert not quantize.with_head(q.model_copy(update={"output_layer": False}), odd) and not capsys.readouterr().err


@helps("models/fidelity.py", "{} if you accept it")
@helps("quantize.py", "quantizer=gptq_int8", "{} force=true")
def test_more_loss_than_is_allowed_is_refused_and_the_ways_out_help(mixed, here, capsys):
    argv = [
        f"outputs={here}",
        f"source={here / 'whole'}",
        f"dataset={here / 'q' / 'data'}",
        "calibration.rows=16",
        "quantizer.group_size=32",
    ]
    capsys.readouterr()
    assert go(quantize, *argv, "run=limit", "quantizer=gptq_int4", "max_kl=1e-5", "min_agreement=1") == ProofFailed.exit_code
    said = capsys.readouterr().err
    assert "more was lost than bits explain" in said and "limits KL 1e-05 nats and 100% the same likeliest token" in said
    accepted = next(line for line in said.splitlines() if "if you accept it" in line).split(" if you")[0].split()
    typed = [word for word in accepted if "=" in word]
    assert [word.split("=")[0] for word in typed] in (["max_kl"], ["max_kl", "min_agreement"])
    assert go(quantize, *argv, "run=limit", "quantizer=gptq_int4", "max_kl=1e-5", *typed) == 0
    assert go(quantize, *argv, "run=limit", "quantizer=gptq_int4", "max_kl=1e-5") == ProofFailed.exit_code, (
        "a finished one is held to it too"
    )
    assert go(quantize, *argv, "run=limit", "quantizer=gptq_int4") == 0
    assert go(quantize, *argv, "run=limit", "quantizer=gptq_int8", "max_kl=1e-3", "force=true") == 0


@helps("quantize.py", "quantizer.bits_per_weight=4.5", "quantizer=gptq_int3", "calibration.text=null leaves it out")
@helps("quantize.py", "calibration.text=FILE names it", "calibration.text_share=auto")
def test_a_size_below_four_bits_and_a_text_that_is_not_there_are_refused(here, capsys):
    argv = [f"outputs={here}", f"source={here / 'model'}", f"dataset={here / 'q' / 'data'}", "run=small", "dry_run=true"]
    assert go(quantize, *argv, "quantizer=mixed", "quantizer.bits_per_weight=4.1") == ConfigError.exit_code
    assert "less than int4 in groups of 128 takes, 4.156" in capsys.readouterr().err
    for way in ("quantizer=gptq_int3", "quantizer=mixed quantizer.bits_per_weight=4.5"):
        assert go(quantize, *argv, *way.split()) == 0
    assert go(quantize, *argv, "calibration.text=/nowhere.txt") == MissingInput.exit_code
    assert go(quantize, *argv, "calibration.text=null") == 0
    assert go(quantize, *argv, "calibration.text_share=0.4") == ConfigError.exit_code
    for way in (f"calibration.text={ROOT / 'README.md'}", "calibration.text_share=auto"):
        assert go(quantize, *argv, "calibration.text_share=0.4", way) == 0


@helps("quantize.py", "calibration.text=null leaves it out")
@helps("models/calibration.py", "calibration.text=null leaves it out")
def test_a_text_that_is_none_is_refused_before_work(here, tmp_path, capsys):
    argv = [f"outputs={here}", f"source={here / 'model'}", f"dataset={here / 'q' / 'data'}", "run=small", "dry_run=true"]
    hostile = {
        "binary": (bytes(range(256)) * 500, "zero bytes"),
        "zeros": (bytes(9999), "zero bytes"),
        "empty": (b"", "is empty"),
        "blank": (b" \n" * 99, "is empty"),
        "cut.gz": (b"\x1f\x8b\x08\0cut", "is cut off"),
        "picture": (b"\x89PNG\r\n\x1a\n" + bytes(99), "zero bytes"),
        "latin": ("schöne Grüße für Köln ".encode("latin-1") * 99, "UTF-8"),
    }
    for name, (content, words) in hostile.items():
        (tmp_path / name).write_bytes(content)
        assert go(quantize, *argv, f"calibration.text={tmp_path / name}") == BadData.exit_code, name
        assert words in capsys.readouterr().err, name
    assert go(quantize, *argv, f"calibration.text={tmp_path}") == MissingInput.exit_code and "is no file" in capsys.readouterr().err
    assert go(quantize, *argv, "calibration.text=null") == 0


def test_a_line_without_an_end_costs_no_memory(here, tmp_path):
    (tmp_path / "line").write_bytes(b"word " * (1 << 20))
    cfg = compose("quantize", ["calibration.rows=2"], QuantizeVerb)
    begun, peak = tracemalloc.start(), 0
    found = calibration.read(cfg.calibration, here / "q" / "data" / "calib.jsonl", tmp_path / "line", load_tokenizer(here / "model"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert begun is None and sum(map(len, found.text)) > 10 and peak < 5 << 20


def test_general_text_is_its_share_of_the_calibration(here, tmp_path, capsys):
    tokenizer = load_tokenizer(here / "model")
    cfg = compose("quantize", ["calibration.rows=8", "calibration.text_share=0.4"], QuantizeVerb)
    split = here / "q" / "data" / "calib.jsonl"
    found = calibration.read(cfg.calibration, split, ROOT / "README.md", tokenizer)
    general = sum(map(len, found.text))
    assert abs(general / found.tokens - 0.4) < 0.01 and f"and on {general:,} tokens of {ROOT / 'README.md'}" in capsys.readouterr().err
    assert tokenizer.decode(found.text[0]) == (ROOT / "README.md").read_text()[: len(tokenizer.decode(found.text[0]))]
    (tmp_path / "short.txt").write_bytes(b"few words \xff and no UTF-8")
    found = calibration.read(cfg.calibration, split, tmp_path / "short.txt", tokenizer)
    assert "few words" in tokenizer.decode(found.text[0]) and "fewer than the" in capsys.readouterr().err


# ---- AWQ


def test_an_awq_folder_is_read_by_transformers_and_says_what_ours_says(here):
    where = mixed_source(here)
    argv = [f"outputs={here}", "run=awq", f"source={where}", f"dataset={here / 'q' / 'data'}", "calibration.rows=16"]
    assert go(quantize, *argv, "quantizer=awq_int4", "quantizer.group_size=32") == 0
    made = artifact.open_artifact(here / "awq" / "quantize")
    assert made.metrics["kl"] < 0.02 and made.metrics["agreement"] > 0.95
    theirs, ours = loading.load_with_kernels(made.path, torch.float32), loading.load_any(made, dtype="held")[0]
    assert hasattr(theirs.get_submodule("model.layers.0.mlp.up_proj"), "qweight")
    ids = torch.tensor([ROWS[0].input_ids])
    with torch.no_grad():
        one, other = (model(ids).logits.float() for model in (theirs, ours))
    assert (one - other).norm() < 0.02 * other.norm()
    norm = "model.layers.0.input_layernorm.weight"
    stored, source = (safetensors_io.entries(path)[norm] for path in (made.path, where))
    assert stored.dtype == source.dtype and not torch.equal(safetensors_io.load(stored), safetensors_io.load(source))


# ---- bitsandbytes


@pytest.mark.parametrize("name", ["bnb_nf4", "bnb_int8"])
def test_layers_of_bitsandbytes_are_those_that_transformers_makes_itself(name, here):
    """NF4 bit for bit what loading with BitsAndBytesConfig gives; the loss from our reading is that of a model with those weights."""
    argv = [f"outputs={here}", f"run={name}", f"source={here / 'model'}", f"dataset={here / 'q' / 'data'}", f"quantizer={name}"]
    assert go(quantize, *argv) == 0
    made = artifact.open_artifact(here / name / "quantize")
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    how = BitsAndBytesConfig(**(nf4 if name == "bnb_nf4" else {"load_in_8bit": True}))
    theirs = AutoModelForCausalLM.from_pretrained(here / "model", quantization_config=how, dtype=torch.float32, device_map={"": "cpu"})
    theirs.save_pretrained(here / f"{name}-theirs")
    one, other = (load_file(path / "model.safetensors") for path in (made.path, here / f"{name}-theirs"))
    assert one.keys() == other.keys()
    for key in one:
        if name == "bnb_nf4" or not key.endswith((".SCB", "_proj.weight")):
            assert torch.equal(one[key], other[key]), key
        else:  # transformers takes the weights through fp16
            assert (one[key].float() - other[key].float()).abs().max() <= (1 if one[key].dtype == torch.int8 else 1e-3), key
    matrices = {key: each for key, each in packed.matrices(safetensors_io.entries(made.path)).items() if isinstance(each, packed.Packed)}
    source = load_file(here / "model" / "model.safetensors")
    assert len(matrices) == 7 and all(each.shape == source[key].shape for key, each in matrices.items())
    assert all(
        (each() - source[key]).norm() < {"bnb_nf4": 0.12, "bnb_int8": 0.02}[name] * source[key].norm() for key, each in matrices.items()
    )
    model, _ = loading.load_any(made, dtype="held")
    whole, layers = (seen.observe(read, ROWS) for read in (seen.whole(model, "whole"), seen.by_layer(by_layer.need(made), "layers")))
    # What is rounded on its way parts for the last bit of a weight.
    assert np.abs(whole.losses - layers.losses).mean() < {"bnb_nf4": 5e-4, "bnb_int8": 0.05}[name]
    hooks = [
        len(layer._forward_pre_hooks) for model in (model, by_layer.need(made).model) for layer in model.model.layers[0].mlp.children()
    ]
    assert hooks[:3] == hooks[4:7] == [name == "bnb_int8"] * 3


@pytest.mark.parametrize("threshold", [6.0, 0.0])
def test_int8_layers_take_what_bitsandbytes_kernels_take(threshold):
    """The kernels round tokens too, but for columns with outliers; in training, on a CPU, they do not."""
    import bitsandbytes

    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), 2 * torch.randn(1, 17, 64)
    x[0, 3, 5], x[0, 8, 40] = 9, -7
    theirs = bitsandbytes.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False, threshold=threshold)
    theirs.weight = bitsandbytes.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    theirs = theirs.to("cpu").eval()
    said = theirs(x)
    ours = torch.nn.Linear(64, 48, bias=False).requires_grad_(False)
    ours.weight.data = theirs.state.CB * (theirs.state.SCB / 127)[:, None]
    alone = ours(x)
    bnb.round_inputs(
        torch.nn.ModuleDict({"a": ours}), {"a": bnb.Stored("a.weight", {"weight": None, "SCB": None})}, {"llm_int8_threshold": threshold}
    )
    ours.eval()
    assert (ours(x) - said).norm() < 1e-3 * said.norm() and (alone - said).norm() > 4e-3 * said.norm()
    ours.train()
    assert torch.equal(ours(x), alone)


@pytest.mark.parametrize("threshold", ["6", None, -1, float("nan")])
def test_a_threshold_that_is_none_is_refused(threshold):
    stored = {"a": bnb.Stored("a.weight", {"weight": None, "SCB": None})}
    with pytest.raises(BadData, match="llm_int8_threshold"):
        bnb.round_inputs(torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}), stored, {"llm_int8_threshold": threshold})
