"""Nothing that this program did not finish or begin itself is removed unless forced, and then it says what."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import FEW, ROOT, helps, process, refused, to_its_end, ways, write_model

from src.core.artifact import open_artifact
from src.core.errors import ConfigError, Moved
from src.training import checkpoints


@pytest.fixture
def make(call, finished, tmp_path):
    """make(*overrides): `data` into tmp_path/outputs/default/data."""
    chats = finished / "inputs" / "chats.json"
    return lambda *overrides: call("data", f"data.path={chats}", *FEW, *overrides)


@pytest.fixture
def place(tmp_path) -> Path:
    folder = tmp_path / "outputs" / "default" / "data"
    folder.parent.mkdir(parents=True)
    return folder


def mine(folder: Path) -> Path:
    """A user's own file in a folder of theirs."""
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("three years")
    return folder / "thesis.txt"


@helps("core/artifact.py", "move it elsewhere", "force=true removes it")
@helps("core/stage.py", "{} leaves it alone")
@pytest.mark.parametrize("name", ["data", "data.partial"])
def test_each_way_out_of_a_folder_in_the_way(make, place, tmp_path, name):
    file = mine(place.with_name(name))
    told = make()
    refused(told, Moved, "move it elsewhere", "force=true removes it")
    assert make(ways(told)[2].removesuffix(" leaves it alone")).returncode == 0 and file.is_file()
    place.with_name(name).rename(tmp_path / "elsewhere")
    assert make().returncode == 0
    shutil.rmtree(place)
    (tmp_path / "elsewhere").rename(place.with_name(name))
    assert make("force=true").returncode == 0 and open_artifact(place)


@pytest.mark.parametrize("dry", [[], ["dry_run=true"]])
@pytest.mark.parametrize("name", ["data", "data.partial"])
def test_a_folder_of_the_user_s_is_refused_and_stays(make, place, name, dry):
    file = mine(place.with_name(name))
    refused(
        make(*dry), Moved, place.with_name(name), "neither finished nor began", "1 files, 11 B", "force=true removes it", "run=OTHER_NAME"
    )
    assert file.read_text() == "three years" and sorted(p.name for p in place.parent.iterdir()) == [name]


@pytest.mark.parametrize("name", ["data", "data.partial"])
def test_forced_it_goes_and_that_is_said(make, place, name):
    mine(place.with_name(name))
    done = make("force=true")
    assert done.returncode == 0 and f"force=true: removes {place.with_name(name)}, 1 files, 11 B" in done.stderr
    assert sorted(p.name for p in place.iterdir() if p.suffix == ".txt") == [] and open_artifact(place)


def test_a_file_in_the_place_of_an_artifact(make, place):
    place.write_text("notes")
    refused(make(), Moved, "a file of 5 B")
    assert place.read_text() == "notes"


def test_an_artifact_whose_manifest_is_lost_is_refused(make, place):
    assert make().returncode == 0
    (place / "manifest.json").unlink()
    refused(make(), Moved, "neither finished nor began", "force=true")
    assert (place / "train.jsonl").is_file()
    assert make("force=true").returncode == 0 and open_artifact(place)


@pytest.mark.parametrize("name", ["data", "data.partial"])
def test_a_link_is_refused_and_forced_only_the_link_goes(make, place, tmp_path, name):
    file = mine(tmp_path / "elsewhere")
    place.with_name(name).symlink_to(file.parent)
    refused(make(), Moved, "a link to", "which stays")
    assert place.with_name(name).is_symlink()
    assert make("force=true").returncode == 0
    assert file.read_text() == "three years" and not place.is_symlink() and open_artifact(place)


def test_a_finished_artifact_that_lies_on_another_disk_behind_a_link(make, place, tmp_path):
    assert make().returncode == 0
    there = tmp_path / "disk" / "data"
    there.parent.mkdir()
    place.rename(there)
    place.symlink_to(there)
    assert "up to date, skipped" in make().stderr
    assert make("force=true", "data.val=0.3").returncode == 0
    assert not place.is_symlink() and open_artifact(place).settings["data"]["val"] == 0.3
    assert open_artifact(there).settings["data"]["val"] == 0.2, "what the link showed is not ours to remove"
    assert sorted(p.name for p in place.parent.iterdir() if not p.name.endswith((".lock", ".jsonl"))) == ["data"]


def test_an_empty_folder_is_in_nobody_s_way(make, place):
    place.mkdir()
    place.with_name("data.partial").mkdir()
    assert make().returncode == 0 and open_artifact(place)


def test_outputs_has_to_name_a_folder(call):
    before = sorted(os.listdir())
    refused(call("data", "outputs="), ConfigError, "outputs=")
    assert sorted(os.listdir()) == before


# ---- whatever ends a process of several


def started(*argv) -> subprocess.Popen:
    """A fine-tune in two worker processes that has reached its third step, its stderr still open."""
    process_ = process(*argv)
    for line in process_.stderr:
        if "  step 3/" in line:
            return process_
    raise AssertionError("it ended before its third step")


def workers_of(launcher: int) -> list[psutil.Process]:
    return [p for p in psutil.Process(launcher).children(recursive=True) if "src.finetune" in " ".join(p.cmdline())]


@pytest.fixture
def two(eighty, tmp_path) -> list[str]:
    argv = [f"outputs={tmp_path}", f"source={eighty}", f"model.path={write_model(tmp_path / 'model')}", "launch.nproc_per_node=2"]
    return [
        *argv,
        "tuner=full",
        "train.log_steps=1",
        "train.checkpoint_steps=2",
        "train.eval_steps=1000",
        "train.samples=0",
        "max_loss_change=1",
    ]


@pytest.mark.slow
def test_training_processes_end_with_their_launcher(two):
    launcher = started(*two, "train.max_steps=400")
    workers = workers_of(launcher.pid)
    assert len(workers) == 2
    launcher.kill()
    assert psutil.wait_procs(workers, timeout=10)[1] == [], "no worker is left"
    launcher.stderr.close()
    launcher.wait()


@pytest.mark.slow
def test_a_training_process_that_is_killed_is_named_by_its_rank(two):
    launcher = started(*two, "train.max_steps=400")
    next(p for p in workers_of(launcher.pid) if p.environ()["RANK"] == "1").kill()
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "the process of rank 1 was killed by signal 9, most likely for lack of memory" in said and "Traceback" not in said, said


LAUNCH = """
import sys
from src.core import stage
from src.settings.training import Launch
from src.training import launch
settings = Launch(nproc_per_node=2, nnodes=1, node_rank=0, master_addr="127.0.0.1", master_port=0)
sys.exit(stage.guarded(lambda: launch.torchrun("sleeper", [], settings)))
"""


@pytest.fixture
def launched():
    """(the launcher, {rank: worker}) of two processes that wait, started as a training's are."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'stand_ins'}"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCH], cwd=ROOT, env=environment, start_new_session=True, **pipes)
    lines = [launcher.stdout.readline().split() for _ in range(2)]
    yield launcher, {int(rank): psutil.Process(int(pid)) for _, rank, pid in lines}
    with contextlib.suppress(ProcessLookupError):
        os.killpg(launcher.pid, signal.SIGKILL)
    launcher.communicate()


def test_workers_end_with_their_launcher(launched):
    launcher, workers = launched
    launcher.kill()
    assert sorted(workers) == [0, 1] and psutil.wait_procs(workers.values(), timeout=10)[1] == [], "no worker is left"


LATE = """
import os, subprocess, sys, time
child = "import os, sys, time; time.sleep(1); from src.core.processes import end_with_parent; end_with_parent(int(sys.argv[1])); time.sleep(60)"
print(subprocess.Popen([sys.executable, "-c", child, str(os.getpid())]).pid, flush=True)
time.sleep(60)
"""


def test_a_worker_that_begins_after_its_launcher_was_killed_ends_too():
    """Nobody has waited for the launcher, so its id is still there."""
    launcher = subprocess.Popen([sys.executable, "-c", LATE], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(launcher.stdout.readline()))
    launcher.kill()
    gone = psutil.wait_procs([worker], timeout=10)[0]
    launcher.communicate()
    assert gone == [worker]


ASKS = """
import os, time
from src.core.processes import begin, fresh
if __name__ == "__main__":
    {}
"""


@pytest.mark.parametrize("asks, count", [("fresh(time.sleep, 60)", 1), ("begin(fresh, time.sleep, 60).join()", 2)])
def test_what_works_for_a_process_ends_with_it(asks, count):
    """The process of a proof or of a quantization, that of a stage with its own, and the one server they are forked from, which Python keeps for as long
    as they live."""
    asking = psutil.Popen([sys.executable, "-c", ASKS.format(asks)], cwd=ROOT)
    by_generation: list[list[psutil.Process]] = [[], []]
    for _ in range(600):
        by_generation = [asking.children(), [each for child in asking.children() for each in child.children()]]
        if len(by_generation[1]) == count:
            break
        time.sleep(0.1)
    family = [*by_generation[0], *by_generation[1]]
    assert len(by_generation[1]) == count and len(family) == count + 2, "of one server, beside Python's tracker of resources"
    asking.kill()
    assert psutil.wait_procs(family, timeout=10)[1] == [], "nothing is left"
    asking.wait()


def test_a_worker_that_is_killed_is_named_by_its_rank(launched):
    launcher, workers = launched
    workers[1].kill()
    said = launcher.communicate(timeout=60)[1]
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "the process of rank 1 was killed by signal 9, most likely for lack of memory" in said and "Traceback" not in said, said


ONE, TWO = ["launch.nproc_per_node=1"], ["deepspeed=zero2", "launch.nproc_per_node=2"]


@pytest.mark.parametrize(
    "number, ways",
    [
        (signal.SIGTERM, ONE),  # the default run's one fine-tune that starts exactly as a user's does
        *(pytest.param(n, ONE, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
        *(pytest.param(n, TWO, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_run_that_is_asked_to_end_makes_a_checkpoint_and_goes_on_from_it(number, ways, eighty, tmp_path):
    argv = [f"outputs={tmp_path}", f"source={eighty}", f"model.path={write_model(tmp_path / 'model')}", *ways]
    argv += ["tuner=full", "train.log_steps=1", "train.max_steps=30", "train.eval_steps=1000", "train.samples=0", "max_loss_change=1"]
    run = started(*argv)
    run.send_signal(number)
    said = run.communicate(timeout=60)[1]
    assert run.returncode == 128 + number and "Traceback" not in said, said
    assert "stops after this step, with a checkpoint" in said and "interrupted; the same command goes on" in said
    (checkpoint,) = (tmp_path / "default" / "finetune.partial" / "checkpoints").glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    assert 3 <= step < 30 and (checkpoint / "whole").read_text() == ways[-1].partition("=")[2]
    code, said = to_its_end(argv)
    assert code == 0 and f"goes on from step {step}" in said and open_artifact(tmp_path / "default" / "finetune")


def test_what_a_job_is_sent_is_heard_once_and_a_person_asking_twice_twice():
    with checkpoints.Stop() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
        assert stop.number == signal.SIGTERM
        time.sleep(checkpoints.Stop.ONCE + 0.2)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)


ASKED_WHILE_IT_SPEAKS = """
import os, signal, threading, time
from src.core.log import say
from src.training.checkpoints import Stop

def ask():
    for _ in range(300):
        stop.number = 0
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.001)

with Stop() as stop:
    asking = threading.Thread(target=ask)
    asking.start()
    while asking.is_alive():
        say("step")
"""


def test_a_signal_in_the_middle_of_a_line_asks_as_any_other():
    done = subprocess.run([sys.executable, "-c", ASKED_WHILE_IT_SPEAKS], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stderr.count("stops after this step, with a checkpoint") > 100


def test_a_checkpoint_is_made_each_so_many_minutes():
    state = checkpoints.Checkpoints(None, 1, 10, checkpoints.Stop())
    control, args = SimpleNamespace(should_save=False, should_training_stop=False), SimpleNamespace(device="cpu")
    state.on_step_end(args, None, control)
    assert not control.should_save
    state.saved -= 601
    state.on_step_end(args, None, control)
    assert control.should_save and not control.should_training_stop


@pytest.mark.parametrize("text", ["", "x", "2.5"])
def test_a_mark_that_was_never_written_whole_is_no_checkpoint(tmp_path, text):
    for step, mark in ((3, "1"), (7, text)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "whole").write_text(mark)
    assert checkpoints.Checkpoints.last(tmp_path, 1) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&1 | true"])
def test_words_that_reach_nobody_end_no_work(redirect, finished, tmp_path):
    argv = [sys.executable, "-m", "src.data", f"data.path={finished / 'inputs' / 'chats.json'}", *FEW]
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f'"$@" outputs={tmp_path}/new {redirect}', "bash", *argv], cwd=ROOT)
    assert done.returncode == 0 and open_artifact(tmp_path / "new" / "default" / "data")
    refused_ = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f'"$@" outputs={tmp_path}/new data.val=0.4 {redirect}', "bash", *argv], cwd=ROOT
    )
    assert refused_.returncode == Moved.exit_code, "the code says it even so"
