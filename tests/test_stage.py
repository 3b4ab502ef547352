"""The one door: what is skipped, refused and told, for every fault a user can make before any costly work."""

import dataclasses
import json
import os
import shutil
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CHAT, FEW, fake_adapter, fake_merge, helps, in_process, refused, save, ways, worked, write_model

from src import data
from src.core import artifact, files, stage
from src.core.errors import (
    BadData,
    Busy,
    ConfigError,
    MissingInput,
    MissingTool,
    Moved,
    NoAnswer,
    NoRoom,
    ProofFailed,
    Tampered,
    ToolFailed,
    Unfinished,
    UserError,
    WrongKind,
)
from src.core.files import hash_files
from src.training import choices


@pytest.fixture
def plan(finished, tmp_path, monkeypatch):
    """plan(verb, *overrides): a dry run of a new run, on the parts of the finished run; nothing may come of it."""
    a = finished / "a"
    usual = {
        "finetune": {"source": a / "data", "model.path": finished / "inputs" / "base", "launch.nproc_per_node": 1},
        "merge": {"source": a / "finetune"},
        "quantize": {"source": a / "merge", "dataset": a / "data"},
        "evaluate": {"source": a / "merge", "dataset": a / "data"},
        "deploy": {"source": a / "merge"},
        "data": {},
    }

    def run(verb: str, *overrides: str):
        given = usual[verb] | dict(o.split("=", 1) for o in overrides)
        done = in_process(verb, "run=new", f"outputs={tmp_path / 'new'}", "dry_run=true", *(f"{k}={v}" for k, v in given.items()))
        assert not (tmp_path / "new" / "new").exists()
        return done

    return run


def test_exit_codes_differ_and_stay():
    """Scripts of other people rely on them."""
    errors = (ConfigError, MissingInput, WrongKind, Moved, BadData, MissingTool, ProofFailed, Tampered, NoRoom, Busy)
    codes = {c: c.exit_code for c in (*errors, Unfinished, ToolFailed, NoAnswer)}
    assert list(codes.values()) == [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    assert len({c.title for c in codes}) == len(codes)


def test_an_error_survives_the_way_between_processes():
    import pickle

    error = pickle.loads(pickle.dumps(WrongKind("what", where="where", fix=["one", "two"])))
    assert (type(error), str(error)) == (WrongKind, "wrong kind of input: what\n  where: where\n  fix:   one\n  or:    two")


# ---- the door itself


def through_the_door(work, *argv) -> int:
    before, sys.argv = sys.argv, ["data", *map(str, argv)]
    try:
        with pytest.raises(SystemExit) as done:
            stage.main(dataclasses.replace(data.STAGE, run=work))
        return done.value.code
    finally:
        sys.argv = before


def test_a_bug_keeps_its_traceback_and_publishes_nothing(tmp_path, finished):
    def work(cfg, inputs, out):
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        through_the_door(work, f"outputs={tmp_path}", f"data.path={finished / 'inputs' / 'chats.json'}")
    assert not (tmp_path / "default" / "data").exists()


@pytest.mark.parametrize("error", [ConfigError, MissingInput, WrongKind, BadData, MissingTool, ProofFailed, UserError])
def test_a_users_fault_inside_the_work_ends_with_its_code(tmp_path, finished, capsys, error):
    def work(cfg, inputs, out):
        (out / "half").write_text("x")
        raise error("what happened", where="there", fix="this way")

    assert through_the_door(work, f"outputs={tmp_path}", f"data.path={finished / 'inputs' / 'chats.json'}") == error.exit_code
    assert capsys.readouterr().err.endswith("what happened\n  where: there\n  fix:   this way\n")
    assert not (tmp_path / "default" / "data").exists()


def test_other_ranks_work_and_never_build(tmp_path, finished, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    seen = []
    assert (
        through_the_door(
            lambda cfg, inputs, out: seen.append(out) or {}, f"outputs={tmp_path}", f"data.path={finished / 'inputs' / 'chats.json'}"
        )
        == 0
    )
    assert seen == [tmp_path / "default" / "data.partial"] and not (tmp_path / "default").exists()
    assert capsys.readouterr().err == ""


def test_flattened_settings():
    assert files.flatten({"a": {"b": 1, "c": {}}, "d": [1, "é"]}) == {"a.b": 1, "a.c": "{}", "d": '[1, "é"]'}


# ---- finished before


@pytest.mark.parametrize(
    "verb, argv",
    [("data", FEW), ("finetune", ["launch.nproc_per_node=1"]), ("merge", []), ("quantize", []), ("evaluate", []), ("deploy", [])],
)
def test_equal_work_is_skipped(call, road, verb, argv):
    own = {"data": [f"data.path={road / 'inputs' / 'chats.json'}"], "finetune": [f"model.path={road / 'inputs' / 'base'}"]}.get(verb, [])
    before = hash_files(road / "a")
    done = call(verb, "run=a", *argv, *own)
    assert done.returncode == 0 and "up to date, skipped" in done.stderr
    assert hash_files(road / "a") == before


def test_a_setting_that_moved_is_named(call, road):
    done = call("finetune", "run=a", f"model.path={road / 'inputs' / 'base'}", "launch.nproc_per_node=1", "tuner.rank=8", "train.epochs=2")
    refused(done, Moved, "tuner.rank 64 -> 8", "train.epochs 5.0 -> 2.0", "force=true", "run=OTHER_NAME")
    assert "tuner.alpha" not in done.stderr
    done = call("finetune", "run=a", f"model.path={road / 'inputs' / 'base'}", "launch.nproc_per_node=1", "tuner=full")
    refused(done, Moved, "tuner.kind lora -> full", "tuner.rank 64 -> (not set)")


@helps("core/stage.py", "force=true makes it again in place", "{} keeps both", "go back to the old settings")
@pytest.mark.parametrize(
    "verb, own", [("data", ["data.path={road}/inputs/chats.json", *FEW]), ("finetune", ["model.path={road}/inputs/base"])]
)
def test_each_way_out_of_a_setting_that_moved(call, road, verb, own):
    own = [*(setting.format(road=road) for setting in own), *(["launch.nproc_per_node=1"] if verb == "finetune" else [])]
    other = {"data": "data.split_seed=9", "finetune": "tuner.rank=8"}[verb]
    again, both, back = ways(call(verb, "run=a", *own, other))
    assert (again, back) == ("force=true makes it again in place", "go back to the old settings")
    assert "up to date" in call(verb, "run=a", *own).stderr
    assert call(verb, *both.removesuffix(" keeps both").split(), *own, other, "dry_run=true").returncode == 0
    assert call(verb, "run=a", "force=true", *own, other, "dry_run=true").returncode == 0


def test_a_parent_that_moved_is_named(call, road):
    old = artifact.open_artifact(road / "a" / "data").key
    assert call("data", "run=a", *FEW, "data.split_seed=9", f"data.path={road / 'inputs' / 'chats.json'}", "force=true").returncode == 0
    new = artifact.open_artifact(road / "a" / "data").key
    done = call("finetune", "run=a", f"model.path={road / 'inputs' / 'base'}", "launch.nproc_per_node=1")
    refused(done, Moved, "parent dataset", old[:12], new[:12], "force=true")
    assert "parent model" not in done.stderr


def test_an_input_file_that_changed_is_named(call, road):
    chats = road / "inputs" / "chats.json"
    chats.write_text(json.dumps(json.loads(chats.read_text())[:-1]))
    refused(call("data", "run=a", *FEW, f"data.path={chats}"), Moved, "parent conversations", chats)


@helps("core/stage.py", "python -m src.{} {} force=true brings it up to date", "source={} takes it as it is")
def test_an_input_made_from_something_since_replaced_is_refused(call, road):
    """Deploying the merge of an earlier fine-tune would put an old model into a new bundle."""
    worked("finetune", fake_adapter, "run=a", f"outputs={road}", f"model.path={road / 'inputs' / 'base'}", "tuner.rank=8", "force=true")
    for verb in ("quantize", "deploy", "evaluate"):
        refused(call(verb, "run=a", "force=true"), Moved, "earlier", "finetune", f"python -m src.merge run=a outputs={road} force=true")
    told = call("deploy", "run=a", "force=true", "dry_run=true", f"source={road / 'a' / 'merge'}")
    assert told.returncode == 0 and "warning" in told.stderr and "earlier" in told.stderr
    assert "made anew since" in call("summary", "run=a").stdout
    assert "made anew since" in call("lineage", road / "a" / "merge").stdout
    worked("merge", fake_merge, "run=a", f"outputs={road}", "force=true")
    for verb in ("quantize", "deploy"):
        assert call(verb, "run=a", "force=true", "dry_run=true").returncode == 0


@helps("core/stage.py", "go back to the old settings: it goes on", "{} keeps both", "force=true clears it and starts anew")
def test_an_unfinished_run_that_can_go_on_is_not_cleared_by_another_setting(call, road):
    def stopped(cfg, inputs, out):
        (out / "checkpoints" / "checkpoint-7").mkdir(parents=True, exist_ok=True)
        (out / "checkpoints" / "checkpoint-7" / "whole").write_text("1")
        raise KeyboardInterrupt

    argv = ["run=b", f"outputs={road}", f"source={road / 'a' / 'data'}", f"model.path={road / 'inputs' / 'base'}"]
    with pytest.raises(AssertionError, match="interrupted"):
        worked("finetune", stopped, *argv)
    told = call("finetune", *argv, "tuner.rank=8", "dry_run=true")
    refused(
        told, Moved, "tuner.rank 64 -> 8", "unfinished", "go back to the old settings: it goes on", "force=true clears it and starts anew"
    )
    elsewhere = ways(told)[1].removesuffix(" keeps both").split()
    assert call("finetune", *elsewhere, argv[1], argv[3], "tuner.rank=8", "dry_run=true").returncode == 0
    assert call("finetune", *argv, "tuner.rank=8", "dry_run=true", "force=true").returncode == 0
    assert (road / "b" / "finetune.partial" / "checkpoints" / "checkpoint-7").is_dir()
    worked("finetune", fake_adapter, *argv)
    assert (road / "b" / "finetune" / "checkpoints" / "checkpoint-7").is_dir(), "the same settings went on in it"


def test_settings_alone_can_be_checked(call, road):
    base = f"model.path={road / 'inputs' / 'base'}"
    assert call("finetune", "run=none", base, "--settings-only").returncode == 0
    refused(call("finetune", "run=none", base, "trian.seed=2", "--settings-only"), ConfigError, "train.seed")
    refused(call("finetune", "run=none", "model.path=./nowhere", "--settings-only"), MissingInput, "nowhere")
    assert not (road / "none").exists()


# ---- inputs that are not there


@helps("core/stage.py", "python -m src.{} {}", "python -m src.data {} data.path=YOURS")
def test_the_command_that_a_missing_input_names_leads_to_it(call, road, tmp_path):
    """Each names the one before it, down to one that needs nothing; then each of them goes through."""
    usual = {"finetune": ["launch.nproc_per_node=1", f"model.path={road / 'inputs' / 'base'}"]}
    steps, done = ["quantize"], call("quantize", "run=b", "dry_run=true")
    while done.returncode == MissingInput.exit_code:
        verb, *argv = ways(done)[0].removeprefix("python -m src.").split()
        steps.append(verb)
        assert argv == ["run=b", f"outputs={road}", *["data.path=YOURS"] * (verb == "data")]
        argv = [word.replace("YOURS", str(road / "inputs" / "chats.json")) for word in argv]
        done = call(verb, *argv, *usual.get(verb, []), "dry_run=true")
    assert steps == ["quantize", "merge", "finetune", "data"] and done.returncode == 0
    assert call("data", *argv).returncode == 0
    worked("finetune", fake_adapter, *argv[:2], *usual["finetune"])
    worked("merge", fake_merge, *argv[:2])
    assert call("quantize", "run=b", "dry_run=true").returncode == 0


@helps("core/stage.py", "run={} has one")
@pytest.mark.parametrize(
    "verb, lacks", [("finetune", "data"), ("merge", "finetune"), ("quantize", "merge"), ("evaluate", "finetune"), ("deploy", "merge")]
)
def test_a_run_without_its_input_names_runs_that_have_it(call, road, verb, lacks):
    refused(
        call(verb, "run=b"),
        MissingInput,
        f"run 'b' has no finished '{lacks}'",
        road / "b" / lacks,
        f"python -m src.{lacks} run=b",
        "run=a has one",
    )
    assert not (road / "b").exists()
    assert (
        "up to date"
        in call(
            verb, "run=a", *(["launch.nproc_per_node=1", f"model.path={road / 'inputs' / 'base'}"] if verb == "finetune" else [])
        ).stderr
    )


def test_an_unfinished_input_is_no_input(call, road):
    (road / "a" / "merge").rename(road / "a" / "merge.partial")
    (road / "a" / "merge.partial" / "manifest.json").unlink()
    shutil.rmtree(road / "a" / "quantize")
    refused(call("merge", "run=b"), MissingInput, "run=a has one")
    refused(call("quantize", "run=b"), MissingInput, "has no finished 'merge'")


@helps("summary.py", "python -m src.data {} starts one")
def test_summary_of_no_run(call):
    told = call("summary", "run=nowhere")
    refused(told, MissingInput, "nowhere", "python -m src.data run=nowhere")
    assert call("data", *ways(told)[0].split()[3:5]).returncode == call("summary", "run=nowhere").returncode == 0


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere", "nobody/nothing", "a/b/c", "'~/model'"])
def test_a_model_that_is_nowhere(plan, path):
    refused(plan("finetune", f"model.path={path}"), MissingInput, path.strip("'"))


def test_a_model_path_that_is_a_file(plan, tmp_path):
    (tmp_path / "model.gguf").write_text("x")
    refused(plan("finetune", f"model.path={tmp_path / 'model.gguf'}"), MissingInput, "model.gguf")


@helps("models/folder.py", "base=FOLDER names its new place")
def test_a_base_that_moved_away(call, road):
    (road / "inputs" / "base").rename(road / "inputs" / "moved")
    shutil.rmtree(road / "a" / "merge")
    refused(call("merge", "run=a"), MissingInput, road / "inputs" / "base", "base=FOLDER")
    assert call("merge", "run=a", f"base={road / 'inputs' / 'moved'}", "dry_run=true").returncode == 0


# ---- inputs of another kind


@pytest.mark.parametrize(
    "verb, override, words",
    [
        ("finetune", "source={a}/finetune", "takes dataset, not adapter"),
        ("finetune", "source={a}/merge", "takes dataset, not model"),
        ("finetune", "model.path={a}/finetune", "takes model or quantized, not adapter"),
        ("finetune", "model.path={a}/data", "takes model or quantized, not dataset"),
        ("finetune", "model.path={a}/deploy-llama2c", "not bundle"),
        ("merge", "source={a}/data", "takes adapter, not dataset"),
        ("merge", "source={a}/quantize", "takes adapter, not quantized"),
        ("merge", "source={a}/merge", "takes adapter, not model"),
        ("merge", "base={a}/data", "not dataset"),
        ("quantize", "source={a}/finetune", "takes model, not adapter"),
        ("quantize", "source={a}/quantize", "takes model, not quantized"),
        ("quantize", "source={a}/data", "takes model, not dataset"),
        ("quantize", "dataset={a}/merge", "takes dataset, not model"),
        ("deploy", "source={a}/finetune", "takes model or quantized, not adapter"),
        ("deploy", "source={a}/data", "takes model or quantized, not dataset"),
        ("deploy", "source={a}/evaluate-merge", "not report"),
        ("evaluate", "source={a}/data", "not dataset"),
        ("evaluate", "source={a}/deploy-llama2c", "not bundle"),
        ("evaluate", "dataset={a}/finetune", "takes dataset, not adapter"),
        ("evaluate", "parent={a}/data", "not dataset"),
    ],
)
@helps("core/stage.py", "give {}, which it was made from", "python -m src.merge source={} makes a model of it")
@helps("core/stage.py", "python -m src.data data.path=FILE makes a dataset", "python -m src.finetune makes an adapter")
@helps("core/stage.py", "give a folder of weights with their config.json")
def test_a_wrong_kind_says_what_it_is_and_what_to_give(plan, finished, verb, override, words):
    setting, _, path = override.format(a=finished / "a").partition("=")
    told = plan(verb, f"{setting}={path}")
    refused(told, WrongKind, words, path)
    (way,) = ways(told)
    made = {"src.merge": "a/merge", "src.data": "a/data", "src.finetune": "a/finetune", "config.json": "inputs/base"}
    instead = next((finished / folder for words, folder in made.items() if words in way), way.partition(",")[0].removeprefix("give "))
    assert plan(verb, f"{setting}={instead}").returncode == 0, way


@helps("core/artifact.py", "give the folder that holds one of them, which may be inside this one")
def test_a_folder_of_nothing_known(plan, tmp_path):
    (tmp_path / "photos").mkdir()
    refused(plan("quantize", f"source={tmp_path / 'photos'}"), WrongKind, "photos", "config.json")
    assert plan("quantize", f"source={write_model(tmp_path / 'photos' / 'inside')}").returncode == 0


@helps("merge.py", "base=FOLDER names the one it was trained on", "fine-tune again on this base")
def test_a_base_that_is_not_the_adapters(plan, call, road, tmp_path):
    other = write_model(tmp_path / "other", tie_word_embeddings=False)
    refused(
        plan("merge", f"base={other}"), WrongKind, "not the base the adapter was trained on", other, "base=FOLDER names", "fine-tune again"
    )
    assert plan("merge", f"base={road / 'inputs' / 'base'}").returncode == 0
    worked("finetune", fake_adapter, "run=c", f"outputs={road}", f"source={road / 'a' / 'data'}", f"model.path={other}")
    assert call("merge", "run=c", f"base={other}", "dry_run=true").returncode == 0


@helps("training/rules.py", "tuner=qlora trains adapters on a GPTQ base", "give the model that it was quantized from", "tuner.dora=false")
def test_a_quantized_base_for_plain_lora(plan, finished):
    quantized, whole = f"model.path={finished / 'a' / 'quantize'}", f"model.path={finished / 'a' / 'merge'}"
    refused(plan("finetune", quantized), WrongKind, "quantized (gptq)", "tuner=qlora", "give the model that it was quantized from")
    assert plan("finetune", quantized, "tuner=qlora").returncode == plan("finetune", whole).returncode == 0
    refused(plan("finetune", quantized, "tuner=qlora", "tuner.dora=true"), ConfigError, "no DoRA", "tuner.dora=false", "quantized from")
    for given in ([quantized, "tuner.dora=false"], [whole, "tuner.dora=true"]):
        assert plan("finetune", "tuner=qlora", *given).returncode == 0


@pytest.mark.parametrize("change, words", [({"lora_bias": True}, "lora_bias"), ({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "bias")])
def test_adapters_that_cannot_be_merged(plan, finished, tmp_path, change, words):
    folder = shutil.copytree(finished / "a" / "finetune", tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | change))
    refused(plan("merge", f"source={folder}", f"base={finished / 'inputs' / 'base'}"), WrongKind, words, folder)


def test_an_adapter_whose_weights_are_a_pickle(plan, finished, tmp_path):
    folder = shutil.copytree(finished / "a" / "finetune", tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(plan("merge", f"source={folder}", f"base={finished / 'inputs' / 'base'}"), WrongKind, "a pickle (adapter_model.bin)", folder)


@pytest.mark.parametrize(
    "name, error", [("adapter_config.json", BadData), ("tokenizer.json", BadData), ("adapter_model.safetensors", BadData)]
)
def test_a_damaged_adapter(plan, finished, tmp_path, name, error):
    folder = shutil.copytree(finished / "a" / "finetune", tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    (folder / name).write_bytes((folder / name).read_bytes()[:-7])
    refused(plan("merge", f"source={folder}", f"base={finished / 'inputs' / 'base'}"), error, folder / name)


@helps("models/merging.py", "base=FOLDER names the base it was trained on")
def test_an_adapter_of_another_model(plan, finished, tmp_path):
    folder = shutil.copytree(finished / "a" / "finetune", tmp_path / "adapter")
    (folder / "manifest.json").unlink()
    at = "base_model.model.transformer.h.0.attn.c_attn"
    save(folder / "adapter_model.safetensors", {f"{at}.lora_A.weight": np.ones((4, 8)), f"{at}.lora_B.weight": np.ones((8, 4))})
    refused(
        plan("merge", f"source={folder}", f"base={finished / 'inputs' / 'base'}"), WrongKind, "transformer.h.0.attn.c_attn", "base=FOLDER"
    )
    base = write_model(tmp_path / "base")
    tensors = {"transformer.h.0.attn.c_attn.weight": np.ones((8, 8)), "model.embed_tokens.weight": np.ones((1024, 8))}
    save(base / "model.safetensors", tensors)
    assert plan("merge", f"source={folder}", f"base={base}").returncode == 0


# ---- model folders that are not whole, or not safe


@pytest.fixture
def model(tmp_path) -> Path:
    return write_model(tmp_path / "model")


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


VERBS_OF_MODELS = [("finetune", "model.path"), ("quantize", "source"), ("deploy", "source")]


@pytest.mark.parametrize("verb, key", VERBS_OF_MODELS)
class TestModelFolders:
    def test_whole(self, plan, model, verb, key):
        assert plan(verb, f"{key}={model}").returncode == 0

    def test_pickled_weights(self, plan, model, verb, key):
        (model / "model.safetensors").rename(model / "pytorch_model.bin")
        refused(plan(verb, f"{key}={model}"), WrongKind, "pickle", "safetensors", model)

    def test_code_of_its_own(self, plan, model, verb, key):
        edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Evil"})
        refused(plan(verb, f"{key}={model}"), WrongKind, "Python code", "trust_remote_code=true", model / "config.json")

    def test_no_weights(self, plan, model, verb, key):
        (model / "model.safetensors").unlink()
        refused(plan(verb, f"{key}={model}"), MissingInput, "no weights", "model.safetensors", model)

    def test_git_lfs_pointer(self, plan, model, verb, key):
        (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n")
        refused(plan(verb, f"{key}={model}"), MissingInput, "Git LFS pointer", "git lfs pull", model)

    def test_cut_off_weights(self, plan, model, verb, key):
        os.truncate(model / "model.safetensors", 100_000)
        refused(plan(verb, f"{key}={model}"), BadData, "model.safetensors", "download it again")

    def test_a_shard_is_missing(self, plan, model, verb, key):
        (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
        refused(plan(verb, f"{key}={model}"), MissingInput, "model-00002-of-00002.safetensors", model)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
@helps("core/errors.py", "copy or download it again, or mend it where you changed it")
def test_weights_cut_off_anywhere(plan, model, keep):
    whole = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(whole[:keep])
    refused(plan("finetune", f"model.path={model}"), BadData, "model.safetensors", "copy or download it again")
    (model / "model.safetensors").write_bytes(whole)
    assert plan("finetune", f"model.path={model}").returncode == 0


@pytest.mark.parametrize("header", [b"\xff" * 64, b"not json" * 8, b"[]", b'"x"', b'{"a": 1}', b'{"a": {"dtype": "F32"}}'])
def test_weights_of_another_format(plan, model, header):
    (model / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"data")
    refused(plan("finetune", f"model.path={model}"), BadData, "model.safetensors")


@pytest.mark.parametrize(
    "content", ["{}", "", '{"weight_map": []}', '{"weight_map": {"a": "../../etc/passwd"}}', '{"weight_map": {"a": 5}}']
)
def test_a_damaged_index(plan, model, content):
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(content)
    refused(plan("finetune", f"model.path={model}"), BadData, "model.safetensors.index.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe{}", b"[" * 100_000])
def test_a_damaged_config(plan, model, content):
    (model / "config.json").write_bytes(content)
    refused(plan("finetune", f"model.path={model}"), BadData, model / "config.json")


@helps("models/folder.py", "finetune takes it with model.allow_pickle=true")
@helps(
    "models/folder.py",
    "finetune runs it with model.trust_remote_code=true, if you have read it and trust it, and so does what follows in that run",
)
def test_pickles_and_code_can_be_allowed(plan, model):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Fine"})
    assert plan("finetune", f"model.path={model}", "model.allow_pickle=true", "model.trust_remote_code=true").returncode == 0


@helps("models/folder.py", "save it with transformers' save_pretrained, which writes safetensors")
def test_pickled_weights_are_saved_anew(plan, model):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    for verb, key in VERBS_OF_MODELS:
        refused(
            plan(verb, f"{key}={model}"),
            WrongKind,
            "save it with transformers' save_pretrained",
            "finetune takes it with model.allow_pickle=true",
        )
    AutoModelForCausalLM.from_pretrained(model).save_pretrained(model)
    for verb, key in VERBS_OF_MODELS:
        assert plan(verb, f"{key}={model}").returncode == 0


@helps("models/folder.py", "python -m src.aux_files source=BASE_MODEL target={} copies it from the base model")
@helps("deploy/llama2c/__init__.py", "python -m src.aux_files source=BASE_MODEL target={}")
@helps("deploy/mobilint/plan.py", "python -m src.aux_files source=BASE_MODEL target={}")
def test_a_model_without_tokenizer(plan, model, finished):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    refused(plan("deploy", f"source={model}"), MissingInput, "tokenizer", f"python -m src.aux_files source=BASE_MODEL target={model}")
    refused(plan("quantize", f"source={model}"), MissingInput, "tokenizer", f"python -m src.aux_files source=BASE_MODEL target={model}")
    board = ["target=mobilint_aries", "target.context_len=512", f"dataset={finished / 'a' / 'data'}"]
    refused(plan("deploy", f"source={model}", *board), MissingInput, f"python -m src.aux_files source=BASE_MODEL target={model}")
    assert in_process("aux_files", f"source={CHAT}", f"target={model}").returncode == 0
    for verb, more in (("quantize", []), ("deploy", []), ("deploy", board)):
        assert plan(verb, f"source={model}", *more).returncode == 0


# ---- rules between settings, or between a setting and its input


@helps("quantize.py", "quantizer.group_size={}", "quantizer.group_size=-1")
@pytest.mark.parametrize("group", [128, 64])
def test_a_group_size_that_does_not_divide(plan, tmp_path, group):
    odd = write_model(tmp_path / "odd", hidden_size=96, intermediate_size=160)
    told = plan("quantize", f"source={odd}", f"quantizer.group_size={group}")
    refused(told, ConfigError, f"group_size={group} does not divide", "model.layers.0")
    assert ways(told) == ["quantizer.group_size=32", "quantizer.group_size=-1"]
    assert all(plan("quantize", f"source={odd}", way).returncode == 0 for way in ways(told))


@helps("quantize.py", "quantizer=gptq_int8", "python -m src.deploy target=llama2c target.format=int8_v2 quantizes it by itself")
def test_rows_that_int4_cannot_pack(plan, tmp_path):
    odd = write_model(tmp_path / "odd", intermediate_size=260)
    told = plan("quantize", f"source={odd}", "quantizer.group_size=-1")
    refused(told, ConfigError, "is 128 x 260, which int4 cannot pack by 8")
    assert plan("quantize", f"source={odd}", "quantizer.group_size=-1", ways(told)[0]).returncode == 0
    verb, *argv = ways(told)[1].removeprefix("python -m src.").removesuffix(" quantizes it by itself").split()
    assert plan(verb, f"source={odd}", *argv).returncode == 0


@helps("training/rules.py", "train.global_batch_size={}", "{}={}", "train.max_length={}")
def test_a_batch_the_processes_cannot_share(plan):
    told = plan("finetune", "train.max_length=600")
    refused(told, ConfigError, "beyond the 512 positions", "train.max_length=512")
    assert plan("finetune", *ways(told)).returncode == 0
    told = plan("finetune", "launch.nproc_per_node=3")
    refused(told, ConfigError, "global_batch_size=8", "3 processes")
    assert ways(told) == ["train.global_batch_size=9", "launch.nproc_per_node=2"]
    assert all(
        plan("finetune", *{"n": "launch.nproc_per_node=3", way.partition("=")[0]: way}.values()).returncode == 0 for way in ways(told)[:1]
    )
    assert plan("finetune", ways(told)[1]).returncode == 0
    done = plan("finetune", "launch.nproc_per_node=2", "train.micro_batch_size=3")
    assert "2 processes, 8 conversations a step" in done.stderr, "how many fit in a forward pass is the layout's affair"


@helps("training/rules.py", "deepspeed=zero2", "tuner=lora deepspeed=zero3", "drop {}")
def test_what_zero3_cannot_partition(plan):
    told = plan("finetune", "tuner=qlora", "deepspeed=zero3")
    refused(told, ConfigError, "4-bit base cannot be partitioned")
    assert ways(told) == ["deepspeed=zero2", "tuner=lora deepspeed=zero3"]
    assert plan("finetune", "tuner=qlora", "deepspeed=zero2").returncode == plan("finetune", *ways(told)[1].split()).returncode == 0
    for whole, more in (("tuner.dora=true", []), ("tuner.init=pissa", ["tuner.dropout=0"])):
        told = plan("finetune", whole, *more, "deepspeed=zero3")
        refused(told, ConfigError, f"{whole} reads whole base weights")
        assert ways(told) == ["deepspeed=zero2", f"drop {whole}"]
        assert plan("finetune", whole, *more, "deepspeed=zero2").returncode == plan("finetune", *more, "deepspeed=zero3").returncode == 0


@pytest.mark.parametrize(
    "content, option, error, words",
    [
        ('{"scheduler": {"type": "WarmupLR"}}', "zero2", ConfigError, "'scheduler'"),
        ('{"optimizer": {"type": "Adam"}, "scheduler": {}}', "zero2", ConfigError, "'optimizer'"),
        ('{"zero_optimization": {"stage": 3}}', "zero2", ConfigError, "its ZeRO stage is 3, the settings say 2"),
        ("{}", "none", ConfigError, "deepspeed=none would ignore it"),
        ("{", "zero2", BadData, "not valid JSON"),
        ("[]", "zero2", BadData, "expected a JSON object"),
        ('{"bf16": {"bf16_master_weights_and_grads": true}}', "zero2", ConfigError, "leaves no fp32 weights"),
        ('{"zero_optimization": 2}', "zero2", BadData, "zero_optimization"),
        ('{"train_batch_size": 16}', "zero2", ConfigError, "train_batch_size=16 is for train.global_batch_size=16 to say"),
        ('{"train_micro_batch_size_per_gpu": 2}', "zero2", ConfigError, "for train.micro_batch_size=2 to say"),
        ('{"gradient_accumulation_steps": 8}', "zero2", ConfigError, "gradient_accumulation_steps=8 is for train.micro_batch_size to say"),
        ('{"fp16": {"enabled": true}}', "zero2", ConfigError, "for train.precision=fp16 to say"),
        ('{"bf16": 7}', "zero2", ConfigError, "bf16 is 7, not a block"),
    ],
)
def test_a_deepspeed_file_that_contradicts(plan, tmp_path, content, option, error, words):
    (tmp_path / "ds.json").write_text(content)
    refused(plan("finetune", f"deepspeed={option}", f"deepspeed.config={tmp_path / 'ds.json'}"), error, words)


def test_numbers_of_a_deepspeed_file_that_the_settings_say_too(plan, tmp_path):
    """What a refusal tells to write is taken."""
    (tmp_path / "ds.json").write_text('{"train_batch_size": 16, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0}')
    argv = [
        "finetune",
        "deepspeed=zero2",
        f"deepspeed.config={tmp_path / 'ds.json'}",
        "train.global_batch_size=16",
        "launch.nproc_per_node=1",
    ]
    assert plan(*argv, "train.micro_batch_size=2").returncode == 0


@helps(
    "training/checks.py",
    "give a JSON file that is there",
    "deepspeed=zero2 or deepspeed=zero3 needs none",
    "name its stage too: deepspeed=zero2 or deepspeed=zero3",
)
@helps("training/choices.py", "remove what is named from the file")
@helps("training/deepspeed_config.py", "deepspeed=zero2 or deepspeed=zero3 needs no file", "remove what is named from the file")
def test_each_way_out_of_a_deepspeed_file(plan, tmp_path):
    file = tmp_path / "ds.json"
    tuned = lambda *argv: plan("finetune", "launch.nproc_per_node=1", *argv)
    refused(tuned("deepspeed=zero2", f"deepspeed.config={file}"), MissingInput, file, "give a JSON file that is there", "zero3 needs none")
    file.write_text("{}")
    refused(tuned("deepspeed=none", f"deepspeed.config={file}"), ConfigError, "name its stage too: deepspeed=zero2 or deepspeed=zero3")
    for option in ("deepspeed=zero2", "deepspeed=zero3"):
        assert tuned(option, f"deepspeed.config={file}").returncode == tuned(option).returncode == 0
    for content, error in (({"scheduler": {}, "gradient_clipping": 1.0}, ConfigError), ({"zero_optimization": 2}, BadData)):
        file.write_text(json.dumps(content))
        refused(tuned("deepspeed=zero2", f"deepspeed.config={file}"), error, "deepspeed=zero2 or deepspeed=zero3 needs no file")
    file.write_text(json.dumps({"zero_optimization": {"no_such_key": 1}}))
    with pytest.raises(BadData, match="no_such_key") as told:
        choices.check_zero(file)
    assert told.value.fix == ["remove what is named from the file", "deepspeed=zero2 or deepspeed=zero3 needs no file"]
    file.write_text(json.dumps({"gradient_clipping": 1.0}))
    choices.check_zero(file)
    assert tuned("deepspeed=zero2", f"deepspeed.config={file}").returncode == 0


@helps("core/stage.py", "run the command that made {} again with {} force=true")
def test_splits_that_are_empty(plan, call, finished, tmp_path):
    call("data", "run=bare", "data.val=0", "data.calib=0", f"data.path={finished / 'inputs' / 'chats.json'}")
    bare = tmp_path / "outputs" / "bare" / "data"
    for verb, split in (("quantize", "calib"), ("evaluate", "val")):
        told = plan(verb, f"dataset={bare}")
        refused(told, MissingInput, "split is empty", bare, f"data.{split}=0.1 force=true")
        again = {"data.val": 0, "data.calib": 0} | {f"data.{split}": 0.1}
        settings = [f"{key}={value}" for key, value in again.items()]
        assert call("data", "run=bare", *settings, f"data.path={finished / 'inputs' / 'chats.json'}", "force=true").returncode == 0
        assert plan(verb, f"dataset={bare}").returncode == 0


@helps("evaluate.py", "put a backslash before each plain ( [ . * + ?")
def test_an_expectation_that_is_no_pattern(plan):
    refused(plan("evaluate", "evaluation.expect='(unclosed'"), ConfigError, "regular expression", "(unclosed", "a backslash before")
    assert plan("evaluate", "evaluation.expect='\\(unclosed'").returncode == 0


# ---- conversation files


GOOD = {"conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "empty"),
        (b" \n\n ", "empty"),
        (b"[]", "no record"),
        (b"{", "line 1"),
        (b'[{"conversations": [', "line"),
        (b"hello", "begins with 'hello'"),
        (b"5", ""),
        (b"[1, 2, 3]", ""),
        (b'{"a": 1}', ""),
        (json.dumps([GOOD]).encode()[:-5], "line 1"),
        ((json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-3] + "\n").encode(), "2"),
        (json.dumps([GOOD]).encode("utf-16")[:-8], "ends"),
        (json.dumps([GOOD | {"id": "café"}], ensure_ascii=False).encode("latin-1"), "UTF-8"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "the file begins with"),
        (b"\x00" * 100, ""),
        (b"[" * 100_000, ""),
        (json.dumps([{"conversations": []}]).encode(), ""),
        (json.dumps([{"conversations": [{"from": "user", "value": 5}]}]).encode(), ""),
    ],
)
def test_damaged_conversations(call, tmp_path, content, words):
    path = tmp_path / "chats.json"
    path.write_bytes(content)
    refused(call("data", f"data.path={path}"), BadData, path, words)
    assert not (tmp_path / "outputs" / "default" / "data").exists()


@pytest.mark.parametrize(
    "make, words", [(lambda p: None, "no such file"), (lambda p: p.mkdir(), "no file of records"), (lambda p: os.mkfifo(p), "not a file")]
)
def test_conversations_that_are_nowhere(call, tmp_path, make, words):
    make(tmp_path / "chats.json")
    refused(call("data", f"data.path={tmp_path / 'chats.json'}"), MissingInput, words, tmp_path / "chats.json", "data.path=FILE")
