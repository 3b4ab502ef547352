"""Loss and perplexity against an independent computation, agreement, expected answers, and folders made elsewhere."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import go, helps, in_process, refused, ways
from transformers import AutoModelForCausalLM

from src import data, evaluate, finetune, merge
from src.core import artifact
from src.core.errors import BadData, ConfigError, MissingInput
from src.models import evaluation, seen
from src.models.loading import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """An outputs folder with run `r`: a dataset, an adapter that learnt something, and its merge."""
    here = tmp_path_factory.mktemp("evaluate")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:100]
    (here / "chats.json").write_text(json.dumps(rows))
    assert go(data, f"outputs={here}", "run=r", f"data.path={here / 'chats.json'}", "data.val=0.15", "data.calib=0.1") == 0
    assert (
        go(finetune, f"outputs={here}", "run=r", "tuner.rank=8", "tuner.learning_rate=3e-3", "train.max_steps=12", "train.eval_steps=12")
        == 0
    )
    assert go(merge, f"outputs={here}", "run=r") == 0
    return here


@pytest.fixture(scope="module")
def reports(here):
    """{name: report} of one call that measures all the run has."""
    assert go(evaluate, f"outputs={here}", "run=r", "evaluation.max_new_tokens=24", "evaluation.batch_size=3") == 0
    return {name: json.loads((here / "r" / f"evaluate-{name}" / "report.json").read_text()) for name in ("finetune", "merge")}


def by_hand(folder: Path, dataset: Path, rows=None) -> tuple[float, float, int]:
    """(loss, accuracy, tokens): one row at a time, answers found in the text between `assistant` and `<|im_end|>`, every such token weighing the same."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    losses, hits = [], []
    for line in list(open(dataset / "val.jsonl"))[:rows]:
        ids, counted = [], []
        for message in json.loads(line)["messages"]:
            head = tokenizer(f"<|im_start|>{message['role']}\n").input_ids
            body = tokenizer(message["content"] + "<|im_end|>").input_ids
            tail = tokenizer("\n").input_ids
            ids += head + body + tail
            counted += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(tail)
        with torch.no_grad():
            scores = model(torch.tensor([ids])).logits[0, :-1].double().log_softmax(-1)
        for k, (token, counts) in enumerate(zip(ids[1:], counted[1:])):
            if counts:
                losses.append(-scores[k, token].item())
                hits.append(scores[k].argmax().item() == token)
    return sum(losses) / len(losses), sum(hits) / len(hits), len(losses)


def test_loss_accuracy_and_perplexity_are_those_of_an_independent_computation(reports, here):
    loss, accuracy, tokens = by_hand(here / "r" / "merge", here / "r" / "data")
    found = reports["merge"]
    print(f"loss {found['loss']:.6f}, by hand {loss:.6f}; {tokens} tokens")
    assert found["tokens"] == tokens
    assert found["loss"] == pytest.approx(loss, abs=2e-6)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1 / tokens + 1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]), rel=1e-12)
    base_loss, _, _ = by_hand(TINY, here / "r" / "data")
    assert reports["finetune"]["parent_loss"] == pytest.approx(base_loss, abs=2e-6)
    assert reports["finetune"]["parent_perplexity"] == pytest.approx(math.exp(base_loss), rel=1e-5)


def test_a_merge_agrees_with_its_adapter_everywhere(reports):
    assert reports["merge"]["agreement"] == 1.0
    assert reports["merge"]["loss"] == pytest.approx(reports["finetune"]["loss"], abs=1e-5)
    assert reports["merge"]["loss"] == pytest.approx(reports["merge"]["parent_loss"], abs=1e-5)


def test_training_shows_in_the_comparison_with_the_base(reports):
    found = reports["finetune"]
    print(f"base {found['parent_loss']:.3f} -> adapter {found['loss']:.3f}, agreement {found['agreement']:.3f}")
    assert found["loss"] < found["parent_loss"] and 0.5 < found["agreement"] < 1


def test_fine_tuning_and_evaluation_measure_the_same_loss(reports, here):
    tuned = artifact.open_artifact(here / "r" / "finetune").metrics
    assert tuned["val_loss"] == pytest.approx(reports["finetune"]["loss"], abs=1e-5)
    assert tuned["val_loss_first"] == pytest.approx(reports["finetune"]["parent_loss"], abs=1e-5)
    assert tuned["val_accuracy"] == pytest.approx(reports["finetune"]["accuracy"], abs=1e-6)


def test_answers_are_the_greedy_ones_one_prompt_at_a_time(reports, here):
    """Batched with padding on the left, they are those of plain generate() without any."""
    rows = [json.loads(line) for line in open(here / "r" / "evaluate-merge" / "answers.jsonl")]
    assert [r["by"] for r in rows] == ["model"] * 5 + ["parent"] * 5
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(here / "r" / "merge", local_files_only=True).eval(),
        load_tokenizer(here / "r" / "merge"),
    )
    records = [json.loads(line) for line in open(here / "r" / "data" / "val.jsonl")]
    for row, record in zip(rows[:5], records):
        opening = []
        for message in record["messages"]:
            if message["role"] == "assistant":
                break
            opening.append(message)
        ids = tokenizer.apply_chat_template(opening, add_generation_prompt=True, return_tensors="pt", return_dict=False)
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24, eos_token_id=[1023, 1021], pad_token_id=1021
            )[0, ids.shape[1] :]
        assert row["prompt"] == opening[-1]["content"] and row.get("before", []) == opening[:-1]
        assert row["answer"] == tokenizer.decode(out, skip_special_tokens=True)
        assert row["ended"] == (1023 in out.tolist())


@pytest.mark.parametrize("size", [1, 4, 64])
def test_batches_do_not_change_the_figures(size, reports, here):
    assert (
        go(
            evaluate,
            f"outputs={here}",
            f"run=b{size}",
            f"source={here / 'r' / 'merge'}",
            f"dataset={here / 'r' / 'data'}",
            f"evaluation.batch_size={size}",
            "evaluation.samples=0",
        )
        == 0
    )
    found = json.loads((here / f"b{size}" / "evaluate-merge" / "report.json").read_text())
    assert found["loss"] == pytest.approx(reports["merge"]["loss"], abs=1e-5) and found["tokens"] == reports["merge"]["tokens"]


def test_expected_answers_are_counted(here):
    """The base answers plainly, the prompt stands before the answer in what must match, and an answer that did not end does not count."""

    def expected(run, pattern, *more):
        prompts = "evaluation.prompts=['What animal goes quack?','Tell me what a cat says.']"
        argv = [
            f"outputs={here}",
            f"run={run}",
            f"source={TINY}",
            f"dataset={here / 'r' / 'data'}",
            prompts,
            f"evaluation.expect='{pattern}'",
            "evaluation.rows=2",
            *more,
        ]
        assert go(evaluate, *argv) == 0
        report = json.loads((here / run / "evaluate-tiny-chat" / "report.json").read_text())
        answers = [json.loads(line) for line in open(here / run / "evaluate-tiny-chat" / "answers.jsonl")]
        assert report["expected"] == sum(a["as_expected"] for a in answers) and report["prompts"] == len(answers) == 2
        return [a["as_expected"] for a in answers]

    assert expected("e1", ".*") == [True, True]
    assert expected("e2", ".*duck.*") == [True, False]
    assert expected("e3", "Tell me.*") == [False, True], "the prompt is part of what is matched"
    assert expected("e4", "duck") == [False, False], "the whole must match"
    assert expected("e5", ".*", "evaluation.max_new_tokens=1") == [False, False], "an answer that was cut off is wrong"


def test_a_folder_made_elsewhere_needs_no_parent(here, capsys):
    other = Path(shutil.copytree(TINY, here / "made elsewhere!"))
    assert go(evaluate, f"outputs={here}", "run=r", f"source='{other}'", "evaluation.samples=1", "evaluation.max_new_tokens=4") == 0
    assert "no parent to compare with" in capsys.readouterr().err
    found = json.loads((here / "r" / "evaluate-made-elsewhere-" / "report.json").read_text())
    assert "agreement" not in found and not [k for k in found if k.startswith("parent")]
    assert found["loss"] == pytest.approx(by_hand(TINY, here / "r" / "data")[0], abs=2e-6)


def test_any_model_can_be_the_parent(here):
    assert (
        go(
            evaluate,
            f"outputs={here}",
            "run=p",
            f"source={TINY}",
            f"parent={here / 'r' / 'merge'}",
            f"dataset={here / 'r' / 'data'}",
            "evaluation.samples=0",
            "evaluation.rows=3",
        )
        == 0
    )
    found = json.loads((here / "p" / "evaluate-tiny-chat" / "report.json").read_text())
    assert found["rows"] == 3 and found["parent_loss"] == pytest.approx(by_hand(here / "r" / "merge", here / "r" / "data", 3)[0], abs=2e-6)
    assert found["parent_loss"] != found["loss"]


@helps("models/evaluation.py", "evaluation.max_length={}")
def test_rows_too_long_are_left_out_and_counted(here, capsys):
    tokenizer = load_tokenizer(TINY)
    lengths = [
        len(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False))
        for line in open(here / "r" / "data" / "val.jsonl")
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    argv = [f"outputs={here}", f"source={TINY}", f"dataset={here / 'r' / 'data'}", "evaluation.samples=0"]
    assert go(evaluate, *argv, "run=long", f"evaluation.max_length={limit}") == 0
    long = sum(n > limit for n in lengths)
    assert f"left out {long} of {len(lengths)} validation rows longer than evaluation.max_length={limit}" in capsys.readouterr().err
    assert json.loads((here / "long" / "evaluate-tiny-chat" / "report.json").read_text())["rows"] == len(lengths) - long
    assert go(evaluate, *argv, "run=none", "evaluation.max_length=2") == 3
    assert f"fix:   evaluation.max_length={max(lengths)}" in capsys.readouterr().err
    assert go(evaluate, *argv, "run=none", f"evaluation.max_length={max(lengths)}") == 0


def test_a_broken_pattern_is_refused_first(here, capsys):
    assert go(evaluate, f"outputs={here}", "run=r", f"source={TINY}", "evaluation.expect='(a'", "force=true") == 2
    assert "not a regular expression" in capsys.readouterr().err


def test_a_second_call_skips_what_is_measured(reports, here, capsys):
    assert go(evaluate, f"outputs={here}", "run=r", "evaluation.max_new_tokens=24", "evaluation.batch_size=3") == 0
    assert capsys.readouterr().err.count("up to date, skipped") == 2


# ---- against the parent


def test_the_report_has_every_figure_against_the_parent_with_its_interval(reports, here):
    """KL, percentile and agreement equal those of whole distributions; each interval holds its figure; each row is in rows.jsonl."""
    found, (p, q) = reports["finetune"], (log_probs_of(here, TINY), log_probs_of(here, here / "r" / "merge"))
    kl = (p.exp() * (p - q)).sum(-1).numpy()
    assert found["kl"] == pytest.approx(kl.mean(), rel=0.02)
    assert found["kl_p99"] == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=0.02)
    assert found["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-3)
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["parent_perplexity"], rel=1e-9)
    assert found["loss_difference"] == pytest.approx(found["loss"] - found["parent_loss"], abs=1e-9)
    assert found["resamples"] == 1000
    for name, interval in found["intervals"].items():
        if name in ("same_answers", "parts_at"):
            assert interval is None, "of five prompts there is none"
        else:
            assert interval[0] <= found[name] <= interval[1], name
    rows = [json.loads(line) for line in open(here / "r" / "evaluate-finetune" / "rows.jsonl")]
    assert len(rows) == found["rows"] and sum(row["tokens"] for row in rows) == found["tokens"]
    assert sum(row["tokens"] * row["kl"] for row in rows) / found["tokens"] == pytest.approx(found["kl"])
    by_kl = sorted(rows, key=lambda row: -row["kl"])
    assert [row["id"] for row in found["worst"]["kl"]] == [row["id"] for row in by_kl[:5]]


def log_probs_of(here, folder: Path) -> torch.Tensor:
    """Of each trained token of run r's validation split, over the whole vocabulary, fp64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32), load_tokenizer(folder)
    records = [json.loads(line) for line in open(here / "r" / "data" / "val.jsonl")]
    with torch.no_grad():
        rows = evaluation.encode_all(records, tokenizer, 2048)
        return torch.cat([model(torch.tensor([row.input_ids])).logits[0, seen.kept(row)] for row in rows]).double().log_softmax(-1)


def test_a_difference_is_called_better_worse_or_no_evidence(reports, here, capsys):
    assert reports["finetune"]["evidence"] == {"loss_difference": "better"}
    assert reports["merge"]["evidence"] == {"loss_difference": "no evidence"}, "rounding alone is none"
    argv = [f"outputs={here}", "run=worse", f"source={TINY}", f"parent={here / 'r' / 'merge'}", f"dataset={here / 'r' / 'data'}"]
    assert go(evaluate, *argv, "evaluation.max_new_tokens=24", "evaluation.samples=8") == 0
    said = capsys.readouterr().err
    print(said)
    found = json.loads((here / "worse" / "evaluate-tiny-chat" / "report.json").read_text())
    assert found["evidence"]["loss_difference"] == "worse" and re.search(r"validation .* worse$", said, re.M)
    assert found["loss_difference"] == pytest.approx(-reports["finetune"]["loss_difference"], abs=1e-5)
    low, high = found["intervals"]["loss_difference"]
    assert f"{found['loss_difference']:+.4f} [{low:+.4f}, {high:+.4f}]" in said
    assert f"KL to the parent {found['kl']:.4f} [" in said and "greedy answers: " in said


def test_where_answers_part(here):
    """The first token that differs, by hand; equal answers part behind their last."""
    rows = [json.loads(line) for line in open(here / "worse" / "evaluate-tiny-chat" / "answers.jsonl")]
    tokenizer, found = load_tokenizer(TINY), json.loads((here / "worse" / "evaluate-tiny-chat" / "report.json").read_text())
    mine, theirs = ([tokenizer(row["answer"]).input_ids for row in rows if row["by"] == by] for by in ("model", "parent"))
    at = sorted(next((k for k in range(len(a)) if a[k : k + 1] != b[k : k + 1]), min(len(a), len(b))) for a, b in zip(mine, theirs))
    assert found["parts_at"] == at[3] and len(at) == 8, "the lower median"
    low, high = found["intervals"]["parts_at"]
    assert low <= found["parts_at"] <= high and 0 < found["same_answers"] < 1


# ---- what was forgotten


@helps("models/gates.py", "parent=FOLDER names the model to compare with")
def test_what_was_forgotten_is_measured_row_by_row_against_the_parent(here, tmp_path):
    """Texts as they stand, token by token, and chats by their answers, in files of a folder; the table names the rows that got worst."""
    texts = [f"The {word} of a duck is yellow, and so it was." for word in ("bill", "foot", "egg", "eye", "nest", "tail")]
    chats = [{"messages": [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": f"It is {n}."}]} for n in range(3)]
    (tmp_path / "other").mkdir()
    for name, rows in {"chats": chats, "texts": [*({"text": text} for text in texts), {"text": 7}]}.items():
        (tmp_path / "other" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = [
        f"outputs={tmp_path}",
        "run=g",
        f"dataset={here / 'r' / 'data'}",
        "evaluation.samples=0",
        f"evaluation.general={tmp_path / 'other'}",
    ]
    done = in_process("evaluate", *argv, f"source={TINY}")
    refused(done, ConfigError, "what a model forgot is told by the one it was made from")
    done = in_process("evaluate", *argv, f"source={here / 'r' / 'merge'}", ways(done)[0].split()[0].replace("FOLDER", str(TINY)))
    assert done.returncode == 0, done.stderr
    assert "general: left out 1: malformed: " in done.stderr
    found = json.loads((tmp_path / "g" / "evaluate-merge" / "report.json").read_text())
    rows = [row for line in open(tmp_path / "g" / "evaluate-merge" / "rows.jsonl") if (row := json.loads(line))["of"] == "general"]
    assert found["general_rows"] == len(rows) == 9
    model, parent = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (here / "r" / "merge", TINY))
    tokenizer = load_tokenizer(TINY)
    for row, text in zip(rows, texts):
        ids = torch.tensor([tokenizer(text).input_ids])
        with torch.no_grad():
            losses = [each(ids, labels=ids).loss.item() for each in (model, parent)]
        assert (row["loss"], row["parent_loss"], row["tokens"]) == (*(pytest.approx(x, abs=1e-5) for x in losses), ids.shape[1] - 1)
    difference = sum(row["loss_difference"] * row["tokens"] for row in rows) / sum(row["tokens"] for row in rows)
    assert found["general_loss_difference"] == pytest.approx(difference, abs=1e-9)
    low, high = found["intervals"]["general_loss_difference"]
    assert low < difference < high
    assert found["general_rows_worse"] == pytest.approx(sum(row["loss_difference"] > 0.01 for row in rows) / 9)
    worst = max(rows, key=lambda row: row["loss_difference"])
    assert found["worst"]["general_loss_difference"][0]["id"] == worst["id"]
    assert any(f"worst: {worst['id']} " in line and f"{worst['loss_difference']:+.4f}" in line for line in done.stderr.splitlines())
    lengths = {parent["role"] for parent in artifact.open_artifact(tmp_path / "g" / "evaluate-merge").manifest["parents"]}
    assert lengths == {"model", "parent", "dataset", "general"}, "the file is known by its content"


@helps("models/evaluation.py", "evaluation.general=FILE of texts, or of chats that the template shows")
def test_general_text_is_cut_and_what_is_nothing_is_refused(here, tmp_path):
    (tmp_path / "g.txt").write_text("x\n")
    argv = [f"outputs={tmp_path}", "run=g", f"source={TINY}", f"parent={TINY}", f"dataset={here / 'r' / 'data'}", "evaluation.samples=0"]
    refused(in_process("evaluate", *argv, f"evaluation.general={tmp_path / 'g.txt'}"), MissingInput, "no row of evaluation.general")
    (tmp_path / "g.txt").write_text("A duck says quack. " * 50 + "\n" + "A cow says moo. " * 50 + "\n")
    done = in_process("evaluate", *argv, f"evaluation.general={tmp_path / 'g.txt'}", "evaluation.max_length=100", "evaluation.rows=1")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in open(tmp_path / "g" / "evaluate-tiny-chat" / "rows.jsonl")]
    assert [(row["of"], row["tokens"]) for row in rows][1:] == [("general", 99)], "one row, as evaluation.rows says, cut at max_length"


def test_general_files_that_are_no_text_are_refused_before_work(here, tmp_path, capsys):
    argv = [f"outputs={tmp_path}", "run=h", f"source={TINY}", f"parent={TINY}", f"dataset={here / 'r' / 'data'}", "evaluation.samples=0"]
    for name, content in {"zeros.txt": bytes(9999), "binary.txt": bytes(range(256)) * 500, "cut.txt.gz": b"\x1f\x8b\x08\0cut"}.items():
        (tmp_path / name).write_bytes(content)
        assert go(evaluate, *argv, f"evaluation.general={tmp_path / name}", "dry_run=true") == BadData.exit_code, name
    for path in (tmp_path / "nothing", here / "r" / "data" / "none.txt"):
        capsys.readouterr()
        assert go(evaluate, *argv, f"evaluation.general={path}") == MissingInput.exit_code
        assert "evaluation.general=" in (said := capsys.readouterr().err) and "data.path" not in said
    (tmp_path / "empty.txt").touch()
    assert go(evaluate, *argv, f"evaluation.general={tmp_path / 'empty.txt'}") == BadData.exit_code
    (tmp_path / "line.txt").write_text("word " * 1_000_000)
    assert go(evaluate, *argv, f"evaluation.general={tmp_path / 'line.txt'}", "evaluation.rows=1") == 0


def test_every_model_of_a_run_is_judged_whatever_the_first_one_is(reports, here, capsys):
    """An adapter that is meant to differ from its base fails, the merge that comes after it keeps the limit."""
    assert go(evaluate, f"outputs={here}", "run=r", "evaluation.max_new_tokens=24", "evaluation.batch_size=3", "gate.top1=0.999") == 17
    said = capsys.readouterr().err
    assert said.count("up to date, skipped") == 2 and said.count("gate failed") == 1 and said.count("keeps gate.top1=0.999") == 1
