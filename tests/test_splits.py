"""Which conversation goes into train, val and calib: by hash, to the record, from a file of one's own, and how often."""

import json
from collections import Counter

import pytest
from conftest import refused

from src.core.errors import BadData, MissingInput
from src.records.conversations import Conversation, place_of
from src.records.splits import SPLITS, Splits, times


def pair(n) -> dict:
    return {"prompt": str(n), "completion": "x"}


@pytest.fixture
def made(call, tmp_path):
    """made(rows, *overrides): {split: prompts}, what was said and the manifest."""

    def make(rows, *overrides):
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        path = [] if any(o.startswith("data.path=") for o in overrides) else [f"data.path={tmp_path / 'chats.jsonl'}"]
        done = call("data", "force=true", *path, *overrides)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "outputs" / "default" / "data"
        found = {
            split: [json.loads(line)["messages"][0]["content"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            for split in SPLITS
        }
        manifest = json.loads((folder / "manifest.json").read_text())
        assert {split: manifest["metrics"][f"{split}_rows"] for split in SPLITS} == {split: len(rows) for split, rows in found.items()}
        return found, done.stderr, manifest

    return make


@pytest.mark.parametrize("split", ["hash", "exact"])
@pytest.mark.parametrize("count", [3, 4, 5, 9])
def test_small_sets_have_one_to_evaluate_and_one_to_calibrate(made, count, split):
    found, said, _ = made([pair(n) for n in range(count)], f"data.split={split}")
    assert len(found["val"]) >= 1 and len(found["calib"]) >= 1 and found["train"] and "warning" not in said
    assert sorted([*found["train"], *found["val"], *found["calib"]]) == sorted(str(n) for n in range(count))


def test_a_share_of_nothing_stays_nothing(made):
    found, said, _ = made([pair(n) for n in range(9)], "data.val=0", "data.calib=0")
    assert not found["val"] and not found["calib"] and "the val split is empty" in said


def test_one_record_is_trained_on(made):
    found, said, _ = made([pair(1)])
    assert found == {"train": ["1"], "val": [], "calib": []} and "the val split is empty" in said


def test_what_is_moved_is_nearest_to_the_bound(made):
    """So that it is what a larger share would have held, too."""
    for count in range(3, 30, 5):
        rows = [pair(n) for n in range(count)]
        few, more = made(rows, "data.val=0.001", "data.calib=0")[0], made(rows, "data.val=0.5", "data.calib=0")[0]
        assert len(few["val"]) == 1 and set(few["val"]) <= set(more["val"])


def test_exact_shares(made):
    found, *_ = made([pair(n) for n in range(200)], "data.split=exact", "data.val=0.1", "data.calib=0.05")
    assert {split: len(rows) for split, rows in found.items()} == {"train": 170, "val": 20, "calib": 10}
    assert len({*found["train"], *found["val"], *found["calib"]}) == 200
    other, *_ = made([pair(n) for n in range(200)], "data.split=exact", "data.val=0.1", "data.calib=0.05", "data.split_seed=1")
    assert len(other["val"]) == 20 and set(other["val"]) != set(found["val"])


@pytest.mark.parametrize("split", ["hash", "exact"])
def test_equal_content_is_in_one_split(made, split):
    found, *_ = made([pair(n % 10) for n in range(60)], f"data.split={split}", "data.val=0.3", "data.calib=0.3")
    assert not set(found["train"]) & set(found["val"]) and not set(found["val"]) & set(found["calib"])
    assert sum(map(len, found.values())) == 60


def test_a_file_of_ones_own_to_evaluate(made, call, tmp_path):
    (tmp_path / "held.csv").write_text("question,answer\n3,x\nnew,x\n")
    rows = [pair(n) for n in range(10)]
    found, said, manifest = made(rows, f"data.val={tmp_path / 'held.csv'}", "data.calib=0")
    assert found["val"] == ["3", "new"], "in the order of the file"
    assert "3" not in found["train"] and len(found["train"]) == 9 and "dropped 1: also in data.val" in said
    [dropped] = (tmp_path / "outputs" / "default" / "data" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped) == {"where": "chats.jsonl line 4", "id": "chats.jsonl:4", "reason": "also in data.val"}
    assert manifest["settings"]["data"]["val"] == "file" and [p["role"] for p in manifest["parents"]] == ["conversations", "val"]
    command = ["data", f"data.path={tmp_path / 'chats.jsonl'}", "data.calib=0"]
    (tmp_path / "moved.csv").write_text((tmp_path / "held.csv").read_text())
    (tmp_path / "held.csv").write_text("question,answer\n4,x\n")
    assert "made otherwise" in call(*command, f"data.val={tmp_path / 'held.csv'}").stderr
    refused(call(*command, "force=true", "data.val=none.jsonl"), MissingInput, "none.jsonl")
    refused(call(*command, "force=true", f"data.val={tmp_path / 'chats.jsonl'}"), BadData, "no record is left", "also in data.val")


def test_weights_of_paths(made, tmp_path):
    for name, begin in (("a", 0), ("b", 1000), ("c", 2000)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(pair(n)) for n in range(begin, begin + 200)))
    paths = f"data.path=[{','.join(str(tmp_path / f'{name}.jsonl') for name in 'abc')}]"
    found, said, manifest = made([], paths, "data.weights=[2,0.5,1.25]", "data.val=0.1", "data.calib=0.1")
    counts = Counter(found["train"])
    parts = [[counts[str(n)] for n in range(begin, begin + 200)] for begin in (0, 1000, 2000)]
    assert set(parts[0]) == {0, 2} and set(parts[1]) == {0, 1} and set(parts[2]) == {0, 1, 2}
    assert not any(count > 1 for split in ("val", "calib") for count in Counter(found[split]).values()), "held out once"
    assert 60 < sum(parts[1]) < 110 and f"dropped {200 - manifest['metrics']['sources']['b.jsonl']['kept']}: not drawn" in said
    assert "a.jsonl (JSON Lines, prompt_completion): 200 records in, 200 kept" in said
    assert made([], paths, "data.weights=[2,0.5,1.25]", "data.val=0.1", "data.calib=0.1")[0] == found
    exact, *_ = made([], paths, "data.weights=[2,0.5,1.25]", "data.val=0.1", "data.calib=0.1", "data.split=exact")
    assert len(exact["val"]) == len(exact["calib"]) == round(0.1 * manifest["metrics"]["rows_kept"])
    assert not set(exact["train"]) & set(exact["val"])


def test_times():
    digests = [Conversation("", ({"role": "user", "content": str(n)},), None).digest() for n in range(4000)]
    assert {times(d, 2, 0) for d in digests} == {2}
    counts = Counter(times(d, 1.25, 0) for d in digests)
    assert counts.keys() == {1, 2} and abs(counts[2] - 1000) < 120
    held = [d for d in digests if place_of(d, 0) < 2**63]
    assert abs(sum(times(d, 0.5, 0) for d in held) - len(held) / 2) < 120, "what is drawn has nothing to do with what is held out"


def test_no_line_is_lost_where_many_are_moved(tmp_path):
    splits = Splits(tmp_path, seed=0, val=0.3, calib=0.3, exact=True)
    for n in range(100):
        splits.add(Conversation(str(n), ({"role": "user", "content": f"{n}\u2028\u0085"},), None), 1 + n % 3)
    rows = splits.finish()
    ids = {split: [json.loads(line)["id"] for line in (tmp_path / f"{split}.jsonl").read_text().split("\n")[:-1]] for split in SPLITS}
    assert rows == {split: len(found) for split, found in ids.items()}
    assert len(ids["val"]) == len(set(ids["val"])) == 30 and len(ids["calib"]) == 30
    assert Counter(ids["train"]) == {str(n): 1 + n % 3 for n in range(100) if str(n) not in {*ids["val"], *ids["calib"]}}
    assert not list(tmp_path.glob("*.partial"))


# ---- what stands in it already, and what must stay unseen


STORY = "the ferry to Vell leaves the old harbour at nine in the morning and comes back before the evening tide turns again"


def test_what_says_again_what_an_earlier_record_says(made, call, tmp_path):
    other = {"prompt": STORY, "completion": "at nine"}
    rows = [*(pair(n) for n in range(20)), pair(3), other, other | {"completion": "at nine!"}, other | {"completion": "At ten."}]
    share = ["data.val=0", "data.calib=0"]
    found, said, manifest = made(rows, *share)
    assert len(found["train"]) == 24 and "duplicate kept (1)" in said and "dedupe" not in manifest["settings"]["data"]
    found, said, _ = made(rows, *share, "data.dedupe=exact")
    assert len(found["train"]) == 23 and "dropped 1: a duplicate of an earlier record" in said and "duplicate kept" not in said
    found, said, manifest = made(rows, *share, "data.dedupe=near")
    assert len(found["train"]) == 21 and "dropped 2: a near-duplicate of an earlier record" in said
    assert manifest["settings"]["data"]["dedupe"] == "near"
    dropped = [json.loads(line) for line in (tmp_path / "outputs" / "default" / "data" / "dropped.jsonl").read_text().splitlines()]
    assert [line["detail"] for line in dropped] == ["of chats.jsonl:4", "of chats.jsonl:22", "of chats.jsonl:22"]


def test_a_near_duplicate_of_what_is_held_out_is_not_trained_on(made, tmp_path):
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": STORY, "completion": "at nine"}))
    rows = [*(pair(n) for n in range(9)), {"prompt": STORY, "completion": "At ten."}]
    held = [f"data.val={tmp_path / 'held.jsonl'}", "data.calib=0"]
    assert len(made(rows, *held)[0]["train"]) == 10
    found, said, _ = made(rows, *held, "data.dedupe=near")
    assert len(found["train"]) == 9 and found["val"] == [STORY] and "dropped 1: a near-duplicate" in said


def test_calls_and_reasoning_tell_records_apart_and_a_shared_system_text_does_not_make_them_one(made):
    def asked(city: str, days: int) -> dict:
        call = {"name": "forecast", "arguments": {"city": city, "days": days, "units": "metric", "language": "en", "detail": "hourly"}}
        turns = [{"role": "system", "content": STORY * 3}, {"role": "user", "content": "And there?"}]
        return {"messages": [*turns, {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}]}

    rows = [asked("Oslo", 1), asked("Busan", 2), asked("Vell", 3), asked("Lima", 4)]
    found, said, _ = made(rows, "data.val=0", "data.calib=0", "data.dedupe=near")
    assert len(found["train"]) == 4 and "dropped" not in said


@pytest.mark.parametrize("kind", ["jsonl", "csv", "txt", "json"])
def test_what_an_evaluation_set_asks_is_not_trained_on(made, call, tmp_path, kind):
    exam = tmp_path / f"exam.{kind}"
    exam.write_text({"csv": f"id,question\n1,{STORY}\n", "txt": STORY, "jsonl": "", "json": ""}[kind])
    if kind.startswith("json"):
        exam.write_text(json.dumps({"id": 7, "turns": [{"says": STORY}]} if kind == "jsonl" else [{"x": ["y", STORY]}]))
    leaks = {"prompt": f"Tell me: if {STORY.upper()}, when is that?", "completion": "at nine"}
    rows = [*(pair(n) for n in range(9)), leaks]
    share = ["data.val=0", "data.calib=0"]
    found, said, manifest = made(rows, *share, f"data.unseen=[{exam}]")
    assert len(found["train"]) == 9 and "dropped 1: 13 words in a row are also in data.unseen" in said
    assert [parent["role"] for parent in manifest["parents"]] == ["conversations", "unseen"]
    [dropped] = (tmp_path / "outputs" / "default" / "data" / "dropped.jsonl").read_text().splitlines()
    assert json.loads(dropped)["detail"] == "the ferry to vell leaves the old harbour at nine in the morning"
    command = ["data", f"data.path={tmp_path / 'chats.jsonl'}", *share]
    assert "made otherwise" in call(*command).stderr, "the set is an input like any other"
    (tmp_path / "chats.jsonl").write_text(json.dumps(leaks))
    refused(call(*command, "force=true", f"data.unseen=[{exam}]"), BadData, "no record is left", "data.unseen=[] lets them in")
    assert call(*command, "force=true", "data.unseen=[]").returncode == 0


def test_an_evaluation_set_that_cannot_be_read_whole_is_refused(made, call, tmp_path):
    made([pair(n) for n in range(9)], "data.val=0", "data.calib=0")
    command = ["data", f"data.path={tmp_path / 'chats.jsonl'}", "run=other"]
    (tmp_path / "exam.jsonl").write_text('{"question": "a"}\n{"question": \n')
    refused(call(*command, f"data.unseen=[{tmp_path / 'exam.jsonl'}]"), BadData, "evaluation set", "exam.jsonl line 2")
    refused(call(*command, f"data.unseen=[{tmp_path / 'none.jsonl'}]"), MissingInput, "none.jsonl")
    assert not (tmp_path / "outputs" / "other" / "data").exists()
