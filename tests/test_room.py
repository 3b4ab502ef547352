"""What a stage takes of this machine is said beforehand, and refused where there is less: in a second, before torch, with ways out that fit."""

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from conftest import CHAT, FEW, ROOT, helps, in_process, refused, typed, ways
from test_structure import loaded_by

from src.core import memory, room
from src.core.compose import compose
from src.core.errors import NoMemory, NoRoom, WrongKind
from src.core.room import Needs, Room
from src.settings.quantizers import Calibration
from src.settings.verbs import QuantizeVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

GB = 10**9
SMALL = """
import atexit, runpy, sys
from src.core import memory
memory.available, memory.swap = lambda: 10_000_000, lambda: 0
atexit.register(lambda: print("LOADED", [m for m in ("torch", "transformers") if m in sys.modules]))
sys.argv = sys.argv[1:]
runpy.run_module(f"src.{sys.argv[0]}", run_name="__main__", alter_sys=True)
"""
"""a verb on a machine with 10 MB of memory available"""
STAGES = ("data", "distill", "pretrain", "cpt", "finetune", "merge", "quantize", "evaluate", "deploy")


@pytest.fixture
def command(finished, tmp_path):
    """command(verb) -> a command that has all it works from, and makes something new."""
    a, inputs = finished / "a", finished / "inputs"
    given = {
        "data": [f"data.path={inputs / 'chats.json'}", *FEW],
        "distill": [f"prompts.path={inputs / 'chats.json'}", "teacher=local", f"teacher.path={CHAT}"],
        "pretrain": [f"text={inputs / 'chats.txt'}"],
        "cpt": [f"text={inputs / 'chats.txt'}", f"model.path={inputs / 'base'}"],
        "finetune": [f"source={a / 'data'}", f"model.path={inputs / 'base'}", "launch.nproc_per_node=1"],
        "merge": [f"source={a / 'finetune'}"],
        "quantize": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "evaluate": [f"source={a / 'merge'}", f"dataset={a / 'data'}"],
        "deploy": [f"source={a / 'merge'}"],
    }
    return lambda verb: [verb, *map(str, given[verb]), "run=new", f"outputs={tmp_path / 'outputs'}"]


@pytest.fixture
def machine(monkeypatch):
    """machine(available, swap=0, disk=None): what this machine has, from now on."""

    def machine(available: float, swap: float = 0, disk: float | None = None):
        monkeypatch.setattr(memory, "available", lambda: int(available))
        monkeypatch.setattr(memory, "swap", lambda: int(swap))
        if disk is not None:
            monkeypatch.setattr(room.shutil, "disk_usage", lambda at: type("Usage", (), {"free": int(disk)}))

    return machine


# ---- the door


@pytest.mark.parametrize("verb", STAGES)
def test_each_verb_is_refused_on_a_machine_too_small_before_anything_is_loaded(verb, command, tmp_path):
    done, seconds = loaded_by(SMALL, *command(verb))
    refused(done, NoMemory, "this takes about", "10.0 MB are available", "where: ", "librar", "room=ignore")
    assert "LOADED []" in done.stdout and seconds < 3
    assert not (tmp_path / "outputs" / "new").exists()


@helps("core/errors.py", "free memory or add swap, then run the same command again")
@helps("core/room.py", "room=ignore goes on regardless")
@pytest.mark.parametrize("verb", ["data", "merge"])
def test_more_memory_or_swap_lets_it_through_and_so_does_the_user(verb, call, command, machine):
    plan = [*command(verb), "dry_run=true"]
    machine(GB / 100)
    short = call(*plan)
    refused(short, NoMemory)
    printed = ways(short)
    assert printed[-2:] == ["free memory or add swap, then run the same command again", "room=ignore goes on regardless"]
    ignored = call(*plan, *typed(printed[-1]))
    assert ignored.returncode == 0 and "may be killed (room=ignore)" in ignored.stderr
    machine(GB / 100, swap=10 * GB)
    swapped = call(*plan)
    assert swapped.returncode == 0 and "will be swapped out" in swapped.stderr
    machine(10 * GB)
    roomy = call(*plan)
    assert roomy.returncode == 0 and "of memory of 10.0 GB" in roomy.stderr and "warning" not in roomy.stderr


def test_too_small_a_disk(call, command, machine):
    plan = [*command("merge"), "dry_run=true"]
    machine(10 * GB, disk=1000)
    refused(call(*plan), NoRoom, "of disk, 1.0 kB are free", "room=ignore")
    assert call(*plan, "room=ignore").returncode == 0


def test_a_launcher_is_refused_before_the_data_is_made(call, machine):
    given = ["finetune", "run=new", f"model.path={CHAT}", "--settings-only"]
    assert call(*given).returncode == 0
    machine(GB / 100)
    refused(call(*given), NoMemory, "this takes about")


def test_a_worker_leaves_the_room_to_the_launcher(call, command, machine, monkeypatch):
    machine(GB / 100)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert call(*command("finetune"), "dry_run=true").returncode == 0


def test_what_no_equation_is_known_for_is_said(call, command, monkeypatch, machine):
    def unknown(*given, **more):
        raise WrongKind("a mixture of experts")

    machine(GB / 100)
    monkeypatch.setattr(host, "merge", unknown)
    done = call(*command("merge"), "dry_run=true")
    assert done.returncode == 0 and "is not estimated: a mixture of experts" in done.stderr


# ---- needs


def test_the_smaller_way_is_what_counts_where_the_larger_does_not_fit():
    needs = Needs({"a": 8 * GB}, smaller=Needs({"a": 2 * GB}, 1))
    assert "8.0 GB of memory of 9.0 GB" in room.check(needs, Room(9 * GB, 0, GB, ROOT))
    assert "2.0 GB of memory of 4.0 GB, 1 B of disk" in room.check(needs, Room(4 * GB, 0, GB, ROOT))


def test_of_settings_of_one_kind_the_first_that_fits_is_a_way_out():
    tried = [{"a=4": Needs({"x": 4 * GB}), "a=2": Needs({"x": 2 * GB}), "a=1": Needs({"x": GB})}, {"b=1": Needs({"x": 9 * GB})}, {}]
    with pytest.raises(NoMemory) as error:
        room.check(Needs({"weights": 7 * GB, "nothing": 0, "rest": GB}, ways=tried), Room(3 * GB, 0, GB, ROOT))
    assert error.value.fix[0] == "a=2" and error.value.where == "weights 7.0 GB + rest 1.0 GB"
    assert not any(way.startswith("b=") for way in error.value.fix)


def test_the_equations_have_the_stages_own_constants():
    from src.models import by_layer, fidelity, gptq, gptq_layers
    from src.training import layout, rules

    theirs = (by_layer.TOGETHER, by_layer.LOGITS, by_layer.HIDDEN, fidelity.TOKENS, rules.ON_CPU, layout.BUSY, gptq_layers.HELD, gptq.ROWS)
    assert theirs == (host.TOGETHER, host.CHUNK, host.HIDDEN, host.HELD_OUT, host.LOGITS, host.BUSY, host.WAITING, host.ROUNDED)
    assert yaml.safe_load((ROOT / "configs" / "tuner" / "lora.yaml").read_text())["rank"] == host.RANK


# ---- every way out


@pytest.fixture(scope="module")
def calib(tmp_path_factory):
    """A dataset with more calibration rows than the fewest that are advised."""
    outputs = tmp_path_factory.mktemp("calib")
    path = ROOT / "assets" / "conversations.json"
    assert in_process("data", "run=d", f"outputs={outputs}", f"data.path={path}", "data.calib=0.9", "data.val=0.05").returncode == 0
    return outputs / "d" / "data"


@pytest.mark.parametrize(
    "verb,given",
    [
        ("finetune", "train.gradient_checkpointing=false train.micro_batch_size=8 train.max_length=512"),
        ("finetune", "tuner=full"),
        ("quantize", "dataset={calib}"),
        ("evaluate", ""),
    ],
)
def test_each_way_out_that_is_printed_is_one(verb, given, call, command, machine, monkeypatch, calib):
    for constant in ("PYTHON", "SERVER", "PROOF", "EVALUATE", "TRAINER", "LAUNCHER", "DEEPSPEED", "BITSANDBYTES", "GPTQMODEL"):
        monkeypatch.setattr(host, constant, 0)
    monkeypatch.setattr(host, "by_layer", lambda *given, **more: {})  # on a tiny model these are all there is
    seen, check = [], room.check
    monkeypatch.setattr(room, "check", lambda needs, *rest, **more: seen.append(needs) or check(needs, *rest, **more))
    plan = [*command(verb), *given.format(calib=calib).split(), "dry_run=true"]
    assert call(*plan).returncode == 0
    least = lambda needs: min(found.memory for found in (needs, needs.smaller) if found)
    shown = set()
    for kind in (kind for kind in seen[0].ways if kind and least(kind[[*kind][-1]]) < least(seen[0])):
        machine(least(kind[[*kind][-1]]) + 1)
        done = call(*plan)
        refused(done, NoMemory)
        (way,) = kind.keys() & set(ways(done))
        assert call(*plan, *way.split()).returncode == 0, way
        shown.add(way.partition("=")[0])
    assert shown, "none makes a difference here"


def quantizing(shape, *, exact: bool) -> Needs:
    calibration = Calibration(rows=64, max_length=512, seed=0, text=None, text_share=0.25)
    return host.quantize(shape, compose("quantize", [], QuantizeVerb).quantizer, calibration, host.Conversations(64, 100), exact=exact)


def test_a_disk_too_small_for_the_exact_sum():
    needs = quantizing(read_shape(CHAT), exact=True)
    with pytest.raises(NoRoom) as error:
        room.check(needs, Room(GB, 0, int(needs.disk) - 1, ROOT))
    assert "weights=stored" in error.value.fix


def test_the_exact_sum_widens_the_embedding_as_a_whole():
    """Which is the most that quantizing a model of few layers and many tokens takes."""
    shape = replace(read_shape(CHAT), vocab=1_000_000, dtype="bfloat16")
    rest = quantizing(replace(shape, vocab=1024), exact=True).memory
    assert quantizing(shape, exact=True).memory >= 6 * shape.embedding
    assert quantizing(shape, exact=True).memory - quantizing(shape, exact=False).memory > 3 * shape.embedding > rest / 2


def test_a_teacher_is_counted_where_it_takes_more_to_be_asked_than_the_student_to_be_trained(call, command, machine, monkeypatch):
    plan = [*command("finetune"), f"teacher.path={CHAT}", "dry_run=true"]
    machine(GB / 100)
    small = call(*plan)
    refused(small, NoMemory)
    assert "teacher:" not in small.stderr
    monkeypatch.setattr(host, "by_layer", lambda shape, tokens=0, adapter=0, ends=False: {"layer in fp32 and a pass": 8e9 * (not adapter)})
    refused(call(*plan), NoMemory, "teacher: layer in fp32 and a pass 8.0 GB")


# ---- the plan


def test_the_plan_says_of_each_stage_what_the_stage_says(call, command, finished):
    base = ["target=openvino_cpu", "target.context_len=512", "target.prompt_len=256"]
    planned = call("plan", f"model={finished / 'a' / 'merge'}", "train.max_length=512", *base).stdout
    table = dict(re.findall(r"^(data|finetune|merge|quantize|evaluate|deploy)\b.*? {2,}(\S+ \w+)  .*fits$", planned, re.MULTILINE))
    assert [*table] == ["data", "finetune", "merge", "quantize", "evaluate", "deploy"], planned
    for verb in ("data", "finetune"):
        done = call(*command(verb), "dry_run=true")
        assert f"needs about {table[verb]} of memory" in done.stderr, (table[verb], done.stderr)


def test_the_plan_names_what_would_fit(call, finished, machine):
    machine(GB / 100)
    said = call("plan", f"model={finished / 'a' / 'merge'}", "target=llama2c").stdout
    assert said.count("does NOT fit") >= 6


# ---- killed all the same


def test_a_stage_that_is_killed_says_so():
    code = "import os\nfrom src.core.watch import watched\nwith watched('merge'):\n    {}\n"
    run = lambda what: subprocess.run(
        [sys.executable, "-c", code.format(what)], cwd=ROOT, capture_output=True, text=True, timeout=60, env={**os.environ}
    )
    killed = run("os.kill(os.getpid(), 9)")
    assert killed.returncode == -9 and killed.stderr.startswith("merge was killed by") and "the same command goes on" in killed.stderr
    assert run("pass").stderr == "" and "was killed" not in run("raise ValueError").stderr
