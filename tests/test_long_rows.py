"""Rows that are too long: what each policy keeps, what it counts away, and when a run stops for it. Through tokenizers made here, and real ones."""

import json
from collections import Counter
from functools import cache, partial
from itertools import accumulate

import pytest
from conftest import ROOT, SHARED, each_kind, helps
from makers import KINDS, tokenizer_folder
from test_chatml import CALLING, SYSTEM, TOOL, spans

from src.chat import encoding
from src.chat.encoding import IGNORE, Encoded
from src.chat.long_rows import POLICIES, Counts, check, exchanges, fit, fit_rows, report
from src.core.errors import BadData
from src.models.loading import load_tokenizer
from src.records.conversations import Tally, read

NAMES = ("qwen2.5", "qwen3", "yi-6b-chat", "mistral-7b-v0.2")
MADE = ("made-qwen2.5", "made-qwen3", "made-yi", "made-mistral")


@cache
def tokenizer_of(name: str):
    return load_tokenizer(tokenizer_folder(name) if name in KINDS else SHARED / "tokenizers" / name)


def written_here() -> list[list[dict]]:
    """Single questions with a long answer, then short dialogues: the embedded conversations, the first 300 of them joined five by five."""
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())
    talks = [
        [{"role": turn["from"], "content": turn["value"]} for turn in row["conversations"] if turn["from"] != "system"] for row in rows
    ]
    answers = [" ".join(message["content"] for talk in talks[k : k + 5] for message in talk[1::2]) for k in range(0, 300, 5)]
    return [[talks[5 * i][0], {"role": "assistant", "content": answer}] for i, answer in enumerate(answers)] + talks[300:]


def of_shared() -> list[list[dict]]:
    return [
        list(chat.messages)
        for name in ("gsm8k_train_500", "fastchat_dummy_200")
        for chat in read(SHARED / "chat" / "qwen" / f"{name}.json", format="auto", on_fault="error", tally=Tally())
    ]


@cache
def records_of(name: str, system: bool | None = None) -> list[dict]:
    """Records: 20 single questions, 40 short dialogues, and 4 long conversations joined of ten dialogues each, some with a system turn."""
    system = "mistral" not in name if system is None else system
    chats = written_here() if name in KINDS else of_shared()
    single, dialogues = (60, 100) if name in KINDS else (500, 600)
    joined = [[message for chat in chats[k : k + 10] for message in chat] for k in range(dialogues, dialogues + 40, 10)]
    talks = chats[: single : single // 20] + chats[single : single + 40] + joined
    return [{"id": f"r{i}", "messages": [SYSTEM, *talk] if system and i % 2 else talk, "tools": None} for i, talk in enumerate(talks)]


def encoder(name):
    """(encode of messages, the stop token's id)."""
    tokenizer = tokenizer_of(name)
    end = encoding.turn_end(tokenizer)
    return lambda messages, tools=None: encoding.encode(tokenizer, messages, tools), end


def fit_all(records, encode, policy, max_length) -> tuple[list[Encoded], Counts]:
    rows, counts = [], Counts()
    for record in records:
        made, more = fit(encode(record["messages"]), record, policy=policy, max_length=max_length, encode=encode)
        rows, counts = rows + made, counts + more
    return rows, counts


@each_kind(MADE, NAMES, policy=POLICIES, max_length=[120, 400])
def test_every_token_is_kept_or_counted(name, policy, max_length):
    encode, end = encoder(name)
    records = records_of(name)
    whole = [encode(record["messages"]) for record in records]
    rows, counts = fit_all(records, encode, policy, max_length)
    assert (counts.rows, counts.tokens) == (len(records), sum(len(row.input_ids) for row in whole))
    long = [row for row in whole if len(row.input_ids) > max_length]
    assert counts.long == len(long) > 0 and counts.lengths == Counter(len(row.input_ids) for row in long)
    for row in rows:
        assert len(row.input_ids) == len(row.labels) <= max_length
        assert all(label in (IGNORE, token) for token, label in zip(row.input_ids, row.labels))
        assert spans(row)[-1][-1] == end and all(run[-1] == end for run in spans(row))
    if policy == "error":
        assert len(rows) == len(records) - len(long) and counts.dropped == counts.cut == 0
        return
    assert counts.dropped + counts.cut == counts.long
    assert len(rows) == counts.rows - counts.long + counts.made
    held = sum(len(row.input_ids) for row in rows)
    assert held == counts.tokens - counts.tokens_dropped - counts.tokens_cut + counts.tokens_repeated
    assert counts.tokens_repeated == 0 or policy == "split_turns"
    assert counts.lost_share == counts.long / counts.rows
    if policy == "drop":
        assert rows == [row for row in whole if len(row.input_ids) <= max_length]
        assert counts.tokens_dropped == sum(len(row.input_ids) for row in long) and counts.cut == 0
    if policy == "keep_end":
        kept = [row.input_ids for row in rows]
        assert kept == [row.input_ids[-max_length:] for row in whole] and counts.dropped == 0
    if policy == "split_turns":
        assert counts.cut >= 4 and counts.made > counts.cut


@each_kind(MADE, NAMES)
def test_the_same_rows_each_time_and_in_parts(name):
    encode, _ = encoder(name)
    records = records_of(name)[10:]
    for policy in POLICIES:
        rows, counts = fit_all(records, encode, policy, 150)
        assert (rows, counts) == fit_all(records, encode, policy, 150)
        first, second = fit_all(records[:30], encode, policy, 150), fit_all(records[30:], encode, policy, 150)
        assert (rows, counts) == (first[0] + second[0], first[1] + second[1])
        long = [record["id"] for record in records if len(encode(record["messages"]).input_ids) > 150]
        assert [name for name, _ in counts.named] == long[:10] and counts.long == len(long)


def long_talk(name) -> list[dict]:
    return [SYSTEM, *(m for record in records_of(name, False)[20:60] for m in record["messages"])]


@each_kind(["made-qwen2.5"], ["qwen2.5"])
def test_split_rows_are_the_conversation_with_its_system_turn_in_each(name):
    """ChatML renders turn by turn, so the rows' ids, the repeated system turn taken off, are the whole conversation's: none lost, none twice."""
    encode, end = encoder(name)
    talk, tokenizer = long_talk(name), tokenizer_of(name)
    head = tokenizer(encoding.render(tokenizer, [SYSTEM]), add_special_tokens=False).input_ids
    user, whole = tokenizer.convert_tokens_to_ids("user"), encode(talk)
    rows, counts = fit(whole, {"id": "long", "messages": talk}, policy="split_turns", max_length=300, encode=encode)
    assert all(row.input_ids[: len(head)] == head and row.input_ids[len(head) + 1] == user for row in rows)
    assert head + [i for row in rows for i in row.input_ids[len(head) :]] == whole.input_ids
    assert [label for row in rows for label in row.labels[len(head) :]] == whole.labels[len(head) :]
    assert counts.made == len(rows) > 5 and counts.tokens_cut == counts.tokens_dropped == 0
    assert counts.tokens_repeated == (len(rows) - 1) * len(head)
    starts = list(accumulate(sum(run.count(end) for run in spans(row)) for row in rows))
    assert counts.unseen == 2 * sum(starts[:-1]), "every exchange of this file is a question and its answer"


def fewest(system, parts, encode, max_length) -> int:
    """The fewest rows that hold all parts, by trying every cut."""
    best = [0]
    for stop in range(1, len(parts) + 1):
        fits = [
            best[start] + 1
            for start in range(stop)
            if len(encode(system + [m for part in parts[start:stop] for m in part]).input_ids) <= max_length
        ]
        best.append(min(fits))
    return best[-1]


@each_kind(["made-qwen2.5"], ["qwen2.5"], max_length=[80, 100, 170])
def test_splits_into_as_few_rows_as_can_be(name, max_length):
    encode, _ = encoder(name)
    for k in (0, 20):
        talk = [SYSTEM, *long_talk(name)[1 + k : 21 + k]]
        rows, counts = fit(encode(talk), {"id": "x", "messages": talk}, policy="split_turns", max_length=max_length, encode=encode)
        assert counts.tokens_cut == 0
        assert len(rows) == fewest(*exchanges(talk), encode, max_length)


@each_kind(["made-qwen2.5"], ["qwen2.5"])
def test_an_exchange_too_long_by_itself_is_left_out_and_parts_its_neighbours(name):
    encode, _ = encoder(name)
    short, huge = records_of(name, False)[20]["messages"][:2], records_of(name, False)[0]["messages"]
    huge = [huge[0], huge[1] | {"content": huge[1]["content"] * 4}]
    alone = len(encode([SYSTEM, *huge]).input_ids) - len(encode([SYSTEM, *short]).input_ids)
    tokens = len(encode([SYSTEM, *short, *huge]).input_ids) - len(encode([SYSTEM, *short]).input_ids)
    assert alone > 150
    for talk, rows_of in (
        ([SYSTEM, *short, *huge, *short], [[SYSTEM, *short], [SYSTEM, *short]]),
        ([SYSTEM, *huge, *short, *short], [[SYSTEM, *short, *short]]),
        ([SYSTEM, *short, *huge], [[SYSTEM, *short]]),
    ):
        rows, counts = fit(encode(talk), {"id": "x", "messages": talk}, policy="split_turns", max_length=150, encode=encode)
        assert rows == [encode(messages) for messages in rows_of]
        first = talk[1:3] == huge
        assert counts.tokens_cut == (len(encode([SYSTEM, *huge]).input_ids) if first else tokens)
        assert (counts.cut, counts.dropped, counts.made) == (1, 0, len(rows))
    rows, counts = fit(encode(huge), {"id": "x", "messages": huge}, policy="split_turns", max_length=150, encode=encode)
    assert (rows, counts.dropped, counts.cut, counts.made) == ([], 1, 0, 0)
    assert counts.tokens_dropped == len(encode(huge).input_ids)


@each_kind(["made-qwen2.5"], ["qwen2.5"])
def test_tools_and_their_results_stay_with_their_question(name):
    encode, _ = encoder(name)
    talk = [SYSTEM, *CALLING, *CALLING, *CALLING]
    encode_with_tool = partial(encode, tools=[TOOL])
    one = len(encode_with_tool([SYSTEM, *CALLING]).input_ids)
    rows, counts = fit(encode_with_tool(talk), {"id": "x", "messages": talk}, policy="split_turns", max_length=one, encode=encode_with_tool)
    assert rows == [encode_with_tool([SYSTEM, *CALLING])] * 3
    assert counts.unseen == 4 + 8


@each_kind(["made-qwen3"], ["qwen3"], policy=["drop", "split_turns", "keep_end"])
def test_rows_of_a_conversation_that_reasons_in_each_turn(name, policy):
    """Qwen3 takes a row for each such turn. Split, each part's turns are again each trained once; otherwise each row is judged by itself."""
    tokenizer = tokenizer_of(name)
    encode = partial(encoding.encode_turns, tokenizer)
    talk = [
        m | {"reasoning_content": f"Thought {i}. " * (60 if i == 8 else 5)} if m["role"] == "assistant" else m
        for i, m in enumerate(long_talk(name)[:21])
    ]
    whole = encode(talk)
    assert len(whole) == 10
    rows, counts = fit_rows(whole, {"id": "x", "messages": talk}, policy=policy, max_length=160, encode=encode)
    assert all(len(row.input_ids) <= 160 and spans(row)[-1][-1] == encoding.turn_end(tokenizer) for row in rows)
    assert (counts.rows, counts.cut, counts.made) == (1, 1, len(rows))
    held = sum(len(row.input_ids) for row in rows)
    assert held == counts.tokens - counts.tokens_cut + counts.tokens_repeated
    trained = [tokenizer.decode(run) for row in rows for run in spans(row)]
    assert len(trained) == len(rows)
    if policy == "drop":
        assert rows == [row for row in whole if len(row.input_ids) <= 160] and 1 <= len(rows) < 10
    if policy == "keep_end":
        assert [row.input_ids for row in rows] == [row.input_ids[-160:] for row in whole] and counts.tokens_repeated == 0
    if policy == "split_turns":
        said = [i for i in range(2, 21, 2) for text in trained if f"Thought {i}." in text]
        assert said == [i for i in range(2, 21, 2) if i != 8], "all but the one too long by itself, in order, once"


def say(*roles) -> list[dict]:
    return [{"role": role, "content": f"{role} {i}"} for i, role in enumerate(roles)]


@pytest.mark.parametrize(
    "roles, lengths",
    [
        (["user", "assistant"], [2]),
        (["user", "assistant", "user", "assistant"], [2, 2]),
        (["user", "user", "assistant", "assistant", "user", "assistant"], [4, 2]),
        (["assistant", "user", "assistant", "user", "assistant"], [3, 2]),
        (["user", "assistant", "tool", "assistant", "user", "assistant", "tool"], [4, 3]),
        (["user", "assistant", "system", "user", "assistant", "user"], [2, 4]),
        (["user", "tool", "user", "assistant"], [4]),
    ],
)
def test_exchanges(roles, lengths):
    for system in ([], ["system"], ["system", "system"]):
        messages = say(*system, *roles)
        front, parts = exchanges(messages)
        assert [*front, *(m for part in parts for m in part)] == messages
        assert len(front) == len(system) and [len(part) for part in parts] == lengths
        assert all(any(m["role"] == "assistant" for m in part) for part in parts)


def test_the_end_that_is_kept_is_still_trained_to_stop():
    ids = list(range(100))
    encoded = Encoded(ids, [IGNORE] * 60 + ids[60:99] + [IGNORE])
    (row,), counts = fit(encoded, {"id": "x", "messages": []}, policy="keep_end", max_length=30, encode=None)
    assert row.input_ids == ids[70:] and row.labels == [IGNORE, *ids[71:99], IGNORE]
    assert (counts.tokens_cut, counts.made) == (70, 1)
    # Only what follows the answer, or the answer's last token with nothing before it, fits: there is nothing left to learn.
    for max_length in (1, 2):
        rows, counts = fit(encoded, {"id": "x", "messages": []}, policy="keep_end", max_length=max_length, encode=None)
        assert (rows, counts.dropped, counts.tokens_dropped, counts.cut) == ([], 1, 100, 0)


def test_counts_add_up():
    parts = [
        Counts(rows=1, tokens=9, dropped=1, tokens_dropped=9, lengths=Counter([9]), named=(("a", 9),)),
        Counts(
            rows=3,
            tokens=30,
            cut=2,
            tokens_cut=4,
            made=5,
            tokens_repeated=6,
            unseen=7,
            lengths=Counter([9, 12]),
            named=(("b", 9), ("c", 12)),
        ),
        *[Counts(rows=1, tokens=10, lengths=Counter([10]), named=((f"d{i}", 10),)) for i in range(10)],
    ]
    total = sum(parts[1:], parts[0])
    assert (total.rows, total.tokens, total.dropped, total.cut, total.made) == (14, 139, 1, 2, 5)
    assert (total.tokens_dropped, total.tokens_cut, total.tokens_repeated, total.unseen) == (9, 4, 6, 7)
    assert total.lengths == {9: 2, 12: 1, 10: 10} and total.long == 13
    assert [name for name, _ in total.named] == ["a", "b", "c", *(f"d{i}" for i in range(7))]
    assert total.lost_share == 3 / 14 and Counts().lost_share == 0


def test_what_is_said():
    setting = "train.max_length=512"
    assert report(Counts(rows=100), "train", setting) == []
    dropped = Counts(rows=100, dropped=3, tokens_dropped=4321)
    assert report(dropped, "train", setting) == ["train: dropped 3 of 100 rows (4,321 tokens) longer than train.max_length=512"]
    cut = Counts(rows=100, cut=5, tokens_cut=1234, made=12, unseen=42)
    both = report(dropped + cut, "val", setting)
    assert both == [
        "val: dropped 3 of 200 rows (4,321 tokens) longer than train.max_length=512",
        "val: cut 5 of 200 rows (1,234 tokens) longer than train.max_length=512; 12 rows made of them, which miss 42 earlier messages",
    ]


def lost(rows: int, lengths: list[int], **more) -> Counts:
    named = tuple((f"r{i}", length) for i, length in enumerate(lengths))[:10]
    return Counts(rows=rows, lengths=Counter(lengths), named=named, **more)


def test_too_much_lost_stops_with_the_ways_out():
    lengths = [600, 700, 700, 800, 5000]
    counts = lost(100, lengths, dropped=3, cut=2)
    check(counts, 0.05, policy="split_turns", max_length=512)
    with pytest.raises(BadData) as stopped:
        check(counts, 0.04, policy="keep_end", max_length=512)
    assert (
        "5 of 100 rows are longer than train.max_length=512; 3 were dropped and 2 cut, more than train.long_share=0.04"
        in stopped.value.what
    )
    assert "record 'r4': 5,000 tokens" in stopped.value.what and stopped.value.where == "the train split"
    assert stopped.value.fix == ["train.max_length=600", "train.long_rows=split_turns", "train.long_share=1"]
    with pytest.raises(BadData) as stopped:
        check(counts, 0.01, policy="split_turns", max_length=512, split="val")
    assert stopped.value.fix == ["train.max_length=800", "train.long_share=1"] and stopped.value.where == "the val split"
    check(counts, 1, policy="drop", max_length=512)
    check(lost(100, []), 0, policy="drop", max_length=512)
    check(Counts(), 0, policy="error", max_length=512)


def test_policy_error_names_the_first_ten_and_how_many():
    with pytest.raises(BadData) as stopped:
        check(lost(1000, [600 + i for i in range(13)]), 1, policy="error", max_length=512)
    lines = stopped.value.what.splitlines()
    assert lines[0] == "13 of 1,000 rows are longer than train.max_length=512"
    assert lines[1:11] == [f"  record 'r{i}': {600 + i} tokens" for i in range(10)] and lines[11:] == ["  and 3 more"]
    assert stopped.value.fix == ["train.max_length=612", "train.long_rows=split_turns", "train.long_rows=drop"]
    check(lost(1000, []), 1, policy="error", max_length=512)


@helps("chat/long_rows.py", "train.max_length={}")
@each_kind(["made-qwen2.5"], ["qwen2.5"])
def test_the_length_named_is_the_smallest_that_does(name):
    encode, _ = encoder(name)
    records = records_of(name, True)
    _, counts = fit_all(records, encode, "drop", 100)
    for limit in (0, 0.01, 0.05, 0.2):
        with pytest.raises(BadData) as stopped:
            check(counts, limit, policy="drop", max_length=100)
        length = int(stopped.value.fix[0].removeprefix("train.max_length="))
        check(fit_all(records, encode, "drop", length)[1], limit, policy="drop", max_length=length)
        with pytest.raises(BadData):
            check(fit_all(records, encode, "drop", length - 1)[1], limit, policy="drop", max_length=length - 1)


def test_unknown_policies_are_a_bug():
    with pytest.raises(ValueError, match="policy='cut'"):
        fit(Encoded([1, 2], [1, 2]), {"id": "x", "messages": []}, policy="cut", max_length=1, encode=None)
