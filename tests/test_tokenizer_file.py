"""A tokenizer that transformers reads otherwise than its tokenizer.json says, or that a result would not keep, is refused before anything is trained."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHAT, SHARED, go, helps, write_model
from makers import tokenizer_folder
from tokenizers import Tokenizer

from src import evaluate, finetune
from src.core import artifact
from src.core.errors import BadData
from src.models import tokenizer_file
from src.models.loading import load_tokenizer
from src.training import session

OTHERS = "transformers makes a {} of this folder's tokenizer.json, with other token ids than the file's own"
SHORT = ["train.max_steps=2", "train.samples=0", "tuner.learning_rate=1e-3", "max_loss_change=9"]


def trains(tmp_path, eighty, model, *argv) -> int:
    return go(finetune, f"outputs={tmp_path}", "run=r", f"source={eighty}", f"model.path={model}", *SHORT, *argv)


def set_class(model: Path, name: str) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": name}))


def fixes(err: str) -> list[str]:
    return re.findall(r"^  (?:fix:  |or:   ) (.*)$", err, re.MULTILINE)


@helps(
    "models/tokenizer_file.py",
    "put the tokenizer files there that the model was trained with, of a {}",
    "if it was trained on transformers' ids: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{}').save_pretrained('{}')\" "
    "writes a tokenizer.json that gives them",
)
def test_another_familys_tokenizer_is_refused_before_training(tmp_path, eighty, capsys, monkeypatch):
    monkeypatch.setattr(session, "load_model", lambda *args, **given: pytest.fail("loaded a model first"))
    model = write_model(tmp_path / "model", "qwen2")
    assert trains(tmp_path, eighty, model) == BadData.exit_code
    err = capsys.readouterr().err
    assert OTHERS.format("Qwen2Tokenizer") in err and f"{model / 'tokenizer.json'} (model.path={model})" in err
    put, saved = fixes(err)
    code = shlex.split(saved.partition("ids: ")[2].partition(" writes ")[0])
    assert put.endswith("of a Qwen2Tokenizer") and code[:2] == ["python", "-c"]
    other = shutil.copytree(model, tmp_path / "other")
    subprocess.run([sys.executable, *code[1:]], check=True, capture_output=True)
    kept = load_tokenizer(model)
    assert kept.encode("Two words") == Tokenizer.from_file(str(model / "tokenizer.json")).encode("Two words").ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder("made-qwen2") / name, other)
    load_tokenizer(other)


@helps("models/tokenizer_file.py", '"tokenizer_class": "PreTrainedTokenizerFast" in {} has the file read as it is')
def test_a_class_that_does_not_fit_is_refused_by_every_verb_that_reads_it(tmp_path, eighty, capsys):
    model = write_model(tmp_path / "model")
    set_class(model, "Qwen2Tokenizer")
    given = [f"outputs={tmp_path}", "run=r", f"source={model}", f"dataset={eighty}", "evaluation.rows=2", "evaluation.samples=0"]
    assert go(evaluate, *given) == BadData.exit_code
    err = capsys.readouterr().err
    assert OTHERS.format("Qwen2Tokenizer") in err and fixes(err)[0].startswith('"tokenizer_class": "PreTrainedTokenizerFast" in ')
    assert str(model / "tokenizer_config.json") in fixes(err)[0]
    set_class(model, "PreTrainedTokenizerFast")
    assert go(evaluate, *given) == 0


@pytest.mark.usefixtures("proofs_in_this_process")
def test_an_adapter_is_read_as_its_base_is_without_the_bases_config(tmp_path, eighty):
    """transformers reads a Mistral's tokenizer.json as it is, whatever class is named beside it, and goes by that class where there is no config.json."""
    model = write_model(tmp_path / "model", model_type="mistral", architectures=["MistralForCausalLM"])
    set_class(model, "Qwen2Tokenizer")
    assert trains(tmp_path, eighty, model) == 0
    made = artifact.open_artifact(tmp_path / "r" / "finetune").path
    assert load_tokenizer(made).encode("Two  words, 1 + 1") == load_tokenizer(model).encode("Two  words, 1 + 1")
    assert not (made / "config.json").exists()


@helps("training/saving.py", '"tokenizer_class": "PreTrainedTokenizerFast" in {} has it read alike everywhere')
@pytest.mark.usefixtures("proofs_in_this_process")
def test_a_tokenizer_that_the_result_would_not_keep_is_refused_before_training(tmp_path, eighty, capsys, monkeypatch, shared):
    """transformers' Llama class does not read again what it wrote of a tokenizer of Mistral's that was given tokens."""
    model = write_model(tmp_path / "model", vocab_size=32000)
    for file in (shared / "tokenizers" / "mistral-7b-v0.2").glob("*token*"):
        shutil.copy(file, model)
    with monkeypatch.context() as patch:
        patch.setattr(session, "load_model", lambda *args, **given: pytest.fail("loaded a model first"))
        assert trains(tmp_path, eighty, model, "chat_template=chatml") == BadData.exit_code
    err = capsys.readouterr().err
    assert "the result would not keep this tokenizer" in err and f"model.path={model}" in err
    assert fixes(err) == [f'"tokenizer_class": "PreTrainedTokenizerFast" in {model / "tokenizer_config.json"} has it read alike everywhere']
    set_class(model, "PreTrainedTokenizerFast")
    assert trains(tmp_path, eighty, model, "chat_template=chatml") == 0


def of_its_own_kind() -> list[Path]:
    return [
        CHAT,
        *(folder for place in ("tokenizers", "models") for folder in (SHARED / place).glob("*") if (folder / "tokenizer.json").is_file()),
    ]


@pytest.mark.parametrize("folder", of_its_own_kind(), ids=lambda folder: folder.name)
def test_published_tokenizers_are_taken_in_no_time(folder):
    tokenizer = load_tokenizer(folder)
    begun = time.process_time()
    tokenizer_file.check(tokenizer, folder)
    assert time.process_time() - begun < 3


def test_a_space_that_is_put_before_a_text_is_no_other_make(tmp_path):
    folder = shutil.copytree(CHAT, tmp_path / "prefixed")
    set_class(folder, "LlamaTokenizer")
    tokenizer, own = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs, ours = tokenizer.encode("The quick brown fox", add_special_tokens=False), own.encode("The quick brown fox").ids
    assert type(tokenizer).__name__ == "LlamaTokenizer" and theirs != ours and theirs[-8:] == ours[-8:]
