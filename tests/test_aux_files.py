"""A model folder made complete, and the proof that it is: read back alone, in another process, without a network."""

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import CHAT, ROOT, helps, refused, write_model
from safetensors.torch import load_file, save_file

from src.core import artifact
from src.core.errors import BadData, MissingInput, ProofFailed, WrongKind
from src.core.files import hash_files
from src.models import by_layer, complete, gptq
from src.models.autogptq import complete as complete_autogptq
from src.models.llama2c_file import Form, read_shape
from src.models.llama2c_file import write_model as write_llama2c

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


@helps(
    "models/autogptq.py", "take the folder as it was before it was repacked", "leave one of them there", "give a folder that AutoGPTQ made"
)
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


# ---- files of karpathy/llama2.c

ORIGINAL = ROOT / ".." / "shared" / "data" / "models" / "original"


def llama2c_files(place: Path, form: Form, **sizes) -> tuple[Path, Path]:
    """A random model.bin and a tokenizer.bin of its own, as llama2.c has them; and the folder that they were made from, `source`."""
    letters = [chr(i) for i in range(ord("a"), ord("z") + 1)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", *letters, "▁a", "th", "the", "▁the", "in", "▁in"]
    model = write_model(place / "source", vocab_size=len(pieces), **sizes)
    shape = read_shape(model, "fp32_v0")
    write_llama2c(model, shape, form, place / "model.bin")
    with open(place / "tokenizer.bin", "wb") as file:
        file.write(struct.pack("<I", 8))
        for id, piece in enumerate(pieces):
            raw = f"\n{piece}\n".encode() if id in (1, 2) else piece.replace("▁", " ").encode()
            file.write(struct.pack("<fi", -float(max(0, id - 259)), len(raw)) + raw)
    return place / "model.bin", place / "tokenizer.bin"


@pytest.mark.parametrize("form", [Form(0, 32), Form(1, 32), Form(2, 8, 32)], ids=str)
@helps("core/artifact.py", "python -m src.aux_files source={} target=NEW_FOLDER, if it is a model.bin of llama2.c")
@helps("aux_files.py", "tokenizer=FILE names it", "target=FOLDER that is not there yet")
def test_a_model_bin_is_read_back(call, tmp_path, form, proofs_in_this_process):
    model, tokenizer = llama2c_files(tmp_path, form)
    told = call("quantize", "run=a", f"source={model}", f"outputs={tmp_path}")
    refused(told, WrongKind, f"python -m src.aux_files source={model} target=NEW_FOLDER")
    tokenizer.rename(tmp_path / "words.bin")
    refused(call("aux_files", f"source={model}", f"target={tmp_path / 'new'}"), MissingInput, "tokenizer=FILE")
    asked = ["aux_files", f"source={model}", f"tokenizer={tmp_path / 'words.bin'}"]
    refused(call(*asked, f"target={tmp_path}"), WrongKind, "has to be new")
    assert call(*asked, f"target={tmp_path / 'new'}", "dry_run=true").returncode == 0 and not (tmp_path / "new").exists()
    done = call(*asked, f"target={tmp_path / 'new'}")
    assert done.returncode == 0, done.stderr
    made, before = load_file(tmp_path / "new" / "model.safetensors"), load_file(tmp_path / "source" / "model.safetensors")
    assert made.keys() == before.keys()
    for name, weight in before.items():
        assert torch.allclose(made[name], weight.float(), atol=float(weight.abs().max()) / 127 if form.bits == 8 else 0), name
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert hf.convert_ids_to_tokens(hf("the thin é")["input_ids"]) == ["<s>", "▁the", "▁", "th", "in", "▁", "<0xC3>", "<0xA9>"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "new").config.max_position_embeddings > 0


@helps("models/llama2c_folder.py", "take that folder, which manifest.json beside the file names")
def test_a_damaged_model_bin_or_tokenizer_bin_is_refused(call, tmp_path):
    model, tokenizer = llama2c_files(tmp_path, Form(1, 32))
    good, words, asked = model.read_bytes(), tokenizer.read_bytes(), ["aux_files", f"source={model}", f"target={tmp_path / 'new'}"]
    for damaged in (
        b"",
        good[:100],
        good[:-4],
        good + b"\0" * 4,
        good[:8] + struct.pack("<7i", *[1 << 24] * 7) + good[36:],
        good[:12] + b"\xff" * 4 + good[16:],
    ):
        model.write_bytes(damaged)
        refused(call(*asked), BadData)
    model.write_bytes(good)
    for damaged in (b"", words[:-1], words + b"\0", words[:8] + b"\xff" * 4 + words[12:]):
        tokenizer.write_bytes(damaged)
        refused(call(*asked), BadData)
    model.write_bytes(good[:4] + struct.pack("<i", 3) + good[8:])
    refused(call(*asked), WrongKind, "version 3")
    assert not (tmp_path / "new").exists()


@pytest.mark.skipif(not ORIGINAL.is_dir(), reason="../shared/data is not here")
def test_stories260k_says_in_transformers_what_the_c_program_says(call, tmp_path, proofs_in_this_process):
    """200 tokens from nothing, byte for byte."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert (
        call(
            "aux_files", f"source={ORIGINAL / 'stories260K.bin'}", f"tokenizer={ORIGINAL / 'tok512.bin'}", f"target={tmp_path / 'hf'}"
        ).returncode
        == 0
    )
    hf, model = AutoTokenizer.from_pretrained(tmp_path / "hf"), AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = model.generate(torch.tensor([hf("")["input_ids"]]), do_sample=False, max_length=None, max_new_tokens=200, pad_token_id=0)[0]
    for name in ("run.c", "Makefile"):
        shutil.copy(ROOT / "assets" / "llama2c" / name, tmp_path)
    subprocess.run(["make", "-B", "-C", tmp_path, "CFLAGS=-O1"], check=True, capture_output=True)
    options = ["-z", ORIGINAL / "tok512.bin", "-t", "0", "-n", "200"]
    said = subprocess.run([tmp_path / "run", ORIGINAL / "stories260K.bin", *options], check=True, capture_output=True).stdout
    assert len(ids) == 201 and said.decode() == hf.decode(ids, skip_special_tokens=True) + "\n"
