"""Learning from a teacher's probabilities: the loss is the one written down, they are computed once, and the student comes closer."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CHAT, go, helps, make_base, write_model

from src import finetune
from src.chat import encoding
from src.core import artifact
from src.core.errors import WrongKind
from src.models import generation
from src.models.loading import load_model, load_tokenizer
from src.training import teacher
from src.training.head import Targets, TeacherTargets, loss_sum

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")
FAST = ["tuner=full", "tuner.learning_rate=1e-3", "train.log_steps=1", "train.eval_steps=1000", "train.samples=0"]


def written_down(logits, targets: Targets) -> torch.Tensor:
    """alpha KL + (1 - alpha) cross-entropy over k + 1 outcomes, through autograd."""
    logq = logits.log_softmax(-1)
    hard = torch.nn.functional.nll_loss(logq, targets.tokens, reduction="sum")
    p, known = targets.teacher.probs, logq.gather(-1, targets.teacher.top_k_ids)
    rest_p, rest_q = 1 - p.sum(-1), 1 - known.exp().sum(-1)
    kl = (p * (p.log() - known)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()
    return targets.teacher.alpha * kl + (1 - targets.teacher.alpha) * hard


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_weight_multiplies_all_of_a_token_s_loss(alpha):
    torch.manual_seed(2)
    probs, top_k_ids = torch.randn(4, 20).softmax(-1).topk(3, dim=-1)
    targets = Targets(torch.randint(0, 20, (4,)), TeacherTargets(top_k_ids, probs, alpha), torch.tensor([0.0, 0.5, 1.0, 3.0]))
    logits = torch.randn(4, 20, requires_grad=True)
    (ours,) = torch.autograd.grad(found := loss_sum(logits, targets), logits)
    each = [written_down(logits[k : k + 1], part) for k, part in enumerate(targets.split(1))]
    (plain,) = torch.autograd.grad(expected := sum(w * loss for w, loss in zip((0.0, 0.5, 1.0, 3.0), each)), logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5) and torch.allclose(ours, plain, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_and_gradient_are_those_written_down(alpha):
    torch.manual_seed(0)
    probs, top_k_ids = (torch.randn(7, 50) * 2).softmax(-1).topk(5, dim=-1)
    targets = Targets(torch.randint(0, 50, (7,)), TeacherTargets(top_k_ids, probs, alpha))
    logits = torch.randn(7, 50, requires_grad=True)
    (plain,) = torch.autograd.grad(expected := written_down(logits, targets), logits)
    (ours,) = torch.autograd.grad(found := loss_sum(logits, targets), logits)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(ours, plain, atol=1e-5)
    parts = [loss_sum(part, t).item() for part, t in zip(logits.split(3), targets.split(3))]
    assert len(parts) == 3 and sum(parts) == pytest.approx(found.item(), rel=1e-5)


def test_with_every_token_kept_it_is_the_kl_divergence():
    torch.manual_seed(1)
    theirs, logits = torch.randn(4, 20), torch.randn(4, 20)
    probs, top_k_ids = theirs.softmax(-1).topk(20, dim=-1)
    kl = torch.nn.functional.kl_div(logits.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
    found = loss_sum(logits, Targets(torch.zeros(4, dtype=torch.long), TeacherTargets(top_k_ids, probs, 1.0)))
    assert found.item() == pytest.approx(kl.item(), rel=1e-4)
    fewer = loss_sum(logits, Targets(torch.zeros(4, dtype=torch.long), TeacherTargets(top_k_ids[:, :3], probs[:, :3], 1.0)))
    assert 0 < fewer.item() <= kl.item()


@pytest.fixture
def train(tmp_path, eighty, capsys):
    """train(run, base, *overrides) -> (exit code, what was said)."""

    def train(run, base, *argv):
        code = go(finetune, f"outputs={tmp_path}", f"run={run}", f"source={eighty}", f"model.path={base}", *FAST, *argv)
        return code, capsys.readouterr().err

    return train


def distance(student, rows) -> float:
    """Mean KL (nats a token) from tiny-chat to a model where an answer is to be given."""
    at = torch.tensor(np.concatenate([np.append(np.array(row.labels[1:]) != encoding.IGNORE, False) for row in rows]))
    ids = [row.input_ids for row in rows]
    ours, theirs = (torch.from_numpy(generation.logits(load_model(path).eval(), ids))[at].log_softmax(-1) for path in (student, CHAT))
    return torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean").item()


def test_a_student_of_its_probabilities_comes_closer_to_the_teacher(train, tmp_path, eighty, monkeypatch):
    """From the same start, on the same rows: with the teacher's probabilities the student is nearer to it than with the tokens alone."""
    base = write_model(
        tmp_path / "student", model_type="mistral", architectures=["MistralForCausalLM"], hidden_size=128, num_hidden_layers=2
    )
    argv = ["train.max_steps=30", "tuner.learning_rate=3e-3"]
    code, said = train("with", base, *argv, f"teacher.path={CHAT}", "teacher.weight=0.9")
    assert code == 0 and "its 32 likeliest tokens hold" in said, said
    assert train("without", base, *argv)[0] == 0
    tokenizer = load_tokenizer(CHAT)
    rows = [encoding.encode(tokenizer, json.loads(line)["messages"]) for line in open(eighty / "val.jsonl")]
    near, far, start = (distance(path, rows) for path in (tmp_path / "with/finetune", tmp_path / "without/finetune", base))
    print(f"KL to the teacher: {start:.3f} at the start, {far:.3f} by tokens, {near:.3f} by its probabilities")
    assert near < 0.9 * far < far < start
    made = artifact.open_artifact(tmp_path / "with" / "finetune")
    assert made.parent("teacher")["key"] == artifact.open_any(CHAT).key and made.settings["teacher"]["weight"] == 0.9
    assert "teacher" not in artifact.open_artifact(tmp_path / "without" / "finetune").settings
    # Another learning rate finds the probabilities there.
    monkeypatch.setattr(teacher, "make", lambda *args: pytest.fail("computed again"))
    assert train("again", base, "train.max_steps=2", "tuner.learning_rate=2e-3", f"teacher.path={CHAT}")[0] == 0


def test_no_weight_on_the_teacher_is_training_without_one(train, tmp_path):
    base = make_base(tmp_path / "base")
    assert train("zero", base, "train.max_steps=3", f"teacher.path={CHAT}", "teacher.weight=0")[0] == 0
    assert train("none", base, "train.max_steps=3")[0] == 0
    curves = [[c["loss"] for c in artifact.open_artifact(tmp_path / run / "finetune").metrics["curve"]] for run in ("zero", "none")]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


@pytest.mark.parametrize("layout", [["train.micro_batch_size=1"], ["train.packing=false", "train.chunked_loss=false"]])
def test_the_teacher_is_the_same_in_every_layout(train, tmp_path, layout):
    base = make_base(tmp_path / "base")
    common = ["train.max_steps=3", f"teacher.path={CHAT}"]
    assert train("one", base, *common)[0] == 0 and train("other", base, *common, *layout)[0] == 0
    curves = [[c["loss"] for c in artifact.open_artifact(tmp_path / run / "finetune").metrics["curve"]] for run in ("one", "other")]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)


@helps("training/teacher.py", "give a teacher with the student's tokenizer")
def test_a_teacher_with_another_tokenizer_is_refused(train, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(CHAT, other)
    file = other / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    a, b = list(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(content))
    code, said = train("refused", make_base(tmp_path / "base"), f"teacher.path={other}")
    assert code == WrongKind.exit_code and "the teacher's tokenizer differs from the student's (token 5" in said
    assert not (tmp_path / "refused" / "finetune").exists()
    shutil.copy(CHAT / "tokenizer.json", other)
    code, said = train("refused", make_base(tmp_path / "base"), f"teacher.path={other}")
    assert code == 0, said


def test_soft_targets_are_the_teacher_s_likeliest_tokens_in_the_rows_order(tmp_path, eighty, train):
    assert train("made", make_base(tmp_path / "base"), "train.max_steps=2", f"teacher.path={CHAT}", "teacher.top_k=4")[0] == 0
    (folder,) = [p.parent for p in (tmp_path / ".cache" / "tokens").rglob("top_k_ids.npy")]
    top_k_ids, probs = np.load(folder / "top_k_ids.npy"), np.load(folder / "probs.npy")
    first = json.loads((eighty / "train.jsonl").read_text().splitlines()[0])
    tokenizer, model = load_tokenizer(CHAT), load_model(CHAT).eval()
    row = encoding.encode(tokenizer, first["messages"])
    at = [i - 1 for i, label in enumerate(row.labels) if label != encoding.IGNORE]
    with torch.no_grad():
        expected = model(torch.tensor([row.input_ids])).logits[0, at].softmax(-1).topk(4, dim=-1)
    assert top_k_ids[: len(at)].tolist() == expected.indices.tolist()
    assert np.allclose(probs[: len(at)], expected.values, atol=1e-5)
