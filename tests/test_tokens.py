"""Token rows: the same from one process or many, made once for equal content and anew for any other, and honest about what they leave out."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import CHAT, ROOT, helps, in_process, ready_processes
from makers import tokenizer_folder

from src.chat import encoding
from src.core import log
from src.core.artifact import open_any, open_artifact
from src.core.compose import compose
from src.core.errors import BadData
from src.models import evaluation
from src.models.loading import load_tokenizer
from src.settings.verbs import FinetuneVerb
from src.training import examples


@pytest.fixture
def made(tmp_path, monkeypatch):
    """made(conversations, *overrides, base=CHAT) -> the train rows of a dataset of them; the cache is tmp_path/tokens."""

    def make(chats, *argv, base=CHAT, name="chats"):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps([{"id": str(i), "conversations": c} for i, c in enumerate(chats)]))
        done = in_process("data", f"outputs={tmp_path}", f"run={name}", f"data.path={file}", "data.val=0", "data.calib=0", "force=true")
        assert done.returncode == 0, done.stderr
        cfg = compose("finetune", [f"model.path={base}", *argv], FinetuneVerb)
        return examples.examples_of(cfg, open_artifact(tmp_path / name / "data"), open_any(base), "train", tmp_path / "tokens")

    return make


def talk(question: str, *answers: str) -> list[dict]:
    turns = []
    for answer in answers:
        turns += [{"from": "user", "value": question}, {"from": "assistant", "value": answer}]
    return turns


def with_template(folder, more: str):
    """tiny-chat with more in front of its chat template."""
    shutil.copytree(CHAT, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = more + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


CHATS = [talk(f"What is {i}?", *[f"It is {j}." for j in range(i % 3 + 1)]) for i in range(90)]


def content(rows) -> list:
    return [(row.input_ids.tolist(), row.labels.tolist()) for row in (rows[i] for i in range(len(rows)))]


def folders(tmp_path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "tokens").iterdir())


def test_rows_are_what_the_template_makes_of_each_conversation(made):
    rows, tokenizer = made(CHATS), load_tokenizer(CHAT)
    assert len(rows) == 90 and rows.lines.tolist() == list(range(1, 91))
    for i in (0, 41, 89):
        messages = [{"role": t["from"], "content": t["value"]} for t in CHATS[i]]
        encoded = encoding.encode(tokenizer, messages)
        assert content(rows)[i] == (encoded.input_ids, encoded.labels)
        assert rows.lengths[i] == len(encoded.input_ids) and rows.trained_tokens[i] == encoded.trained
    assert isinstance(rows.input_ids, np.memmap) and rows.input_ids.dtype == np.int32


def test_several_processes_make_the_same_rows_as_one(made, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(log, "FIRST", 0)
    monkeypatch.setattr(log, "EVERY", 0)
    monkeypatch.setattr(examples, "PORTION", 11)
    monkeypatch.setattr(examples, "WORTH_A_PROCESS", 1e-9)
    monkeypatch.setattr(examples, "get_context", lambda kind: ready_processes())
    monkeypatch.setattr(examples.os, "cpu_count", lambda: 1)
    alone = made(CHATS)
    shutil.rmtree(tmp_path / "tokens")
    monkeypatch.setattr(examples.os, "cpu_count", lambda: 2)
    started = []
    pool = examples.ProcessPoolExecutor
    monkeypatch.setattr(examples, "ProcessPoolExecutor", lambda *args, **given: started.append(args) or pool(*args, **given))
    together = made(CHATS)
    assert started == [(2,)]
    told = re.findall(r"  tokenizing train: (\d+) of 90, \d+\.\d s left\n", capsys.readouterr().err)
    assert told == [str(done) for done in range(11, 90, 11)] * 2, "rows, once by one process and once by two"
    assert content(alone) == content(together) and alone.lines.tolist() == together.lines.tolist()


def test_a_process_is_started_only_for_work_that_takes_longer_than_its_start(made, monkeypatch):
    monkeypatch.setattr(examples.os, "cpu_count", lambda: 4)
    assert [examples.processes_for(seconds) for seconds in (1, 9, 11, 60)] == [0, 1, 2, 4]
    monkeypatch.setattr(examples, "PORTION", 11)
    monkeypatch.setattr(examples, "ProcessPoolExecutor", lambda *args, **given: pytest.fail("started for a second of work"))
    assert len(made(CHATS)) == 90


WORKER = """
import os, sys
from pathlib import Path
from src.core.compose import compose
from src.settings.verbs import FinetuneVerb
from src.training import examples

base, source = Path("assets/tiny-chat"), Path(sys.argv[1])
examples.start_worker(os.getppid(), compose("finetune", [f"model.path={base}"], FinetuneVerb), base, source)
assert examples.work((0, 1, 1)).lengths
print(*[name for name in ("torch", "peft", "accelerate", "bitsandbytes", "rich") if name in sys.modules])
"""


def test_a_process_that_tokenizes_imports_and_says_nothing_of_training(tmp_path):
    source = tmp_path / "train.jsonl"
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    source.write_text(json.dumps({"id": "1", "messages": messages}) + "\n")
    done = subprocess.run([sys.executable, "-c", WORKER, source], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def test_tokenizing_for_an_evaluation_is_told_too(monkeypatch, capsys):
    monkeypatch.setattr(log, "FIRST", 0)
    monkeypatch.setattr(log, "EVERY", 0)
    records = [
        {"id": str(i), "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]} for i in range(4)
    ]
    assert len(evaluation.encode_all(records, load_tokenizer(CHAT), 512)) == 4
    assert re.fullmatch(r"(  tokenizing validation: [123] of 4, \d+\.\d s left\n){3}", capsys.readouterr().err)


def test_a_fault_in_another_process_is_the_user_s_error_and_leaves_nothing(made, monkeypatch, tmp_path):
    monkeypatch.setattr(examples, "PORTION", 11)
    monkeypatch.setattr(examples.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(examples, "WORTH_A_PROCESS", 1e-9)
    monkeypatch.setattr(examples, "get_context", lambda kind: ready_processes())
    base = with_template(tmp_path / "base", "{% if messages[0]['content'] == 'Break.' %}{{ 1 // 0 }}{% endif %}")
    with pytest.raises(BadData, match="ZeroDivisionError") as error:
        made([*CHATS, talk("Break.", "No.")], base=base)
    assert error.value.where == "record '90'"
    assert folders(tmp_path) == []


@helps("chat/unseen.py", "chat_template=chatml: a template that shows calls, results and system turns")
def test_what_a_template_refuses_is_left_out_and_counted_or_refused(made, tmp_path, capsys):
    base = with_template(tmp_path / "base", "{% if messages[0]['content'] == 'Refuse me.' %}{{ raise_exception('as asked') }}{% endif %}")
    refused = talk("Refuse me.", "No.")
    rows = made([*CHATS, refused], base=base)
    assert len(rows) == len(CHATS) and rows.notes == {"refused": 1} and rows.named == {"refused": ["90"]}
    assert "train: 1 answer left out of the loss: the chat template refuses" in capsys.readouterr().err
    with pytest.raises(BadData, match="1 of 181 answers cannot be trained") as error:
        made([*CHATS, refused], "unseen=error", base=base)
    assert "records '90'" in error.value.what
    with pytest.raises(BadData, match="30 of 210 answers cannot be trained") as error:
        made([*CHATS, *[refused] * 30], base=base, name="many")
    assert [way.partition(":")[0] for way in error.value.fix] == ["chat_template=chatml", "unseen=skip"]
    assert len(made([*CHATS, *[refused] * 30], "unseen=skip", base=base, name="many")) == 90
    assert len(made([*CHATS, *[refused] * 30], "chat_template=chatml", base=base, name="many")) == 120


def test_equal_content_is_read_and_not_made_again(made, monkeypatch, tmp_path):
    first = made(CHATS)
    monkeypatch.setattr(examples, "make", lambda *args: pytest.fail("made again"))
    again = made(CHATS, "train.seed=7", "tuner.rank=4")
    assert content(first) == content(again)
    base = tmp_path / "elsewhere"
    shutil.copytree(CHAT, base)
    assert content(made(CHATS, base=base, name="renamed")) == content(first), "neither paths nor weights matter"


@pytest.mark.parametrize("change", ["max_length", "policy", "mask", "data", "template", "code"])
def test_whatever_decides_the_rows_makes_them_anew(made, monkeypatch, tmp_path, change):
    made(CHATS)
    before, argv, chats, base = folders(tmp_path), [], CHATS, CHAT
    if change == "max_length":
        argv = ["train.max_length=256"]
    if change == "policy":
        argv = ["train.long_rows=keep_end"]
    if change == "mask":
        argv = ["legacy_mask=qwen"]
    if change == "data":
        chats = [*CHATS[:-1], talk("What is 89?", "It is 90.")]
    if change == "template":
        base = with_template(tmp_path / "base", "{# another #}")
    if change == "code":
        other = tmp_path / "chatml.py"
        other.write_text("# another version\n")
        monkeypatch.setattr(encoding, "__file__", str(other))
    made(chats, *argv, base=base, name="other")
    assert len(folders(tmp_path)) == 2 and set(before) < set(folders(tmp_path))


def test_long_conversations_are_counted_also_when_they_come_from_the_cache(made, capsys):
    long = [*CHATS[:9], talk("A story!", *["Once upon a time there was a cat who liked milk."] * 9)]
    for _ in range(2):
        rows = made(long, "train.max_length=72", "train.long_share=0.5")
        assert len(rows) == 9 and rows.counts.dropped == 1
        assert "train: dropped 1 of 10 rows" in capsys.readouterr().err
    split = made(long, "train.max_length=72", "train.long_rows=split_turns", "train.long_share=0.5")
    assert len(split) > 10 and split.lengths.max() <= 72
    assert split.lines.tolist()[9:] == [10] * (len(split) - 9), "each row still knows its record"
    assert all(row.labels[row.labels != encoding.IGNORE][-1] == 1023 for row in (split[i] for i in range(len(split))))
    with pytest.raises(BadData, match="longer than"):
        made(long, "train.max_length=72", "train.long_rows=error")


def test_the_old_labels_leave_out_what_they_do_not_know(made, capsys):
    """Qwen's finetune.py would train a call as an empty answer, and knows no weight."""
    weighted = [{"from": "user", "value": "Hi!"}, {"from": "assistant", "value": "Ahoy!", "weight": 0.5}]
    rows = made([*CHATS, weighted], "legacy_mask=qwen")
    assert len(rows) == len(CHATS) and rows.notes["legacy"] == 1
    assert "legacy_mask=qwen knows no tool calls, reasoning or weights" in capsys.readouterr().err


def test_the_first_token_of_a_row_is_never_trained(made):
    """The labels of Qwen's finetune.py count the first marker, which nothing stands before."""
    rows = made(CHATS, "legacy_mask=qwen")
    assert all(rows[i].labels[0] == encoding.IGNORE for i in range(len(rows)))
    assert rows.trained_tokens[0] == (rows[0].labels != encoding.IGNORE).sum()


def test_answers_that_qwen3_shows_without_their_reasoning_are_skipped_or_rows_of_their_own(made, tmp_path, capsys):
    base = tmp_path / "qwen3"
    shutil.copytree(tokenizer_folder("made-qwen3"), base)
    (base / "config.json").write_text("{}")
    chats = [talk("2 + 2?", "<think>\nTwo pairs.\n</think>\n\n4", "<think>\nThe same.\n</think>\n\nStill 4")]
    one = made(chats, base=base)
    assert len(one) == 1 and "1 answer left out of the loss" in capsys.readouterr().err
    each = made(chats, "train.hidden_turns=rows", base=base)
    assert len(each) == 2 and "left out" not in capsys.readouterr().err
    decode = load_tokenizer(base).decode
    trained = [decode(row.labels[row.labels != encoding.IGNORE]) for row in (each[0], each[1])]
    assert "Two pairs." in trained[0] and "The same." in trained[1]
