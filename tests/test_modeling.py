"""Locating, checking and growing models; no network."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, helps

from src.core import processes
from src.core.errors import MissingInput, MissingTool, UserError, WrongKind, using
from src.core.files import read_json
from src.core.processes import silenced
from src.models import generation
from src.models.folder import LFS, check_folder, locate
from src.models.loading import load_model, load_tokenizer
from src.models.vocabulary import grow_vocabulary

ASSETS = Path(__file__).parent.parent / "assets"
COMMIT = "0123456789012345678901234567890123456789"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub cache as huggingface_hub lays it out, with one model in it, and no way out to the network."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(ASSETS / "tiny-chat", repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repo


def test_a_hub_id_is_found_in_the_cache(hub):
    assert locate("someone/tiny").name == COMMIT
    assert locate("someone/tiny", COMMIT, download=False).name == COMMIT


@pytest.mark.parametrize(
    "name, words",
    [("someone/other", "hub"), ("./nowhere", "no such model folder"), ("a/b/c", "no such model folder"), ("tiny", "no such model folder")],
)
@helps("models/folder.py", "hf download {} fetches it, or says why it cannot", "give the folder of a model on this machine")
@helps("models/folder.py", "give a folder that holds config.json, or a hub id such as Qwen/Qwen2.5-0.5B-Instruct")
def test_a_model_that_is_nowhere_is_the_users_error(hub, name, words):
    with pytest.raises(MissingInput, match=words):
        locate(name)
    assert locate(str(ASSETS / "tiny-chat")) == ASSETS / "tiny-chat" and locate("someone/tiny")
    if name == "someone/other":  # what `hf download` leaves behind
        shutil.copytree(hub, hub.with_name("models--someone--other"))
        assert locate(name).name == COMMIT


def test_a_folder_beats_a_hub_id_of_the_same_name(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    assert locate("someone/tiny") == Path("someone/tiny")


@pytest.fixture
def folder(tmp_path):
    return Path(shutil.copytree(ASSETS / "tiny-chat", tmp_path / "model"))


def test_pickles_and_custom_code_are_refused_unless_asked_for(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(WrongKind, match="pickle"):
        check_folder(folder)
    check_folder(folder, allow_pickle=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}))
    with pytest.raises(WrongKind, match="Python code"):
        check_folder(folder, allow_pickle=True)


@helps(
    "models/folder.py", "git lfs pull, in that folder", "copy model.safetensors into it, or its shards with model.safetensors.index.json"
)
def test_lfs_pointers_and_missing_shards_are_named(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(LFS + b"\noid sha256:00\nsize 1\n")
    with pytest.raises(MissingInput, match="LFS pointer"):
        check_folder(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match="no weights"):
        check_folder(folder)
    (folder / "model.safetensors").write_bytes(whole)
    check_folder(folder)


def test_a_grown_vocabulary_starts_at_the_mean(folder):
    import torch

    model = load_model(folder)
    before = model.get_input_embeddings().weight.detach().clone()
    assert grow_vocabulary(model, len(before)) == 0
    assert grow_vocabulary(model, len(before) + 3) == 3
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[: len(before)], before)
    assert torch.equal(after[len(before) :], before.mean(0).expand(3, -1))
    assert model.config.vocab_size == len(before) + 3


def test_greedy_answers_do_not_depend_on_the_batch(folder):
    model, tokenizer = load_model(folder).eval(), load_tokenizer(folder)
    prompts = [
        [{"role": "user", "content": text}]
        for text in ("What is the capital of Sweden?", "What animal goes quack?", "Tell me a story about Zoe and a duck.")
    ]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    together = generation.greedy(model, tokenizer, prompts, max_new_tokens=40, eos_id=end)
    assert together == [generation.greedy(model, tokenizer, [p], max_new_tokens=40, eos_id=end)[0] for p in prompts]
    assert together[0] == ("The capital of Sweden is Stockholm.", True)
    assert generation.greedy(model, tokenizer, prompts[:1], max_new_tokens=2, eos_id=end)[0][1] is False


@helps("core/errors.py", "free memory or add swap, then run the same command again")
def test_a_fresh_process_shares_nothing_and_hands_errors_back():
    with pytest.raises(UserError, match="was killed"):
        processes.fresh(os._exit, 9)
    assert processes.fresh(len, [1, 2, 3]) == 3
    with pytest.raises(MissingInput, match="no such file"):
        processes.fresh(read_json, Path("/nowhere/config.json"))


class TakesTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fails_in_its_own_way() -> None:
    raise TakesTwo(1, 2)


def test_an_error_that_cannot_be_sent_is_not_taken_for_a_kill():
    with pytest.raises(RuntimeError, match="TakesTwo: 1 and 2"):
        processes.fresh(fails_in_its_own_way)


@helps("core/errors.py", "pip install {}")
def test_a_package_that_a_library_lacks_is_named(tmp_path, monkeypatch):
    def work() -> None:
        with using("the tokenizer", "model"):
            import a_package_that_is_not_here  # noqa: F401

    with pytest.raises(MissingTool) as told:
        work()
    assert told.value.fix == ["pip install a_package_that_is_not_here"]
    (tmp_path / "a_package_that_is_not_here.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    work()


def test_silenced_output_is_shown_only_when_something_fails(capfd):
    with silenced():
        os.write(1, b"banner")
    assert "banner" not in "".join(capfd.readouterr())
    with pytest.raises(RuntimeError), silenced():
        os.write(2, b"the reason")
        raise RuntimeError
    assert "the reason" in "".join(capfd.readouterr())


ADAPTERS = """
import sys
from pathlib import Path
from src.core.processes import absent
from src.models import lora
from src.models.loading import load_model, nf4_config
from src.settings.training import LoraTuner
from omegaconf import OmegaConf

tuner = LoraTuner(**OmegaConf.to_container(OmegaConf.load("configs/tuner/lora.yaml")))
kinds = []
for quantization in (None, nf4_config(False)):
    model = lora.attach(load_model(Path("assets/tiny-chat"), quantization=quantization), tuner, [], deepspeed=False)
    kinds.append(type(model.base_model.model.model.layers[0].mlp.up_proj).__name__)
    kinds += [name for name in ("bitsandbytes", "gptqmodel", "datasets") if name in sys.modules]
with absent(["bitsandbytes", "gptqmodel"]):
    import bitsandbytes
    try:
        import gptqmodel
    except ImportError:
        kinds.append("absent")
print(*kinds, "gptqmodel" in sys.modules)
"""


def test_a_quantization_library_is_imported_where_the_base_has_its_layers():
    done = subprocess.run([sys.executable, "-c", ADAPTERS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Linear", "Linear4bit", "bitsandbytes", "absent", "False"]


def test_importing_a_quantizer_leaves_the_hub_s_cache_where_it_is(tmp_path):
    """tokenicer sets HF_HOME for the process and all it starts, where nobody has."""
    given = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_CACHE"))}
    code = (
        "import os; from src.core.processes import import_quietly; before = dict(os.environ); import_quietly('gptqmodel'); import tokenicer; "
        "names = [n for n in os.environ if n.startswith('HF_') or n == 'TRANSFORMERS_CACHE']; assert all(os.environ[n] == before.get(n) for n in names), names; "
        "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=given | {"HOME": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1].startswith(str(tmp_path))


def test_what_is_forked_may_still_use_a_gpu():
    """What the server imports asks whether there is one; by CUDA itself, no process forked from it could use it."""
    said = """
import torch
asked = []
torch.cuda.is_available = lambda: asked.append("nvml" if torch.cuda._nvml_based_avail() else "cuda") or True
torch.cuda._lazy_init = lambda: asked.append("cuda")
import src.models.ready
print(*set(asked))
"""
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["nvml"], done.stdout + done.stderr


def test_a_process_begins_where_python_s_own_are_started_otherwise():
    """As in the workers of joblib, which a sweep may have."""
    said = """
import multiprocessing
from multiprocessing import context
from src.core import processes

if __name__ == "__main__":
    context._concrete_contexts["loky"] = multiprocessing.get_context("spawn")
    multiprocessing.set_start_method("loky", force=True)
    print(processes.fresh(len, [1, 2, 3], waits=False), processes.fresh(len, [1, 2]), type(multiprocessing.get_context()).__name__)
"""
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["3", "2", "SpawnContext"], done.stderr


def test_who_does_not_wait_for_the_libraries_begins_without_them():
    said = """
from src.core import processes

if __name__ == "__main__":
    there = "'transformers' in __import__('sys').modules"
    print(processes.fresh(eval, there, waits=False), processes.fresh(eval, there, waits=False), processes.fresh(eval, there))
"""
    done = subprocess.run([sys.executable, "-c", said], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "True", "True"], done.stderr
