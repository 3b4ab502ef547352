"""Trackers get the numbers, never stop a run, and nothing secret is written anywhere."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import go

from src import data, finetune
from src.core import artifact, processes
from src.settings.verbs import Tensorboard, Wandb
from src.training import tracking
from src.training.tracking import Trackers

ROOT = Path(__file__).resolve().parent.parent
WANDB = Wandb(kind="wandb", project="boardwalk-test", mode="offline")
SECRETS = {
    "WANDB_API_KEY": "5ec7e7" * 6 + "abcd",
    "HF_TOKEN": "hf_sentinelSENTINELsentinelSENTINEL",
    "HUGGING_FACE_HUB_TOKEN": "hf_otherOTHERotherOTHERotherOTHER",
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "fresh", lambda work, *args: work(*args))


def events(folder: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    return found


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A short run with both trackers while secrets stand in the environment: (outputs folder, its metrics, what it printed)."""
    here = tmp_path_factory.mktemp("tracked")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:40]
    (here / "chats.json").write_text(json.dumps(rows))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**SECRETS, "WANDB_MODE": "offline"}.items():
            patch.setenv(name, value)
        patch.setattr(processes, "fresh", lambda work, *args: work(*args))
        said = []
        patch.setattr(tracking, "say", said.append)
        patch.setattr(tracking, "warn", said.append)
        assert go(data, f"outputs={here}", "run=t", f"data.path={here / 'chats.json'}", "data.val=0.15", "data.calib=0.1") == 0
        argv = [
            "tracker=[tensorboard,wandb]",
            "tracker.wandb.mode=offline",
            "train.max_steps=3",
            "train.log_steps=1",
            "train.eval_steps=2",
            "tuner.rank=4",
        ]
        assert go(finetune, f"outputs={here}", "run=t", *argv) == 0
    return here, artifact.open_artifact(here / "t" / "finetune").metrics, said


def test_tensorboard_has_the_curve_the_manifest_has(tracked):
    here, metrics, _ = tracked
    found = events(here / "t" / "tracking" / "tensorboard")
    assert {
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "train/tokens_per_second",
        "train/memory_gb",
        "eval/loss",
        "eval/accuracy",
    } <= set(found.Tags()["scalars"])
    for key in ("loss", "learning_rate"):
        drawn = [(e.step, e.value) for e in found.Scalars(f"train/{key}")]
        assert drawn == [(c["step"], pytest.approx(c[key], rel=1e-6)) for c in metrics["curve"]]
    assert [e.step for e in found.Scalars("eval/loss")] == [0, 2, 3], "the last is of what is saved"
    assert found.Scalars("eval/loss")[-1].value == pytest.approx(metrics["val_loss"], rel=1e-6)
    texts = [
        found.Tensors(t)[-1].tensor_proto.string_val[0].decode() for t in found.Tags()["tensors"] if t.startswith(("settings", "samples"))
    ]
    assert any('"rank": 4' in t for t in texts) and any(metrics["samples"][0]["prompt"] in t for t in texts)


def test_wandb_writes_its_run_offline(tracked):
    here, _, said = tracked
    folder = here / "t" / "tracking" / "wandb"
    [file] = folder.rglob("*.wandb")
    content = file.read_bytes()
    for key in (b"train/loss", b"eval/loss", b"learning_rate"):
        assert key in content
    assert b"boardwalk" in content
    assert any("offline" in line and "wandb sync" in line for line in said)
    assert not [line for line in said if "stopped" in line]


def test_nothing_secret_is_written(tracked):
    here, _, said = tracked
    files = [p for p in here.rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any("tfevents" in p.name for p in files)
    for file in files:
        content = file.read_bytes()
        for name, value in SECRETS.items():
            assert value.encode() not in content, f"{name} in {file.relative_to(here)}"
    assert not [v for v in SECRETS.values() if any(v in line for line in said)]


def test_trackers_write_beside_the_artifact_not_in_it(tracked):
    here, _, _ = tracked
    assert not [f for f in artifact.open_artifact(here / "t" / "finetune").files if "track" in f or "wandb" in f or "tfevents" in f]


def test_the_tracker_is_no_part_of_the_key(tracked):
    here, _, _ = tracked
    assert go(finetune, f"outputs={here}", "run=t", "train.max_steps=3", "train.log_steps=1", "train.eval_steps=2", "tuner.rank=4") == 0


# ---- faults


class Broken:
    """A sink of which one method raises."""

    def __init__(self, faulty):
        self.calls, self.faulty = [], faulty

    def sink(self):
        def call(name):
            def run(*args):
                self.calls.append(name)
                if name == self.faulty:
                    raise OSError("disk of the tracker\nis full")

            return run

        return {name: call(name) for name in ("numbers", "samples", "close")}


def use(trackers):
    trackers.numbers({"train/loss": 1.0}, 1)
    trackers.numbers({"train/loss": 0.9}, 2)
    trackers.samples([("q", "a")], 2)
    trackers.close()


@pytest.mark.parametrize("faulty", ["numbers", "samples", "close"])
def test_a_tracker_that_fails_is_said_once_and_left_alone(faulty, tmp_path, monkeypatch, capsys):
    broken, sound = Broken(faulty), Broken(None)
    monkeypatch.setattr(tracking, "_wandb", lambda *args: broken.sink())
    monkeypatch.setattr(tracking, "_tensorboard", lambda *args: sound.sink())
    use(Trackers({"wandb": WANDB, "tensorboard": Tensorboard(kind="tensorboard")}, tmp_path, "r", {}))
    err = capsys.readouterr().err
    assert err.count("tracker wandb stopped, training goes on: OSError: disk of the tracker") == 1 and err.count("stopped") == 1
    assert broken.calls[-1] == faulty and broken.calls.count(faulty) == 1, "not asked again"
    assert sound.calls == ["numbers", "numbers", "samples", "close"]


def test_a_tracker_that_cannot_start_is_said_once(tmp_path, monkeypatch, capsys):
    def no(*args):
        raise RuntimeError("no account")

    monkeypatch.setattr(tracking, "_wandb", no)
    use(Trackers({"wandb": WANDB, "tensorboard": Tensorboard(kind="tensorboard")}, tmp_path, "r", {"a": 1}))
    assert capsys.readouterr().err.count("tracker wandb stopped, training goes on: RuntimeError: no account") == 1
    assert [e.value for e in events(tmp_path / "tensorboard").Scalars("train/loss")] == [1.0, pytest.approx(0.9)]


def test_a_tracker_that_is_not_installed_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(Trackers({"wandb": WANDB}, tmp_path, "r", {}))
    assert capsys.readouterr().err.count("tracker wandb stopped") == 1


def test_training_goes_on_when_a_tracker_breaks(tracked, monkeypatch, capsys):
    here, metrics, _ = tracked
    monkeypatch.setattr(tracking, "_wandb", lambda *args: Broken("numbers").sink())
    argv = ["tracker=[wandb]", "train.max_steps=3", "train.log_steps=1", "train.eval_steps=2", "tuner.rank=4"]
    assert go(finetune, f"outputs={here}", "run=broken", f"source={here / 't' / 'data'}", *argv) == 0
    err = capsys.readouterr().err
    assert err.count("tracker wandb stopped") == 1
    assert artifact.open_artifact(here / "broken" / "finetune").metrics["curve"] == metrics["curve"], (
        "and nothing about the training changed"
    )


def test_no_tracker_writes_nothing(tmp_path):
    use(Trackers({}, tmp_path, "r", {}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "key,mode,wanted",
    [(None, "auto", "offline"), ("x" * 40, "auto", "online"), ("x" * 40, "offline", "offline"), (None, "online", "online")],
)
def test_wandb_is_online_only_where_a_key_or_the_user_says_so(key, mode, wanted, tmp_path, monkeypatch):
    import wandb

    asked = {}
    monkeypatch.setattr(wandb, "init", lambda **kwargs: asked.update(kwargs))
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    Trackers({"wandb": WANDB.model_copy(update={"mode": mode})}, tmp_path, "r", {})
    assert asked["mode"] == wanted and asked["project"] == "boardwalk-test" and asked["name"] == "r"
