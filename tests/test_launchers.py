"""finetune/*.sh: the flags of the old recipe and torchrun's environment become overrides. A stub stands in for Python and writes down its argv."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from src.core.compose import compose
from src.settings.verbs import DataVerb, FinetuneVerb

ROOT = Path(__file__).resolve().parent.parent
LAUNCHERS = ROOT / "finetune"
MEANS = {
    "finetune_ds.sh": ["tuner=full", "deepspeed=zero3"],
    "finetune_lora_ds.sh": ["tuner=lora", "deepspeed=zero2"],
    "finetune_lora_single_gpu.sh": ["tuner=lora", "deepspeed=none", "launch.nproc_per_node=1"],
    "finetune_qlora_ds.sh": ["tuner=qlora", "deepspeed=zero2"],
    "finetune_qlora_single_gpu.sh": ["tuner=qlora", "deepspeed=none", "launch.nproc_per_node=1"],
}
STUB = r"""#!/usr/bin/env bash
{ printf '%s\0' "$@"; printf '\n'; } >> "$CALLS"
printf '%s' "$PWD" > "$CALLS.path"
case "$*" in *src.data*) exit "${DATA_CODE:-0}" ;; *) exit "${TRAIN_CODE:-0}" ;; esac
"""


@pytest.fixture
def launch(tmp_path):
    """launch(script, *argv, cwd=..., **environment) -> (process, one argv per call of Python)."""
    stub = tmp_path / "my python"
    stub.write_text(STUB)
    stub.chmod(0o755)

    def launch(script, *argv, cwd=tmp_path, **environment):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        clean = {
            k: v
            for k, v in os.environ.items()
            if k not in ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "GPUS_PER_NODE", "PYTHONPATH")
        }
        done = subprocess.run(
            ["bash", LAUNCHERS / script, *argv],
            cwd=cwd,
            env={**clean, "PYTHON": str(stub), "CALLS": str(calls), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        lines = calls.read_text().split("\0\n")[:-1] if calls.is_file() else []
        # The look at the settings before anything costly is a call of its own, tested below.
        return done, [line.split("\0") for line in lines if "--settings-only" not in line]

    return launch


def settings(argv):
    """The module called and the settings that its argv really gives, through the one composer there is."""
    assert argv[0] == "-m"
    verb = argv[1].removeprefix("src.")
    return verb, compose(verb, argv[2:], {"data": DataVerb, "finetune": FinetuneVerb}[verb])


def test_there_is_a_launcher_for_each_way_and_no_other():
    assert sorted(p.name for p in LAUNCHERS.glob("finetune*.sh")) == sorted(MEANS)


@pytest.mark.parametrize("script", MEANS)
def test_what_a_launcher_means_alone(launch, script):
    done, calls = launch(script)
    assert (done.returncode, calls) == (0, [["-m", "src.finetune", *MEANS[script]]]), done.stderr
    _, cfg = settings(calls[0])
    assert cfg.tuner.kind == MEANS[script][0].split("=")[1]
    assert cfg.deepspeed.stage == {"none": 0, "zero2": 2, "zero3": 3}[MEANS[script][1].split("=")[1]]


def test_flags_and_overrides(launch):
    flags = ["-m", "my_model", "-d", "chat.json", "--deepspeed", "zero3"]
    done, calls = launch("finetune_lora_ds.sh", *flags, "run=x", "outputs=o", "tuner.rank=16", "data.val=0.2", "train.epochs=1")
    assert done.returncode == 0, done.stderr
    assert calls == [
        ["-m", "src.data", "run=x", "outputs=o", "data.path='chat.json'", "data.val=0.2"],
        [
            "-m",
            "src.finetune",
            "run=x",
            "outputs=o",
            "tuner=lora",
            "deepspeed=zero2",
            "model.path='my_model'",
            "deepspeed=zero3",
            "tuner.rank=16",
            "train.epochs=1",
        ],
    ]
    (_, data), (_, train) = map(settings, calls)
    assert (data.run, data.data.path, data.data.val) == ("x", "chat.json", 0.2)
    assert (train.run, train.model.path, train.tuner.rank, train.deepspeed.stage, train.train.epochs) == ("x", "my_model", 16, 3, 1)


def test_long_flags(launch):
    _, calls = launch("finetune_ds.sh", "--model", "m", "--data", "d.json")
    assert [c[1] for c in calls] == ["src.data", "src.finetune"]
    assert settings(calls[1])[1].model.path == "m"


def test_without_data_the_run_s_own_is_used(launch):
    assert [c[1] for c in launch("finetune_ds.sh", "-m", "m")[1]] == ["src.finetune"]


@pytest.mark.parametrize("name,stage", [("ds_config_zero2.json", 2), ("finetune/ds_config_zero3.json", 3), ("my ds, file's.json", 2)])
def test_a_deepspeed_file(launch, name, stage):
    _, calls = launch("finetune_lora_ds.sh", "--deepspeed", name)
    cfg = settings(calls[0])[1]
    assert (cfg.deepspeed.config, cfg.deepspeed.stage) == (name, stage)


def test_a_stage_beside_the_file_wins_over_its_name(launch):
    _, calls = launch("finetune_lora_ds.sh", "--deepspeed", "mine.json", "deepspeed=zero3")
    cfg = settings(calls[0])[1]
    assert (cfg.deepspeed.config, cfg.deepspeed.stage) == ("mine.json", 3)


def test_machines_come_from_the_environment(launch):
    done, calls = launch("finetune_ds.sh", NNODES="4", NODE_RANK="2", MASTER_ADDR="10.0.0.7", MASTER_PORT="29501", GPUS_PER_NODE="8")
    assert done.returncode == 0
    box = settings(calls[0])[1].launch
    assert (box.nnodes, box.node_rank, box.master_addr, box.master_port, box.nproc_per_node) == (4, 2, "10.0.0.7", 29501, 8)


def test_an_empty_environment_variable_is_as_if_unset(launch):
    assert launch("finetune_ds.sh", NNODES="", MASTER_PORT="")[1] == [["-m", "src.finetune", *MEANS["finetune_ds.sh"]]]


STRANGE = [
    "with space",
    "comma, and [brackets]",
    "key=value",
    "it's",
    'double "quoted"',
    "${oc.env:HOME}",
    "$HOME `ls` \\back",
    "back\\'slash quote",
    "trailing\\",
    "한글 길",
    "{a: b}",
    "#hash ~tilde",
    "-dash",
    "2024",
    "null",
    "percent%s",
]


@pytest.mark.parametrize("name", STRANGE)
def test_any_path_reaches_the_settings_as_it_is(launch, name):
    folder = f"/data/{name}" if name not in ("2024", "null", "-dash") else name
    done, calls = launch("finetune_lora_ds.sh", "-m", folder, "-d", f"{folder}.json")
    assert done.returncode == 0, done.stderr
    (_, data), (_, train) = map(settings, calls)
    assert data.data.path == f"{folder}.json"
    assert train.model.path == folder


def test_an_unknown_flag_starts_nothing(launch):
    for argv in (["--lr", "3"], ["-x"], ["word"], ["-m", "m", "--bf16"]):
        done, calls = launch("finetune_lora_ds.sh", *argv)
        assert (done.returncode, calls) == (2, [])
        assert "unknown argument" in done.stderr and "usage" in done.stderr


@pytest.mark.parametrize("flag", ["-m", "--model", "-d", "--data", "--deepspeed"])
def test_a_flag_without_its_value_starts_nothing(launch, flag):
    done, calls = launch("finetune_lora_ds.sh", flag)
    assert (done.returncode, calls) == (2, []) and flag in done.stderr


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help(launch, flag):
    done, calls = launch("finetune_ds.sh", flag)
    assert (done.returncode, calls) == (0, []) and "usage" in done.stdout


@pytest.mark.parametrize("script", MEANS)
def test_a_failing_data_stage_stops_with_its_code(launch, script):
    done, calls = launch(script, "-d", "bad.json", DATA_CODE="6")
    assert done.returncode == 6 and [c[1] for c in calls] == ["src.data"]


def test_training_s_code_is_the_launcher_s(launch):
    assert launch("finetune_ds.sh", TRAIN_CODE="8")[0].returncode == 8


def test_it_works_from_any_folder_and_makes_its_outputs_in_the_project(launch, tmp_path):
    elsewhere = tmp_path / "some where"
    (elsewhere / "rel").mkdir(parents=True)
    (elsewhere / "rel" / "chat.json").write_text("[]")
    done, calls = launch("finetune_ds.sh", "-d", "rel/chat.json", "-m", "someone/tiny", cwd=elsewhere)
    assert done.returncode == 0, done.stderr
    assert settings(calls[0])[1].data.path == str(elsewhere / "rel" / "chat.json"), "a path that is there is the caller's"
    assert settings(calls[1])[1].model.path == "someone/tiny", "one that is not may be a hub id"
    assert (tmp_path / "calls.path").read_text() == str(ROOT)
    _, calls = launch("finetune_ds.sh", "-d", "rel/*.json", "-m", "someone/tiny", cwd=elsewhere)
    assert settings(calls[-2])[1].data.path == str(elsewhere / "rel" / "*.json"), "a pattern that something matches, too"


def test_settings_are_looked_at_before_the_data_is_read(launch):
    done, calls = launch("finetune_ds.sh", "-d", "chat.json", TRAIN_CODE="2")
    assert done.returncode == 2
    assert calls == [], "only the look at the settings was made"


def test_a_group_choice_replaces_the_launcher_s(launch):
    _, calls = launch("finetune_ds.sh", "deepspeed=zero2_offload")
    cfg = settings(calls[0])[1]
    assert (cfg.deepspeed.stage, cfg.deepspeed.offload, cfg.tuner.kind) == (2, True, "full")


def test_trackers_can_be_chosen(launch):
    _, calls = launch("finetune_lora_single_gpu.sh", "tracker=[wandb,tensorboard]")
    assert sorted(settings(calls[0])[1].tracker) == ["tensorboard", "wandb"]


def test_no_hyperparameter_lives_in_a_launcher():
    """Numbers belong to configs/; what is left here is how many processes and which ZeRO stage."""
    for script in LAUNCHERS.glob("*.sh"):
        text = "\n".join(line for line in script.read_text().splitlines() if not line.lstrip().startswith("#"))
        for name in (
            "learning_rate",
            "epochs",
            "batch_size",
            "max_length",
            "warmup",
            "weight_decay",
            "rank=",
            "alpha",
            "dropout",
            "bf16",
            "fp16",
        ):
            assert name not in text.replace("node_rank=", ""), f"{script.name}: {name}"
        left = re.sub(
            r"zero[23](_offload)?|nproc_per_node=1|>&2|return [02]|\$[12#0]|\bshift 2\b|-ge 2|-gt 0|\[0\]|BASH_SOURCE|python3|\\1", "", text
        )
        assert not re.search(r"\d", left), f"{script.name}: {re.findall(r'.*[0-9].*', left)}"


def test_launchers_are_sound_shell():
    for script in LAUNCHERS.glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0
        if script.name in MEANS:
            assert "set -euo pipefail" in script.read_text() and os.access(script, os.X_OK)
