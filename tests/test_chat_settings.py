"""Chat template, its keywords, reasoning and date as settings of one fine-tune: in its rows, its key, its folder and every stage after it."""

import json
import shutil

import pytest
from conftest import CHAT, go, helps, refused
from test_template_kinds import CALL, TOOL, calls, result, says, user

from src import data, evaluate, finetune, merge
from src.chat import template
from src.core import artifact
from src.core.errors import BadData, ConfigError, MissingInput
from src.models.loading import load_tokenizer

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")
SILENT = (
    "{% if thinking is defined and thinking %}{{ 'Think.' }}{% endif %}{{ strftime_now('%Y-%m-%d') }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FAST = ["tuner.rank=4", "tuner.learning_rate=1e-3", "train.max_steps=2", "train.samples=0", "train.packing=false"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A base whose template prints no call, and a dataset of calls."""
    folder = tmp_path_factory.mktemp("settings")
    base = folder / "base"
    shutil.copytree(CHAT, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": SILENT}))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    rows = [
        {"messages": [user(f"Warm at {n}?"), calls("Bern"), result(f"{n} degrees"), says(f"It is {n}.")], "tools": [TOOL]}
        for n in range(40)
    ]
    (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go(data, f"outputs={folder}", "run=chats", f"data.path={folder}/chats.jsonl", "data.val=0.2", "data.calib=0.1") == 0
    return folder


def tune(here, run: str, *argv) -> int:
    return go(finetune, f"outputs={here}", f"run={run}", f"source={here}/chats/data", f"model.path={here}/base", *FAST, *argv)


def test_a_template_that_loses_calls_is_noticed_before_it_is_trained(here, capsys):
    assert tune(here, "lost") == BadData.exit_code
    said = capsys.readouterr().err
    assert "answers cannot be trained" in said and "does not print their tool calls" in said
    assert "fix:   chat_template=chatml" in said and "unseen=skip" in said
    assert not (here / "lost" / "finetune").exists()


def test_ours_in_its_place_is_everybody_s_from_then_on(here, capsys):
    assert tune(here, "ours", "chat_template=chatml") == 0
    said = capsys.readouterr().err
    assert "left out" not in said and "the chat template is ChatML" in said
    assert go(merge, f"outputs={here}", "run=ours") == 0
    for stage in ("finetune", "merge"):
        folder = here / "ours" / stage
        assert template.text_of(folder) == template.CHATML
        assert (folder / "tokenizer.json").read_bytes() == (here / "base" / "tokenizer.json").read_bytes()
        shown = load_tokenizer(folder).apply_chat_template([user("Warm?"), calls("Bern")], tools=[TOOL], tokenize=False)
        assert f"<tool_call>\n{CALL}\n</tool_call><|im_end|>" in shown
    capsys.readouterr()
    assert go(evaluate, f"outputs={here}", "run=ours", f"source={here}/ours/merge", f"dataset={here}/chats/data") == 0
    assert "left out" not in capsys.readouterr().err


def test_keywords_and_the_day_are_in_the_key_and_the_folder(here, capsys):
    assert tune(here, "keyed", "unseen=skip", "template.thinking=true", "today=2027-03-02", "reasoning=drop") == 0
    said = capsys.readouterr().err
    assert "prints today's date, which is 2027-03-02 in all rows" in said and "answers left out of the loss" in said
    made = artifact.open_artifact(here / "keyed" / "finetune")
    assert made.settings["template"] == {"thinking": True} and made.settings["today"] == "2027-03-02"
    config = json.loads((made.path / "tokenizer_config.json").read_text())
    assert config[template.SETTINGS] == {"reasoning": "drop", "today": "2027-03-02"} and "chat_template" not in config
    assert load_tokenizer(made.path).apply_chat_template([user("Hi!")], tokenize=False).startswith("Think.")
    assert tune(here, "keyed", "unseen=skip", "template.thinking=true", "today=2027-03-02", "reasoning=drop") == 0
    assert "up to date" in capsys.readouterr().err
    assert tune(here, "keyed", "unseen=skip", "template.thinking=false", "today=2027-03-02", "reasoning=drop") != 0
    assert "template" in capsys.readouterr().err


def test_a_template_from_a_file_is_an_input_of_the_run(here, capsys):
    file = here / "own.jinja"
    file.write_text(template.CHATML.replace("tool_call>", "call>"))
    assert tune(here, "file", f"chat_template={file}") == 0
    assert template.text_of(here / "file" / "finetune") == file.read_text()
    file.write_text(template.CHATML)
    assert tune(here, "file", f"chat_template={file}") != 0, "its content moved"
    assert "chat_template" in capsys.readouterr().err


@helps("training/chat_tokenizer.py", "chat_template=chatml, or chat_template=FILE names a Jinja file")
def test_what_cannot_be_is_refused_before_anything_is_done(here, call):
    given = ["finetune", f"source={here}/chats/data", f"model.path={here}/base", "dry_run=true"]
    refused(call(*given, "template.thinkin=true"), ConfigError, "does not read thinkin; did you mean 'thinking'?", "template.thinkin")
    refused(call(*given, "chat_template=nowhere.jinja"), MissingInput, "nowhere.jinja", "chat_template=chatml")
    refused(call(*given, "today=tomorrow"), ConfigError, "today=tomorrow")
    refused(call(*given, "templat.thinking=true"), ConfigError, "unknown setting 'templat.thinking'")
    (here / "there.jinja").write_text(template.CHATML)
    for taken in ("template.thinking=true", "chat_template=chatml", f"chat_template={here}/there.jinja"):
        assert call(*given, taken).returncode == 0
