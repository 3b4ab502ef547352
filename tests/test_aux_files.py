"""A model folder made complete, and the proof that it is: read back alone, in another process, without a network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CHAT, helps, refused
from safetensors.torch import load_file, save_file

from src.core import artifact
from src.core.errors import BadData, MissingInput, ProofFailed, WrongKind
from src.core.files import hash_files
from src.models import by_layer, complete, gptq
from src.models.autogptq import complete as complete_autogptq

NAMES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture
def bare(tiny_model) -> Path:
    """What another tool leaves behind: weights and config.json alone."""
    folder = tiny_model()
    for name in NAMES:
        (folder / name).unlink()
    return folder


def test_a_folder_without_tokenizer_is_completed_and_proven(cli, bare):
    weights = hash_files(bare)
    done = cli("aux_files", f"source={CHAT}", f"target={bare}")
    assert done.returncode == 0, done.stderr
    assert all(name in done.stderr for name in NAMES)
    assert "token ids equal to the source's, loaded alone and offline" in done.stderr
    after = hash_files(bare)
    assert weights.items() <= after.items() and {n: after[n] for n in NAMES} == {n: hash_files(CHAT)[n] for n in NAMES}
    assert not list(bare.glob("*.partial"))


@helps("models/complete.py", "if the source's is the right one, remove the tokenizer files there and run the same command again")
def test_a_tokenizer_that_differs_fails_the_proof(call, tiny_model, proofs_in_this_process):
    folder = tiny_model()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    tokenizer["model"]["merges"] = merges[: len(merges) // 2]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    before = hash_files(folder)
    done = call("aux_files", f"source={CHAT}", f"target={folder}")
    refused(done, ProofFailed, "tokenizer differs", folder)
    assert hash_files(folder) == before, "what a folder has stays as it is"
    for name in NAMES[:2]:
        (folder / name).unlink()
    assert call("aux_files", f"source={CHAT}", f"target={folder}").returncode == 0


def test_a_plan_names_the_files_and_copies_none(call, bare):
    before = hash_files(bare)
    done = call("aux_files", f"source={CHAT}", f"target={bare}", "dry_run=true")
    assert done.returncode == 0 and all(name in done.stderr for name in NAMES)
    assert hash_files(bare) == before


@helps("aux_files.py", "give a folder that is on this machine", "give the folder of weights and config.json to complete")
@helps("aux_files.py", "give a copy of it without manifest.json")
def test_folders_it_does_not_take(call, bare, finished, tmp_path, proofs_in_this_process):
    refused(call("aux_files", f"source={tmp_path / 'nowhere'}", f"target={bare}"), MissingInput, tmp_path / "nowhere")
    refused(call("aux_files", f"source={CHAT}", f"target={tmp_path / 'nowhere'}"), MissingInput, tmp_path / "nowhere")
    refused(call("aux_files", f"source={CHAT}", f"target={tmp_path}"), WrongKind, "config.json", tmp_path)
    refused(call("aux_files", f"source={CHAT}", f"target={finished / 'a' / 'merge'}"), WrongKind, "sealed", finished / "a" / "merge")
    copy = shutil.copytree(finished / "a" / "merge", tmp_path / "copy", ignore=shutil.ignore_patterns("manifest.json"))
    for target in (copy, bare):
        assert call("aux_files", f"source={CHAT}", f"target={target}").returncode == 0


def test_a_source_without_tokenizer_leaves_the_target_alone(call, bare, tiny_model):
    source, before = tiny_model(), hash_files(bare)
    for name in NAMES[:2]:
        (source / name).unlink()
    refused(call("aux_files", f"source={source}", f"target={bare}"), MissingInput, "no tokenizer", source)
    assert hash_files(bare) == before


def test_everything_a_model_needs_beside_its_weights_is_copied(tmp_path):
    """The Qwen-1 models do not load without their kernels and tokenizer code; their weights and notes are not ours to copy."""
    source, out = tmp_path / "source", tmp_path / "out"
    wanted = [
        "tokenizer.json", "tokenizer.model", "qwen.tiktoken", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
        "additional_chat_templates/tools.jinja", "generation_config.json", "modeling_qwen.py", "cache_autogptq_cuda_256.cpp", "cache_autogptq_cuda_kernel_256.cu",
    ]  # fmt: skip
    others = ["model.safetensors", "pytorch_model.bin", "README.md", "config.json", ".hidden.py", "training_args.bin"]
    for name in wanted + others:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    out.mkdir()
    assert sorted(complete.copy(source, out)) == sorted(wanted)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(wanted)
    assert complete.copy(source, out) == []


def test_files_that_are_there_stay(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    (source / "tokenizer.json").write_text("theirs")
    (source / "generation_config.json").write_text("theirs")
    (out / "tokenizer.json").write_text("ours")
    assert complete.copy(source, out) == ["generation_config.json"]
    assert (out / "tokenizer.json").read_text() == "ours"
    (out / "generation_config.json").unlink()
    assert complete.copy(source, out, tokenizer=False) == ["generation_config.json"]


def test_a_copy_cut_short_is_not_taken_for_the_file(tmp_path, monkeypatch):
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir(), out.mkdir()
    (source / "tokenizer.json").write_text("whole")

    def cut(_, target):
        Path(target).write_text("wh")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(shutil, "copyfile", cut)
        complete.copy(source, out)
    assert not (out / "tokenizer.json").exists()
    assert complete.copy(source, out) == ["tokenizer.json"] and (out / "tokenizer.json").read_text() == "whole"


def test_probes_reach_what_tokenizers_get_wrong():
    """Spaces, digits, scripts, emoji and control tokens: a tokenizer rebuilt in another class differs on at least one."""
    text = "".join(complete.PROBES)
    for part in ("  ", "\t", "\n\n", "12345", "안녕", "你好", "🚀", "é", "<|im_start|>"):
        assert part in text


# ---- folders that AutoGPTQ made


@pytest.fixture
def autogptq(tmp_path):
    """The embedded model as AutoGPTQ leaves one: weights under its own name, quantize_config.json, and a config.json that says nothing of either."""
    folder = tmp_path / "auto"
    folder.mkdir()
    tensors = load_file(CHAT / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        made = gptq.nearest(tensors.pop(name).float(), gptq.Nearest(4, 32))
        tensors |= {f"{name.removesuffix('.weight')}.{suffix}": t for suffix, t in made.tensors.items()}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "gptq_model-4bit-32g.safetensors", {"format": "pt"})
    shutil.copy(CHAT / "config.json", folder)
    settings = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True}
    settings |= {"true_sequential": True, "model_name_or_path": None, "model_file_base_name": "gptq_model-4bit-32g"}
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("config", ["there", "missing", "halfway"])
def test_a_folder_that_autogptq_made_is_completed_by_one_command(autogptq, config, call):
    if config == "missing":
        (autogptq / "config.json").unlink()
    if config == "halfway":  # killed before the rename
        complete_autogptq(CHAT, autogptq)
        (autogptq / "model.safetensors").rename(autogptq / "gptq_model-4bit-32g.safetensors")
    before = {path.name: path.read_bytes() for path in autogptq.iterdir()}
    dry = call("aux_files", f"source={CHAT}", f"target={autogptq}", "dry_run=true")
    assert dry.returncode == 0 and "would rename gptq_model-4bit-32g.safetensors to model.safetensors" in dry.stderr
    assert before == {path.name: path.read_bytes() for path in autogptq.iterdir()}
    done = call("aux_files", f"source={CHAT}", f"target={autogptq}")
    assert done.returncode == 0, done.stderr
    assert (autogptq / "model.safetensors").read_bytes() == before["gptq_model-4bit-32g.safetensors"]
    block = json.loads((autogptq / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["bits"], block["group_size"], block["sym"]) == ("gptq", 4, 32, True)
    assert json.loads((autogptq / "quantize_config.json").read_text())["model_file_base_name"] == "model"
    found = artifact.open_any(autogptq)
    assert found.kind == "quantized" and by_layer.load(found)
    again = call("aux_files", f"source={CHAT}", f"target={autogptq}")
    assert again.returncode == 0 and "AutoGPTQ" not in again.stderr


@helps("models/autogptq.py", "take the folder as it was before it was repacked", "leave one of them there", "give a folder that AutoGPTQ made")
@helps("models/autogptq.py", "take weights and quantize_config.json of one and the same model")
def test_what_is_no_such_folder_is_left_as_it_is_and_that_is_said(autogptq, call):
    settings, weights = autogptq / "quantize_config.json", autogptq / "gptq_model-4bit-32g.safetensors"
    right = json.loads(settings.read_text())

    def told(error, *words):
        before = sorted(path.name for path in autogptq.iterdir())
        refused(call("aux_files", f"source={CHAT}", f"target={autogptq}"), error, *words)
        assert before == sorted(path.name for path in autogptq.iterdir())

    for change, error, words in (
        ({"is_marlin_format": True}, WrongKind, "Marlin"),
        ({"bits": 8}, BadData, "has 4 bits in groups of 32, and quantize_config.json says 8"),
        ({"group_size": 64}, BadData, "says 4 in groups of 64"),
    ):
        settings.write_text(json.dumps(right | change))
        told(error, words)
    settings.write_text(json.dumps(right))
    for other in ("gptq_model-8bit.safetensors", "model.safetensors"):
        shutil.copy(weights, autogptq / other)
        told(WrongKind, "which is the model?" if other.startswith("gptq") else "both")
        (autogptq / other).unlink()
    kept = weights.read_bytes()
    save_file({"x": torch.zeros(1)}, weights)
    told(BadData, "no quantized matrix")
    weights.write_bytes(kept)
    assert call("aux_files", f"source={CHAT}", f"target={autogptq}").returncode == 0
