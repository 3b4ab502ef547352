"""Artifacts: names that follow from content, results that are whole or absent, and what is left after a crash, a full disk or a second process."""

import contextlib
import errno
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import FEW, ROOT, hear_ctrl_c, helps, in_process, refused

from src.core import artifact, compose, files
from src.core.artifact import Artifact, building, key_of, open_artifact, seal
from src.core.errors import BadData, Busy, MissingInput, NoRoom, Tampered, WrongKind
from src.core.files import HashCache, hash_files, sha256, write_json
from src.settings import verbs

CHATS = [
    {"id": str(i), "conversations": [{"from": "user", "value": f"Question {i}?"}, {"from": "assistant", "value": f"Answer {i}."}]}
    for i in range(40)
]


@pytest.fixture
def chats(tmp_path) -> Path:
    path = tmp_path / "chats.json"
    path.write_text(json.dumps(CHATS))
    return path


def make(
    path: Path, content: str = "content", *, key: str = "k", settings: dict | None = None, inputs: dict | None = None, resumes=None
) -> Artifact:
    with building(path, key, resumes=resumes) as out:
        (out / "file.txt").write_text(content)
        seal(out, stage="data", kind="dataset", version=1, settings=settings or {}, inputs=inputs or {}, metrics={"rows": 1}, seconds=0.5)
    return open_artifact(path)


def keeps(partial: Path) -> bool:
    return True


def leftovers(folder: Path) -> list[str]:
    """What a person sees there: everything but locks, caches and the run's journal."""
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != "metrics.jsonl")


# ---- keys


def test_a_key_is_the_same_everywhere():
    # Golden: an artifact made elsewhere, or by an earlier version, must keep its name.
    spelled = '{"parents":{"model":"ab"},"settings":{"dtype":"auto","n":1.5,"이름":null},"stage":"merge","version":1}'
    assert key_of("merge", 1, {"n": 1.5, "이름": None, "dtype": "auto"}, {"model": "ab"}) == hashlib.sha256(spelled.encode()).hexdigest()


def test_a_key_knows_no_order_but_every_value():
    one = key_of("s", 1, {"a": 1, "b": {"c": [1, 2]}}, {"x": "1", "y": "2"})
    assert one == key_of("s", 1, {"b": {"c": [1, 2]}, "a": 1}, {"y": "2", "x": "1"})
    others = [
        key_of("t", 1, {"a": 1, "b": {"c": [1, 2]}}, {"x": "1", "y": "2"}),
        key_of("s", 2, {"a": 1, "b": {"c": [1, 2]}}, {"x": "1", "y": "2"}),
        key_of("s", 1, {"a": 1, "b": {"c": [2, 1]}}, {"x": "1", "y": "2"}),
        key_of("s", 1, {"a": True, "b": {"c": [1, 2]}}, {"x": "1", "y": "2"}),
        key_of("s", 1, {"a": 1, "b": {"c": [1, 2]}}, {"x": "2", "y": "1"}),
        key_of("s", 1, {"a": 1, "b": {"c": [1, 2]}}, {"x": "1"}),
    ]
    assert len({one, *others}) == 7


def test_a_key_refuses_what_json_has_no_word_for():
    with pytest.raises(ValueError):
        key_of("s", 1, {"a": float("nan")}, {})


def settings_of(*overrides: str) -> dict:
    return compose.compose("finetune", list(overrides), verbs.FinetuneVerb).model_dump(mode="json")


@pytest.mark.parametrize(
    "override",
    [
        "run=other", "outputs=/elsewhere", "force=true", "dry_run=true", "tracker=wandb", "tracker=[wandb,tensorboard]", "launch.nproc_per_node=4", "launch.master_addr=10.0.0.1",
        "train.micro_batch_size=2", "model.path=/moved/base", "source=/moved/data",
    ],
)  # fmt: skip
def test_where_and_how_it_runs_takes_no_part_in_the_key(override):
    assert settings_of(override) == settings_of()


@pytest.mark.parametrize(
    "override",
    [
        "tuner.rank=8",
        "tuner=full",
        "train.epochs=2",
        "train.seed=1",
        "train.max_length=256",
        "deepspeed=zero2",
        "train.global_batch_size=16",
    ],
)
def test_what_it_makes_takes_part_in_the_key(override):
    assert key_of("finetune", 1, settings_of(override), {}) != key_of("finetune", 1, settings_of(), {})


def test_the_same_number_in_other_words_is_the_same_key():
    assert settings_of("tuner.learning_rate=3e-4") == settings_of("tuner.learning_rate=0.0003")
    assert settings_of("tuner.alpha=16") == settings_of("tuner.alpha=16.0")


# ---- building


def test_the_manifest_is_the_last_file_and_lists_the_others(tmp_path):
    made = make(tmp_path / "a")
    assert made.files == {"file.txt": {"sha256": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73", "size": 7}}
    assert (made.kind, made.stage, made.metrics) == ("dataset", "data", {"rows": 1})
    assert artifact.verify(made) == [] and leftovers(tmp_path) == ["a"]


def test_nothing_has_the_finished_name_until_all_is_done(tmp_path):
    seen = []
    with building(tmp_path / "a", "k", resumes=None) as out:
        (out / "file.txt").write_text("x")
        seen.append((tmp_path / "a").exists())
        seal(out, stage="s", kind="model", version=1, settings={}, inputs={}, metrics={}, seconds=0)
        seen.append((tmp_path / "a").exists())
    assert seen == [False, False] and artifact.is_finished(tmp_path / "a")


def test_a_stage_that_does_not_seal_is_a_bug(tmp_path):
    with pytest.raises(RuntimeError, match="without a manifest"), building(tmp_path / "a", "k", resumes=None):
        pass
    assert leftovers(tmp_path) == ["a.partial"]


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, MemoryError, BadData("x")])
def test_a_failed_build_leaves_no_finished_name(tmp_path, interrupt):
    with pytest.raises(BaseException), building(tmp_path / "a", "k", resumes=None) as out:  # noqa: B017
        (out / "half").write_text("x")
        raise interrupt
    # What cannot go on is not left about; only a signal leaves it, and the next run clears it.
    assert leftovers(tmp_path) == (["a.partial"] if interrupt is KeyboardInterrupt else [])


def test_a_partial_folder_is_continued_only_for_the_same_key(tmp_path, capsys):
    for key, resumes, survives in (("k", keeps, True), ("other", keeps, False), ("other", None, False)):
        with contextlib.suppress(KeyboardInterrupt), building(tmp_path / "a", "k", resumes=keeps) as out:
            (out / "checkpoint").write_text("step 5")
            raise KeyboardInterrupt
        capsys.readouterr()
        with contextlib.suppress(KeyboardInterrupt), building(tmp_path / "a", key, resumes=resumes) as out:
            assert (out / "checkpoint").exists() == survives
            raise KeyboardInterrupt
        assert ("clearing an unfinished a.partial" in capsys.readouterr().err) != survives


SLOW = """
import dataclasses, sys, time
from src import data
from src.core import stage
def work(cfg, inputs, out):
    (out / "half.jsonl").write_text("half a result")
    print("building", flush=True)
    time.sleep(60)
stage.main(dataclasses.replace(data.STAGE, run=work))
"""


def slow_data(outputs: Path, chats: Path, *more: str) -> subprocess.Popen:
    """The verb `data` in another process, in the middle of its work."""
    command = [sys.executable, "-c", SLOW, f"outputs={outputs}", f"data.path={chats}", *FEW, *more]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=hear_ctrl_c)
    assert process.stdout.readline() == "building\n"
    return process


def end(process: subprocess.Popen, number: int) -> int:
    process.send_signal(number)
    process.stdout.close()
    return process.wait(20)


def test_killed_in_the_middle_then_run_again(call, tmp_path, chats):
    outputs = tmp_path / "outputs"
    end(slow_data(outputs, chats), signal.SIGKILL)
    assert leftovers(outputs / "default") == ["data.partial"]
    done = call("data", f"data.path={chats}", *FEW)
    assert done.returncode == 0 and "clearing an unfinished data.partial of an earlier run" in done.stderr
    assert leftovers(outputs / "default") == ["data"]
    assert artifact.verify(open_artifact(outputs / "default" / "data")) == []


def test_interrupted_from_the_keyboard_ends_with_130(tmp_path, chats):
    assert end(slow_data(tmp_path / "outputs", chats), signal.SIGINT) == 130
    assert leftovers(tmp_path / "outputs" / "default") == ["data.partial"]


def test_forced_and_killed_keeps_the_old_result(call, tmp_path, chats):
    outputs = tmp_path / "outputs"
    assert call("data", f"data.path={chats}", *FEW).returncode == 0
    old = open_artifact(outputs / "default" / "data")
    process = slow_data(outputs, chats, "force=true", "data.split_seed=7")
    assert open_artifact(old.path).key == old.key and artifact.verify(old) == []
    end(process, signal.SIGKILL)
    assert open_artifact(old.path).key == old.key and artifact.verify(old) == []


def test_forced_replaces_the_old_result_when_the_new_is_done(call, tmp_path, chats):
    call("data", f"data.path={chats}", *FEW)
    path = tmp_path / "outputs" / "default" / "data"
    old = open_artifact(path).key
    assert call("data", f"data.path={chats}", *FEW, "data.split_seed=7", "force=true").returncode == 0
    assert open_artifact(path).key != old
    assert leftovers(path.parent) == ["data"] and not list(path.parent.glob(".*replaced"))


@helps("core/artifact.py", "wait until it has ended", "run=OTHER_NAME")
def test_a_second_process_is_told_to_wait(call, tmp_path, chats):
    process = slow_data(tmp_path / "outputs", chats)
    try:
        told = call("data", f"data.path={chats}", *FEW)
        refused(told, Busy, tmp_path / "outputs" / "default" / "data", "wait until it has ended", "run=OTHER_NAME")
        assert call("data", f"data.path={chats}", *FEW, "run=other").returncode == 0
        assert re.search(rf"process {process.pid}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d, is making this artifact", told.stderr), (
            told.stderr
        )
        assert (tmp_path / "outputs" / "default" / "data.partial" / "half.jsonl").exists(), "the first one's work must stay"
    finally:
        end(process, signal.SIGKILL)
    assert call("data", f"data.path={chats}", *FEW).returncode == 0, "a lock must not outlive its process"


def test_one_of_many_at_once_wins(tmp_path):
    """Threads hold separate open files, so the lock tells them apart as it does processes."""
    start, ends = threading.Barrier(4), []

    def work():
        start.wait()
        try:
            with building(tmp_path / "a", "k", resumes=None) as out:
                (out / "file.txt").write_text("x")
                threading.Event().wait(0.2)
                seal(out, stage="s", kind="model", version=1, settings={}, inputs={}, metrics={}, seconds=0)
            ends.append("done")
        except Busy:
            ends.append("busy")

    threads = [threading.Thread(target=work) for _ in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert sorted(ends) == ["busy"] * 3 + ["done"] and artifact.verify(open_artifact(tmp_path / "a")) == []


KILLED_AT = """
import os, signal, sys
from src import data
from src.core import stage
after, real, count = int(sys.argv.pop(1)), os.replace, 0
def replace(old, new):
    global count
    folder = os.path.isdir(old)
    if folder and count == after:
        os.kill(os.getpid(), signal.SIGKILL)
    real(old, new)
    count += folder
os.replace = replace
stage.main(data.STAGE)
"""


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_the_renames_of_a_replacement(call, tmp_path, chats, renamed):
    """Of the two renames (the old aside, the new into place) none, one or both are done when the process dies: there is always one whole artifact."""
    outputs = tmp_path / "outputs"
    assert call("data", f"data.path={chats}", *FEW).returncode == 0
    before = open_artifact(outputs / "default" / "data").key
    other = [f"outputs={outputs}", f"data.path={chats}", "data.val=0.3", "data.calib=0.2", "force=true"]
    if renamed < 2:
        dead = subprocess.run([sys.executable, "-c", KILLED_AT, str(renamed), *other], cwd=ROOT, capture_output=True)
        assert dead.returncode == -signal.SIGKILL
        folder = outputs / "default"
        left = [open_artifact(folder / name) for name in (".data.replaced", "data") if (folder / name / "manifest.json").is_file()]
        assert [a.key for a in left] == [before], "the old one, under either name"
        assert open_artifact(folder / "data.partial").key != before, "and the new one, whole, not yet under its name"
        done = call("data", f"data.path={chats}", *FEW)
        assert done.returncode == 0, done.stderr
        assert open_artifact(folder / "data").key == before and artifact.verify(open_artifact(folder / "data")) == []
    assert call(*["data", *other[1:]]).returncode == 0
    assert open_artifact(outputs / "default" / "data").key != before and leftovers(outputs / "default") == ["data"]


def test_the_old_one_steps_aside_before_the_new_one_comes(tmp_path, monkeypatch):
    """The other order would need the new one's name to be free, which it is not: on most systems a folder cannot replace one with files in it."""
    seen, real = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: seen.append((Path(old).name, Path(new).name)) or real(old, new))
    for _ in range(2):
        with building(tmp_path / "a", "k") as out:
            write_json(out / "manifest.json", {})
    folders = [pair for pair in seen if not pair[0].endswith(".json.partial") and ".json" not in pair[1] and "key" not in pair[1]]
    assert folders == [("a.partial", "a"), ("a", ".a.replaced"), ("a.partial", "a")]


# ---- no room


@contextlib.contextmanager
def mounted(folder: Path, options: str):
    """A small tmpfs, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("needs root to mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_full_costs_nothing_finished(tmp_path):
    small = tmp_path / "small"
    (tmp_path / "many.json").write_text(json.dumps(CHATS * 100))
    with mounted(small, "size=128k"):
        (tmp_path / "few.json").write_text(json.dumps(CHATS))
        assert in_process("data", f"outputs={small}", "run=old", f"data.path={tmp_path / 'few.json'}", *FEW).returncode == 0
        done = in_process("data", f"outputs={small}", "run=old", "force=true", "room=ignore", f"data.path={tmp_path / 'many.json'}", *FEW)
        refused(done, NoRoom, "No space left", "free space", "outputs=")
        assert artifact.verify(open_artifact(small / "old" / "data")) == []
        subprocess.run(["mount", "-o", "remount,size=4m", small], check=True)
        assert in_process("data", f"outputs={small}", "run=old", "force=true", f"data.path={tmp_path / 'many.json'}", *FEW).returncode == 0
        assert leftovers(small / "old") == ["data"]


def test_a_folder_that_is_read_only(tmp_path, chats):
    with mounted(tmp_path / "ro", "size=64k,ro"):
        refused(
            in_process("data", f"outputs={tmp_path / 'ro'}", f"data.path={chats}", *FEW), NoRoom, "Read-only", tmp_path / "ro", "outputs="
        )


@helps("core/errors.py", "free space, then run the same command again")
@helps("core/stage.py", "give yourself the right to write there, or move away what is in its place")
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_what_the_system_refuses_is_told_without_a_traceback(call, tmp_path, chats, monkeypatch, number):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number), str(tmp_path / "there"))

    with monkeypatch.context() as full:
        full.setattr(os, "replace", refuse)
        refused(call("data", f"data.path={chats}", *FEW), NoRoom, os.strerror(number), tmp_path / "there")
    assert "data" not in leftovers(tmp_path / "outputs" / "default") if (tmp_path / "outputs" / "default").exists() else True
    assert call("data", f"data.path={chats}", *FEW).returncode == 0


@helps("core/stage.py", "outputs=FOLDER_ELSEWHERE")
def test_an_outputs_folder_that_is_a_file(call, tmp_path, chats):
    (tmp_path / "outputs").write_text("")
    refused(call("data", f"data.path={chats}", *FEW), NoRoom, tmp_path / "outputs", "outputs=FOLDER_ELSEWHERE")
    assert call("data", f"data.path={chats}", *FEW, f"outputs={tmp_path / 'elsewhere'}").returncode == 0


def test_a_run_that_is_a_file(call, tmp_path, chats):
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs" / "default").write_text("")
    refused(call("data", f"data.path={chats}", *FEW), NoRoom, tmp_path / "outputs" / "default")


@helps("core/stage.py", "give it a shorter name")
def test_a_run_name_longer_than_the_disk_allows(call, chats):
    refused(call("data", f"data.path={chats}", *FEW, "run=" + "x" * 300), NoRoom, "too long", "give it a shorter name")
    assert call("data", f"data.path={chats}", *FEW, "run=" + "x" * 30).returncode == 0


# ---- hashes of outside inputs


def test_hashes_are_kept_while_a_file_stays_the_same(tmp_path, monkeypatch):
    cache, folder = HashCache(tmp_path / "cache.json"), tmp_path / "model"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"a" * 100)
    (folder / "b.bin").write_bytes(b"b" * 100)
    hashed, real = [], sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or real(path))
    first = hash_files(folder, cache)
    assert hash_files(folder, cache) == first and hashed == ["a.bin", "b.bin"]

    stat = (folder / "a.bin").stat()
    (folder / "a.bin").write_bytes(b"c" * 100)  # same size, new time
    os.utime(folder / "a.bin", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    second = hash_files(folder, cache)
    assert second["a.bin"] != first["a.bin"] and second["b.bin"] == first["b.bin"] and hashed[2:] == ["a.bin"]

    (folder / "new").write_bytes(b"d" * 100)  # same size and time, another inode
    os.utime(folder / "new", ns=((folder / "b.bin").stat().st_mtime_ns,) * 2)
    os.replace(folder / "new", folder / "b.bin")
    assert hash_files(folder, cache)["b.bin"] != first["b.bin"]


@pytest.mark.parametrize("content", ["", "not json", "[]", '"text"', "null", '{"a|1|2|3": 5}'])
def test_a_damaged_cache_costs_time_and_nothing_else(tmp_path, content):
    (tmp_path / "cache.json").write_text(content)
    (tmp_path / "input").write_text("x")
    assert hash_files(tmp_path / "input", HashCache(tmp_path / "cache.json")) == hash_files(tmp_path / "input")


def test_the_seal_never_trusts_the_cache(tmp_path):
    made = make(tmp_path / "a")
    stat = (made.path / "file.txt").stat()
    (made.path / "file.txt").write_text("CONTENT")
    os.utime(made.path / "file.txt", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert artifact.verify(made) == ["file.txt: bytes differ"]


def test_an_outside_key_follows_names_and_bytes(tmp_path):
    def key(**files: str) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        return artifact.outside(folder, "model").key

    assert key(a="1", b="2") == key(b="2", a="1")
    assert len({key(a="1", b="2"), key(a="2", b="1"), key(a="1"), key(a="1", c="2")}) == 4
    with pytest.raises(MissingInput, match="empty"):
        key()


def test_hidden_files_and_caches_are_no_content(tmp_path):
    (tmp_path / "a").write_text("x")
    before = hash_files(tmp_path)
    for name in (".git", "__pycache__", ".cache"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    (tmp_path / ".DS_Store").write_text("x")
    assert hash_files(tmp_path) == before


# ---- opening


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", "null", '{"schema": 1}', '{"schema": 2}', '{"schema": 1, "seal": null}', b"\xff\xfe\x00"]
)
def test_a_damaged_manifest_is_noticed(tmp_path, damage):
    made = make(tmp_path / "a")
    (made.path / "manifest.json").write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(Tampered):
        open_artifact(made.path)


def test_a_missing_or_cut_file_is_noticed_at_once(tmp_path):
    made = make(tmp_path / "a")
    (made.path / "file.txt").write_text("cut")
    with pytest.raises(Tampered, match=r"file\.txt"):
        open_artifact(made.path)
    (made.path / "file.txt").unlink()
    with pytest.raises(Tampered, match=r"file\.txt"):
        open_artifact(made.path)


def test_folders_made_elsewhere_are_told_by_their_configuration(tmp_path):
    for name, file, content, kind in (
        ("m", "config.json", {"model_type": "llama"}, "model"),
        ("q", "config.json", {"quantization_config": {"bits": 4}}, "quantized"),
        ("a", "adapter_config.json", {}, "adapter"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(json.dumps(content))
        assert artifact.open_any(tmp_path / name).kind == kind
    (tmp_path / "none").mkdir()
    with pytest.raises(WrongKind, match="not a Hugging Face folder"):
        artifact.open_any(tmp_path / "none")
    with pytest.raises(MissingInput):
        artifact.open_any(tmp_path / "nowhere")


def test_a_moved_outputs_folder_keeps_its_chain(tmp_path):
    parent = make(tmp_path / "outputs" / "run" / "data")
    child = make(tmp_path / "outputs" / "run" / "next", inputs={"dataset": parent})
    other = make(tmp_path / "outputs" / "two" / "next", inputs={"dataset": parent})
    assert child.parent("dataset")["path"] == "data" and other.parent("dataset")["path"] == "../run/data"
    assert child.parent("dataset")["key"] == parent.key and child.parent("model") is None
    assert set(child.manifest["ancestors"]) == {parent.key}


def test_a_manifest_says_how_it_was_made(tmp_path):
    manifest = make(tmp_path / "a").manifest
    assert manifest["packages"].keys() <= set(artifact.PACKAGES) and "numpy" in manifest["packages"]
    assert manifest["git"] is None or len(manifest["git"].removesuffix("-dirty")) == 40
    assert "HOME" not in json.dumps(manifest) and manifest["seconds"] == 0.5
