"""The journal by itself: what it acknowledged is there after kill -9, what it counts adds up, and it belongs to one process and one user."""

import asyncio
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, helps

from src.core.errors import BadData, Busy, NoRoom
from src.distill.journal import Journal, Total

ANSWER = {"text": "an answer", "reasoning": "", "prompt_tokens": 3, "tokens": 4, "finish": "stop"}


def run(path: Path, work):
    async def go():
        async with Journal(path) as journal:
            return await work(journal)

    return asyncio.run(go())


def test_what_a_request_went_through_is_known_and_adds_up(tmp_path):
    async def work(journal: Journal):
        assert await journal.look("a") is None
        sent = await journal.send("a", "t", 10, 20, 0.5)
        await journal.failed(sent, "a", "t", 30, 0.5, True)
        known = await journal.look("a")
        assert (known.state, known.faults, known.paid_tokens) == ("tried", 1, 30)
        sent = await journal.send("a", "t", 10, 20, 0.5)
        known = await journal.answered(sent, "a", "t", 7, 0.125, ANSWER)
        assert (known.state, known.text, known.paid_tokens, known.paid_money) == ("answered", "an answer", 37, 0.625)
        await journal.spoil("a")
        assert (await journal.look("a")).faults == 2
        await journal.put_aside("a", "t", "answer is not JSON", "detail")
        await journal.put_aside("b", "t", "HTTP 400", "")
        assert (await journal.look("a")).reason == "answer is not JSON"
        await journal.take_back(["b"])
        assert (await journal.look("b")).state == "tried" and (await journal.look("a")).state == "aside"
        assert await journal.take_back_all() == 1 and (await journal.look("a")).faults == 0
        return await journal.totals()

    assert run(tmp_path / "j.sqlite", work) == {"t": Total(2, 37, 0.625, 0)}
    assert (tmp_path / "j.sqlite").stat().st_mode & 0o777 == 0o600


def test_what_was_on_its_way_counts_in_full_when_it_is_opened_again(tmp_path):
    async def send(journal: Journal):
        await journal.send("a", "t", 10, 20, 0.5)

    async def look(journal: Journal):
        return await journal.totals(), (await journal.look("a")).state

    run(tmp_path / "j.sqlite", send)
    for _ in range(2):
        assert run(tmp_path / "j.sqlite", look) == ({"t": Total(1, 30, 0.5, 1)}, "tried")


def test_a_batch_stays_open_until_it_ends(tmp_path):
    async def begin(journal: Journal):
        numbers = await journal.begin_batch("n", "t", [("a", 1, 2, 0.1), ("b", 3, 4, 0.2)])
        await journal.answered(numbers[0], "a", "t", 3, 0.1, ANSWER)

    async def end(journal: Journal):
        (batch,) = await journal.open_batches("t")
        assert batch.id is None and list(batch.requests) == ["b"] and batch.requests["b"][1:] == (3, 4)
        assert await journal.open_batches("another") == []
        await journal.name_batch("n", "batch-7")
        (batch,) = await journal.open_batches("t")
        await journal.end_batch("n")
        return batch.id, await journal.open_batches("t"), await journal.totals()

    run(tmp_path / "j.sqlite", begin)
    assert run(tmp_path / "j.sqlite", end) == ("batch-7", [], {"t": Total(1, 3, 0.1, 0)})


WRITER = """
import asyncio, sys
from pathlib import Path
from src.distill.journal import Journal

async def main():
    async with Journal(Path(sys.argv[1])) as journal:
        async def one(n):
            for i in range(n, 100000, 16):
                number = await journal.send(f"{i}", "t", 1, 1, 0.0)
                await journal.answered(number, f"{i}", "t", 2, 0.0, {"text": f"text {i}", "reasoning": "", "prompt_tokens": 1, "tokens": 1, "finish": "stop"})
                print(i, flush=True)
        await asyncio.gather(*(one(n) for n in range(16)))

asyncio.run(main())
"""


def test_what_was_acknowledged_survives_a_kill(tmp_path):
    path = tmp_path / "j.sqlite"
    process = subprocess.Popen([sys.executable, "-c", WRITER, path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    told = [process.stdout.readline() for _ in range(700)]
    process.kill()
    told += process.stdout.readlines()
    assert process.wait() == -signal.SIGKILL
    numbers = [int(line) for line in told if line.endswith("\n")]

    async def work(journal: Journal):
        for number in numbers:
            known = await journal.look(str(number))
            assert known.state == "answered" and known.text == f"text {number}"
        return await journal.totals()

    totals = run(path, work)["t"]
    assert totals.requests >= len(numbers) >= 700 and totals.requests - totals.lost <= len(numbers) + 16


def test_one_process_at_a_time(tmp_path):
    async def work(journal: Journal):
        code = "import sys; from pathlib import Path; from src.distill.journal import Journal; Journal(Path(sys.argv[1]))"
        return await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code, tmp_path / "j.sqlite"], cwd=ROOT, capture_output=True, text=True
        )

    assert Busy.__name__ in run(tmp_path / "j.sqlite", work).stderr


@pytest.mark.parametrize("content", [b"not a database at all, but longer than a header" * 40, b"SQLite format 3\0" + bytes(5000)])
def test_what_is_no_journal_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "j.sqlite"
    path.write_bytes(content)
    with pytest.raises(BadData, match="it was left as it is"):
        Journal(path)
    assert path.read_bytes() == content


def test_another_database_is_refused(tmp_path):
    import sqlite3

    base = sqlite3.connect(tmp_path / "j.sqlite")
    base.execute("CREATE TABLE mine (x)")
    base.commit()
    base.close()
    with pytest.raises(BadData, match="not a journal"):
        Journal(tmp_path / "j.sqlite")


@helps("distill/journal.py", "wait until it has ended", "run=OTHER_NAME")
def test_a_journal_that_another_process_has_open(tmp_path):
    one = sqlite3.connect(tmp_path / "j.sqlite", isolation_level=None)
    one.execute("PRAGMA locking_mode = EXCLUSIVE")
    one.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Busy) as told:
        Journal(tmp_path / "j.sqlite")
    assert told.value.fix == ["wait until it has ended", "run=OTHER_NAME"]
    run(tmp_path / "other.sqlite", lambda journal: journal.look("0"))
    one.close()
    run(tmp_path / "j.sqlite", lambda journal: journal.look("0"))


def test_a_full_disk_is_the_users_to_mend(tmp_path):
    async def work(journal: Journal):
        journal._base.execute("PRAGMA max_page_count = 16")
        with pytest.raises(NoRoom, match="full"):
            for number in range(1000):
                await journal.answered(
                    await journal.send(f"{number}", "t", 1, 1, 0.0), f"{number}", "t", 1, 0.0, ANSWER | {"text": "x" * 900}
                )
        return await journal.look("0")

    assert run(tmp_path / "j.sqlite", work).state == "answered"


def test_a_fault_of_ours_comes_out_and_leaves_nobody_waiting(tmp_path):
    async def work(journal: Journal):
        sent = await journal.send("a", "t", 1, 1, 0.0)
        await journal.failed(sent, "a", "t", 1, 0.0, False)
        with pytest.raises(RuntimeError, match="settled before"):
            await asyncio.wait_for(journal.failed(sent, "a", "t", 1, 0.0, False), 10)
        with pytest.raises(RuntimeError):
            await asyncio.wait_for(journal.look("a"), 10)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("threading.excepthook", lambda _: None)
        for n in range(20):  # what is asked while the thread ends is not lost between the two
            run(tmp_path / f"{n}.sqlite", work)
