"""A model folder made complete, and the proof that it is: read back alone, in another process, without a network."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import CHAT, helps, refused

from src.core.errors import MissingInput, ProofFailed, WrongKind
from src.core.files import hash_files
from src.models import complete

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
