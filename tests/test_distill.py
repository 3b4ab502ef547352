"""The verb against a stand-in endpoint with every fault: no row lost, none paid twice, no budget passed, the same bytes after any kill."""

import contextlib
import itertools
import json
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import CHAT, ROOT, hear_ctrl_c, helps, refused

from src.chat.encoding import turn_end
from src.core.artifact import open_artifact
from src.core.errors import BadData, BudgetSpent, ConfigError, MissingInput, Moved, NoAnswer
from src.distill import batch, sources
from src.distill.estimate import by_root, estimate
from src.models.generation import greedy
from src.models.loading import load_any

FAULTS = {"seconds": 0.04, "date": 0.01, "server": 0.06, "malformed": 0.04, "shape": 0.03, "dropped": 0.04, "refused": 0.03, "empty": 0.03}
FILES = ("train.jsonl", "val.jsonl", "calib.jsonl", "set_aside.jsonl", "samples.html")
QUICK = ["teacher.model=stand-in", "teacher.limits.back_off=0.02", "teacher.limits.concurrency=32", "recipe.order=[answer]"]


class Teacher:
    """A stand-in server in a process of its own."""

    def __init__(self, **behaviour):
        self._process = subprocess.Popen(
            [sys.executable, ROOT / "tests" / "stand_ins" / "teacher.py", json.dumps(behaviour)], stdout=subprocess.PIPE, text=True
        )
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"

    def state(self) -> dict:
        return json.load(urllib.request.urlopen(f"{self.url}/stand_in", timeout=30))

    def behave(self, **behaviour) -> None:
        urllib.request.urlopen(f"{self.url}/stand_in/behave", json.dumps(behaviour).encode(), timeout=30).read()

    def came(self) -> int:
        return sum(self.state()["came"].values())

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture
def teacher():
    with contextlib.ExitStack() as stack:

        def start(**behaviour) -> Teacher:
            found = Teacher(**behaviour)
            stack.callback(found.close)
            return found

        yield start


@pytest.fixture
def prompts(tmp_path):
    def write(count: int) -> Path:
        path = tmp_path / f"prompts{count}.jsonl"
        path.write_text("".join(json.dumps({"id": f"p{n}", "prompt": f"Question {n}: what is {n} times 7?"}) + "\n" for n in range(count)))
        return path

    return write


def argv(teacher: Teacher, path: Path | None, *more) -> list[str]:
    return ["distill", *([f"prompts.path={path}"] if path else []), f"teacher.url={teacher.url}", *QUICK, *map(str, more)]


def rows_of(folder: Path, name: str = "train") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def everything(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def journal(tmp_path: Path, query: str, run: str = "default") -> list[tuple]:
    with contextlib.closing(sqlite3.connect(tmp_path / "outputs" / run / "distill.journal.sqlite")) as base:
        return base.execute(query).fetchall()


# ---- keys


@helps("core/stage.py", "leave it out of {}; a server is sent the key in the variable that its key_env names")
def test_a_key_in_a_setting_is_refused_before_anything_is_sent(call, teacher, prompts, tmp_path, monkeypatch):
    monkeypatch.setenv("STAND_IN_AUTH", "stand-in-8f3b1c")
    monkeypatch.setenv("OTHER_TOKEN", "other-4e5d6c7")
    server, path = teacher(), prompts(1)
    for given, setting in (
        ("teacher.extra={user: stand-in-8f3b1c}", "teacher.extra.user holds what STAND_IN_AUTH does"),
        ("teacher.extra={user: {a: '${oc.env:OTHER_TOKEN}'}}", "teacher.extra.user.a holds what OTHER_TOKEN does"),
        ("teacher.terms='as other-4e5d6c7 has them'", "teacher.terms holds what OTHER_TOKEN does"),
    ):
        done = call(*argv(server, path, "teacher.key_env=STAND_IN_AUTH", given))
        refused(done, ConfigError, setting)
        assert "8f3b1c" not in done.stderr and "4e5d6c7" not in done.stderr
    assert server.came() == 0 and not (tmp_path / "outputs" / "default").exists()
    assert call(*argv(server, path, "teacher.key_env=STAND_IN_AUTH")).returncode == 0, (
        "without the key in a setting it is sent from its variable"
    )
    assert server.came() == 1


# ---- nothing lost, nothing paid twice


def test_every_fault_is_got_over_and_every_row_accounted_for(call, teacher, prompts, tmp_path):
    server = teacher(faults=FAULTS, cut=0.05, always=0.03, latency=0.01, wait=0.1)
    done = call(*argv(server, prompts(200)))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "default" / "distill"
    kept = [row for split in ("train", "val", "calib") for row in rows_of(folder, split)]
    aside = rows_of(folder, "set_aside")
    assert len(kept) + len(aside) == 200 and {r["id"] for r in kept + aside} == {f"p{n}#{n}" for n in range(200)}
    assert {row["reason"] for row in aside} == {"cut off", "HTTP 500"}
    assert all(row["messages"][1]["content"] for row in kept)
    state = server.state()
    assert max(state["answered"].values()) == 1
    assert {"429", "500"} <= state["statuses"].keys()
    metrics = json.loads((folder / "manifest.json").read_text())["metrics"]
    answer = metrics["steps"]["answer"]
    assert answer["came"] + answer["made"] == answer["went"] + sum(answer["aside"].values())
    assert "200 records in + 0 made" in done.stderr and "set aside" in done.stderr


def disturbed(teacher: Teacher, path: Path, outputs: Path, moments: list[int], *more) -> tuple[int, str]:
    """Run the command again and again, killed each time the server has had so many requests; then to its end. (kills, stderr of the last)"""
    command = [sys.executable, "-m", f"src.{argv(teacher, path)[0]}", *argv(teacher, path, f"outputs={outputs}", *more)[1:]]
    kills = 0
    for moment in moments:
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and teacher.came() < moment:
            time.sleep(0.01)
        process.kill()
        kills += process.wait() == -signal.SIGKILL
        process.stderr.close()
        known = {text.split()[0] for (text,) in _answers(outputs) if text}
        before = teacher.state()["came"]
        yield known, before
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert kills == len(moments)


def _answers(outputs: Path) -> list[tuple]:
    path = outputs / "default" / "distill.journal.sqlite"
    if not path.is_file():
        return []
    with contextlib.closing(sqlite3.connect(path)) as base:
        if not base.execute("SELECT 1 FROM sqlite_master WHERE name = 'requests'").fetchone():
            return []
        return base.execute("SELECT text FROM requests WHERE state = 'answered'").fetchall()


@pytest.mark.parametrize("count, kills", [(150, 3), pytest.param(1000, 20, marks=pytest.mark.slow)])
def test_killed_at_any_moment_the_same_command_makes_the_same_files(cli, teacher, prompts, tmp_path, count, kills):
    behaviour = {"faults": FAULTS, "cut": 0.03, "always": 0.02, "latency": 0.05, "wait": 0.1}
    undisturbed = teacher(**behaviour)
    path = prompts(count)
    assert cli(*argv(undisturbed, path)).returncode == 0
    server = teacher(**behaviour)
    draw = random.Random(4)
    moments = sorted(draw.sample(range(1, count), kills))
    known_before = []
    for known, came in disturbed(server, path, tmp_path / "second", moments):
        known_before.append((known, came))
    assert everything(tmp_path / "outputs" / "default" / "distill") == everything(tmp_path / "second" / "default" / "distill")
    # What was answered and in the journal when it was killed is not asked again; what was on its way at most is.
    after = server.state()["came"]
    for known, came in known_before:
        assert known <= after.keys()
        assert all(after[digest] == came[digest] for digest in known)
    again = sum(count - 1 for count in server.state()["answered"].values())
    assert again <= 32 * kills
    print(f"{kills} kills, {again} answers that were on their way asked again")


def test_a_later_step_changed_asks_nothing_again(call, teacher, prompts, tmp_path):
    server, path = teacher(), prompts(40)
    assert call(*argv(server, path)).returncode == 0
    before = server.came()
    changed = argv(server, path, "recipe.order=[answer,short]", "recipe.steps.short.max=160")
    refused(call(*changed), Moved, "recipe.order")
    done = call(*changed, "force=true")
    assert done.returncode == 0, done.stderr
    assert server.came() == before == 40
    assert "up to date" in call(*changed).stderr


def test_two_rows_that_ask_the_same_share_one_request(call, teacher, tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "The same?"}) + "\n" + json.dumps({"prompt": "The same?"}) + "\n" + json.dumps({"prompt": "No."}))
    server = teacher(latency=0.05)
    assert call(*argv(server, path)).returncode == 0
    assert server.came() == 2


def test_what_was_set_aside_stays_so_until_it_is_to_be_tried_anew(call, teacher, prompts, tmp_path):
    server, path = teacher(always=0.3), prompts(30)
    assert call(*argv(server, path)).returncode == 0
    aside, came = len(rows_of(tmp_path / "outputs" / "default" / "distill", "set_aside")), server.came()
    assert 0 < aside < 30
    server.behave(always=0.0)
    assert call(*argv(server, path, "force=true")).returncode == 0
    assert server.came() == came
    done = call(*argv(server, path, "force=true", "retry_set_aside=true"))
    assert done.returncode == 0 and f"asks {aside} requests anew" in done.stderr
    assert server.came() == came + aside
    assert not rows_of(tmp_path / "outputs" / "default" / "distill", "set_aside")


def test_a_cut_off_answer_is_taken_only_where_that_is_allowed_and_never_asked_twice(call, teacher, prompts, tmp_path):
    server, path = teacher(cut=0.5), prompts(20)
    assert call(*argv(server, path)).returncode == 0
    assert {row["reason"] for row in rows_of(tmp_path / "outputs" / "default" / "distill", "set_aside")} == {"cut off"}
    assert call(*argv(server, path, "allow_cut_off=true", "force=true")).returncode == 0
    assert not rows_of(tmp_path / "outputs" / "default" / "distill", "set_aside")
    assert server.came() == 20


def test_ctrl_c_waits_for_what_is_paid_and_the_next_command_goes_on(teacher, prompts, tmp_path):
    server, path = teacher(latency=0.3), prompts(400)
    command = [sys.executable, "-m", *argv(server, path, f"outputs={tmp_path / 'outputs'}")]
    command[2] = "src.distill"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    while server.came() < 60:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said, said
    assert "answers on their way" in said
    assert journal(tmp_path, "SELECT count(*) FROM sent") == [(0,)]
    assert len(_answers(tmp_path / "outputs")) == sum(server.state()["answered"].values())


# ---- limits


@pytest.mark.parametrize("budget", ["budget.tokens=4000", "budget.money=0.004"])
@helps(
    "distill/runner.py",
    "the same command with a higher budget.tokens or budget.money goes on",
    "prompts.count=N makes a smaller dataset of the first",
)
def test_the_budget_is_never_passed_and_a_higher_one_goes_on(call, teacher, prompts, tmp_path, budget):
    server, path = teacher(latency=0.02, faults={"dropped": 0.1, "server": 0.1}, tokens_per_byte=0.9), prompts(300)
    prices = ["teacher.price.prompt=1", "teacher.price.completion=1", "recipe.steps.answer.sampling.max_tokens=60"]
    done = call(*argv(server, path, budget, *prices))
    refused(done, BudgetSpent, "remain", "budget.tokens", "the same command", "prompts.count=N")
    assert done.returncode == 16
    state = server.state()
    assert 2000 < state["tokens"] <= 4000
    ((tokens, money),) = journal(tmp_path, "SELECT sum(tokens), sum(money) FROM totals")
    assert state["tokens"] <= tokens <= 4000 and money <= 0.004
    assert call(*argv(teacher(), path, budget, *prices, "run=first", "prompts.count=5")).returncode == 0
    key, value = budget.split("=")
    again = call(*argv(server, path, f"{key}={float(value) * 1000:.0f}", *prices))
    assert again.returncode == 0, again.stderr
    assert max(server.state()["answered"].values()) == 1


def test_what_a_kill_left_on_its_way_counts_as_spent(teacher, prompts, tmp_path, cli):
    server, path = teacher(latency=1.0, steady=True), prompts(50)
    command = [sys.executable, "-m", "src.distill", *argv(server, path, f"outputs={tmp_path / 'outputs'}")[1:]]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while server.came() < 20:
        time.sleep(0.02)
    process.kill()
    process.wait()
    server.behave(latency=0.0)
    done = cli(*argv(server, path))
    assert done.returncode == 0 and "were on their way when a command was killed" in done.stderr
    ((lost, tokens),) = journal(tmp_path, "SELECT lost, tokens FROM totals")
    assert lost >= 20 and tokens >= server.state()["tokens"]
    assert "lost by kills" in (tmp_path / "outputs" / "default" / "distill" / "README.md").read_text()


def test_concurrency_falls_where_the_teacher_is_busy(call, teacher, prompts):
    server = teacher(latency=0.05, steady=True, most=6, wait=0.3)
    done = call(*argv(server, prompts(150)))
    assert done.returncode == 0, done.stderr
    state = server.state()
    assert sum(state["answered"].values()) == 150
    turned_away = state["statuses"]["429"]
    print(f"{turned_away} of {turned_away + 150} turned away")
    assert turned_away < 100


def test_retry_after_is_honoured(call, teacher, prompts):
    server = teacher(faults={"seconds": 1.0}, wait=1.0)
    assert call(*argv(server, prompts(3), "teacher.limits.concurrency=1")).returncode == 0
    times = server.state()["times"]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    # Each of the three is turned away at least once, and nobody asks within the second that was asked for.
    assert len(times) >= 6 and sum(gap >= 0.98 for gap in gaps) >= 3


def test_requests_a_minute_are_kept(call, teacher, prompts):
    server = teacher()
    assert call(*argv(server, prompts(30), "teacher.limits.requests_per_minute=600")).returncode == 0
    times = server.state()["times"]
    # 600 a minute are 10 a second; a burst of a second's worth may go first.
    assert max(times) - min(times) > (30 - 11) / 10 * 0.95
    for begin in times:
        assert sum(begin <= t < begin + 1.0 for t in times) <= 21


@helps("distill/dispatch.py", "mend what it says; the same command goes on, with every answer so far")
def test_a_teacher_out_of_order_stops_the_run_and_what_is_done_is_kept(call, teacher, prompts, tmp_path):
    server, path = teacher(down_after=20, latency=0.01), prompts(200)
    done = call(*argv(server, path, "teacher.limits.breaker=8", "teacher.limits.tries=3"))
    refused(done, NoAnswer, "8 failures on end", "HTTP 500", "the same command goes on")
    assert len(_answers(tmp_path / "outputs")) >= 20
    server.behave(down_after=None)
    again = call(*argv(server, path))
    assert again.returncode == 0, again.stderr
    assert not rows_of(tmp_path / "outputs" / "default" / "distill", "set_aside"), "what failed while it was down is not held against a row"
    assert max(server.state()["answered"].values()) == 1


@pytest.mark.parametrize(
    "behaviour, words",
    [
        ({"status": 401}, ["OPENAI_API_KEY"]),
        ({"status": 404}, ["teacher.model"]),
        ({"status": 302}, ["http://elsewhere.example/v1", "not followed"]),
    ],
)
@helps("distill/endpoint.py", "give the address and the model that the server has: teacher.url and teacher.model")
def test_what_no_request_can_get_over_stops_at_once(call, teacher, prompts, behaviour, words):
    server = teacher(**behaviour)
    done = call(*argv(server, prompts(50)))
    refused(done, NoAnswer, *words)
    assert "secret" not in done.stderr
    assert server.state()["statuses"][str(behaviour["status"])] <= 33
    if behaviour["status"] == 404:
        assert call(*argv(teacher(), prompts(50))).returncode == 0


@helps("distill/dispatch.py", "teacher.limits.breaker=N, higher, waits for more")
def test_a_request_the_server_refuses_is_set_aside_and_the_run_stops_where_it_refuses_all(call, teacher, prompts, tmp_path):
    server = teacher(status=400)
    done = call(*argv(server, prompts(50), "teacher.limits.breaker=5"))
    refused(done, NoAnswer, "5 failures on end", "HTTP 400", "as told", "teacher.limits.breaker=N, higher, waits for more")
    server = teacher(status=400)
    refused(call(*argv(server, prompts(50), "run=more", "teacher.limits.breaker=20")), NoAnswer, "20 failures on end")


def test_nobody_there(call, prompts, tmp_path):
    done = call("distill", f"prompts.path={prompts(5)}", "teacher.url=http://127.0.0.1:9", *QUICK, "teacher.limits.breaker=3")
    refused(done, NoAnswer, "no connection")


# ---- the key


def test_the_key_reaches_the_server_and_nothing_else(cli, teacher, prompts, tmp_path):
    secret = "sk-test-0123456789abcdef"
    server, path = teacher(key=secret), prompts(10)
    wrong = cli(*argv(server, path), env={"OPENAI_API_KEY": "sk-wrong-fedcba9876543210"})
    refused(wrong, NoAnswer, "refuses the key in OPENAI_API_KEY")
    assert "fedcba" not in wrong.stderr
    done = cli(*argv(server, path, "teacher.key_env=MY_KEY"), env={"MY_KEY": secret, "https_proxy": "http://127.0.0.1:9"})
    assert done.returncode == 0, done.stderr
    assert secret not in done.stderr + done.stdout and "unencrypted" in done.stderr
    for file in (tmp_path / "outputs").rglob("*"):
        if file.is_file():
            assert b"0123456789abcdef" not in file.read_bytes() and b"fedcba9876543210" not in file.read_bytes(), file
    mode = (tmp_path / "outputs" / "default" / "distill.journal.sqlite").stat().st_mode
    assert mode & 0o777 == 0o600


@pytest.mark.parametrize("url", ["http://me:secret@host/v1", "ftp://host", "http://host/v1?key=secret", "http://host/v1/chat/completions"])
def test_an_address_that_is_none_is_refused_without_showing_it(call, prompts, url):
    done = call("distill", f"prompts.path={prompts(1)}", f'teacher.url="{url}"', *QUICK)
    refused(done, ConfigError, "teacher: url")
    assert "secret" not in done.stderr


# ---- the journal


@helps("distill/journal.py", "put back a copy of it", "move it away: all is asked, and paid, anew")
def test_a_damaged_journal_is_told_and_left_alone(call, teacher, prompts, tmp_path):
    server, path = teacher(), prompts(30)
    assert call(*argv(server, path)).returncode == 0
    file = tmp_path / "outputs" / "default" / "distill.journal.sqlite"
    data = bytearray(file.read_bytes())
    for damage in (b"this is no journal" * 500, bytes(data[:4096]) + bytes(len(data) - 4096)):
        file.write_bytes(damage)
        done = call(*argv(server, path, "force=true"))
        refused(done, BadData, "journal", "left as it is", str(file))
        assert file.read_bytes() == damage
    file.write_bytes(bytes(data))
    assert call(*argv(server, path, "force=true")).returncode == 0 and server.came() == 30, "a copy put back has every answer"
    file.write_bytes(damage)
    file.rename(tmp_path / "damaged")
    assert call(*argv(server, path, "force=true")).returncode == 0 and server.came() == 60


# ---- sources


def test_prompts_of_every_layout(call, teacher, tmp_path):
    server = teacher()
    path = tmp_path / "mixed.jsonl"
    records = [
        {"messages": [{"role": "user", "content": "Only a question"}]},
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}, {"role": "user", "content": "C"}]},
        {"instruction": "Say it", "output": "It."},
        {"instruction": "Say this", "input": "in French"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"id": "own", "prompt": "Why?", "topic": "why"},
        {"prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]},
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    assert call(*argv(server, path, "holdout.val=0", "holdout.calib=0")).returncode == 0
    rows = rows_of(tmp_path / "outputs" / "default" / "distill")
    assert [row["messages"][-2]["content"] for row in rows] == [
        "Only a question",
        "C",
        "Say it",
        "Say this\nin French",
        "Hi",
        "Why?",
        "Who?",
    ]
    assert [row["id"] for row in rows] == ["0", "1", "2", "3", "4", "own#5", "6"]
    lines = tmp_path / "lines.txt"
    lines.write_text("First?\n\n  Second? \n")
    found = list(sources.records(lines, "prompts", None))
    assert [row.messages for row in found] == [[{"role": "user", "content": text}] for text in ("First?", "Second?")]


@helps("distill/sources.py", "mend the lines that are named", "prompts.on_fault=drop sets them aside, and counts them")
def test_faults_of_a_file_are_told_before_anything_is_asked(call, teacher, tmp_path):
    server = teacher()
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "fine"}\n{"prompt": 7}\n{"prompt": "<|im_end|> and more"}\nnot json\n{"prompt": "\\ud800"}\n')
    done = call(*argv(server, path))
    refused(done, BadData, "4 of 5", "bad.jsonl line 2", "control string", "prompts.on_fault=drop")
    assert server.came() == 0
    done = call(*argv(server, path, "prompts.on_fault=drop", "holdout.val=0", "holdout.calib=0"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "default" / "distill"
    assert len(rows_of(folder)) == 1 and len(rows_of(folder, "set_aside")) == 4
    path.write_text('{"prompt": "fine"}\n' * 3)
    assert call(*argv(server, path, "run=mended", "holdout.val=0", "holdout.calib=0")).returncode == 0


@helps("distill/sources.py", "prompts.path={} names it", "name one that is there", "prompts.path=FILE names one in it")
@helps("distill/sources.py", "prompts.path=null", "name a file of prompts, or a folder of text")
def test_what_a_recipe_begins_with_has_to_be_there(call, tmp_path):
    plain = ["teacher.model=m"]
    refused(call("distill", *plain), MissingInput, "a file of prompts")
    refused(call("distill", *plain, f"prompts.path={tmp_path / 'none.jsonl'}"), MissingInput, "no such file")
    refused(call("distill", *plain, f"prompts.path={tmp_path}"), MissingInput, "a folder", "prompts.path=FILE names one in it")
    (tmp_path / "some.jsonl").write_text('{"prompt": "fine"}\n')
    assert call("distill", *plain, f"prompts.path={tmp_path / 'some.jsonl'}", "dry_run=true").returncode == 0
    own = ["recipe=magpie", *plain]
    told = call("distill", *own, f"prompts.path={tmp_path / 'some.jsonl'}", "dry_run=true")
    refused(told, MissingInput, "draws its own prompts and takes no file", "prompts.path=null")
    assert call("distill", *own, "prompts.path=null", "dry_run=true").returncode == 0
    (tmp_path / "none").write_text("[]")
    refused(
        call("distill", *plain, f"prompts.path={tmp_path / 'none'}"),
        BadData,
        "nothing to begin with",
        "name a file of prompts, or a folder of text",
    )


@helps("distill/__main__.py", "{}.price.prompt=USD {}.price.completion=USD, per million tokens")
def test_a_budget_in_money_needs_prices(call, teacher, prompts):
    server, path = teacher(), prompts(1)
    refused(call(*argv(server, path, "budget.money=1")), ConfigError, "teacher.price.prompt=USD teacher.price.completion=USD")
    assert call(*argv(server, path, "budget.money=1", "teacher.price.prompt=1", "teacher.price.completion=2")).returncode == 0


# ---- estimate, card, samples, finetune


def test_an_estimate_spends_on_its_rows_alone_and_is_near_what_all_cost(call, teacher, prompts, tmp_path):
    server, path = teacher(), prompts(300)
    prices = ["teacher.price.prompt=1", "teacher.price.completion=2"]
    done = call(*argv(server, path, "estimate=25", *prices))
    assert done.returncode == 0, done.stderr
    assert server.came() == 25 and not (tmp_path / "outputs" / "default" / "distill").exists()
    low, high = (float(n.replace(",", "")) for n in re.search(r"\(95 %: ([\d,]+) to ([\d,]+)\)", done.stderr).groups())
    assert call(*argv(server, path, *prices)).returncode == 0
    assert server.came() == 300
    ((tokens, money),) = journal(tmp_path, "SELECT tokens, money FROM totals")
    assert low * 0.97 <= tokens <= high * 1.03 and money > 0
    assert tokens == server.state()["tokens"]


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    draw = random.Random(0)
    costs = [(draw.lognormvariate(5, 0.6), 0.0) for _ in range(1000)]
    truth, inside = sum(tokens for tokens, _ in costs), 0
    for trial in range(60):
        found = estimate(draw.sample(costs, 40), 1000, random.Random(trial))
        inside += found.tokens[0] <= truth <= found.tokens[2]
    print(f"{inside} of 60")
    assert inside >= 51


def test_what_was_asked_for_a_row_counts_for_the_one_it_came_from():
    costs = {"a#0": (1, 0.1), "a#0/1": (2, 0.0), "a#0/1/2": (3, 0.0), "b/c": (5, 0.0), "elsewhere": (4, 0.0)}
    assert by_root(costs, ["a#0", "b/c"]) == [(8.0, 0.1), (7.0, 0.0)]


def test_card_and_samples_say_what_one_has_to_know(call, teacher, tmp_path):
    server = teacher()
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "<script>alert('x')</script> & more"}) + "\n" + json.dumps({"prompt": "你好 \u202e abc"}))
    told = [
        'teacher.licence="Apache-2.0"',
        'teacher.terms="no models that compete"',
        "teacher.revision=abc123",
        "holdout.val=0",
        "holdout.calib=0",
    ]
    assert call(*argv(server, path, *told)).returncode == 0
    folder = tmp_path / "outputs" / "default" / "distill"
    card, page = (folder / "README.md").read_text(), (folder / "samples.html").read_text()
    for words in (
        "Apache-2.0",
        "no models that compete",
        "abc123",
        "| answer | 2 | 0 | 0 | 2 |",
        "seeds: 0",
        "`set_aside.jsonl`",
        "$0.0000",
    ):
        assert words in card
    assert "<script>" not in page and "&lt;script&gt;" in page and "default-src 'none'" in page
    assert not re.search(r"(src|href)=", page)
    row = rows_of(folder)[0]["distill"]
    assert row["teachers"] == ["stand-in@abc123"] and len(row["prompt"]) == 64 and row["tokens"] > 0 and len(row["requests"]) == 1


@pytest.mark.usefixtures("proofs_in_this_process")
def test_finetune_takes_the_dataset(call, teacher, prompts, tmp_path):
    server = teacher(words=5)
    assert call(*argv(server, prompts(40), "holdout.val=0.2")).returncode == 0
    done = call(
        "finetune", f"source={tmp_path / 'outputs' / 'default' / 'distill'}", "train.max_steps=2", "launch.nproc_per_node=1", "tuner.rank=4"
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "outputs" / "default" / "finetune" / "manifest.json").read_text())
    assert manifest["parents"][0]["stage"] == "distill"


@pytest.mark.parametrize("where", ["field", "inline", "closed"])
def test_what_a_teacher_thinks_is_kept_in_the_row_and_on_the_card(call, teacher, prompts, tmp_path, where):
    """It was paid for: whether the server tells it apart or not, the answer holds none of it, and the row all of it."""
    done = call(*argv(teacher(thinks=where), prompts(40), "recipe.steps.answer.n=1"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "outputs" / "default" / "distill"
    answers = [row["messages"][-1] for name in ("train", "val", "calib") for row in rows_of(folder, name)]
    assert len(answers) == 40 and "answers with reasoning" in done.stderr
    for answer in answers:
        digest = answer["content"].partition(" ")[0]
        assert answer["reasoning_content"] == f"I think of {digest}." and "think" not in answer["content"]
    assert "I think of" in (folder / "samples.html").read_text()


@pytest.mark.slow
def test_a_student_learns_to_open_and_close_its_thinking(call, teacher, prompts, tmp_path):
    assert call(*argv(teacher(thinks="field", words=2), prompts(60), "recipe.steps.answer.n=1")).returncode == 0
    student = ["finetune", f"model.path={CHAT}", "tuner=full", "tuner.learning_rate=3e-3", "train.max_steps=40", "train.samples=0"]
    done = call(*student, f"source={tmp_path}/outputs/default/distill", "chat_template=chatml", "train.eval_steps=1000")
    assert done.returncode == 0, done.stderr
    model, tokenizer = load_any(open_artifact(tmp_path / "outputs" / "default" / "finetune"))
    asked = [[{"role": "user", "content": f"Question {n}: what is {n} times 7?"}] for n in (71, 83, 95)]
    for text, ended in greedy(model, tokenizer, asked, max_new_tokens=120, eos_id=turn_end(tokenizer)):
        assert ended and text.startswith("<think>\nI think of ") and text.count("</think>") == 1, text
        assert text.partition("</think>")[2].strip(), "and an answer after it"


def test_a_plan_asks_nothing(call, teacher, prompts, tmp_path):
    server = teacher()
    done = call(*argv(server, prompts(5), "dry_run=true"))
    assert done.returncode == 0 and "would make" in done.stderr and "without a key" in done.stderr
    assert server.state()["statuses"] == {} and not (tmp_path / "outputs" / "default").exists()


# ---- other teachers


@pytest.mark.parametrize("batched", ["false", "true"])
def test_a_count_that_no_context_holds_is_not_taken_into_the_accounts(call, teacher, prompts, tmp_path, batched):
    """10^30 tokens would not fit into the journal; what was reserved is counted instead, as where a teacher counts nothing."""
    done = call(*argv(teacher(tokens_per_byte=1e30), prompts(3), f"teacher.batch={batched}"))
    assert done.returncode == 0, done.stderr
    ((tokens,),) = journal(tmp_path, "SELECT tokens FROM totals")
    assert 3 * 1024 < tokens < 3 * 5000


@helps("distill/batch.py", "the same command waits on")
def test_a_batch_that_never_ends_is_given_up(call, teacher, prompts, monkeypatch):
    monkeypatch.setattr(batch, "LONGEST_BATCH", 0.3)
    server = teacher(batch_seconds=1e9)
    refused(call(*argv(server, prompts(2), "teacher.batch=true")), NoAnswer, "batch-0 has not ended in", "the same command waits on")
    monkeypatch.setattr(batch, "LONGEST_BATCH", 60)
    server.behave(batch_seconds=0)
    done = call(*argv(server, prompts(2), "teacher.batch=true"))
    assert done.returncode == 0 and "fetches batch batch-0" in done.stderr and server.state()["batches"] == 1


def test_a_batch_is_fetched_by_the_next_command_and_never_sent_twice(cli, teacher, prompts, tmp_path):
    server, path = teacher(batch_seconds=1.0, batch_lost=0.1), prompts(60)
    batched = argv(server, path, "teacher.batch=true", "teacher.batch_size=40", f"outputs={tmp_path / 'outputs'}")
    process = subprocess.Popen([sys.executable, "-m", "src.distill", *batched[1:]], cwd=ROOT, stderr=subprocess.DEVNULL)
    while server.state()["batches"] < 2:
        time.sleep(0.02)
    process.kill()
    process.wait()
    done = cli(*batched)
    assert done.returncode == 0, done.stderr
    assert "sent by an earlier command" in done.stderr
    folder = tmp_path / "outputs" / "default" / "distill"
    assert sum(len(rows_of(folder, split)) for split in ("train", "val", "calib")) == 60
    assert max(server.state()["answered"].values()) == 1 and len(server.state()["answered"]) == 60
    # The same rows come one by one.
    assert cli(*argv(teacher(), path, f"outputs={tmp_path / 'second'}")).returncode == 0
    assert everything(folder) == everything(tmp_path / "second" / "default" / "distill")


def test_a_model_folder_teaches_and_its_answers_do_not_follow_from_their_neighbours(call, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"What is your name, {n}?"}) for n in range(9)))
    local = ["distill", f"prompts.path={path}", "teacher=local", f"teacher.path={CHAT}", "recipe.order=[answer]"]
    local += ["recipe.steps.answer.sampling.max_tokens=40", "allow_cut_off=true", "holdout.val=0", "holdout.calib=0"]
    answers = []
    for size in (1, 4):
        done = call(*local, f"teacher.batch_size={size}", f"run=b{size}")
        assert done.returncode == 0, done.stderr
        answers.append([row["messages"] for row in rows_of(tmp_path / "outputs" / f"b{size}" / "distill")])
    assert len(answers[0]) == 9 and answers[0] == answers[1]
    assert len({messages[-1]["content"] for messages in answers[0]}) > 1
    again = call(*local, "teacher.batch_size=1", "run=b1", "force=true")
    assert again.returncode == 0
    assert journal(tmp_path, "SELECT requests, money FROM totals", "b1") == [(9, 0.0)]
