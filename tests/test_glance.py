"""A look at data before anything is trained: what is shown is what a model would see, and nothing is made."""

import json

import pytest
from conftest import CHAT, refused

from src.core.errors import MissingInput

LONG = "word " * 600


@pytest.fixture
def shown(call, tmp_path):
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"question {i} about something"},
                {"role": "assistant", "content": f"answer {i}, which is its own"},
            ]
        }
        for i in range(30)
    ]
    rows.append(rows[3])
    rows.append({"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "한국어로 대답합니다"}]})
    (tmp_path / "chats.json").write_text(json.dumps(rows))
    done = call("data", f"data.path={tmp_path / 'chats.json'}", f"preview={CHAT}", "data.val=0.2", "data.calib=0")
    assert done.returncode == 0, done.stderr
    return done, tmp_path


def test_rows_are_shown_with_what_is_trained_marked_and_nothing_is_made(shown):
    done, tmp_path = shown
    first = done.stdout.partition("\n\n")[0]
    assert "tokens" in first and "[[answer" in done.stdout and "[[question" not in done.stdout
    assert not (tmp_path / "outputs" / "default").exists()


def test_lengths_limits_writing_and_what_stands_twice_are_told(shown):
    done, _ = shown
    assert "the same twice: 1;" in done.stdout
    assert "Hangul" in done.stdout and "Latin" in done.stdout
    line = next(line for line in done.stdout.splitlines() if line.strip().startswith("512"))
    assert line.split()[1] == "1", "one conversation is longer than 512 tokens"
    assert next(line for line in done.stdout.splitlines() if line.startswith("train")).split()[2] == "2.0", "turns"


def test_the_data_set_that_is_there_does_not_hide_the_look(call, tmp_path, road):
    chats = road / "inputs" / "chats.json"
    for _ in range(2):
        assert call("data", "run=n", f"data.path={chats}").returncode == 0
    done = call("data", "run=n", f"data.path={chats}", f"preview={CHAT}")
    assert done.returncode == 0 and "train.max_length" in done.stdout
    refused(call("data", "run=n", f"data.path={chats}", "preview=/nowhere/model"), MissingInput, "/nowhere/model")
