"""Answers that can be checked: what is read out of them, what the data's answers are made for, and calls that nobody asked for."""

import json
from fractions import Fraction

import pytest
from conftest import CHAT, go, helps, in_process, refused, typed, ways

from src import data
from src.chat.template import CHATML
from src.core.errors import BadData, ConfigError, MissingInput, MissingTool, WrongKind
from src.models import checks
from src.models.checks import Reference
from src.models.loading import load_tokenizer

ADD = [{"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object", "properties": {}}}}]


def asked(text: str, *calls: tuple[str, dict], tools: list | None = None) -> Reference:
    called = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    return Reference(
        [{"role": "user", "content": "?"}], tools, {"role": "assistant", "content": text} | ({"tool_calls": called} if called else {})
    )


@pytest.mark.parametrize(
    "text, value",
    [
        ("It is 7.", 7),
        ("3 + 4 = 7", 7),
        ("10-5=5", 5),
        ("from 3-5", 5),
        ("It is -5 degrees.", -5),
        ("minus: −5", -5),
        ("$1,234.50 in all", Fraction("1234.5")),
        ("#### 72", 72),
        ("1/2", Fraction(1, 2)),
        ("1e3", 1000),
        (".5", Fraction(1, 2)),
        ("답은 7입니다", 7),
        ("답은7", 7),
        ("<think>It is 9? 9.</think>\nIt is 7", 7),
        ("9 it was.</think> Seven", None),
        ("as GPT4 says", None),
        ("none", None),
        ("1e999999999", None),
        ("7" * 5000, None),
        ("1/0", 0),
    ],
)
def test_the_last_number(text, value):
    assert checks.number(text) == value


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(C)", "C"),
        ("D.", "D"),
        ("B) a pig", "B"),
        ("The answer is C.", "C"),
        ("The answer is **(D)** because A is wrong", "D"),
        ("First I thought the answer is A. No, the answer is B", "B"),
        ("Answer: E", "E"),
        ("정답은 B", "B"),
        (r"so \boxed{C}", "C"),
        ("A cat says meow.", None),
        ("The answer is a pig.", None),
        ("The answer is A pig.", None),
        ("I think so.", None),
        ("b", None),
    ],
)
def test_the_letter_of_a_choice(text, letter):
    assert checks.choice(text) == letter


@pytest.mark.parametrize(
    "text, value",
    [
        ('{"a": 1}', {"a": 1}),
        ("```json\n[1, 2]\n```", [1, 2]),
        ("7", None),
        ('{"a": NaN}', None),
        ('{"a": 1', None),
        ('Here: {"a": 1}', None),
    ],
)
def test_json(text, value):
    assert checks.value(text) == value


CALL = {"name": "add", "arguments": {"a": 1, "b": [2]}}


@pytest.mark.parametrize(
    "text, found",
    [
        (f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>", [CALL]),
        (f"Let me see. <tool_call>{json.dumps(CALL)}</tool_call>\n<tool_call>{json.dumps(CALL)}</tool_call>", [CALL, CALL]),
        (f"[TOOL_CALLS] [{json.dumps(CALL)}, {json.dumps(CALL)}]", [CALL, CALL]),
        ('{"type": "function", "name": "add", "parameters": {"a": 1, "b": [2]}}', [CALL]),
        ('{"type": "function", "function": {"name": "add", "arguments": "{\\"b\\": [2], \\"a\\": 1}"}}', [CALL]),
        ('<think>{"name": "add", "arguments": {}}</think> No.', []),
        ('{"name": "Bob", "age": 3}', []),
        ('<tool_call>{"name": "add", "arguments": {"a": 1</tool_call>', []),
        ('{"name": "add", "arguments": [1]}', []),
        ("{{{[[[ no", []),
    ],
)
def test_calls_in_any_templates_words(text, found):
    assert checks.calls(text) == found


def test_calls_are_the_same_in_any_order_and_none_counts_twice():
    one, other = {"name": "a", "arguments": {}}, {"name": "b", "arguments": {"x": 1}}
    assert checks.same_calls([one, other], [other, one])
    assert not checks.same_calls([one, one], [one, other]) and not checks.same_calls([one], [one, one])
    assert not checks.same_calls([other], [other | {"arguments": {"x": 2}}])
    assert checks.same_calls([other], [other | {"arguments": {"x": 1.0}}]) and not checks.same_calls(
        [other], [other | {"arguments": {"x": True}}]
    )


@pytest.mark.parametrize(
    "references, name",
    [
        ([asked("It is 7."), asked("#### 3"), asked("Yes.")], "number"),
        ([asked("It is 7."), asked("Nine lives."), asked("Yes.")], None),
        ([asked("B"), asked("The answer is C"), asked("7")], "choice"),
        ([asked('{"a": 7}'), asked("[1]")], "json"),
        ([asked("It is 7."), asked("", ("add", {}))], "calls"),
        ([], None),
    ],
)
def test_auto_takes_what_the_answers_are_made_for(references, name):
    found = checks.choose("auto", references, None)
    assert (found and found.name) == name
    assert checks.choose("none", references, None) is None


def rows(*texts: str, ended: bool = True) -> list[dict]:
    return [{"prompt": "?", "answer": text, "ended": ended} for text in texts]


def test_what_is_right_and_an_answer_that_was_cut_off_is_not():
    references = [asked("It is 7."), asked("It is 8."), asked("Yes.")]
    answers = {"model": [*rows("7", "9"), *rows("?")], "parent": [*rows("x = 7.0"), *rows("8", ended=False), *rows("?")]}
    found, right = checks.score(checks.choose("auto", references, None), references, answers, None)
    assert found == {"task_check": "number", "task_prompts": 2, "task_lost": []} and right == {
        "model": [True, False],
        "parent": [True, False],
    }
    assert "right" not in answers["model"][2], "there is nothing to check it by"


def test_calls_by_name_and_arguments_and_false_ones_counted():
    tokenizer = load_tokenizer(CHAT)
    tokenizer.chat_template = CHATML
    references = [
        asked("", ("add", {"a": 1}), tools=ADD),
        asked("", ("add", {"a": 2}), tools=ADD),
        asked("Hello.", tools=ADD),
        asked("Bye.", tools=ADD),
        asked("Hm."),
    ]
    call = lambda a: f'<tool_call>\n{{"name": "add", "arguments": {{"a": {a}}}}}\n</tool_call>'
    answers = {"model": rows(call(1), call(3), call(1), "Bye!", "Hm"), "parent": rows(call(1), call(2), "Hi.", "Bye!", "Hm")}
    found, right = checks.score(checks.choose("auto", references, None), references, answers, tokenizer)
    assert right == {"model": [True, False, False, True], "parent": [True] * 4}
    assert (found["false_calls"], found["parent_false_calls"], found["task_prompts"]) == (1, 0, 4)
    assert found["task_lost"] == ["?", "?"]


def test_calls_that_a_template_does_not_show_are_not_checked(capsys):
    tokenizer = load_tokenizer(CHAT)
    references = [asked("", ("add", {"a": 1}), tools=ADD), asked("Hello.", tools=ADD)]
    found, right = checks.score(checks.CALLS, references, {"model": rows("", "Hi")}, tokenizer)
    assert right == {"model": [True]} and found["task_prompts"] == 1
    assert "shows 1 of 2 answers without calls that can be read" in capsys.readouterr().err


def test_a_schema(tmp_path, monkeypatch):
    (tmp_path / "s.json").write_text('{"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}')
    check = checks.choose("auto", [asked("x")], tmp_path / "s.json")
    assert (
        check.name == "schema"
        and check.right(asked("x"), '{"a": 1}')
        and not check.right(asked("x"), '{"a": "b"}')
        and not check.right(asked("x"), "1")
    )
    (tmp_path / "s.json").write_text('{"$ref": "http://127.0.0.1:9/elsewhere.json"}')
    with pytest.raises(BadData, match="JSON Schema cannot be used"):
        checks.of_schema(tmp_path / "s.json").right(asked("x"), '{"a": 1}')
    (tmp_path / "s.json").write_text('{"type": "no such"}')
    with pytest.raises(BadData, match="JSON Schema cannot be used"):
        checks.of_schema(tmp_path / "s.json")
    monkeypatch.setitem(__import__("sys").modules, "jsonschema.validators", None)
    with pytest.raises(MissingTool, match="needs a library"):
        checks.of_schema(tmp_path / "s.json")


# ---- the verb


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A dataset artifact of sums, all held out but one, whose answers tiny-chat mostly knows."""
    here = tmp_path_factory.mktemp("sums")
    pairs = [(a, b) for a in range(1, 7) for b in range(1, 4)]
    chats = [{"prompt": f"What is {a} plus {b}?", "completion": f"{a} plus {b} is {a + b}."} for a, b in pairs]
    (here / "val.json").write_text(json.dumps(chats))
    (here / "train.json").write_text(json.dumps([{"prompt": "Hi", "completion": "Hello!"}, {"prompt": "Bye", "completion": "Bye!"}]))
    assert go(data, f"outputs={here}", "run=d", f"data.path={here / 'train.json'}", f"data.val={here / 'val.json'}") == 0
    return here / "d" / "data"


@pytest.fixture
def measured(sums, tmp_path):
    """measured(*overrides) -> (finished process, report) of tiny-chat on the sums."""

    def run(*argv):
        argv = [f"source={CHAT}", f"dataset={sums}", "evaluation.samples=12", "evaluation.max_new_tokens=16", *argv]
        done = in_process("evaluate", "run=s", f"outputs={tmp_path}", *argv)
        report = tmp_path / "s" / "evaluate-tiny-chat" / "report.json"
        return done, json.loads(report.read_text()) if report.is_file() else None

    return run


def test_sums_are_checked_without_being_asked_for(measured, tmp_path):
    done, report = measured(f"parent={CHAT}")
    assert done.returncode == 0, done.stderr
    assert "checks the last number, which 12 of 12 prompts have" in done.stderr
    answers = [json.loads(line) for line in open(tmp_path / "s" / "evaluate-tiny-chat" / "answers.jsonl")]
    by_hand = [row["ended"] and row["answer"].rstrip(".").split()[-1] == str(eval_sum(row["prompt"])) for row in answers]
    assert [row["right"] for row in answers] == by_hand and sum(by_hand) > 0
    assert report["task"] == sum(by_hand[:12]) / 12 == report["parent_task"]
    assert report["task_difference"] == 0 and report["evidence"]["task_difference"] == "no evidence"
    assert "of 12 answers right, parent's" in done.stderr and ": no evidence" in done.stderr


def eval_sum(prompt: str) -> int:
    return sum(int(word.rstrip("?")) for word in prompt.split() if word.rstrip("?").isdigit())


@helps("evaluate.py", "evaluation.check=auto takes what there is", "evaluation.prompts=null asks the data's own")
def test_a_check_that_nothing_is_made_for(measured):
    done, _ = measured("evaluation.check=choice", "evaluation.prompts=[Hi]")
    refused(done, ConfigError, "none of the 0 prompts has an answer in the data to check by evaluation.check=choice")
    assert ways(done) == ["evaluation.check=auto takes what there is", "evaluation.prompts=null asks the data's own"]
    done, report = measured("evaluation.prompts=[Hi]", *typed(ways(done)[0]))
    assert done.returncode == 0 and "does not score answers" in done.stderr and "task" not in report
    done, report = measured("evaluation.check=number", *typed("evaluation.prompts=null"), "force=true")
    assert done.returncode == 0 and report["task_check"] == "number" and "parent_task" not in report
    assert "number: " in done.stderr


def test_settings_of_a_schema_go_together(measured, tmp_path):
    refused(measured("evaluation.check=schema")[0], ConfigError, "evaluation.json_schema=FILE")
    refused(measured("evaluation.check=number", "evaluation.json_schema=x")[0], ConfigError, "is of use where schema is what is checked")
    refused(measured("evaluation.json_schema=nowhere.json")[0], MissingInput, "no such file", way=False)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "s.json").write_text("{}")
    refused(measured(f"evaluation.json_schema={tmp_path / 'folder'}")[0], WrongKind, "is one file", way=False)
    (tmp_path / "s.json").write_text('{"type": "object"}')
    done, report = measured(f"evaluation.json_schema={tmp_path / 's.json'}", "evaluation.samples=2", "evaluation.rows=2")
    assert done.returncode == 0 and (report["task_check"], report["task"]) == ("schema", 0.0)
