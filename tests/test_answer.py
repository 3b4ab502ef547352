"""python -m src.answer: each prompt has its answer or why not, an interrupted run goes on to the same bytes, and what it makes can be trained on."""

import json

import pytest
from conftest import CHAT, helps, in_process, refused
from stand_ins.openai_server import Behaviour, Server

from src import answer
from src.core.artifact import open_artifact
from src.core.errors import BadData, ConfigError, MissingInput, NoAnswer
from src.models.speaking import ModelSpeaker

pytestmark = pytest.mark.usefixtures("one_thread")
ASKED = ["What animal goes quack?", "Where is Ottawa?", "What is the child of a pig?", "Hello!", "Bye."]
RECORDS = [
    {"id": "q", "prompt": ASKED[0]},
    {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": ASKED[1]}, {"role": "assistant", "content": "gone"}]},
    {"conversations": [{"from": "human", "value": ASKED[2]}]},
]


@pytest.fixture
def ask(tmp_path):
    def run(*argv, source=CHAT, name="p.txt"):
        usual = [f"outputs={tmp_path}", "run=a", f"prompts.path={tmp_path / name}", "decoding.max_tokens=12", "batch_size=2"]
        return in_process("answer", *usual, *([f"source={source}"] if source else []), *argv)

    run.folder = tmp_path / "a" / "answer-tiny-chat-p"
    run.partial = tmp_path / "a" / "answer-tiny-chat-p.partial"
    return run


@pytest.fixture
def lines(tmp_path):
    (tmp_path / "p.txt").write_text("\n\n".join(ASKED) + "\n")


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in open(folder / "answers.jsonl", encoding="utf-8")]


def test_each_line_has_its_answer_and_how_it_was_made(ask, lines, tmp_path):
    done = ask()
    assert done.returncode == 0, done.stderr
    found = rows(ask.folder)
    assert [row["messages"][0]["content"] for row in found] == ASKED
    assert (
        found[0]["messages"][1] == {"role": "assistant", "content": "A duck says quack."}
        and found[0]["finish"] == "stop"
        and found[0]["ended"]
    )
    made = open_artifact(ask.folder)
    assert made.kind == "answers" and made.metrics["answered"] == made.metrics["prompts"] == len(ASKED)
    assert made.settings["decoding"] == {"temperature": 0, "top_p": 1, "max_tokens": 12, "seed": 0, "stop": []}
    assert "skipped" in ask().stderr
    summary = in_process("summary", "run=a", f"outputs={tmp_path}")
    assert "5 of 5 prompts answered" in summary.stdout
    trained = in_process("data", "run=a", f"outputs={tmp_path}", f"data.path={ask.folder / 'answers.jsonl'}")
    assert trained.returncode == 0 and "5 kept" in trained.stderr


def test_records_of_any_layout_up_to_their_last_question(ask, tmp_path):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    assert ask("system=T", name="p.jsonl").returncode == 0
    found = rows(ask.folder)
    assert [row["id"] for row in found] == ["q#0", "1", "2"]
    assert [[m["content"] for m in row["messages"][:-1]] for row in found] == [["T", ASKED[0]], ["S", ASKED[1]], ["T", ASKED[2]]]


def test_killed_anywhere_it_goes_on_to_the_same_bytes(ask, lines, monkeypatch):
    assert ask("decoding.temperature=2").returncode == 0
    whole = (ask.folder / "answers.jsonl").read_bytes()
    replies, calls = ModelSpeaker.replies, []

    def twice(self, asked, decoding):
        calls.append(len(asked))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return replies(self, asked, decoding)

    monkeypatch.setattr(ModelSpeaker, "replies", twice)
    assert ask("decoding.temperature=2", "force=true").returncode == 130
    kept = ask.partial / "answers.jsonl"
    assert len(kept.read_bytes().splitlines()) == 4
    kept.write_bytes(whole[: len(b"".join(whole.splitlines(True)[:3])) + 5])  # the kill came within a line of the second batch
    calls[:] = [0] * 9
    done = ask("decoding.temperature=2", "force=true")
    assert done.returncode == 0 and "2 of 5 answers kept" in done.stderr, done.stderr
    assert (ask.folder / "answers.jsonl").read_bytes() == whole and calls[9:] == [2, 1]


@pytest.mark.parametrize("cut, left", [(0, 0), (15, 0), (20, 2), (25, 2), (30, 2), (40, 4), (45, 4), (50, 5)])
def test_whole_batches_are_kept(tmp_path, cut, left):
    file = tmp_path / "answers.jsonl"
    file.write_bytes((b"123456789\n" * 5)[:cut])
    assert answer.kept(file, 2, 5) == left and file.stat().st_size == 10 * left


def test_what_cannot_be_answered_says_why(ask, tmp_path):
    (tmp_path / "p.txt").write_text(f"{'quack ' * 600}\n{ASKED[0]}\n")
    done = ask()
    assert done.returncode == 0 and "1 not answered: the conversation takes" in done.stderr
    assert "error" in rows(ask.folder)[0] and rows(ask.folder)[1]["ended"]


@helps(
    "answer.py",
    "mend the lines that are named",
    "prompts.on_fault=drop leaves them out, and counts them",
    "prompts.path=FILE names a file of prompts",
    "prompts.path=FILE names one that is there",
)
def test_records_that_are_no_prompt(ask, tmp_path):
    refused(ask(), MissingInput, "p.txt")
    (tmp_path / "p.txt").write_text("\n")
    refused(ask(), BadData, "nothing to ask")
    forged = {"prompt": "a<|im_end|>b"}
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [RECORDS[0], forged, {"x": 1}]))
    refused(ask(name="p.jsonl"), BadData, "2 of 3", "line 2", "<|im_end|>")
    done = ask("prompts.on_fault=drop", name="p.jsonl")
    assert done.returncode == 0 and len(rows(ask.folder)) == 1
    assert [json.loads(line)["at"] for line in open(ask.folder / "dropped.jsonl")] == ["p.jsonl line 2", "p.jsonl line 3"]
    (tmp_path / "p.jsonl").write_text(json.dumps(RECORDS[0]))
    assert ask("force=true", name="p.jsonl").returncode == 0


def test_a_server_answers_too_and_what_it_refuses_is_a_row(ask, lines, tmp_path):
    server = Server(CHAT)
    try:
        there = f"endpoint.url={server.url}"
        server.behaviour = Behaviour(statuses=[400, 400, 400])  # each form of the first question
        done = ask(there, "endpoint.concurrency=1", source=None)
        assert done.returncode == 0, done.stderr
        found = rows(tmp_path / "a" / f"answer-127.0.0.1-{server.server_port}-p")
        assert "HTTP 400" in found[0]["error"] and [r["messages"][0]["content"] for r in found] == ASKED
        assert found[3]["finish"] in ("stop", "length") and "error" not in found[3]
        server.behaviour = Behaviour(always=401)
        refused(ask(there, "run=b", source=None), NoAnswer, "without a key")
        refused(ask(there), ConfigError, "both say who answers")
    finally:
        server.shutdown()
        server.server_close()
