"""Killed at random moments, whole groups, launchers and workers, by SIGKILL and by SIGTERM: the same command goes on to the files of a run that nobody
disturbed, and nothing is left of the dead. Real processes, as a user starts them; test_distill.py has the same for distill."""

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
from conftest import CHAT, FEW, ROOT

from src.core.files import hash_files

pytestmark = pytest.mark.slow
MOMENTS = 20
SHORT = [f"model.path={CHAT}", "train.samples=1", "tuner.rank=4", "train.eval_steps=6", "train.checkpoint_steps=3", "train.log_steps=1"]
VERBS = {
    "finetune": ["finetune", *SHORT, "train.max_steps=60", "launch.nproc_per_node=1"],
    "finetune-zero2": ["finetune", *SHORT, "train.max_steps=40", "deepspeed=zero2", "launch.nproc_per_node=2"],
    "merge": ["merge"],
    "quantize": ["quantize", "calibration.rows=4"],
    "evaluate": ["evaluate", "evaluation.samples=2"],
    "deploy": ["deploy", "target=llama2c"],
}
WAYS = ("group", "launcher", "worker", "SIGTERM")


@pytest.fixture(scope="module")
def road(tmp_path_factory) -> Path:
    """An outputs folder whose run `r` has a dataset, an adapter and a merge."""
    here = tmp_path_factory.mktemp("kills")
    (here / "chats.json").write_text(json.dumps(json.loads((ROOT / "assets" / "conversations.json").read_text())[:60]))
    given = [f"outputs={here / 'o'}", "run=r"]
    for verb, *argv in (("data", f"data.path={here / 'chats.json'}", *FEW), ("finetune", *SHORT, "train.max_steps=8"), ("merge",)):
        process = begin([verb, *given, *argv])
        said = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, said
    return here / "o"


def begin(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-m", f"src.{argv[0]}", *argv[1:]], cwd=ROOT, env=environment, start_new_session=True, **pipes)


def end(process: subprocess.Popen, way: str, draw: random.Random) -> tuple[str, int, str]:
    """(how it was ended in fact, its exit code, what it said); nothing of it lives on for more than ten seconds."""
    family = psutil.Process(process.pid).children(recursive=True)
    # Python's own tracker of shared memory complains in its own words, and is no worker.
    workers = [p for p in family if p.is_running() and "resource_tracker" not in " ".join(p.cmdline())]
    if way == "worker" and not workers:
        way = "launcher"
    if way == "group":
        os.killpg(process.pid, signal.SIGKILL)
    elif way == "launcher":
        process.kill()
    elif way == "SIGTERM":
        process.terminate()
    else:
        draw.choice(workers).kill()
    said = process.communicate(timeout=240)[1].decode()
    left = psutil.wait_procs([p for p in family if p.is_running()], timeout=10)[1]
    assert not left, f"{way}: {[p.cmdline() for p in left]} live on"
    return way, process.returncode, said


def artifact_of(road: Path, run: str, verb: str) -> Path:
    return next(p for p in (road / run).iterdir() if p.name.startswith(verb) and not p.name.endswith((".lock", ".partial")))


def told(folder: Path) -> dict:
    """A manifest's metrics, flat."""
    metrics, found = json.loads((folder / "manifest.json").read_text())["metrics"], {}

    def walk(value, key):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
            walk(inner, f"{key}.{name}")
        if not isinstance(value, dict | list):
            found[key] = value

    walk(metrics, "")
    return found


@pytest.mark.parametrize("name", VERBS)
def test_killed_at_random_moments(name, road):
    verb, *settings = VERBS[name]
    inputs = {"finetune": ["data"], "merge": ["data", "finetune"]}.get(verb, ["data", "finetune", "merge"])

    def command(run: str) -> list[str]:
        for stage in inputs:
            if not (road / run / stage).exists():
                shutil.copytree(road / "r" / stage, road / run / stage)
        return [verb, f"outputs={road}", f"run={run}", *settings]

    start = time.monotonic()
    for run in ("one", "two"):
        process = begin(command(f"{name}-{run}"))
        said = process.communicate(timeout=300)[1].decode()
        assert process.returncode == 0, said
    lasts = (time.monotonic() - start) / 2
    one, two = (artifact_of(road, f"{name}-{run}", verb) for run in ("one", "two"))
    vary = {key for key, value in told(one).items() if told(two).get(key) != value or "memory" in key or "second" in key}

    draw, codes, finished = random.Random(name), [], 0
    run, number = f"{name}-killed0", 0
    for moment in range(MOMENTS):
        process = begin(command(run))
        try:
            said = process.communicate(timeout=lasts * draw.uniform(0.02, 0.95))[1].decode()
        except subprocess.TimeoutExpired:
            way, code, said = end(process, WAYS[moment % len(WAYS)], draw)
            assert "Traceback" not in said, f"{way}: {said}"
            assert code != 0 or way in ("worker", "SIGTERM"), said  # it may have been at its very end
            assert way != "SIGTERM" or code in (143, 0, -15), (code, said)
            codes.append(f"{way} {code}")
            if code:
                continue
        assert process.returncode == 0, said
        finished, number = finished + 1, number + 1
        compare(road, run, verb, one, vary)
        run = f"{name}-killed{number}"
    process = begin(command(run))
    said = process.communicate(timeout=300)[1].decode()
    assert process.returncode == 0, said
    compare(road, run, verb, one, vary)
    print(f"{name}: {len(codes)} of {MOMENTS} killed ({', '.join(sorted(set(codes)))}), {finished + 1} ends, all equal")


def compare(road: Path, run: str, verb: str, undisturbed: Path, vary: set[str]) -> None:
    """The artifact's files and what its manifest tells are those of a run that nobody disturbed, and beside it there is nothing else."""
    made = artifact_of(road, run, verb)
    ours, theirs = hash_files(made), hash_files(undisturbed)
    assert ours.keys() == theirs.keys()
    differing = {n for n in ours if ours[n] != theirs[n] and not n.endswith(("manifest.json", ".log", ".html"))}
    assert not differing, differing
    a, b = told(made), told(undisturbed)
    assert a.keys() == b.keys() and {k: (a[k], b[k]) for k in a if a[k] != b[k] and k not in vary} == {}
    names = {p.name for p in (road / run).iterdir() if not p.name.endswith(".lock")}
    assert names == {p.name for p in undisturbed.parent.iterdir() if not p.name.endswith(".lock")}
