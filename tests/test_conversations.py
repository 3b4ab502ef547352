import json
import random
import tracemalloc
from collections import Counter

import pytest
from conftest import ROOT, SHARED, each_kind

from src.core.errors import BadData, MissingInput
from src.records import conversations, json_stream
from src.records.conversations import FORMATS, Conversation, Tally, read, split_of

CHAT = SHARED / "chat"

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
QWEN = {"id": "a", "conversations": [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
OPENAI = {"messages": [USER, ASSISTANT]}
ALPACA = {"instruction": "Hi", "output": "Hello"}
WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"z": 1, "a": "Söul"}}}
DECLARED = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def openai(*messages, **columns):
    return {"messages": list(messages), **columns}


def qwen(*turns, **columns):
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **columns}


@pytest.fixture
def load(tmp_path):
    """Write records (or raw bytes) to a file and read it: (conversations, tally)."""

    def load(content, format="auto", on_fault="error", name="chat.json"):
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = ("\n".join(map(json.dumps, content)) if name.endswith("l") else json.dumps(content)).encode()
        path.write_bytes(content)
        tally = Tally()
        found = list(read(path, format=format, on_fault=on_fault, tally=tally))
        assert tally.rows_in == tally.kept + tally.dropped.total()
        assert tally.kept == len(found)
        return found, tally

    return load


def call(role, value):
    return qwen(("human", "?"), (role, value), ("observation", "21"), ("gpt", "warm"))


CALLED = [
    {"role": "user", "content": "?"},
    {"role": "assistant", "content": "", "tool_calls": [WEATHER]},
    {"role": "tool", "content": "21"},
    {"role": "assistant", "content": "warm"},
]
SYSTEM = {"role": "system", "content": "S"}
WELL_FORMED = {
    "qwen": ("qwen", QWEN, [USER, ASSISTANT]),
    "qwen roles": (
        "qwen",
        qwen(("system", "S"), ("user", "Hi"), ("tool", "t"), ("assistant", "Hello")),
        [SYSTEM, USER, {"role": "tool", "content": "t"}, ASSISTANT],
    ),
    "sharegpt": ("sharegpt", SHAREGPT, [USER, ASSISTANT]),
    "sharegpt system column": ("sharegpt", SHAREGPT | {"system": "S"}, [SYSTEM, USER, ASSISTANT]),
    "sharegpt empty system": ("sharegpt", SHAREGPT | {"system": ""}, [USER, ASSISTANT]),
    "sharegpt call": ("sharegpt", call("function_call", json.dumps(WEATHER["function"])), CALLED),
    "sharegpt call, text arguments": (
        "sharegpt",
        call("function_call", '{"name": "weather", "arguments": "{\\"z\\": 1, \\"a\\": \\"Söul\\"}"}'),
        CALLED,
    ),
    "ms-swift pairs": ("sharegpt", {"system": "S", "conversation": [{"human": "Hi", "assistant": "Hello"}]}, [SYSTEM, USER, ASSISTANT]),
    "openai": ("openai", OPENAI, [USER, ASSISTANT]),
    "openai developer": ("openai", openai({"role": "developer", "content": "S"}, USER, ASSISTANT), [SYSTEM, USER, ASSISTANT]),
    "openai parts": (
        "openai",
        openai({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "value": "i"}]}, ASSISTANT),
        [USER, ASSISTANT],
    ),
    "openai calls": (
        "openai",
        openai(
            {"role": "user", "content": "?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"z": 1, "a": "Söul"}'}}],
            },
            {"role": "tool", "content": "21"},
            {"role": "assistant", "content": "warm"},
        ),
        [CALLED[0], CALLED[1] | {"tool_calls": [{"id": "1", **WEATHER}]}, *CALLED[2:]],
    ),
    "openai call parts": (
        "openai",
        openai(
            USER,
            {
                "role": "assistant",
                "content": [{"type": "reasoning", "value": "Hm"}, {"type": "tool_call", "value": json.dumps(WEATHER["function"])}],
            },
        ),
        [USER, {"role": "assistant", "content": "", "reasoning_content": "Hm", "tool_calls": [WEATHER]}],
    ),
    "openai name": ("openai", openai(USER | {"name": "Bo"}, ASSISTANT | {"tool_calls": None}), [USER | {"name": "Bo"}, ASSISTANT]),
    "alpaca": ("alpaca", ALPACA, [USER, ASSISTANT]),
    "alpaca input": (
        "alpaca",
        {"instruction": "Add", "input": "1, 2", "output": "3"},
        [{"role": "user", "content": "Add\n1, 2"}, {"role": "assistant", "content": "3"}],
    ),
    "alpaca null input": ("alpaca", ALPACA | {"input": None, "history": None}, [USER, ASSISTANT]),
    "alpaca history": (
        "alpaca",
        {"system": "S", "query": "Hi", "response": "Hello", "history": [["a", "b"]]},
        [SYSTEM, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, USER, ASSISTANT],
    ),
    "dolly": ("alpaca", {"instruction": "Hi", "context": "", "response": "Hello"}, [USER, ASSISTANT]),
    "white space stays": (
        "qwen",
        qwen(("user", " Hi\n"), ("assistant", "\tHello ")),
        [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "\tHello "}],
    ),
}


@pytest.mark.parametrize("case", WELL_FORMED)
def test_formats(load, case):
    format, record, messages = WELL_FORMED[case]
    for chosen in ("auto", format):
        [found], tally = load([record], chosen)
        assert list(found.messages) == messages
        assert tally.formats == {format: 1}


@pytest.mark.parametrize("tools", [[DECLARED], [DECLARED["function"]], json.dumps([DECLARED]), json.dumps([DECLARED["function"]])])
def test_tools(load, tools):
    [found], _ = load([SHAREGPT | {"tools": tools}])
    assert found.tools == (DECLARED,)


@pytest.mark.parametrize("tools", [None, [], "", "[]"])
def test_no_tools(load, tools):
    [found], _ = load([SHAREGPT | {"tools": tools}])
    assert found.tools is None


def test_json_is_canonical_and_keeps_argument_order(load):
    record = WELL_FORMED["sharegpt call"][1] | {"id": "ß"}
    [found], _ = load([record])
    line = found.to_json()
    assert (
        line.startswith('{"id": "ß", "messages": [{"role": "user", "content": "?"}')
        and line.endswith('"tools": null}')
        and "\n" not in line
    )
    assert '{"z": 1, "a": "Söul"}' in line
    assert json.loads(line)["messages"] == list(found.messages)


def test_digest_is_of_content_alone(load):
    (a, b), tally = load([QWEN, QWEN | {"id": "b"}])
    [c], _ = load([SHAREGPT])
    [d], _ = load([SHAREGPT | {"tools": [DECLARED]}])
    assert a.digest() == b.digest() == c.digest() != d.digest()
    assert tally.notes == {"duplicate kept": 1}


def test_ids(load):
    assert [c.id for c in load([QWEN, QWEN | {"id": 7}, QWEN | {"id": None}, QWEN | {"id": ""}])[0]] == [
        "a",
        "7",
        "chat.json#2",
        "chat.json#3",
    ]
    assert [c.id for c in load(b"\n" + json.dumps(OPENAI).encode(), name="chat.jsonl")[0]] == ["chat.jsonl:2"]


def test_notes(load):
    _, tally = load([QWEN | {"topic": "x"}, QWEN | {"topic": "y", "conversations": [t | {"mood": 1} for t in QWEN["conversations"]]}])
    assert tally.notes == {"unknown column ignored: 'topic'": 2, "unknown turn field ignored: 'mood'": 1, "duplicate kept": 1}
    _, tally = load([ALPACA | {f"column {n}": n} for n in range(500)])
    assert len(tally.notes) <= conversations.NOTES_LISTED + 2


REAL = {
    "openai/fastchat_dummy_200.jsonl": ("openai", 200, {"user": 402, "assistant": 402}),
    "qwen/fastchat_dummy_200.json": ("qwen", 200, {"user": 399, "assistant": 399}),
    "qwen/gsm8k_train_500.json": ("qwen", 500, {"user": 500, "assistant": 500}),
    "qwen/self_instruct_seed_175.json": ("qwen", 175, {"user": 175, "assistant": 175}),
    "qwen/songys_ko_2000.json": ("qwen", 2000, {"user": 2000, "assistant": 2000}),
    "qwen/tinystories_continue_1000.json": ("qwen", 1000, {"user": 1000, "assistant": 1000}),
    "qwen/tinystories_named_510.json": ("qwen", 510, {"user": 510, "assistant": 510}),
    "upstream/fastchat_dummy_conversation.json": ("sharegpt", 500, {"user": 1000, "assistant": 1000}),
    "upstream/litgpt_dolly_fixture.json": ("alpaca", 12, {"user": 12, "assistant": 12}),
    "upstream/llamafactory_glaive_toolcall_en_demo.json": ("sharegpt", 300, {"user": 746, "assistant": 746 + 211, "tool": 211}),
    "upstream/llamafactory_glaive_toolcall_zh_demo.json": ("sharegpt", 300, {"user": 722, "assistant": 724 + 216, "tool": 218}),
    "upstream/llamafactory_identity.json": ("alpaca", 91, {"user": 91, "assistant": 91}),
    "upstream/llamafactory_reason_tool_use_demo_50.jsonl": ("openai", 50, {"system": 50, "user": 70, "assistant": 112, "tool": 42}),
    "upstream/llamafactory_v1_sft_identity_50.jsonl": ("openai", 50, {"user": 50, "assistant": 50}),
    "upstream/ms-swift_alpaca.jsonl": ("alpaca", 3, {"system": 1, "user": 4, "assistant": 4}),
    "upstream/ms-swift_chatml.jsonl": ("openai", 3, {"system": 1, "user": 5, "assistant": 5}),
    "upstream/ms-swift_conversations.jsonl": ("qwen", 3, {"system": 1, "user": 5, "assistant": 5}),
    "upstream/ms-swift_sharegpt.jsonl": ("sharegpt", 3, {"system": 1, "user": 5, "assistant": 5}),
    "upstream/ms-swift_swift_multi.jsonl": ("alpaca", 3, {"system": 1, "user": 5, "assistant": 5}),
    "upstream/ms-swift_swift_single.jsonl": ("alpaca", 3, {"system": 1, "user": 3, "assistant": 3}),
}
REFUSED = {
    "upstream/llamafactory_dataset_info.json": "one JSON object over several lines",
    "upstream/self_instruct_seed_tasks.jsonl": "175 of 175 records are malformed",
}


def test_every_real_file_is_covered(shared):
    assert {str(path.relative_to(CHAT)) for path in CHAT.rglob("*.json*")} == REAL.keys() | REFUSED.keys()


@each_kind([], REAL)
def test_real_files(name):
    format, rows, roles = REAL[name]
    tally = Tally()
    found = list(read(CHAT / name, format="auto", on_fault="error", tally=tally))
    assert (tally.rows_in, tally.kept, tally.formats) == (rows, rows, {format: rows})
    assert Counter(message["role"] for c in found for message in c.messages) == roles


@each_kind([], REFUSED)
def test_real_files_refused(name):
    with pytest.raises(BadData, match=REFUSED[name]):
        list(read(CHAT / name, format="auto", on_fault="error", tally=Tally()))


PAIRS = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}


def written_as(format: str, turns: list[dict]) -> dict:
    """A conversation of the embedded file in another layout."""
    named = {"user": "human", "assistant": "gpt"}
    texts = [turn["value"] for turn in turns if turn["from"] != "system"]
    system = {"system": turns[0]["value"]} if turns[0]["from"] == "system" else {}
    if format == "sharegpt":
        return {"conversations": [turn | {"from": named[turn["from"]]} for turn in turns if turn["from"] != "system"], **system}
    if format == "openai":
        return {"messages": [{"role": turn["from"], "content": turn["value"]} for turn in turns]}
    if format in PAIRS:
        history = {"history": [texts[k : k + 2] for k in range(0, len(texts) - 2, 2)]}
        return dict(zip(PAIRS[format], texts[-2:])) | history | system
    if format == "preference":
        return {"conversations": turns[:-1], "chosen": turns[-1], "rejected": turns[-1] | {"value": "No."}}
    return {"conversations": turns}


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
@pytest.mark.parametrize("format", [format for format in FORMATS if format != "text"])
def test_a_whole_file_in_each_layout_holds_the_same_conversations(load, format, name):
    rows = [row["conversations"] for row in json.loads((ROOT / "assets" / "conversations.json").read_text())]
    found, tally = load([written_as(format, turns) for turns in rows], name=name)
    assert (tally.rows_in, tally.kept, tally.formats) == (len(rows), len(rows), {format: len(rows)})
    assert [list(c.messages) for c in found] == [[{"role": turn["from"], "content": turn["value"]} for turn in turns] for turns in rows]
    assert len({c.digest for c in found}) == len({json.dumps(turns) for turns in rows})


def test_files_that_hold_no_conversations_are_refused(load):
    described = {"my_chats": {"file_name": "chats.json", "formatting": "sharegpt"}, "others": {"file_name": "o.json"}}
    with pytest.raises(BadData, match="one JSON object over several lines"):
        load(json.dumps(described, indent=2).encode())
    tasks = [{"id": f"t{i}", "name": "a task", "instances": [{"input": "", "output": "x"}]} for i in range(5)]
    with pytest.raises(BadData, match="5 of 5 records are malformed"):
        load(tasks, name="chat.jsonl")


LINES = b"\n".join([json.dumps(QWEN).encode(), json.dumps(QWEN | {"id": "b"}).encode()])
ARRAY = json.dumps([QWEN, QWEN | {"id": "b"}], indent=1).encode()


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + b"\n",
        LINES.replace(b"\n", b"\r\n"),
        LINES.replace(b"\n", b"\n\n  \n\t\r\n") + b"\n\n",
        b"\xef\xbb\xbf" + LINES,
        ARRAY,
        ARRAY.replace(b"\n", b"\r\n"),
        ARRAY.replace(b"\n", b""),
        b"\xef\xbb\xbf \n" + ARRAY + b"\n\n",
        b"\n" * 3_000_000 + ARRAY,
    ],
)
@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_containers(load, content, name):
    found, _ = load(content, name=name)
    assert [c.id for c in found] == ["a", "b"]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_windows_of_any_size_read_the_same(load, monkeypatch, chunk):
    monkeypatch.setattr(json_stream, "CHUNK", chunk)
    records = [
        qwen(("user", 'né 😀 \\ "' * n), ("assistant", "x" * n + "\n"), id=n, score=-1.5e-3, flag=True, none=None) for n in range(1, 12)
    ]
    for text in (json.dumps(records), json.dumps(records, indent=2, ensure_ascii=False)):
        found, _ = load(text.encode())
        assert [c.messages[0]["content"] for c in found] == [r["conversations"][0]["value"] for r in records]
    with pytest.raises(BadData) as caught:
        load(json.dumps([QWEN, 12345, QWEN], indent=1).encode())
    assert "line 15, record #1: not an object: the record is a number" in caught.value.what


def test_records_larger_than_the_window(load):
    long = qwen(("user", "é" * 3_000_000), ("assistant", "x"))
    for name in ("chat.json", "chat.jsonl"):
        found, _ = load([long, QWEN], name=name)
        assert len(found[0].messages[0]["content"]) == 3_000_000


@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_record_limit(load, monkeypatch, name):
    monkeypatch.setattr(json_stream, "RECORD_LIMIT", 10_000)
    monkeypatch.setattr(json_stream, "CHUNK", 1_000)
    records = [QWEN, qwen(("user", "x" * 50_000), ("assistant", "x")), QWEN]
    with pytest.raises(BadData, match="over 0 MiB"):
        load(records, name=name)
    if name == "chat.jsonl":
        found, tally = load(records, on_fault="drop", name=name)
        assert len(found) == 2 and tally.dropped == {"malformed: record too large": 1}


def test_memory_is_flat(tmp_path):
    path = tmp_path / "big.json"
    with open(path, "w") as file:
        file.write("[\n")
        file.writelines(json.dumps(qwen(("user", f"{n}"), ("assistant", "word " * 1000), id=n), indent=1) + ",\n" for n in range(6000))
        file.write(json.dumps(QWEN) + "]")
    assert path.stat().st_size > 30e6
    tracemalloc.start()
    try:
        rows = sum(1 for _ in read(path, format="auto", on_fault="error", tally=Tally()))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 6001
    assert peak < 12e6


PART = {"role": "assistant", "content": [{"type": "text", "text": "a"}]}
MALFORMED = {
    "not an object": ("qwen", [1, 2], "not an object: the record is a list"),
    "unknown format": ("auto", {"body": "x"}, "the record has 'body'; expected 'conversations'"),
    "list in an object": ("auto", {"data": [QWEN]}, "an object with its records under 'data'"),
    "other column": ("qwen", {"body": "x"}, "missing field: the record has no 'conversations'"),
    "ill-typed list": ("qwen", {"conversations": "x"}, "'conversations' is a string, not a list"),
    "empty list": ("auto", {"conversations": []}, "empty list: 'conversations'"),
    "turn no object": ("qwen", {"conversations": ["x"]}, "item 1 is a string, not an object"),
    "no from": ("qwen", {"conversations": [{"value": "x"}]}, "turn 1 has no 'from'"),
    "from a list": ("qwen", {"conversations": [{"from": ["user"], "value": "x"}]}, "'from' is a list, not a string"),
    "value a number": ("auto", {"conversations": [{"from": "user", "value": 3}]}, "turn 1: 'value' is a number, not a string"),
    "value null": ("auto", {"conversations": [{"from": "gpt", "value": None}]}, "turn 1: 'value' is null, not a string"),
    "unknown role": ("auto", qwen(("user", "x"), ("wizard", "y")), "unknown role: turn 2 is from 'wizard'; known: user, assistant"),
    "another format": ("qwen", OPENAI, "record is 'openai' but data.format is 'qwen'"),
    "call no JSON": ("auto", call("function_call", "weather()"), "bad JSON in a string: turn 2"),
    "call no name": ("auto", call("function_call", '{"arguments": {}}'), "a tool call has no 'name'"),
    "call a list of text": ("auto", call("function_call", '["f"]'), "a call is a string, not an object"),
    "arguments no JSON": ("auto", call("function_call", '{"name": "f", "arguments": "x"}'), "turn 2: arguments: Expecting value"),
    "arguments a list": ("auto", call("function_call", '{"name": "f", "arguments": []}'), "arguments are a list"),
    "arguments infinite": ("auto", call("function_call", '{"name": "f", "arguments": {"x": 1e999}}'), "beyond the range"),
    "arguments NaN": ("auto", call("function_call", '{"name": "f", "arguments": {"x": NaN}}'), "not a JSON number"),
    "arguments deep": (
        "auto",
        call("function_call", '{"name": "f", "arguments": {"x": ' + "[" * 300 + "]" * 300 + "}}"),
        "nested too deeply",
    ),
    "tools no list": ("auto", SHAREGPT | {"tools": '{"name": "f"}'}, "'tools' is not a list of functions"),
    "tools of text": ("auto", SHAREGPT | {"tools": [{"function": "f"}]}, "'tools' is not a list of functions"),
    "tools no JSON": ("auto", SHAREGPT | {"tools": "f(x)"}, "'tools': Expecting value"),
    "system a list": ("auto", SHAREGPT | {"system": ["x"]}, "'system' is a list"),
    "pair half": ("auto", {"conversation": [{"human": "x"}]}, "pair 1 has no 'assistant'"),
    "content missing": ("auto", openai(USER, {"role": "assistant"}), "turn 2 has no 'content'"),
    "content null": ("auto", openai(USER, {"role": "assistant", "content": None}), "'content' is null"),
    "image part": (
        "auto",
        openai({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}),
        "has 'image_url'; known: reasoning, text, tool_call",
    ),
    "part no object": ("auto", openai({"role": "user", "content": ["x"]}), "unsupported content part"),
    "parts out of order": (
        "auto",
        openai(USER, {"role": "assistant", "content": PART["content"] + [{"type": "reasoning", "value": "x"}]}),
        "out of order",
    ),
    "user calls": ("auto", openai(USER | {"tool_calls": [WEATHER]}), "only the assistant"),
    "calls a string": ("auto", openai(PART | {"tool_calls": {"f": 1}}), "'tool_calls' is an object"),
    "images": ("auto", OPENAI | {"images": ["x.png"]}, "not text: the record has 'images'"),
    "answer a number": ("alpaca", {"instruction": "x", "output": 0.5}, "'output' is a number"),
    "no answer": ("alpaca", {"instruction": "x"}, "the record has no 'output'"),
    "two answers": ("auto", ALPACA | {"response": "x"}, "both 'output' and 'response'"),
    "history": ("auto", ALPACA | {"history": [["x"]]}, "'history' pair 1"),
    "im_end": ("auto", qwen(("user", "x<|im_end|>\n"), ("assistant", "y")), "control string: <|im_end|> in turn 1 (user)"),
    "im_start": ("auto", qwen(("user", "x"), ("assistant", "<|im_start|>")), "in turn 2 (assistant)"),
    "endoftext": ("auto", openai(USER, ASSISTANT | {"reasoning_content": "<|endoftext|>"}), "<|endoftext|> in turn 2"),
    "control in parts": (
        "auto",
        openai({"role": "user", "content": [{"type": "text", "text": "<|im_"}, {"type": "text", "text": "end|>"}]}),
        "in turn 1",
    ),
    "control in tools": ("auto", SHAREGPT | {"tools": [{"name": "<|im_end|>"}]}, "in the tools"),
    "control in arguments": ("auto", call("function_call", '{"name": "f", "arguments": {"\\u003c|im_end|>": 1}}'), "in turn 2"),
    "lone surrogate": ("auto", qwen(("user", "\ud83d"), ("assistant", "y")), "half of a surrogate pair"),
    "lone surrogate id": ("auto", QWEN | {"id": "\udc00"}, "half of a surrogate pair"),
    "NaN": ("auto", QWEN | {"score": float("nan")}, "not a JSON number: NaN"),
    "Infinity": ("auto", QWEN | {"score": float("-inf")}, "not a JSON number: -Infinity"),
}


SOUND = {
    "qwen": QWEN,
    "sharegpt": SHAREGPT,
    "openai": OPENAI,
    "alpaca": ALPACA,
    "prompt_completion": {"prompt": "Hi", "completion": "Hello"},
    "question_answer": {"question": "Hi", "answer": "Hello"},
    "preference": {"prompt": "Hi", "chosen": "Hello", "rejected": "No"},
    "text": {"text": "Hello"},
}
ALIKE = ({"qwen", "sharegpt"}, set(PAIRS))
"""layouts that differ in names alone, any of which a file may use"""


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("name", ["chat.json", "chat.jsonl"])
def test_malformed(load, case, name):
    format, record, what = MALFORMED[case]
    content = [record, QWEN] if format == "auto" else [SOUND[format], record]
    with pytest.raises(BadData) as caught:
        load(content, format, name=name)
    assert "1 of 2 records are malformed" in caught.value.what
    assert what in caught.value.what
    assert caught.value.fix
    found, tally = load(content, format, "drop", name)
    assert len(found) == 1
    [reason] = tally.dropped
    assert reason.startswith("malformed: ") and len(reason) < 60
    assert tally.fault_count == len(tally.faults) == 1


@pytest.mark.parametrize("began", FORMATS)
@pytest.mark.parametrize("other", FORMATS)
def test_formats_do_not_mix(load, began, other):
    content = [SOUND[began], SOUND[other]]
    if began == other or any({began, other} <= family for family in ALIKE):
        assert load(content)[1].kept == 2
        return
    with pytest.raises(BadData, match=f"record is '{other}' but the file began as '{began}'"):
        load(content)
    assert load(content, on_fault="drop")[1].dropped == {"malformed: another format": 1}


def test_a_record_that_tells_no_format_settles_none(load):
    _, tally = load([qwen(("system", "S")), SHAREGPT, SHAREGPT])
    assert (tally.kept, tally.dropped) == (2, {"no assistant turn": 1})


@pytest.mark.parametrize(
    "record, reason",
    [
        (qwen(("user", "x")), "no assistant turn"),
        (qwen(("user", "x"), ("assistant", ""), ("assistant", " \n")), "every assistant turn is empty"),
        (qwen(("user", ""), ("assistant", " ")), "no content in any turn"),
        (ALPACA | {"output": ""}, "every assistant turn is empty"),
    ],
)
def test_useless_records_are_dropped_and_no_fault(load, record, reason):
    found, tally = load([record])
    assert (found, tally.dropped, tally.fault_count) == ([], {reason: 1}, 0)


def test_one_empty_assistant_turn_among_others_is_kept(load):
    assert load([qwen(("user", "x"), ("assistant", ""), ("user", "x"), ("assistant", "y"))])[1].kept == 1


def test_faults_name_file_line_and_record(load):
    content = json.dumps(
        [QWEN] * 2 + [qwen(("user", 1), id=f"bad_{n}") for n in range(12)] + [qwen(("user", "x"), ("gpt", 1), id="last")], indent=1
    ).encode()
    with pytest.raises(BadData) as caught:
        load(content)
    first, second, third = caught.value.what.splitlines()
    assert first == "13 of 15 records are malformed"
    line = content[: content.rindex(b"\n {", 0, content.index(b"bad_0"))].count(b"\n") + 2
    what = "ill-typed field: turn 1: 'value' is a number, not a string (12 records): "
    assert second.startswith(f"  {what}chat.json line {line}, record 'bad_0'; chat.json line ") and second.endswith("'bad_2' and 9 more")
    assert third.endswith("record 'last': ill-typed field: turn 2: 'value' is a number, not a string")
    assert any("data.on_fault=drop" in fix for fix in caught.value.fix)


def test_error_mode_yields_before_it_raises(tmp_path):
    path = tmp_path / "chat.json"
    path.write_text(json.dumps([QWEN, {}, QWEN]))
    found = read(path, format="auto", on_fault="error", tally=Tally())
    assert [next(found).id, next(found).id] == ["a", "a"]
    with pytest.raises(BadData):
        next(found)


def test_one_tally_counts_several_files(tmp_path):
    tally = Tally()
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps([QWEN, {}]))
        list(read(tmp_path / name, format="auto", on_fault="drop", tally=tally))
    assert (tally.rows_in, tally.kept, tally.fault_count, tally.notes) == (4, 2, 2, {"duplicate kept": 1})


def test_hostile_names_are_quoted(load):
    with pytest.raises(BadData) as caught:
        load([qwen(("\x1b[2J" + "x" * 9999, "y"), id="\x1b]0;" + "i" * 9999)])
    assert "\x1b" not in caught.value.what and len(caught.value.what) < 500


LINE = json.dumps(QWEN).encode()


@pytest.mark.parametrize(
    "line, what",
    [
        (b'{"a": 1,}', "bad JSON: Expecting property name enclosed in double quotes at column 9"),
        (b"hello", "bad JSON: Expecting value at column 1"),
        (LINE + LINE, "bad JSON: Extra data"),
        (LINE[:-1], "bad JSON: Expecting ',' delimiter"),
        (LINE.replace(b"Hi", b"\x00"), "bad JSON: Invalid control character"),
        (LINE.replace(b"Hi", b"\xff\xfe"), f"not UTF-8: byte 0xff at line 2, offset {len(LINE) + 1 + LINE.index(b'Hi')} of the file"),
        (LINE.replace(b"Hi", "é".encode()[:1]), "not UTF-8: byte 0xc3 at line 2"),
        (b'{"a": ' + b"[" * 100_000, "bad JSON: nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad JSON: a number has too many digits"),
    ],
)
def test_a_bad_line_spoils_itself_alone(load, line, what):
    content = LINE + b"\n" + line + b"\n" + LINE
    with pytest.raises(BadData) as caught:
        load(content)
    assert f"chat.json line 2: {what}" in caught.value.what
    assert load(content, on_fault="drop")[1].kept == 2


def test_a_byte_that_is_not_utf8_spoils_its_record_alone(load):
    content = b"\xef\xbb\xbf" + json.dumps([QWEN, QWEN | {"id": "Z\u00e9Z"}, QWEN], indent=1, ensure_ascii=False).encode().replace(
        "é".encode(), b"\xe9"
    )
    line = content[: content.index(b"\xe9")].count(b"\n") + 1
    with pytest.raises(BadData) as caught:
        load(content)
    assert f"byte 0xe9 at line {line}, offset {content.index(0xE9)} of the file" in caught.value.what
    assert load(content, on_fault="drop")[1].kept == 2


PRETTY = json.dumps([QWEN | {"id": f"r{n}"} for n in range(3)], indent=1).encode()
SECOND = PRETTY.index(b"r1")


@pytest.mark.parametrize("on_fault", ["error", "drop"])
@pytest.mark.parametrize(
    "content, what, line",
    [
        (
            PRETTY[: SECOND + 20],
            "the file ends in the middle of a record; the last good record before it is 'r0'",
            PRETTY[: SECOND + 20].count(b"\n") + 1,
        ),
        (PRETTY[:20], "the file ends in the middle of a record; there is no good record", 4),
        (PRETTY[:-1], "the file ends without a ]; the last good record before it is 'r2'", PRETTY.count(b"\n") + 1),
        (PRETTY[:-2] + b",", "the file ends in the middle of a record; the last good record before it is 'r2'", None),
        (PRETTY[:-1] + b",]", "Expecting value, found ']'", None),
        (PRETTY + b"]", "more text after its closing ]; the last good record before it is 'r2'", None),
        (PRETTY + PRETTY, "more text after its closing ]", None),
        (PRETTY.replace(b"r1", b'r"1'), "Expecting ',' delimiter, found '1", PRETTY[:SECOND].count(b"\n") + 1),
        (PRETTY.replace(b'"r1"', b"\xff"), "not UTF-8: byte 0xff", PRETTY[:SECOND].count(b"\n") + 1),
        (PRETTY.replace(b" },\n {", b" }\n {"), "expected , or ] after a record, found '{'; the last good record before it is 'r0'", None),
        (PRETTY.replace(b'"r1"', b"9" * 5000), "too many digits", None),
        (b"[" * 100_000, "nested too deeply", 1),
        (b'[{"a":' * 50_000, "nested too deeply", 1),
        (b"[", "the file ends in the middle of a record", 1),
        (b"[tru", "Expecting value, found 'tru'", 1),
        (b"[]x", "more text after", 1),
    ],
)
def test_a_damaged_array_always_raises(load, content, what, line, on_fault):
    with pytest.raises(BadData) as caught:
        load(content, on_fault=on_fault)
    assert what in caught.value.what
    if line:
        assert caught.value.where.endswith(f"chat.json line {line}")


@pytest.mark.parametrize(
    "content, what",
    [
        (b"", "empty"),
        (b"\xef\xbb\xbf \n\t\r\n", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS pointer"),
        (b'{\n "data": []\n}', "one JSON object over several lines"),
        (b'{"data": [\n{}]}', "one JSON object over several lines"),
        (b"PAR1\x15\x04", "the Parquet file is damaged"),
        (b"\xff\xfe[\x00", "the file ends in the middle of a record"),
        (b"instruction,output\nHi,Hello\n", "begins with 'instruction"),
    ],
)
def test_no_file_of_records(tmp_path, content, what):
    path = tmp_path / "chat.json"
    path.write_bytes(content)
    with pytest.raises(BadData, match=what):
        list(read(path, format="auto", on_fault="drop", tally=Tally()))


def test_no_records(load):
    with pytest.raises(BadData, match="no records"):
        load(b" [ \n ] ")


def test_no_file(tmp_path):
    for path, what in ((tmp_path / "none.json", "no such file"), (tmp_path, "not a file")):
        with pytest.raises(MissingInput, match=what):
            read(path, format="auto", on_fault="error", tally=Tally())


@pytest.mark.parametrize(
    "content",
    [LINES * 3, ARRAY, json.dumps([WELL_FORMED["sharegpt call"][1] | {"tools": [DECLARED]}, WELL_FORMED["openai call parts"][1]]).encode()],
)
def test_damaged_bytes_are_read_or_refused(tmp_path, content):
    path, dice, outcomes = tmp_path / "chat.json", random.Random(1), Counter()
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(damaged))
            kind = dice.randrange(4)
            if kind == 0:
                damaged[at] = dice.randrange(256)
            elif kind == 1:
                del damaged[at : at + dice.randint(1, 30)]
            elif kind == 2:
                damaged[at:at] = damaged[at : at + dice.randint(1, 30)]
            else:
                damaged[at : at + 1] = dice.choice(
                    [b"[", b"}", b'"', b"\\", b"null", b"{}", b"\n", b"NaN", b"1e999", b"\\ud800", b"\xed\xa0\x80"]
                )
            damaged = damaged or bytearray(b" ")
        path.write_bytes(damaged)
        for on_fault in ("drop", "error"):
            tally, found = Tally(), []
            try:
                for conversation in read(path, format="auto", on_fault=on_fault, tally=tally):
                    found.append(conversation)
                    assert json.loads(conversation.to_json().encode())["messages"] == list(conversation.messages)
                outcomes["read"] += 1
            except BadData as error:
                str(error).encode()
                outcomes["refused"] += 1
            assert tally.rows_in == tally.kept + tally.dropped.total()
            assert tally.kept == len(found)
    assert min(outcomes["read"], outcomes["refused"]) > 20


def digests(count):
    return [Conversation("", ({"role": "user", "content": str(n)},), None).digest() for n in range(count)]


def test_split_depends_on_seed_and_content_alone():
    assert [split_of(d, 0, 0.2, 0.2) for d in digests(10)] == ["train"] * 6 + ["val", "calib", "train", "val"]
    assert [split_of(d, 1, 0.2, 0.2) for d in digests(100)] != [split_of(d, 0, 0.2, 0.2) for d in digests(100)]


def test_split_fractions():
    counts = Counter(split_of(d, 0, 0.1, 0.05) for d in digests(10_000))
    assert abs(counts["val"] - 1000) < 120 and abs(counts["calib"] - 500) < 90
    assert {split_of(d, 0, 0.0, 0.0) for d in digests(1000)} == {"train"}


def test_more_calib_takes_from_train_only():
    for d in digests(1000):
        before, after = split_of(d, 0, 0.1, 0.1), split_of(d, 0, 0.1, 0.3)
        assert before == after or (before, after) == ("train", "calib")


def test_added_rows_move_no_old_ones(load):
    def splits(rows):
        return {c.id: split_of(c.digest(), 0, 0.3, 0.2) for c in load([qwen(("user", str(n)), ("assistant", "x"), id=n) for n in rows])[0]}

    old, new = splits(range(100)), splits(range(-50, 150))
    assert old.items() <= new.items() and set(old.values()) == {"train", "val", "calib"}
