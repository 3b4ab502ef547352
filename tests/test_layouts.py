"""Turns, pairs and columns as public data has them: what each becomes, what is said of it, and what helps where none is known."""

import csv
import json
import shlex

import pytest
from conftest import refused

from src.core.errors import BadData, ConfigError
from src.records import columns, formats, turns
from src.records.conversations import RecordLayout, Tally, read

USER, ASSISTANT = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.fixture
def one(tmp_path):
    """one(record, **layout): (messages, notes, weight) of the only record of a file."""

    def make(record, **layout):
        (tmp_path / "chat.jsonl").write_text(json.dumps(record))
        tally = Tally()
        [found] = read(tmp_path / "chat.jsonl", format=RecordLayout(**layout), on_fault="error", tally=tally)
        return list(found.messages), dict(tally.notes), found.weight

    return make


@pytest.fixture
def fault(tmp_path):
    """fault(record): what is wrong with the only record of a file, and the ways out."""

    def make(record, **layout):
        (tmp_path / "chat.jsonl").write_text(json.dumps(record))
        with pytest.raises(BadData) as caught:
            list(read(tmp_path / "chat.jsonl", format=RecordLayout(**layout), on_fault="error", tally=Tally()))
        return caught.value.what, caught.value.fix

    return make


def openai(*messages, **more):
    return {"messages": list(messages), **more}


# ---- turns


@pytest.mark.parametrize("role", [role for role, meant in turns.ROLES.items() if meant in ("user", "assistant", "system")])
@pytest.mark.parametrize("spelled", [str, str.upper, str.title])
def test_roles_in_any_mix_and_case(one, role, spelled):
    record = {"conversations": [{"from": spelled(role), "value": "x"}, {"from": "user", "value": "?"}, {"from": "gpt", "value": "!"}]}
    assert [m["role"] for m in one(record)[0]] == [turns.ROLES[role], "user", "assistant"]


@pytest.mark.parametrize("role", ["tool", "function", "observation", "tool_response", "ipython", "Tool_Result"])
@pytest.mark.parametrize("call", ["tool_call", "function_call"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
def test_tool_turns_in_every_layout(one, role, call, keys):
    said = (("human", "?"), (call, json.dumps(CALL["function"])), (role, "3"), ("gpt", "!"))
    for name in ("conversations", "messages"):
        messages, *_ = one({name: [dict(zip(keys, turn)) for turn in said]})
        assert messages == [USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ASSISTANT]


def test_qwens_layout_with_tool_turns(one):
    turn = lambda role, value: {"from": role, "value": value}
    record = {
        "conversations": [turn("user", "?"), turn("tool_call", json.dumps(CALL["function"])), turn("tool", "3"), turn("assistant", "!")]
    }
    assert [m["role"] for m in one(record)[0]] == ["user", "assistant", "tool", "assistant"]


def test_parallel_calls_and_a_call_beside_text_are_one_turn(one):
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    result = {"role": "tool_response", "content": "3"}
    messages, notes, _ = one(openai(USER, {"role": "assistant", "content": "I look."}, call, call, result, result, ASSISTANT))
    assert messages[1] == {"role": "assistant", "content": "I look.", "tool_calls": [CALL, CALL]}
    assert [m["role"] for m in messages[2:]] == ["tool", "tool", "assistant"]
    assert notes == {turns.JOINED_CALL: 1}


def test_ids_of_calls_are_kept_and_take_no_part_in_what_is_equal(tmp_path):
    def record(id):
        call = {"role": "assistant", "content": None, "tool_calls": [{"id": id, **CALL}]}
        return openai(USER, call, {"role": "tool", "tool_call_id": id, "name": "f", "content": "3"}, ASSISTANT)

    (tmp_path / "chat.json").write_text(json.dumps([record("call_1"), record("call_2")]))
    tally = Tally()
    a, b = read(tmp_path / "chat.json", format="auto", on_fault="error", tally=tally)
    assert a.messages[1]["tool_calls"] == [{"id": "call_1", **CALL}]
    assert a.messages[2] == {"role": "tool", "content": "3", "name": "f", "tool_call_id": "call_1"}
    assert a.digest() == b.digest() and tally.notes == {"duplicate kept": 1}


@pytest.mark.parametrize(
    "arguments, read, note",
    [
        ("", {}, None),
        (None, {}, None),
        ("{}", {}, None),
        ({"a": 1}, {"a": 1}, None),
        ('{"a": 1}', {"a": 1}, None),
        (json.dumps('{"a": 1}'), {"a": 1}, turns.PARSED_TWICE),
    ],
)
def test_arguments_of_calls(one, arguments, read, note):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    messages, notes, _ = one(openai(USER, call, ASSISTANT))
    assert messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": read}}]
    assert notes == ({note: 1} if note else {})


@pytest.mark.parametrize("arguments", ["[1]", "3", json.dumps("[1]"), json.dumps(json.dumps('{"a": 1}')), 3, [1]])
def test_arguments_that_are_no_object(fault, arguments):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}
    assert "turn 2: arguments are" in fault(openai(USER, call, ASSISTANT))[0]


def test_openais_older_function_call(one):
    call = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}}
    messages, *_ = one(openai(USER, call, {"role": "function", "name": "f", "content": "3"}, ASSISTANT | {"function_call": None}))
    assert messages == [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "3", "name": "f"},
        ASSISTANT,
    ]


@pytest.mark.parametrize(
    "content, text, note",
    [
        ({"r": "3"}, '{"r": "3"}', turns.OBJECT_RESULT),
        ([{"r": "é"}], '[{"r": "é"}]', turns.OBJECT_RESULT),
        ([{"type": "text", "text": "3"}], "3", None),
        (None, "", turns.EMPTY_RESULT),
        (3, "3", turns.OBJECT_RESULT),
    ],
)
def test_results_of_tools(one, content, text, note):
    call = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    messages, notes, _ = one(openai(USER, call, {"role": "tool", "content": content}, ASSISTANT))
    assert messages[2]["content"] == text and notes == ({note: 1} if note else {})


@pytest.mark.parametrize("key", turns.REASONING)
def test_reasoning_under_each_of_its_names(one, key):
    messages, notes, _ = one(openai(USER, ASSISTANT | {key: "Hm."}))
    assert messages == [USER, ASSISTANT | {"reasoning_content": "Hm."}] and not notes
    assert one({"prompt": "?", "completion": "!", key: "Hm."})[0] == messages
    assert one(openai(USER, ASSISTANT | {key: "Hm.", "reasoning_content": "Hm."}))[0] == messages


def test_thinking_in_parts(one):
    parts = [{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "!"}]
    assert one(openai(USER, {"role": "assistant", "content": parts}))[0] == [USER, ASSISTANT | {"reasoning_content": "Hm."}]


def test_two_reasonings_are_one_too_many(fault):
    assert "ambiguous fields: turn 2 has two reasonings" in fault(openai(USER, ASSISTANT | {"reasoning": "a", "thinking": "b"}))[0]


@pytest.mark.parametrize("empty", [None, [], "", [None], [""], {"bytes": None, "path": None}])
@pytest.mark.parametrize("column", ["image", "images", "audios"])
def test_media_of_nothing_is_none(one, column, empty):
    assert one(openai(USER | {column: empty}, ASSISTANT, **{column: empty}))[0] == [USER, ASSISTANT]


def test_the_right_turn_is_blamed(fault):
    """By its number in the file, whatever was put before it or joined."""
    call = {"role": "tool_call", "content": json.dumps(CALL["function"])}
    record = openai(USER, call, call, {"role": "tool", "content": "<|im_end|>"}, ASSISTANT, system="S")
    assert "<|im_end|> in turn 4 (tool)" in fault(record)[0]
    assert "<|im_end|> in 'completion' (assistant)" in fault({"prompt": "?", "completion": "<|im_end|>", "system": "S"})[0]
    assert "<|im_end|> in 'history' pair 1 (user)" in fault({"instruction": "?", "output": "!", "history": [["<|im_end|>", "x"]]})[0]


# ---- weights


@pytest.mark.parametrize(
    "given, weight",
    [
        ({"weight": 0}, 0.0),
        ({"weight": 1}, None),
        ({"weight": 0.5}, 0.5),
        ({"train": False}, 0.0),
        ({"train": True}, None),
        ({"loss": False}, 0.0),
        ({"loss": True}, None),
        ({"loss": None}, None),
        ({"loss_scale": 2}, 2.0),
        ({"loss_weight": 0.0}, 0.0),
        ({"weight": 0, "train": False}, 0.0),
    ],
)
def test_weights_of_turns(one, given, weight):
    """OpenAI's, axolotl's, ms-swift's, LLaMA-Factory's."""
    messages, notes, _ = one(openai(USER, ASSISTANT | given, USER, ASSISTANT))
    assert messages[1] == ASSISTANT | ({} if weight is None else {"weight": weight}) and messages[3] == ASSISTANT
    assert notes == ({} if weight is None else {formats.WEIGHTED if weight else formats.WEIGHT_0: 1})


@pytest.mark.parametrize("weight", [-1, "0.5", [], True, {"a": 1}])
def test_weights_without_sense(fault, weight):
    assert "bad weight: turn 2: 'weight' is" in fault(openai(USER, ASSISTANT | {"weight": weight}))[0]
    assert weight == "0.5" or "bad weight: the record: 'weight' is" in fault(openai(USER, ASSISTANT, weight=weight))[0]


def test_weights_that_disagree(fault):
    assert "ambiguous fields: turn 2: 'weight' is 1 and 'train' is 0" in fault(openai(USER, ASSISTANT | {"weight": 1, "train": False}))[0]


def test_a_weight_on_a_user_is_said(one):
    messages, notes, _ = one(openai(USER | {"loss_weight": 1.0}, ASSISTANT | {"loss_weight": 1.0}))
    assert messages == [USER, ASSISTANT] and notes == {turns.FOREIGN_WEIGHT: 1}
    assert one(openai(USER | {"loss_weight": 0.0}, ASSISTANT))[1] == {}


@pytest.mark.parametrize("given, weight", [(1, 1), (None, 1), ("", 1), (2, 2), ("0.5", 0.5)])
def test_weights_of_records(one, given, weight):
    assert one(openai(USER, ASSISTANT, weight=given))[2] == weight


@pytest.mark.parametrize("given", [10**400, 1e308, 1e39, 1e-50])
def test_a_weight_that_fp32_does_not_hold_is_refused(fault, given):
    for record in (openai(USER, ASSISTANT, weight=given), openai(USER, ASSISTANT | {"weight": given})):
        assert "bad weight" in fault(record)[0]


def test_a_column_that_is_named_and_not_there_is_said(one):
    record = {"q": "?", "a": "!", "weight": 2}
    notes = one(record, columns={"prompt": "q", "response": "a", "weight": "wieght"})[1]
    assert notes["no such column, which data.columns names: 'wieght'"] == 1


def test_what_weighs_nothing_is_dropped(tmp_path):
    records = [openai(USER, ASSISTANT, weight=0), openai(USER, ASSISTANT | {"train": False}), openai(USER, ASSISTANT)]
    (tmp_path / "chat.json").write_text(json.dumps(records))
    tally = Tally()
    assert len(list(read(tmp_path / "chat.json", format="auto", on_fault="error", tally=tally))) == 1
    assert tally.dropped == {"weight 0 on the record": 1, "weight 0 on every assistant turn": 1}


def test_the_weight_of_a_record_is_in_its_line_and_digest(tmp_path):
    (tmp_path / "chat.json").write_text(json.dumps([openai(USER, ASSISTANT, weight=w) for w in (1, 2)]))
    a, b = read(tmp_path / "chat.json", format="auto", on_fault="error", tally=Tally())
    assert "weight" not in json.loads(a.to_json()) and json.loads(b.to_json())["weight"] == 2
    assert a.digest() != b.digest()


# ---- pairs


@pytest.mark.parametrize(
    "record, format",
    [
        ({"prompt": "?", "completion": "!"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ASSISTANT]}, "prompt_completion"),
        ({"prompt": [{"from": "human", "value": "?"}], "completion": "!"}, "prompt_completion"),
        ({"prompt": "?", "response": "!"}, "prompt_completion"),
        ({"question": "?", "answer": "!"}, "question_answer"),
        ({"query": "?", "response": "!"}, "alpaca"),
        ({"input": "?", "output": "!"}, "alpaca"),
        ({"prompt": "?", "chosen": "!", "rejected": "no"}, "preference"),
        ({"prompt": [USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]}, "preference"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]}, "preference"),
        ({"conversations": [{"from": "human", "value": "?"}], "chosen": {"from": "gpt", "value": "!"}, "rejected": {}}, "preference"),
        ({"messages": [USER, ASSISTANT], "rejected_response": "no"}, "openai"),
    ],
)
def test_pairs(tmp_path, record, format):
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    for chosen in ("auto", format):
        tally = Tally()
        [found] = read(tmp_path / "chat.jsonl", format=chosen, on_fault="error", tally=tally)
        assert list(found.messages) == [USER, ASSISTANT] and tally.formats == {format: 1}
        assert (formats.UNUSED in tally.notes) == ("rejected" in str(record))


def test_answers_within_a_prompt_are_not_trained_on(one):
    for record in (
        {"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]},
        {"prompt": [USER, ASSISTANT, USER], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        {"chosen": [USER, ASSISTANT, USER, ASSISTANT], "rejected": [USER, ASSISTANT, USER, ASSISTANT]},
    ):
        messages, notes, _ = one(record)
        assert messages == [USER, ASSISTANT | {"weight": 0.0}, USER, ASSISTANT] and notes[formats.PROMPT_TURNS] == 1


def test_undesired_answers_are_not_learnt(tmp_path):
    """KTO's label."""
    (tmp_path / "chat.json").write_text(json.dumps([{"prompt": "?", "completion": "!", "label": label} for label in (True, False)]))
    tally = Tally()
    assert len(list(read(tmp_path / "chat.json", format="auto", on_fault="error", tally=tally))) == 1
    assert tally.dropped == {"marked as not desired (label false)": 1}


def test_a_label_beside_other_answers_is_a_class(one):
    """Dropping the false ones of a set of yes and no would tilt what is learnt."""
    for record in (
        {"question": "Is it so?", "answer": "No", "label": False},
        {"instruction": "Is it so?", "output": "No", "label": "false"},
    ):
        assert one(record)[1] == {"unknown column ignored: 'label'": 1}


def test_a_label_beside_turns_is_read(tmp_path):
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (tmp_path / "chat.json").write_text(json.dumps([{"messages": turns, "label": label} for label in (True, False)]))
    tally = Tally()
    assert len(list(read(tmp_path / "chat.json", format="auto", on_fault="error", tally=tally))) == 1
    assert tally.dropped == {"marked as not desired (label false)": 1} and not tally.notes


def test_a_label_that_is_none_of_these_is_said(one):
    assert one({"prompt": "?", "completion": "!", "label": 3})[1] == {"unknown column ignored: 'label'": 1}


def test_plain_text(one):
    messages, notes, _ = one({"text": "Once upon a time."})
    assert messages == [{"role": "assistant", "content": "Once upon a time."}] and notes == {formats.TEXT_ALONE: 1}
    assert formats.RENDERED in one({"text": "### Human: ?\n### Assistant: !"})[1]


def test_turns_and_columns_that_are_not_read_are_said(one):
    record = openai(USER | {"mood": 1}, ASSISTANT, conversations=["x", 3])
    assert one(record)[1] == {"unknown turn field ignored: 'mood'": 1, "unknown column ignored: 'conversations'": 1}
    assert one({"prompt": [USER | {"mood": 1}], "completion": "!"})[1] == {"unknown turn field ignored: 'mood'": 1}
    assert one({"conversation": [{"human": "?", "assistant": "!", "mood": 1}]})[1] == {"unknown turn field ignored: 'mood'": 1}


def test_a_system_column_beside_a_system_turn(one):
    system = {"role": "system", "content": "S"}
    assert one(openai(system, USER, ASSISTANT, system="S"))[0] == [system, USER, ASSISTANT]
    assert one(openai(system, USER, ASSISTANT, system="T"))[0] == [{"role": "system", "content": "T"}, system, USER, ASSISTANT]


def test_whole_numbers_are_texts(one):
    assert one({"question": "How many?", "answer": 7})[0][1]["content"] == "7"


def test_notes_on_texts(one):
    assert one({"instruction": "hi", "output": "I am {{name}}."})[1] == {formats.PLACEHOLDER: 1}
    assert one(openai(USER, {"role": "assistant", "content": "\u1112\u1161\u11ab"}))[1] == {formats.DECOMPOSED: 1}


def test_notes_and_reasons_come_in_one_order(call, tmp_path):
    """Whatever order Python's sets are in."""
    rows = [openai(USER, ASSISTANT, **dict.fromkeys("zyxwv", 1))] * 3 + [openai(USER, b=1)] + [openai({"role": "system", "content": " "})]
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    said = call("data", f"data.path={tmp_path / 'chat.json'}", "data.val=0", "data.calib=0").stderr
    found = [line for line in said.splitlines() if "ignored" in line or "dropped 1" in line]
    assert found == [f"data: dropped 1: {reason}" for reason in ("no assistant turn", "no content in any turn")] + [
        f"data: unknown column ignored: '{name}' ({count})" for name, count in (*((n, 3) for n in "vwxyz"), ("b", 1))
    ]


# ---- columns and roles of one's own

FOREIGN = {
    "pairs": ({"Frage": "?", "Antwort": "!"}, ["prompt: Frage", "response: Antwort"]),
    "likely names": ({"category": "x", "user_question": "?", "gold_answer": "!", "topic": "y"}, ["user_question", "gold_answer"]),
    "spaces": ({"The question": "?", "Its 'answer'": "!"}, ["The question"]),
    "turns": (
        {"dialog": [{"speaker": "user", "utterance": "?"}, {"speaker": "bot", "utterance": "!"}]},
        ["dialog", "speaker", "utterance"],
    ),
    "known turns": ({"chat": [USER, ASSISTANT]}, ["chat"]),
}


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
@pytest.mark.parametrize("case", FOREIGN)
def test_the_mapping_that_is_proposed_helps(call, tmp_path, case, suffix):
    record, _ = FOREIGN[case]
    path = tmp_path / f"chat.{suffix}"
    if suffix == "csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([record, [v if isinstance(v, str) else json.dumps(v) for v in record.values()]])
    else:
        path.write_text(json.dumps(record))
    done = call("data", f"data.path={path}")
    refused(done, BadData, "data.columns=", *(f"'{name}'" for name in record if "'" not in name))
    [setting] = shlex.split(done.stderr.split("fix:")[1].splitlines()[0])
    assert setting.startswith("data.columns=")
    done = call("data", f"data.path={path}", setting, "data.val=0", "data.calib=0")
    assert done.returncode == 0, done.stderr
    [line] = (tmp_path / "outputs" / "default" / "data" / "train.jsonl").read_text().splitlines()
    assert json.loads(line)["messages"] == [USER, ASSISTANT]


def test_columns_win_over_what_a_record_has_besides(one):
    record = {"prompt": "a template", "question": "?", "answer": "!", "response": "other", "messages": [USER], "note": "x"}
    messages, notes, _ = one(record, columns={"prompt": "question", "response": "answer"})
    assert messages == [USER, ASSISTANT]
    assert notes == {f"column left out by data.columns: '{name}'": 1 for name in ("prompt", "response", "messages")} | {
        "unknown column ignored: 'note'": 1
    }


def test_more_columns(one):
    record = {"q": "?", "a": "!", "cot": "Hm.", "sys": "S", "w": 0.5, "weight": "70 kg", "key": "k1"}
    names = {"prompt": "q", "response": "a", "reasoning": "cot", "system": "sys", "weight": "w", "id": "key"}
    messages, _, weight = one(record, columns=names)
    assert messages == [{"role": "system", "content": "S"}, USER, ASSISTANT | {"reasoning_content": "Hm."}] and weight == 0.5


def test_a_column_that_is_not_what_it_is_called(one, fault):
    record = {"question": "?", "answer": "!", "weight": "70 kg"}
    what, fix = fault(record)
    assert "'weight' is '70 kg'" in what and "data.columns={weight:null}" in fix[0]
    assert one(record, columns={"weight": None})[0] == [USER, ASSISTANT]


def test_two_columns_that_could_be_the_prompt(one, fault):
    record = {"instruction": "?", "question": "x", "output": "!"}
    _, fix = fault(record)
    assert fix[0] == "data.columns={prompt:instruction}"
    assert one(record, columns={"prompt": "instruction"})[0] == [USER, ASSISTANT]


def test_a_column_that_is_not_there(fault):
    assert (
        "no 'q', which data.columns names; it has 'question', 'answer'"
        in fault({"question": "?", "answer": "!"}, columns={"prompt": "q"})[0]
    )


def test_roles_of_ones_own(call, tmp_path):
    record = {"conversations": [{"from": "customer", "value": "?"}, {"from": "Agent", "value": "!"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(record))
    command = ["data", f"data.path={tmp_path / 'chat.jsonl'}", "data.val=0", "data.calib=0"]
    refused(call(*command), BadData, "turn 1 is from 'customer'", "data.roles={customer:assistant} (or user")
    assert call(*command, "data.roles={customer:user,Agent:assistant}").returncode == 0
    refused(call(*command, "data.roles={customer:client}"), ConfigError, "data.roles.customer")


def test_settings_without_sense(call):
    refused(call("data", "data.columns={question:prompt}"), ConfigError, "it is {OURS:YOURS}: {prompt:question}")
    refused(call("data", "data.columns={colour:x}"), ConfigError, "no column is called 'colour'")
    refused(call("data", "data.columns={prompt:x,response:x}"), ConfigError, "'x' can be one column only")
    refused(call("data", "data.weights=[1,2]"), ConfigError, "data.weights has 2 numbers for 1 paths")
    refused(call("data", "data.weights=[0]"), ConfigError, "data.weights")
    refused(call("data", "data.val=2"), ConfigError, "data.val=2")


def test_every_way_out_names_columns_that_there_are():
    from src.settings.data import COLUMNS

    assert {*columns.MEANT, *columns.NEEDED, *formats.TURN_NAMES} <= set(COLUMNS)
