"""The measure itself: KL and top-1 agreement by golden values, intervals by how often they hold the truth, and what is called evidence."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import CHAT, ROOT, rounded
from transformers import AutoModelForCausalLM

from src.chat.encoding import Encoded
from src.core.artifact import open_any
from src.models import bootstrap, comparison, evaluation, seen
from src.models.loading import load_tokenizer

PARENT = [[0.5, 0.25, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]]
MODEL = [[0.25, 0.5, 0.125, 0.125], [0.7, 0.1, 0.1, 0.1], [0.3, 0.4, 0.2, 0.1]]
TRUE_KL = [0.25 * math.log(2), 0.0, 0.4 * math.log(4 / 3) + 0.3 * math.log(3 / 4)]
"""nats, by hand"""


def said(probs: list, rows: list[Encoded], at=None) -> seen.Seen:
    logits = iter(torch.tensor(probs).log().split([row.trained for row in rows]))
    return seen.observe(seen.one_by_one(lambda _: next(logits) + 3.0, "test"), rows, at)


@pytest.mark.parametrize("at_most", [64, 2])
def test_kl_and_top_1_of_distributions_known_by_hand(at_most):
    """Two rows, of two tokens and of one. Of the two likeliest alone KL is smaller, for the others count together, and never larger."""
    rows = [Encoded([0, 0, 1], [-100, 0, 1]), Encoded([0, 3], [-100, 3])]
    parent = said(PARENT, rows)
    model = said(MODEL, rows, parent.top_k_ids[:, :at_most])
    parent = seen.Seen(parent.losses, parent.top_k_ids[:, :at_most], parent.log_probs[:, :at_most], parent.likeliest)
    assert seen.divergence(parent, model) == pytest.approx(TRUE_KL, abs=1e-6), "what differs is among the two likeliest"
    found = comparison.Rows("", list(zip("ab", rows)), model, parent)
    figures = found.figures(np.ones(2))
    assert figures["kl"] == pytest.approx(sum(TRUE_KL) / 3, abs=1e-6)
    assert figures["kl_p99"] == pytest.approx(max(TRUE_KL), abs=1e-6)
    assert figures["agreement"] == pytest.approx(1 / 3)
    assert figures["parent_loss"] == pytest.approx(-(math.log(0.5) + math.log(0.1) + math.log(0.1)) / 3, abs=1e-6)
    assert figures["perplexity_ratio"] == pytest.approx(math.exp(math.log(0.5 / 0.25) / 3), abs=1e-6), (
        "only the first target's probability moved"
    )
    worst = {name: [row["id"] for row in rows] for name, rows in found.worst().items()}
    assert worst == {"kl": ["a", "b"], "agreement": ["b", "a"], "loss_difference": ["a", "b"]}
    twice = found.figures(np.array([1, 2]))
    assert twice["agreement"] == pytest.approx(1 / 4) and twice["kl"] == pytest.approx((TRUE_KL[0] + 2 * TRUE_KL[2]) / 4, abs=1e-6)


def test_ids_that_the_model_lacks_are_not_asked_of_it():
    """A parent whose embedding has rows more than the model's: its likeliest token is one of them, and KL still is a number."""
    rows = [Encoded([0, 1], [-100, 1])]
    read = lambda probs: seen.one_by_one(lambda _: torch.tensor([probs]).log(), "test")
    parent = seen.observe(read([0.1, 0.2, 0.7]), rows, below=2)
    assert sorted(parent.top_k_ids[0]) == [0, 1] and parent.likeliest == [2]
    model = seen.observe(read([0.5, 0.5]), rows, parent.top_k_ids)
    assert math.isfinite(seen.divergence(parent, model)[0])


def test_golden_values_of_a_fixed_pair_of_models(tmp_path):
    """As literals, and against the whole vocabulary in fp64."""
    tokenizer, other = load_tokenizer(CHAT), rounded(tmp_path / "rounded", 3)
    records = [
        {
            "id": str(i),
            "messages": [
                {"role": {"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), "content": m["value"]} for m in r["conversations"]
            ],
        }
        for i, r in enumerate(json.loads((ROOT / "assets" / "conversations.json").read_text())[:40])
    ]
    ids, rows = zip(*evaluation.encode_named(records, tokenizer, 512))
    read = lambda folder: evaluation.Measured(open_any(folder), "test").reader
    parent = seen.observe(read(CHAT), rows)
    found = comparison.Rows("", list(zip(ids, rows)), seen.observe(read(other), rows, parent.top_k_ids), parent)
    figures = found.figures(np.ones(len(rows)))
    golden = {"parent_loss": 0.34111, "loss": 0.37999, "kl": 0.02861, "kl_p99": 0.44017, "agreement": 0.96594, "perplexity_ratio": 1.03965}
    assert {name: figures[name] for name in golden} == pytest.approx(golden, abs=1e-4)

    def everywhere(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        with torch.no_grad():
            return torch.cat([model(torch.tensor([row.input_ids])).logits[0, seen.kept(row)] for row in rows]).double().log_softmax(-1)

    p, q = everywhere(CHAT), everywhere(other)
    true = (p.exp() * (p - q)).sum(-1).numpy()
    assert figures["agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-9)
    assert figures["kl"] == pytest.approx(true.mean(), rel=0.02) and figures["kl"] <= true.mean()
    assert figures["kl_p99"] == pytest.approx(np.quantile(true, 0.99, method="inverted_cdf"), rel=0.02)
    assert figures["loss_difference"] == pytest.approx(
        (p - q).gather(1, torch.tensor(seen.targets_of(rows))[:, None]).mean().item(), abs=1e-6
    )


# ---- intervals


def test_an_interval_of_95_percent_holds_the_truth_that_often():
    """Of few rows, from a skewed law, where the plain percentile interval holds it far less often."""
    law, held = np.random.default_rng(1), []
    for seed in range(200):
        values = law.gamma(2, 1, size=10)
        low, high = bootstrap.intervals(lambda weights: {"mean": weights @ values / weights.sum()}, 10, seed)["mean"]
        held.append(low <= 2 <= high)
    print(f"held {np.mean(held):.1%}")
    assert 0.88 <= np.mean(held) <= 0.99


def test_a_difference_is_of_pairs():
    """Rows that differ widely, and a model that is 0.1 worse at each: evidence, though either loss alone could be anywhere."""
    parent = np.random.default_rng(0).gamma(2, 2, size=20)
    found = bootstrap.intervals(
        lambda weights: {"loss": weights @ (parent + 0.1) / weights.sum(), "loss_difference": weights @ np.full(20, 0.1) / weights.sum()},
        20,
    )
    assert found["loss_difference"] == pytest.approx([0.1, 0.1]) and found["loss"][1] - found["loss"][0] > 1
    again = bootstrap.intervals(lambda weights: {"loss": weights @ (parent + 0.1) / weights.sum()}, 20)
    assert again["loss"] == found["loss"], "the draws are seeded"


def test_of_too_few_rows_there_is_no_interval_and_no_evidence():
    found = bootstrap.intervals(lambda weights: {"loss_difference": 5.0}, bootstrap.FEWEST - 1)
    assert found == {"loss_difference": None} and bootstrap.verdict(None, less_is_better=True) == "no evidence"


@pytest.mark.parametrize(
    "interval, less, more",
    [
        ([-0.1, 0.2], "no evidence", "no evidence"),
        ([0.0, 0.2], "no evidence", "no evidence"),
        ([1e-7, 2e-6], "no evidence", "no evidence"),
        ([0.1, 0.2], "worse", "better"),
        ([-0.2, -0.1], "better", "worse"),
    ],
)
def test_what_an_interval_is_evidence_of(interval, less, more):
    assert (bootstrap.verdict(interval, less_is_better=True), bootstrap.verdict(interval, less_is_better=False)) == (less, more)


def test_the_99th_percentile_counts_rows_as_often_as_they_are_drawn():
    values = np.arange(1000.0)
    assert bootstrap.quantile(values, np.ones(1000), 0.99) == 989
    assert bootstrap.quantile(values, np.where(values < 10, 100, 0), 0.99) == 9
    assert bootstrap.quantile(values, np.ones(1000), 0.5) == np.quantile(values, 0.5, method="inverted_cdf")
