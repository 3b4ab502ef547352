"""Laws that hold for whatever comes: the JSON stream, long conversations, the plan of batches. Hypothesis draws the cases, and makes a failing one small."""

import functools
import io
import json

import numpy as np
import pytest
from conftest import CHAT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from src.chat import encoding, long_rows
from src.models.loading import load_tokenizer
from src.records import json_stream
from src.records.json_stream import Damaged, Malformed
from src.training.batches import BatchPlan

EACH = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
SPACE = st.text(" \t\n\r", max_size=3)


def opened(text: str) -> io.StringIO:
    """As json_stream opens a file: what no UTF-8 can hold is in it as half a surrogate pair."""
    return io.StringIO(text.encode("utf-8", "surrogatepass").decode("utf-8", "surrogateescape"), newline="\n")


# ---- the JSON stream


@EACH
@example(values=[1e16, 1.5e-7, -2.25], gaps=[""] * 14, chunk=1, escaped=True)
@example(values=[1e16, 1.5e-7, -2.25], gaps=[""] * 14, chunk=3, escaped=True)
@given(values=st.lists(VALUES, max_size=6), gaps=st.lists(SPACE, min_size=14, max_size=14), chunk=st.integers(1, 40), escaped=st.booleans())
def test_an_array_is_read_as_the_json_module_reads_it(values, gaps, chunk, escaped):
    parts = [gap + json.dumps(value, ensure_ascii=escaped) + other for value, gap, other in zip(values, gaps, gaps[7:])]
    text = f"{gaps[6]}[{','.join(parts) or gaps[0]}]{gaps[13]}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        found = list(json_stream.array(opened(text), "f"))
    good = [raw.value for raw in found]
    assert len(good) == len(values) and [raw.name for raw in found] == [f"f#{i}" for i in range(len(values))]
    for value, ours in zip(values, good):
        spelled = json.dumps(value, ensure_ascii=False)
        if any("\ud800" <= c <= "\udfff" for c in spelled) and not escaped:
            assert isinstance(ours, Malformed), "half a character is no UTF-8"
        else:
            assert ours == value


@EACH
@given(values=st.lists(VALUES, min_size=1, max_size=6), cut=st.floats(0, 1), chunk=st.integers(1, 40))
def test_an_array_cut_off_anywhere_gives_what_was_whole_and_then_its_damage(values, cut, chunk):
    text = json.dumps(values)
    text = text[: max(1, int(cut * (len(text) - 1)))]
    found = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Damaged):
        patch.setattr(json_stream, "CHUNK", chunk)
        for raw in json_stream.array(opened(text), "f"):
            found.append(raw.value)
    if found and isinstance(found[-1], int | float):
        found.pop()  # a number that is cut off is a number too; the damage behind it is said all the same
    assert found == values[: len(found)]


@EACH
@given(
    values=st.lists(VALUES, max_size=6),
    bad=st.lists(st.sampled_from(["{", "nul", '"x', "[1,", "NaN", "1 2"]), max_size=3),
    chunk=st.integers(1, 40),
)
def test_a_bad_line_spoils_itself_alone(values, bad, chunk):
    lines = [json.dumps(value) for value in values]
    mixed = [line for pair in zip(lines, [*bad, *[""] * len(lines)]) for line in pair]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "CHUNK", chunk)
        found = [raw.value for raw in json_stream.lines(opened("\n".join(mixed)), "f")]
    assert [value for value in found if not isinstance(value, Malformed)] == values
    assert sum(isinstance(value, Malformed) for value in found) == sum(bool(line) for line in [*bad, *[""] * len(lines)][: len(lines)])


# ---- long conversations

TURN = st.tuples(st.sampled_from(["user", "assistant"]), st.text("ab c", min_size=1, max_size=30))


@functools.cache
def encoder():
    tokenizer = load_tokenizer(CHAT)
    eos_id = encoding.turn_end(tokenizer)
    return lambda messages: encoding.teach(tokenizer, messages).rows, eos_id


@EACH
@given(
    turns=st.lists(TURN, min_size=1, max_size=12), limit=st.integers(8, 200), policy=st.sampled_from(["drop", "split_turns", "keep_end"])
)
def test_no_long_conversation_loses_a_token_unsaid(turns, limit, policy):
    encode, eos_id = encoder()
    messages = [{"role": "user", "content": "hi"}, *({"role": role, "content": text} for role, text in turns)]
    messages = [
        m for m, after in zip(messages, [*messages[1:], {"role": ""}]) if m["role"] != after["role"]
    ]  # no role speaks twice in a row
    if not any(m["role"] == "assistant" for m in messages):
        return
    if not (whole := encode(messages)):
        assert all(not m["content"].strip() for m in messages if m["role"] == "assistant")
        return
    rows, counts = long_rows.fit_rows(whole, {"id": "x", "messages": messages}, policy=policy, max_length=limit, encode=encode)
    trained = sum(label != encoding.IGNORE for row in whole for label in row.labels)
    kept = sum(label != encoding.IGNORE for row in rows for label in row.labels)
    for row in rows:
        assert len(row.input_ids) == len(row.labels) <= limit
        last = max(i for i, label in enumerate(row.labels) if label != encoding.IGNORE)
        assert row.labels[last] == eos_id, "what a row teaches last is to stop"
        assert all(label in (encoding.IGNORE, token) for token, label in zip(row.input_ids, row.labels))
    assert kept <= trained
    if all(len(row.input_ids) <= limit for row in whole):
        assert rows == whole and counts.dropped == counts.cut == 0
    elif kept < trained:
        assert counts.dropped or counts.cut, "what is lost is counted"


# ---- the plan of batches


@st.composite
def plans(draw):
    lengths = np.array(draw(st.lists(st.integers(1, 60), min_size=1, max_size=40)), dtype=np.int64)
    world = draw(st.integers(1, 4))
    batch = world * draw(st.integers(1, 6))
    capacity = int(lengths.max()) * draw(st.integers(1, 4))
    return BatchPlan(lengths, batch, world, capacity, draw(st.booleans()), draw(st.integers(1, 3 * len(lengths))), draw(st.integers(0, 9)))


@EACH
@given(plan=plans())
def test_every_epoch_has_every_example_once_in_an_order_of_its_own(plan):
    seen = [example for step in range(plan.steps) for example in plan.examples(step)]
    assert len(seen) == plan.total
    count = len(plan.lengths)
    for begin in range(0, plan.total - count + 1, count):
        assert sorted(seen[begin : begin + count]) == list(range(count))
    if plan.total >= 2 * count and count >= 8:
        assert seen[:count] != seen[count : 2 * count]


@EACH
@given(plan=plans())
def test_a_layout_deals_out_its_step_within_capacity(plan):
    for step in range(plan.steps):
        layout = plan.layout(step)
        dealt = [example for bins in layout for part in bins for example in part]
        assert sorted(dealt) == sorted(plan.examples(step)) and all(len(bins) == plan.world for bins in layout)
        assert all(plan.size(part) <= plan.capacity for bins in layout for part in bins)
