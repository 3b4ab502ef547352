"""A cache costs time, nothing else: two writers, a killed one, a full disk, damage and a place that cannot be written each leave a run as right as without it."""

import multiprocessing
import os
import socket
import tempfile
from pathlib import Path

import pytest
from conftest import CHAT

from src.core import cache, files
from src.core.cache import kept_or_made
from src.core.files import HashCache, hash_files


def make(folder: Path, text: str = "made") -> None:
    (folder / "a").write_text(text)
    (folder / "b").write_text(text)


def read(folder: Path) -> str:
    text = (folder / "a").read_text()
    if (folder / "b").read_text() != text:
        raise ValueError("damaged")
    return text


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_it_is_made_once_and_then_read(tmp_path):
    made = []
    for _ in range(2):
        folder = kept_or_made(tmp_path / "k", lambda f: (made.append(f), make(f)), read)
        assert folder == tmp_path / "k" and read(folder) == "made"
    assert len(made) == 1 and names(tmp_path) == ["k"]


def slowly(folder: Path, barrier, text: str) -> None:
    def together(partial: Path) -> None:
        make(partial, text)
        barrier.wait(20)

    assert read(kept_or_made(folder, together, read)) in ("one", "two")


def test_two_writers_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    both = [context.Process(target=slowly, args=(tmp_path / "k", barrier, text)) for text in ("one", "two")]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0] and names(tmp_path) == ["k"]


def test_what_a_dead_process_left_is_cleared_and_a_living_one_s_stays(tmp_path):
    gone = multiprocessing.get_context("fork").Process(target=int)
    gone.start()
    gone.join()
    for host, pid in ((socket.gethostname(), gone.pid), (socket.gethostname(), os.getppid()), ("elsewhere", gone.pid)):
        make_in = tmp_path / f"k.{host}.{pid}.partial"
        make_in.mkdir()
        make(make_in)
    kept_or_made(tmp_path / "k", make, read)
    assert names(tmp_path) == sorted(["k", f"k.{socket.gethostname()}.{os.getppid()}.partial", f"k.elsewhere.{gone.pid}.partial"])


@pytest.mark.parametrize("damage", ["cut", "missing", "a file"])
def test_damage_is_said_and_made_anew(tmp_path, damage, capsys):
    folder = tmp_path / "k"
    if damage == "a file":
        folder.write_text("")
    else:
        folder.mkdir()
        make(folder, "damaged")
        (folder / "b").unlink() if damage == "missing" else (folder / "b").write_text("dam")
    assert read(kept_or_made(folder, make, read)) == "made" and names(tmp_path) == ["k"]
    assert "is damaged or cannot be read; it is made anew" in capsys.readouterr().err


def test_where_nothing_can_be_kept_it_is_made_for_the_run(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file where the folder should be")
    folder = kept_or_made(tmp_path / "cache" / "k", make, read)
    assert read(folder) == "made" and folder.parent == Path(tempfile.gettempdir()) and "for this run alone" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    def full(folder: Path) -> None:
        make(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        kept_or_made(tmp_path / "k", full, read)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b'{"x": 1}'])
def test_a_damaged_file_of_hashes_costs_time_alone(tmp_path, content):
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    hashes = HashCache(tmp_path / "hashes.json")
    hashes.path.write_bytes(content)
    assert hash_files(tmp_path / "in", hashes) == hash_files(tmp_path / "in")
    assert len(hashes.read()) >= 2


def test_hashes_that_cannot_be_written_are_not_missed(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files, "write_json", refuse)
    (tmp_path / "in").mkdir()
    make(tmp_path / "in")
    assert len(hash_files(tmp_path / "in", HashCache(tmp_path / "no" / "hashes.json"))) == 2


def test_a_dry_run_writes_nothing_at_all(call, finished, tmp_path):
    argv = [f"source={finished / 'a' / 'data'}", f"model.path={CHAT}", "launch.nproc_per_node=1", f"outputs={tmp_path / 'new'}"]
    assert call("finetune", *argv, "dry_run=true").returncode == 0
    assert call("data", f"data.path={finished / 'inputs' / 'chats.json'}", f"outputs={tmp_path / 'new'}", "dry_run=true").returncode == 0
    assert not (tmp_path / "new").exists()


def test_a_name_without_a_process_is_nobody_s_dead(tmp_path):
    assert not any(map(cache._is_dead, ("x.partial", "a.b.partial", f"k.{socket.gethostname()}.{os.getpid()}.partial", "k.h.12x.partial")))
