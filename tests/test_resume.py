"""A run killed at any moment goes on to the same bytes, by the same command."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import CHAT, ROOT, begun, go, hear_ctrl_c, helps, make_base, to_its_end

from src import finetune
from src.core import artifact
from src.core.errors import Moved
from src.training.checkpoints import Checkpoints

FAST = ["tuner.learning_rate=3e-3", "train.log_steps=1", "train.eval_steps=4", "train.max_steps=8", "train.checkpoint_steps=1"]
ROADS = {
    "lora": ["tuner.rank=8"],
    "full": ["tuner=full"],
    "qlora": ["tuner=qlora", "tuner.rank=8"],
    "lora-zero2": ["tuner.rank=8", "deepspeed=zero2", "launch.nproc_per_node=2"],
    "lora-zero3": ["tuner.rank=8", "deepspeed=zero3", "launch.nproc_per_node=2"],
    "full-zero2": ["tuner=full", "deepspeed=zero2", "launch.nproc_per_node=2"],
    "full-zero3": ["tuner=full", "deepspeed=zero3", "launch.nproc_per_node=2"],
    "lora-two": ["tuner.rank=8", "launch.nproc_per_node=2"],
}
slow = lambda name: name if name == "lora" else pytest.param(name, marks=pytest.mark.slow)


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


def command(outputs, run, base, dataset, road) -> list[str]:
    return [f"outputs={outputs}", f"run={run}", f"source={dataset}", f"model.path={base}", *ROADS[road], *FAST]


def killed_after(argv: list[str], said: str) -> str:
    """What the run had said when it was killed with -9 after a line that holds `said`, all its processes with it."""
    lines = []
    with begun(argv) as (child, heard):
        for line in heard:
            lines.append(line)
            if said in line:
                os.killpg(child.pid, signal.SIGKILL)
                break
    assert child.exitcode == -signal.SIGKILL, "".join(lines)
    return "".join(lines)


def run_to_its_end(argv: list[str], capsys) -> tuple[int, str]:
    """(exit code, what was said); in this process where one is enough, which saves the imports."""
    if "launch.nproc_per_node=2" not in argv:
        return go(finetune, *argv), capsys.readouterr().err
    return to_its_end(argv)


@pytest.mark.parametrize("road", map(slow, ROADS))
def test_a_run_killed_twice_ends_in_the_same_bytes(road, tmp_path, eighty, capsys):
    """Losses, weights, order and every random draw (dropout is on) are those of a run nobody disturbed."""
    base = make_base(tmp_path / "base")
    argv = command(tmp_path, "killed", base, eighty, road)
    killed_after(argv, "step 3/8")
    assert not (tmp_path / "killed" / "finetune").exists()
    again = killed_after(argv, "step 6/8")
    assert "goes on from step" in again and "probe:" not in again
    for run, goes_on in (("killed", True), ("undisturbed", False)):
        code, said = run_to_its_end(command(tmp_path, run, base, eighty, road), capsys)
        assert code == 0 and ("goes on from step" in said) == goes_on, said
    a, b = (tmp_path / run / "finetune" for run in ("killed", "undisturbed"))
    files = {p.name for p in a.iterdir()}
    assert files == {p.name for p in b.iterdir()} and not files & {"checkpoints", "layout.json"}
    for name in files - {"manifest.json"}:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    one, other = (artifact.open_artifact(p).metrics for p in (a, b))
    assert one["curve"] == other["curve"] and len(one["curve"]) == 8
    assert {k: one[k] for k in ("val_loss", "tokens_seen", "samples")} == {k: other[k] for k in ("val_loss", "tokens_seen", "samples")}


def test_what_an_unfinished_run_needs_to_go_on_is_asked_for(tmp_path, eighty, capsys):
    """Another number of processes is refused with its own code and loses nothing; another layout of batches is not taken, which is said."""
    base = make_base(tmp_path / "base")
    argv = command(tmp_path, "killed", base, eighty, "lora")
    killed_after(argv, "step 3/8")
    partial = tmp_path / "killed" / "finetune.partial"
    kept = sorted(p.name for p in partial.glob("checkpoints/*"))
    code, err = to_its_end([*argv, "launch.nproc_per_node=2"])
    assert code == Moved.exit_code, err
    assert err.count("trained by 1 processes and cannot go on with 2") == 1 and err.count("launch.nproc_per_node=1") == 1, err
    assert "Traceback" not in err
    assert sorted(p.name for p in partial.glob("checkpoints/*")) == kept, "the checkpoint is still there to go on from"
    code, said = run_to_its_end([*argv, "train.micro_batch_size=1"], capsys)
    assert code == 0 and "goes on as it began, with train.micro_batch_size=auto" in said, said


@helps("training/checkpoints.py", "launch.nproc_per_node={}", "remove {} to start over")
def test_a_checkpoint_without_its_mark_is_not_looked_at(tmp_path):
    for step, mark in ((4, "1"), (8, None), (12, "1")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if mark:
            (folder / "whole").write_text(mark)
    assert Checkpoints.last(tmp_path, 1).name == "checkpoint-12"
    (tmp_path / "checkpoint-12" / "whole").unlink()
    assert Checkpoints.last(tmp_path, 1).name == "checkpoint-4"
    with pytest.raises(Moved) as told:
        Checkpoints.last(tmp_path, 2)
    assert told.value.fix == ["launch.nproc_per_node=1", f"remove {tmp_path.parent} to start over"]
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert Checkpoints.last(tmp_path, 1) is Checkpoints.last(tmp_path, 2) is None


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_workers_end_quietly_and_the_run_goes_on(tmp_path, eighty, number, code):
    """Ctrl-C reaches every process of the terminal; a batch system's SIGTERM only the one it started."""
    argv = command(tmp_path, "stopped", CHAT, eighty, "lora-zero2")
    child = [sys.executable, "-m", "src.finetune", *argv]
    started = subprocess.Popen(child, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)
    for line in started.stderr:
        if "step 4/" in line:
            break
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    said = started.stderr.read()
    assert started.wait(timeout=60) == code
    assert "interrupted; the same command goes on" in said and "Traceback" not in said
    again = subprocess.run(child, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "goes on from step" in again.stderr, again.stderr


def test_the_layout_of_a_run_is_written_before_its_first_step(tmp_path, eighty):
    base = make_base(tmp_path / "base")
    said = killed_after(command(tmp_path, "killed", base, eighty, "lora"), "probe:")
    kept = json.loads((tmp_path / "killed" / "finetune.partial" / "layout.json").read_text())
    assert kept["layout"]["packed"] and kept["layout"]["fused"] and kept["asked"]["packing"] == "auto"
    assert "forward, backward, optimizer step and saving" in said
