"""Trackers get the numbers, never stop a run, and nothing secret is written anywhere."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from conftest import go, helps, refused

from src import data, finetune
from src.core import artifact, processes, tracking
from src.core.errors import MissingTool
from src.core.tracking import TrackedPlace, Trackers
from src.settings.trackers import Tensorboard, Wandb

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
    found = events(here / "t" / "tracking" / "tensorboard" / "finetune")
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
    content = b"".join(file.read_bytes() for file in folder.rglob("*.wandb"))
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

        return types.SimpleNamespace(**{name: call(name) for name in ("numbers", "samples", "artifact", "close")})


def use(trackers):
    trackers.numbers({"train/loss": 1.0}, 1)
    trackers.numbers({"train/loss": 0.9}, 2)
    trackers.samples([("q", "a")], 2)
    trackers.close()


@pytest.mark.parametrize("faulty", ["numbers", "samples", "close"])
def test_a_tracker_that_fails_is_said_once_and_left_alone(faulty, tmp_path, monkeypatch, capsys):
    broken, sound = Broken(faulty), Broken(None)
    monkeypatch.setattr(tracking, "SINKS", {Wandb: lambda *args: broken.sink(), Tensorboard: lambda *args: sound.sink()})
    use(
        Trackers(
            {"wandb": WANDB, "tensorboard": Tensorboard(kind="tensorboard")},
            TrackedPlace(tmp_path / "tracking", "r", "s"),
            {},
            journal=False,
        )
    )
    err = capsys.readouterr().err
    assert err.count("tracker wandb stopped, the work goes on: OSError: disk of the tracker") == 1 and err.count("stopped") == 1
    assert broken.calls[-1] == faulty and broken.calls.count(faulty) == 1, "not asked again"
    assert sound.calls == ["numbers", "numbers", "samples", "close"]


def test_a_tracker_that_cannot_start_is_said_once(tmp_path, monkeypatch, capsys):
    def no(*args):
        raise RuntimeError("no account")

    monkeypatch.setitem(tracking.SINKS, Wandb, no)
    use(Trackers({"wandb": WANDB, "tensorboard": Tensorboard(kind="tensorboard")}, TrackedPlace(tmp_path / "tracking", "r", "s"), {"a": 1}))
    assert capsys.readouterr().err.count("tracker wandb stopped, the work goes on: RuntimeError: no account") == 1
    assert [e.value for e in events(tmp_path / "tracking" / "tensorboard" / "s").Scalars("train/loss")] == [1.0, pytest.approx(0.9)]


def test_a_tracker_that_is_not_installed_is_said_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(Trackers({"wandb": WANDB}, TrackedPlace(tmp_path / "tracking", "r", "s"), {}, journal=False))
    assert capsys.readouterr().err.count("tracker wandb stopped") == 1


def test_training_goes_on_when_a_tracker_breaks(tracked, monkeypatch, capsys):
    here, metrics, _ = tracked
    monkeypatch.setitem(tracking.SINKS, Wandb, lambda *args: Broken("numbers").sink())
    argv = ["tracker=[wandb]", "train.max_steps=3", "train.log_steps=1", "train.eval_steps=2", "tuner.rank=4"]
    assert go(finetune, f"outputs={here}", "run=broken", f"source={here / 't' / 'data'}", *argv) == 0
    err = capsys.readouterr().err
    assert err.count("tracker wandb stopped") == 2, "by the training, and by the door that tells of its end"
    assert artifact.open_artifact(here / "broken" / "finetune").metrics["curve"] == metrics["curve"], (
        "and nothing about the training changed"
    )


def test_no_tracker_writes_nothing(tmp_path):
    use(Trackers({}, TrackedPlace(tmp_path / "tracking", "r", "s"), {}, journal=False))
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
    Trackers({"wandb": WANDB.model_copy(update={"mode": mode})}, TrackedPlace(tmp_path / "tracking", "r", "s"), {}, journal=False)
    assert asked["mode"] == wanted and asked["project"] == "boardwalk-test" and (asked["name"], asked["group"]) == ("r/s", "r")


# ---- every stage, and the journal that is the source of truth


def journal(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_journal_holds_the_curve_answers_and_artifact_of_every_stage(tracked):
    here, metrics, _ = tracked
    events_of = {stage: [e for e in journal(here / "t") if e["stage"] == stage] for stage in ("data", "finetune")}
    drawn = {e["step"]: e["numbers"]["train/loss"] for e in events_of["finetune"] if "train/loss" in e.get("numbers", {})}
    assert drawn == {c["step"]: c["loss"] for c in metrics["curve"]}
    assert any(metrics["samples"][0]["prompt"] in str(e.get("samples")) for e in events_of["finetune"])
    for stage, told in events_of.items():
        [made] = [e["artifact"] for e in told if "artifact" in e]
        found = artifact.open_artifact(here / "t" / stage)
        assert made["key"] == found.key and made["files"] == {name: file["sha256"] for name, file in found.files.items()}
        assert any(f"{stage}/seconds" in e.get("numbers", {}) for e in told)


def test_a_stage_that_trains_nothing_is_tracked_too(call, road):
    """Read back by TensorBoard's own reader."""
    assert call("data", "run=n", f"data.path={road / 'inputs' / 'chats.json'}", "tracker=tensorboard", "data.val=0.2").returncode == 0
    found = events(road / "n" / "tracking" / "tensorboard" / "data")
    metrics = artifact.open_artifact(road / "n" / "data").metrics
    assert found.Scalars("data/train_rows")[0].value == metrics["train_rows"]
    assert any("artifact" in tag for tag in found.Tags()["tensors"])


def test_where_things_are_is_not_told(tmp_path):
    told = {}
    sink = lambda tracker, place, settings: told.update(settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tracking.SINKS, Wandb, sink)
        Trackers(
            {"wandb": WANDB}, TrackedPlace(tmp_path, "r", "s"), {"model_path": "/home/somebody/models/qwen", "x": "a/b"}, journal=False
        )
    assert told["model_path"] == "qwen" and told["x"] == "a/b"


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    use(Trackers({}, TrackedPlace(tmp_path / "tracking", "r", "s"), {}))
    assert capsys.readouterr().err.count("tracker metrics.jsonl stopped, the work goes on") == 1


@helps("core/tracking.py", "pip install {}", "tracker=none")
def test_a_tracker_without_its_library_is_refused_beforehand(call, monkeypatch, road):
    real = tracking.importlib.util.find_spec
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name, *more: None if name == "trackio" else real(name, *more))
    argv = ["data", "run=n", f"data.path={road / 'inputs' / 'chats.json'}"]
    refused(call(*argv, "tracker=trackio"), MissingTool, "tracker=trackio", "pip install trackio")
    assert call(*argv, "tracker=none").returncode == 0


def test_a_run_that_goes_on_is_the_same_tracked_run(tmp_path):
    one, other = TrackedPlace(tmp_path / "a", "r", "s"), TrackedPlace(tmp_path / "b", "r", "s")
    assert one.id == TrackedPlace(tmp_path / "a", "r", "s").id != other.id


@pytest.mark.parametrize("name", ["trackio", "mlflow"])
def test_other_trackers_are_read_back_by_their_own_libraries(name, road, tmp_path):
    """In a process of its own, as each keeps its place for the life of one."""
    pytest.importorskip(name)
    argv = ["data", "run=n", f"outputs={road}", f"data.path={road / 'inputs' / 'chats.json'}", f"tracker={name}"]
    done = subprocess.run([sys.executable, "-m", *(f"src.{argv[0]}", *argv[1:])], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "stopped" not in done.stderr, done.stderr
    done = subprocess.run([sys.executable, "-c", READ[name]], cwd=road / "n" / "tracking", capture_output=True, text=True, timeout=300)
    [line] = [line for line in done.stdout.splitlines() if line.startswith("{")] or [done.stderr]
    told = json.loads(line)
    made = artifact.open_artifact(road / "n" / "data")
    assert told["rows"] == made.metrics["train_rows"] and told["boardwalk"] and told["key"] == made.key and told["group"] == "n"


READ = {
    "trackio": """
import json, os
os.environ["TRACKIO_DIR"] = os.path.abspath("trackio")
import trackio
[run] = trackio.Api().runs("boardwalk")
from trackio.sqlite_storage import SQLiteStorage
[log] = [l for l in SQLiteStorage.get_logs("boardwalk", run.name) if "data/train_rows" in l]
trackio.init("boardwalk", name="reader", embed=False)
made = trackio.use_artifact("n-data")
print(json.dumps({"rows": log["data/train_rows"], "boardwalk": run.config["boardwalk"], "group": run.config["_Group"], "key": made.metadata["key"]}))
""",
    "mlflow": """
import json, os, mlflow
mlflow.set_tracking_uri("sqlite:///" + os.path.abspath("mlflow/mlflow.db"))
[run] = mlflow.search_runs(experiment_names=["boardwalk"], output_format="list")
made = mlflow.artifacts.load_dict(run.info.artifact_uri + "/artifact.json")
settings = mlflow.artifacts.load_dict(run.info.artifact_uri + "/settings.json")
print(json.dumps({"rows": run.data.metrics["data/train_rows"], "boardwalk": settings["boardwalk"], "group": run.data.tags["group"], "key": made["key"]}))
""",
}
