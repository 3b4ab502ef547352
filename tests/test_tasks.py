"""lm-eval's tasks: what it is told is what transformers says, whatever holds the model; without it nothing is begun. Where it is installed it is run for real."""

import importlib.util
import json

import pytest
import torch
from conftest import CHAT, go, helps
from stand_ins.openai_server import Server
from transformers import AutoModelForCausalLM

from src import evaluate
from src.chat.encoding import IGNORE, Encoded
from src.core import artifact
from src.core.errors import BadData, ConfigError, MissingInput, MissingTool
from src.models import tasks
from src.models.evaluation import Measured
from src.models.loading import load_tokenizer
from src.serving.client import Client
from src.serving.measure import Served

needs_lm_eval = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed")
TEXTS = ["<|im_start|>user\nWhat does a duck say?<|im_end|>\n<|im_start|>assistant\n", "A cow says", "One"]
CONTINUED = ["A duck says quack.", " moo and eats grass.", " two three"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHAT)


@pytest.fixture(scope="module")
def server():
    server = Server(CHAT)
    server.behaviour.echo = "ids"
    yield server
    server.shutdown()
    server.server_close()


def rows(tokenizer) -> list[Encoded]:
    pairs = [(tokenizer(a).input_ids, tokenizer(b, add_special_tokens=False).input_ids) for a, b in zip(TEXTS, CONTINUED)]
    return [tasks._row(before, counted, 512) for before, counted in pairs]


@pytest.mark.parametrize("where", ["here", "endpoint"])
def test_log_probabilities_and_answers_are_those_of_transformers(where, tokenizer, server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    asked = tasks.Local(Measured(artifact.open_any(CHAT), "model"), tokenizer, 2)
    if where == "endpoint":
        asked = Served(Client(server.url, timeout=5), "tiny-chat", tokenizer, 1)
    model = AutoModelForCausalLM.from_pretrained(CHAT, dtype=torch.float32)
    for row, (told, greedy) in zip(rows(tokenizer), asked.log_probs(rows(tokenizer)), strict=True):
        with torch.no_grad():
            table = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
        counted = [(k, token) for k, token in enumerate(row.labels) if token != IGNORE]
        assert told == pytest.approx(sum(float(table[k - 1, token]) for k, token in counted), abs=1e-3)
        assert greedy == all(int(table[k - 1].argmax()) == token for k, token in counted)
    if where == "here":
        assert asked.answers(TEXTS[:1] * 3, ["quack", "\n"], 12) == ["A duck says quack"] * 3
    else:
        assert asked.answers(["What does a duck say?"], ["quack"], 12)[0].startswith("A duck says quack")


def test_a_row_is_cut_at_its_beginning():
    assert tasks._row([1, 2, 3], [4, 5], 3) == Encoded([3, 4, 5], [IGNORE, 4, 5])


def test_figures_are_compared_document_by_document():
    mine, theirs = [(str(i), float(i % 2)) for i in range(10)], [(str(i), 1.0) for i in range(10)]
    told, parts = tasks.compare({"model": {"t,acc": mine}, "parent": {"t,acc": theirs}})
    assert told == {"tasks": {"t,acc": 10}} and parts[0][0] == "t,acc_" and parts[0][1].values["task_difference"] == -0.5
    metrics = told | tasks.comparison.report(parts)
    assert metrics["evidence"]["t,acc_task_difference"] == "worse" and "-0.5000" in tasks.in_words(metrics)[-1]


@helps("models/tasks.py", "evaluation.tasks=null leaves them out", "pip install lm-eval==0.4.13")
@helps("evaluate.py", "evaluation.tasks=null", "evaluation.tasks=null leaves it out")
def test_without_lm_eval_nothing_is_begun(eighty, tmp_path, monkeypatch, capsys):
    argv = [f"outputs={tmp_path}", "run=t", f"source={CHAT}", f"dataset={eighty}", "dry_run=true"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert go(evaluate, *argv, "evaluation.tasks=[hellaswag]") == MissingTool.exit_code
    assert "pip install lm-eval" in capsys.readouterr().err
    assert go(evaluate, *argv, "numerics=ax650_s8", "evaluation.tasks=[hellaswag]") == ConfigError.exit_code
    assert go(evaluate, *argv, f"evaluation.tasks=[{tmp_path}/none.yaml]") == MissingInput.exit_code
    assert go(evaluate, *argv, "evaluation.tasks=null") == 0


@pytest.fixture
def own(tmp_path):
    """A folder with two tasks: choices and answers."""
    (tmp_path / "animals.jsonl").write_text(
        "".join(json.dumps({"animal": a, "label": i}) + "\n" for i, a in enumerate(("duck", "cow", "dog")) for _ in "ab")
    )
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({"a": a, "b": b, "c": a + b}) + "\n" for a in (1, 2, 3) for b in (1, 2)))
    head = "task: {0}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {1}/{0}.jsonl\ntest_split: test\n"
    chat = 'doc_to_text: "<|im_start|>user\\n{}<|im_end|>\\n<|im_start|>assistant\\n"\n'
    (tmp_path / "animals.yaml").write_text(
        head.format("animals", tmp_path)
        + "output_type: multiple_choice\n"
        + chat.format("What does a {{animal}} say?").replace('\\n"', '\\nA {{animal}} says"')
        + 'doc_to_choice: ["quack", "moo", "woof"]\ndoc_to_target: "{{label}}"\n'
        + "metric_list:\n  - metric: acc\n"
    )
    (tmp_path / "sums.yaml").write_text(
        head.format("sums", tmp_path)
        + "output_type: generate_until\n"
        + chat.format("What is {{a}} plus {{b}}?")
        + 'doc_to_target: "{{a}} plus {{b}} is {{c}}."\ngeneration_kwargs:\n  until: ["<|im_end|>"]\n  max_gen_toks: 24\n'
        + "metric_list:\n  - metric: exact_match\n"
    )
    return tmp_path


@needs_lm_eval
@helps("models/tasks.py", "evaluation.tasks=[FILE.yaml] for one of your own", "lm-eval ls tasks lists them", "a line task: NAME in it")
@helps("models/tasks.py", "evaluation.tasks=null leaves it out")
def test_tasks_of_ones_own_run_for_real(eighty, own, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    argv = [
        f"outputs={tmp_path / 'o'}",
        "run=t",
        f"source={CHAT}",
        f"parent={CHAT}",
        f"dataset={eighty}",
        "evaluation.samples=0",
        "evaluation.rows=6",
    ]
    assert go(evaluate, *argv, "evaluation.tasks=[no_such_task]") == ConfigError.exit_code
    (own / "nameless.yaml").write_text("output_type: multiple_choice\n")
    assert go(evaluate, *argv, f"evaluation.tasks=[{own}/nameless.yaml]") == BadData.exit_code
    (own / "nameless.yaml").unlink()
    chosen = f"evaluation.tasks=[{own}/animals.yaml,{own}/sums.yaml]"
    assert go(evaluate, *argv, chosen) == 0
    found = artifact.open_artifact(tmp_path / "o" / "t" / "evaluate-tiny-chat")
    assert found.metrics["tasks"] == {"animals,acc": 6, "sums,exact_match": 6}
    assert found.metrics["animals,acc_task"] == 1 and found.metrics["sums,exact_match_task"] > 0.5
    assert found.metrics["sums,exact_match_task_difference"] == 0 and "animals  acc" in capsys.readouterr().err
    monkeypatch.setattr(tasks.Local, "log_probs", None)
    monkeypatch.setattr(tasks.Local, "answers", None)
    assert go(evaluate, *argv, chosen, "force=true") == 0, "all it said is in the runs' cache"


@needs_lm_eval
def test_log_likelihoods_are_lm_evals_own(tokenizer):
    """Of pairs, of an empty context, and of a text longer than a window."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    theirs = HFLM(pretrained=str(CHAT), dtype="float32", device="cpu", max_length=63)  # what is given to the model, without the last token
    ours = tasks._as_lm(tasks.Local(Measured(artifact.open_any(CHAT), "model"), tokenizer, 2), tokenizer, 64)
    make = lambda kind, *args: Instance(request_type=kind, doc={}, arguments=args, idx=0)
    pairs = [make("loglikelihood", *pair) for pair in [*zip(TEXTS, CONTINUED), ("", "A duck"), ("word " * 90, "A duck")]]
    for one, other in zip(ours.loglikelihood(pairs), theirs.loglikelihood(pairs), strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
    rolling = [make("loglikelihood_rolling", "A duck says quack. " * 20)]
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(theirs.loglikelihood_rolling(rolling), abs=1e-2)
