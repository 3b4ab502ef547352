"""A road in one command: its plan, its faults told at once, what ends it, how it goes on, and several that differ in one setting."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import FEW, ROOT, helps, refused, to_its_end, write_model

from src.core import artifact
from src.core.errors import Busy, ConfigError, GateFailed, MissingInput, Moved
from src.pipeline import recipe, run, sweep


@pytest.fixture
def walked(road):
    """The settings with which the finished run was made, as a recipe's file; its run is all up to date."""
    file = road.parent / "walked.yaml"
    inputs = road / "inputs"
    stages = [
        f"data {' '.join(FEW)} data.path={inputs / 'chats.json'}",
        f"finetune launch.nproc_per_node=1 model.path={inputs / 'base'}",
        "merge",
        "quantize",
        "evaluate",
        "deploy",
    ]
    file.write_text(json.dumps({"stages": stages}))
    return [f"recipe={file}", "run=a", f"outputs={road}"]


def written(folder, *stages: str, **more) -> str:
    (folder / "r.yaml").write_text(json.dumps({"stages": list(stages), **more}))
    return f"recipe={folder / 'r.yaml'}"


# ---- recipes


@pytest.mark.parametrize("name", recipe.names())
def test_every_recipe_is_of_stages_with_settings_they_know(name):
    steps = recipe.read(name)
    given = ["distill.prompts.path=p", "distill.teacher.model=m"] if any(step.verb == "distill" for step in steps) else []
    given += ["pretrain.text=t"] if any(step.verb == "pretrain" for step in steps) else []
    steps, faults = recipe.assigned(steps, given)
    assert not faults and len(recipe.composed(steps, ["run=x"])) == len(steps)
    assert (recipe.FOLDER / f"{name}.yaml").read_text().startswith("# "), "a recipe opens with what it is"


@helps("pipeline/recipe.py", "recipe=YOURS.yaml takes one of your own", "recipe=NAME takes one that is there: {}")
def test_a_recipe_that_is_not_there_is_refused_with_the_nearest(call, tmp_path):
    refused(call("pipeline", "recipe=lora_ax560"), ConfigError, "recipe=lora_ax560", "did you mean 'lora_ax650'?")
    refused(call("pipeline", f"recipe={tmp_path / 'r.yaml'}"), MissingInput, "lora_llama2c")
    assert call("pipeline", written(tmp_path, "data"), "dry_run=true").returncode == 0
    assert call("pipeline", "recipe=gptq", "dry_run=true").returncode == 0


@pytest.mark.parametrize(
    "text, words",
    [
        ("stages: [data, mrege]", "did you mean 'merge'?"),
        ("stages: []", "no stages"),
        ("[data]", ""),
        ("stages: [data]\nstage: [merge]", "'stage' beside"),
        ("stages: ['data \"x']", "quotation"),
        ("stages: [1]", ""),
        ("stages: ['']", ""),
        ("\x00", ""),
    ],
)
@helps("pipeline/recipe.py", "write it as those in configs/pipeline are: `stages:`, then a line `- VERB key=value ...` for each")
def test_a_file_that_is_no_recipe_is_refused(text, words, call, tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(text)
    refused(call("pipeline", f"recipe={file}"), ConfigError, "no recipe", words, file)
    file.write_text("stages:\n  - data")
    assert call("pipeline", f"recipe={file}", "dry_run=true").returncode == 0


# ---- settings


@helps("pipeline/recipe.py", "write STAGE.key=value, with a setting as python -m src.STAGE --help lists it")
def test_faults_of_all_stages_come_at_once_as_they_were_typed(call):
    done = call("pipeline", "finetune.tuner.rnk=8", "tuner.alpha=x", "quantzer=gptq_int4", "deploy.target=ax605", "run=?")
    assert done.returncode == 2 and "run=?" in done.stderr, "the pipeline's own come first"
    done = call("pipeline", "finetune.tuner.rnk=8", "tuner.alpha=x", "quantzer=gptq_int4", "deploy.target=ax605")
    refused(done, ConfigError, "4 faults", "finetune.tuner.rnk=8: unknown", "'tuner.rank'", "tuner.alpha=x: ", "did you mean 'quantizer'?")
    assert "deploy.target=ax605: no such target; did you mean 'ax650'?" in done.stderr
    assert call("pipeline", "finetune.train.epochs=1", "tuner.rank=8", "quantizer=gptq_int8", "dry_run=true").returncode == 0


def test_a_setting_goes_where_it_belongs():
    steps = [recipe.Step("data", ()), recipe.Step("finetune", ("tuner=lora",)), recipe.Step("quantize", ()), recipe.Step("deploy", ())]
    given = [
        "data.path=x",
        "data.data.val=0.5",
        "finetune.tuner=qlora",
        "tuner.rank=4",
        "weights=stored",
        "calibration.rows=3",
        "train.epochs=2",
    ]
    found, faults = recipe.assigned(steps, given)
    assert not faults
    assert [step.overrides for step in found] == [
        ("data.path=x", "data.val=0.5"),
        ("tuner=qlora", "tuner.rank=4", "train.epochs=2"),
        ("weights=stored", "calibration.rows=3"),
        ("weights=stored",),
    ]


# ---- the plan, and what is done


def test_a_road_that_is_walked_is_skipped_stage_by_stage(call, walked):
    done = call("pipeline", *walked)
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in done.stdout.splitlines()[2:8]] == ["skipped"] * 6, done.stdout
    assert "evaluate-finetune, evaluate-merge, evaluate-quantize" in done.stdout and "python -m" not in done.stderr


def test_what_was_made_otherwise_is_refused_and_made_again_by_force_with_all_that_follows(call, walked):
    done = call("pipeline", *walked, "tuner.rank=3")
    refused(done, Moved, "tuner.rank 64 -> 3", "force=true makes it, and what follows from it, again in place")
    done = call("pipeline", *walked, "tuner.rank=3", "force=true", "dry_run=true")
    assert done.returncode == 0, done.stderr
    states = {line.split()[1]: line.split()[2] for line in done.stdout.splitlines()[2:8]}
    assert states == {"data": "skipped"} | dict.fromkeys(["finetune", "merge", "quantize", "evaluate", "deploy"], "again")


def test_a_model_that_is_not_there_is_missed_before_the_data_is_read(call, tmp_path):
    refused(call("pipeline", "finetune.model.path=/nowhere/model"), MissingInput, "/nowhere/model")
    assert not (tmp_path / "outputs").exists()


def test_a_stage_that_would_not_fit_is_told_before_the_first_begins(call, tmp_path, monkeypatch):
    monkeypatch.setattr("src.core.memory.available", lambda: 500 << 20)
    monkeypatch.setattr("src.core.memory.swap", lambda: 0)
    done = call("pipeline")
    assert done.returncode == 15 and "finetune: this takes about" in done.stderr, done.stderr
    assert not (tmp_path / "outputs" / "default" / "data").exists()


def test_a_stage_that_fails_ends_the_road_with_its_code_and_the_same_command_goes_on(call, tmp_path):
    chats = tmp_path / "chats.json"
    shutil.copy(ROOT / "assets" / "conversations.json", chats)
    argv = [written(tmp_path, f"data data.path={chats}", "evaluate source=/nowhere")]
    done = call("pipeline", *argv)
    assert done.returncode == 3 and "pipeline: ended at evaluate with exit code 3" in done.stderr
    assert artifact.is_finished(tmp_path / "outputs" / "default" / "data")
    (tmp_path / "r.yaml").write_text(json.dumps({"stages": [f"data data.path={chats}"]}))
    done = call("pipeline", *argv)
    assert done.returncode == 0 and "skipped" in done.stdout


def test_a_report_that_does_not_keep_to_its_gate_is_not_passed_over(monkeypatch, walked, call):
    """It is finished and up to date; the stage is run for its verdict, and its exit code ends the road."""

    def judge(cfg, made):
        raise GateFailed("KL is 0.2, above gate.kl=0.1")

    evaluate = dataclasses.replace(recipe.stage_of("evaluate"), judge=judge)
    monkeypatch.setattr(recipe, "stage_of", lambda verb, real=recipe.stage_of: evaluate if verb == "evaluate" else real(verb))
    started = []
    monkeypatch.setattr(run, "start", lambda verb, argv: started.append(verb) or GateFailed.exit_code)
    done = call("pipeline", *walked)
    assert done.returncode == 17 and started == ["evaluate"] and "KL is 0.2" in done.stdout and "gate=none" in done.stderr


# ---- its processes


def killed(verb, argv):
    os.kill(os.getpid(), signal.SIGKILL)


def writes_its_environment(verb, argv):
    forked = "transformers" in sys.modules
    assert forked == (os.environ["CUDA_VISIBLE_DEVICES"] == "")
    Path(argv[0]).write_text(os.environ["ASKED_WITH"])
    sys.exit(7)


@pytest.mark.parametrize("gpus", ["", "0"])
def test_a_stage_has_the_environment_of_who_begins_it_and_its_code_comes_back(gpus, monkeypatch, tmp_path):
    """Also where the server it is forked from was begun with another; and with a GPU, where none is forked."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    said = []
    for given in ("one", "two"):
        monkeypatch.setenv("ASKED_WITH", given)
        monkeypatch.setattr(run, "as_typed", writes_its_environment)
        assert run.start("evaluate", [str(tmp_path / given)]) == 7
        said.append((tmp_path / given).read_text())
    assert said == ["one", "two"]
    monkeypatch.setattr(run, "as_typed", killed)
    assert run.start("evaluate", []) == -signal.SIGKILL


def walking(argv: list[str], to: str) -> psutil.Popen:
    """A road under way, leader of a group of processes as a shell's or a job's are, that has come so far."""
    road = psutil.Popen([sys.executable, "-m", "src.pipeline", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert any(to in line for line in road.stderr), "it ended before"
    return road


def test_however_a_road_ends_the_same_command_learns_what_another_start_does(eighty, tmp_path):
    """Two workers under DeepSpeed, forked for a stage of a road; asked to end as a job's processes all are, then killed, the road goes on to the bytes of
    a training that was started by itself."""
    model = write_model(tmp_path / "model")
    own = [f"source={eighty}", f"model.path={model}", "deepspeed=zero2", "launch.nproc_per_node=2", "tuner=lora", "train.log_steps=1"]
    own += ["train.max_steps=40", "train.checkpoint_steps=10", "train.eval_steps=1000", "train.samples=0", "max_loss_change=1"]
    argv = [written(tmp_path, " ".join(["finetune", *own])), f"outputs={tmp_path}", "run=road"]
    road = walking(argv, "  step 3/")
    os.killpg(road.pid, signal.SIGTERM)
    said = road.communicate(timeout=60)[1]
    assert road.returncode == 128 + signal.SIGTERM and "stops after this step, with a checkpoint" in said, said
    (checkpoint,) = (tmp_path / "road" / "finetune.partial" / "checkpoints").glob("checkpoint-*")
    road = walking(argv, f"goes on from step {checkpoint.name.split('-')[1]}")
    assert any("  step 11/" in line for line in road.stderr)
    next(p for p in road.children(recursive=True) if p.name() == "finetune" and p.parent().name() == "finetune").kill()
    said = road.communicate(timeout=60)[1]
    assert road.returncode == 128 + signal.SIGKILL and "was killed by signal 9" in said and ".py" not in said, said
    road = walking(argv, "  step 12/")
    family = road.children(recursive=True)
    assert sum(process.name() == "finetune" for process in family) == 3, "the stage and its workers, by the name that ps shows"
    road.kill()
    assert len(family) > 3 and psutil.wait_procs(family, timeout=10)[1] == [], "nothing is left"
    road.communicate()
    done = subprocess.run([sys.executable, "-m", "src.pipeline", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "goes on from step 10" in done.stderr, done.stderr
    code, said = to_its_end([f"outputs={tmp_path}", "run=alone", *own])
    assert code == 0, said
    one, other = ((tmp_path / name / "finetune" / "adapter_model.safetensors").read_bytes() for name in ("road", "alone"))
    assert one == other


def test_a_worker_s_user_error_is_said_once_with_its_code(eighty, tmp_path):
    """The first of two workers finds the folder in use, and the launcher ends the other."""
    own = [f"source={eighty}", f"model.path={write_model(tmp_path / 'model')}", "deepspeed=zero2", "launch.nproc_per_node=2"]
    (tmp_path / "r").mkdir()
    with artifact.held(tmp_path / "r" / ".finetune.lock", tmp_path / "r" / "finetune"):
        argv = [written(tmp_path, " ".join(["finetune", *own])), f"outputs={tmp_path}", "run=r"]
        done = subprocess.run([sys.executable, "-m", "src.pipeline", *argv], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert done.returncode == Busy.exit_code and done.stderr.count("already running: ") == 1 and "Traceback" not in done.stderr, (
            done.stderr
        )


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(tmp_path, cli):
    """The embedded default, kill -9 at random moments, until it is through; twenty kills at least."""
    argv = ["pipeline", "train.max_steps=6", "train.checkpoint_steps=2", "recipe=lora_llama2c"]
    whole = cli(*argv, f"outputs={tmp_path / 'whole'}", timeout=900)
    assert whole.returncode == 0, whole.stderr
    moments, kills, log = random.Random(0), 0, open(tmp_path / "log", "w")
    while kills < 20:
        begun = subprocess.Popen(
            [sys.executable, "-m", f"src.{argv[0]}", *argv[1:], f"outputs={tmp_path / 'killed'}"], cwd=ROOT, stderr=log, stdout=log
        )
        try:
            code = begun.wait(moments.uniform(1, 12))
        except subprocess.TimeoutExpired:
            begun.send_signal(signal.SIGKILL)
            begun.wait()
            kills, code = kills + 1, None
            time.sleep(1)  # until the kernel has ended the stage
        if code == 0:
            shutil.rmtree(
                tmp_path / "killed" / "default" / random.Random(kills).choice(["deploy-llama2c", "quantize", "merge", "finetune"])
            )
        assert code in (0, None), (tmp_path / "log").read_text()
    assert cli(*argv, f"outputs={tmp_path / 'killed'}", timeout=900).returncode == 0
    for path in (tmp_path / "whole" / "default").iterdir():
        if artifact.is_finished(path):
            one, other = (artifact.open_artifact(tmp_path / name / "default" / path.name) for name in ("whole", "killed"))
            assert one.key == other.key
            if one.stage != "evaluate":
                assert {n: f for n, f in one.files.items() if not n.endswith(("report.json", "README.md"))} == {
                    n: f for n, f in other.files.items() if not n.endswith(("report.json", "README.md"))
                }, path.name


# ---- several that differ


def test_a_sweep_is_a_run_for_each_value_and_one_table(cli, tmp_path):
    argv = [written(tmp_path, "data"), "run=s", "data.val=0.2", "data.split_seed=1,2", "objective=data.train_rows"]
    done = cli("pipeline", "--multirun", *argv)
    assert done.returncode == 0, done.stderr
    rows = done.stdout.split("seconds\n")[-1]
    assert "s-split_seed-1" in rows and "s-split_seed-2" in rows
    results = json.loads((tmp_path / "outputs" / "s" / "sweep" / "runs.json").read_text())["runs"]
    assert [r["objective"] for r in results] == sorted(r["objective"] for r in results) and len({r["objective"] for r in results}) == 2
    assert (tmp_path / "outputs" / "s" / "sweep" / "runs.png").read_bytes().startswith(b"\x89PNG")


@helps("pipeline/sweep.py", "give a setting several values, such as tuner.rank=4,8,16")
def test_a_sweep_is_checked_before_its_first_run(call, tmp_path):
    done = call("pipeline", "--multirun", "finetune.tuner.rank=4,x", "deploy.target=llama2c,ax605")
    refused(done, ConfigError, "finetune.tuner.rank=x")
    refused(call("pipeline", "--multirun"), ConfigError, "nothing to sweep over")
    assert not (tmp_path / "outputs").exists()
    done = call("pipeline", "--multirun", "finetune.tuner.rank=4,8,16", "dry_run=true")
    assert done.returncode == 0 and "finetune.tuner.rank=4,8,16" in done.stderr


def test_stages_before_what_is_swept_over_are_shared_and_linked(road, tmp_path):
    steps = recipe.read("lora_llama2c")
    assert [s.verb for s in sweep.shared_steps(steps, ["quantizer"])] == ["data", "finetune", "merge"]
    assert [s.verb for s in sweep.shared_steps(steps, ["target", "tuner.rank"])] == ["data"]
    found = artifact.open_artifact(road / "a" / "merge")
    artifact.link(found, road / "b" / "merge")
    made = artifact.open_artifact(road / "b" / "merge")
    assert made.key == found.key and not artifact.verify(made)
    assert all((made.path / name).samefile(found.path / name) for name in made.files)
    with pytest.raises(Moved):
        artifact.link(found, road / "b" / "merge")


def test_a_run_is_named_by_what_it_differs_in():
    assert sweep.run_name("r", {"finetune.tuner.rank": "8", "quantizer": "awq_int4"}) == "r-rank-8-quantizer-awq_int4"
    odd = {sweep.run_name("r", {"data.path": path}) for path in ("/a b", "/a_b", "/a/b", "x" * 300)}
    assert len(odd) == 4 and all(len(name) < 100 and set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-_.") for name in odd)


def test_the_plan_tells_how_long_a_stage_took_before(road):
    assert run.before(road, "merge").endswith(" in a") and run.before(road, "distill") == ""
