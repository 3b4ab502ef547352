"""Training is right whatever its layout: packed or padded, in one pass or many, with the loss in chunks or from the logits, resumed or not."""

import contextlib
import copy
import itertools
import time
import weakref

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.chat import encoding
from src.models import devices
from src.training import attention, batches, choices, layout
from src.training.batches import BatchPlan, Steps, micro_batch
from src.training.examples import Example
from src.training.head import HeadLoss, Targets

SHAPES = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 32},
    # Layers with a window and without one, and a logit scale behind the output layer.
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "granite": {"model_type": "granite", "logits_scaling": 2.0},
}
PACKING = ["llama", "qwen2", "qwen3", "mistral"]


@pytest.fixture(scope="module")
def model():
    """model(name): a model of that shape with random weights, fp32, in eval mode; the same each time."""

    def build(name: str, **changes):
        common = {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "bos_token_id": None,
            "eos_token_id": 511,
            "initializer_range": 0.1,
        }
        settings = {**common, **SHAPES[name], **changes}
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings)).eval()

    return build


def drawn(*lengths: int) -> list[Example]:
    """Rows of random ids in which about half is trained, in stretches."""
    draw = np.random.default_rng(7)
    rows = []
    for length in lengths:
        ids = draw.integers(0, 512, length, dtype=np.int32)
        trained = np.arange(length) % 10 >= 5
        rows.append(Example(ids, np.where(trained, ids, encoding.IGNORE)))
    return rows


ROWS = drawn(31, 7, 64, 12, 45)


def step_of(model, batches, head=None):
    """(sum of losses, {name: gradient}) over micro-batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        with head.learning(Targets(batch["targets"])) if head else contextlib.nullcontext():
            out = model(**layout.inputs_of(batch, "cpu"), logits_to_keep=batch["keep"], use_cache=False).logits
        loss = out.sum() if head else torch.nn.functional.cross_entropy(out, batch["targets"], reduction="sum")
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def apart(a: dict, b: dict) -> float:
    """Largest relative distance of two sets of gradients."""
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / a[n].norm().clamp(min=1e-12)).item() for n in a)


# ---- packing


@pytest.mark.parametrize("name", PACKING)
def test_packed_equals_unpacked_in_loss_and_gradient(model, name):
    alone, packed = model(name), model(name)
    attention.register()
    packed.set_attn_implementation(attention.NAME)
    one = step_of(alone, [micro_batch(ROWS, [i], 0, packed=False) for i in range(5)])
    together = step_of(packed, [micro_batch(ROWS, list(range(5)), 0, packed=True)])
    padded = step_of(alone, [micro_batch(ROWS, list(range(5)), 0, packed=False)])
    print(f"{name}: loss {one[0]:.4f}, packed {together[0] - one[0]:.1e}, gradients {apart(one[1], together[1]):.1e}")
    for other in (together, padded):
        assert other[0] == pytest.approx(one[0], rel=1e-5)
        assert apart(one[1], other[1]) < 1e-5


@pytest.mark.parametrize("name", PACKING)
def test_nothing_leaks_between_packed_rows(model, name):
    """Another row's tokens change nothing: not through attention, position, mask or cache; and gradients stay where their row is."""
    attention.register()
    packed = model(name)
    packed.set_attn_implementation(attention.NAME)
    batch = micro_batch(ROWS, [0, 2, 3], 0, packed=True)
    embedded = packed.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    given = layout.inputs_of(batch, "cpu")
    given.pop("input_ids")
    logits = packed(inputs_embeds=embedded, **given, use_cache=False).logits[0]
    begin, end = 31, 31 + 64
    logits[begin:end].square().sum().backward()
    touched = embedded.grad[0].abs().sum(-1) > 0
    assert touched[begin:end].all() and not touched[:begin].any() and not touched[end:].any()
    changed = embedded.detach().clone()
    changed[0, :begin] += 1
    changed[0, end:] -= 1
    assert torch.equal(packed(inputs_embeds=changed, **given, use_cache=False).logits[0, begin:end], logits[begin:end].detach())


@pytest.mark.parametrize(("lengths", "window"), [([40], None), ([13, 1, 26], None), ([13, 27], 8)])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_rows_on_a_cpu_are_sdpa_s_and_their_outputs_kept_once(lengths, window, heads, kv_heads):
    def given() -> list[torch.Tensor]:
        torch.manual_seed(0)
        return [torch.randn(1, n, 40, 16, requires_grad=True) for n in (heads, kv_heads, kv_heads)]

    ours, theirs = given(), given()
    kept: dict[int, int] = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, _ = attention.attention(None, *ours, None, scaling=0.25, sliding_window=window, cu_seq_lens_q=bounds)
    expected = attention._by_rows(*theirs, lengths, 0.0, 0.25, window)
    assert torch.equal(out, expected)
    direction = torch.randn_like(out)
    out.backward(direction)
    expected.backward(direction)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs))
    sums = 4 * 40 * heads
    assert sum(kept.values()) == sum(t.nbytes for t in ours) + out.nbytes + sums


def test_a_call_without_bounds_is_ordinary_attention(model):
    """Sample answers are generated by the model as it is set up for training."""
    attention.register()
    ordinary, ours = model("qwen2"), model("qwen2")
    ours.set_attn_implementation(attention.NAME)
    ids, mask = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert torch.allclose(ours(ids).logits, ordinary(ids).logits, atol=1e-5)
    kept = mask.bool()
    assert torch.allclose(ours(ids, attention_mask=mask).logits[kept], ordinary(ids, attention_mask=mask).logits[kept], atol=1e-5)
    left = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert ours.generate(**left).tolist() == ordinary.generate(**left).tolist()


def test_models_are_packed_only_where_it_is_right(model):
    assert all(layout.packs(model(name), "auto", "fp32") for name in PACKING)
    wrong = model("llama")
    inner = wrong.model.forward
    # A model that mixes neighbouring tokens, as one with convolutions or a state does.
    wrong.model.layers[0].register_forward_hook(lambda module, args, out: out + out.roll(1, dims=1))
    assert wrong.model.forward == inner and not layout.packs(wrong, "auto", "fp32")
    assert wrong.config._attn_implementation != attention.NAME, "left as it came"
    chunked = model("llama")
    chunked.config.attention_chunk_size = 64
    assert not layout.may_pack(chunked)


# ---- the loss at the output layer


@pytest.mark.parametrize("logits", [1, 512 * 4 * 10, 1 << 30])
@pytest.mark.parametrize("tied", [True, False])
def test_the_loss_in_chunks_is_the_loss_of_the_logits(model, monkeypatch, tied, logits):
    monkeypatch.setattr("src.training.head.ON_CPU", logits)
    batches = [micro_batch(ROWS, [0, 1, 2], 0, packed=False), micro_batch(ROWS, [3, 4], 0, packed=False)]
    plain = step_of(model("qwen2", tie_word_embeddings=tied), batches)
    ours = model("qwen2", tie_word_embeddings=tied)
    chunked = step_of(ours, batches, HeadLoss(ours, chunked=True))
    assert chunked[0] == pytest.approx(plain[0], rel=1e-6)
    assert apart(plain[1], chunked[1]) < 1e-5
    whole = model("qwen2", tie_word_embeddings=tied)
    assert apart(plain[1], step_of(whole, batches, HeadLoss(whole, chunked=False))[1]) < 1e-6


@pytest.mark.parametrize("targets", [["lm_head"], ["lm_head", "q_proj"], ["q_proj"]])
def test_the_loss_in_chunks_works_with_lora_on_the_output_layer_and_with_a_frozen_one(model, monkeypatch, targets):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr("src.training.head.ON_CPU", 512 * 4 * 10)
    results = []
    for fused in (False, True):
        base = model("qwen2", tie_word_embeddings=False)
        torch.manual_seed(3)
        tuned = get_peft_model(base, LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
        head = HeadLoss(base, chunked=True) if fused else None
        results.append(step_of(tuned, [micro_batch(ROWS, [0, 2], 0, packed=False)], head))
    (plain, gradients), (ours, chunked) = results
    assert ours == pytest.approx(plain, rel=1e-6) and apart(gradients, chunked) < 1e-5
    assert len(gradients) == 2 * ("lm_head" in targets) + 4 * ("q_proj" in targets)


def test_a_micro_batch_with_nothing_trained_has_no_loss_and_gradients_of_zero(model):
    ids = ROWS[0].input_ids
    empty = [Example(ids, np.full_like(ids, encoding.IGNORE))]
    for batch in (micro_batch(empty, [0], 0, packed=False), micro_batch(empty, [], 0, packed=False)):
        ours = model("llama")
        loss, gradients = step_of(ours, [batch], HeadLoss(ours, chunked=True))
        assert loss == 0 and len(gradients) == len(list(ours.parameters())) and not any(g.any() for g in gradients.values())


def test_the_loss_in_chunks_is_taken_only_where_it_is_the_model_s_loss(model):
    assert all(layout.fuses(model(name), "fp32") for name in PACKING)
    assert not layout.fuses(model("granite"), "fp32"), "it scales its logits behind the output layer"
    assert model("granite").get_output_embeddings().forward.__name__ == "forward"


def test_in_evaluation_each_token_s_loss_and_hit_are_those_of_the_logits(model, monkeypatch):
    monkeypatch.setattr("src.training.head.ON_CPU", 512 * 4 * 10)
    plain, batch = model("qwen2"), micro_batch(ROWS, [0, 2], 0, packed=False)
    head = HeadLoss(plain, chunked=True)
    with torch.no_grad():
        with head.learning(Targets(batch["targets"])):
            ours = plain(**layout.inputs_of(batch, "cpu"), logits_to_keep=batch["keep"]).logits
        logits = plain(**layout.inputs_of(batch, "cpu")).logits[batch["keep"]]
    assert torch.allclose(ours[:, 0], torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="none"), atol=1e-5)
    assert torch.equal(ours[:, 1].bool(), logits.argmax(-1) == batch["targets"])


def test_the_logits_of_a_chunk_are_gone_before_the_next_are_made(model, monkeypatch):
    monkeypatch.setattr("src.training.head.ON_CPU", 512 * 4 * 2)
    plain, batch = model("qwen2"), micro_batch(ROWS, [0, 2], 0, packed=False)
    head, made, together = HeadLoss(plain, chunked=True), [], []

    def logits(hidden, layer=head.logits):
        together.append(sum(one() is not None for one in made))
        out = layer(hidden)
        made.append(weakref.ref(out))
        return out

    head.logits = logits
    step_of(plain, [batch], head)
    assert len(together) > 2 and not any(together)


def test_memory_is_given_back_on_the_way_through_a_pass_that_keeps_its_activations(model, monkeypatch):
    """But for a small part of the time."""
    calls: list[int] = []
    monkeypatch.setattr(devices, "trim", lambda: calls.append(1))
    monkeypatch.setattr(devices, "_next_trim", 0.0)
    plain, batch = copy.deepcopy(model("llama")), micro_batch(ROWS, [0, 2], 0, packed=False)
    choices.trim_on_the_way(plain)
    with torch.no_grad():
        plain(**layout.inputs_of(batch, "cpu"))
    assert not calls
    plain(**layout.inputs_of(batch, "cpu"))
    assert len(calls) == plain.config.num_hidden_layers > 1
    calls.clear()
    monkeypatch.setattr(devices, "trim", lambda: time.sleep(calls.append(1) or 0.01))
    plain(**layout.inputs_of(batch, "cpu"))
    assert len(calls) == 1


# ---- the plan of a run


def plan(lengths, batch=8, world=1, capacity=100, packed=True, epochs=2.0, seed=1):
    lengths = np.array(lengths)
    return BatchPlan(lengths, batch, world, capacity, packed, round(len(lengths) * epochs), seed)


LENGTHS = np.random.default_rng(0).integers(5, 60, 101)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("capacity", [60, 150, 10_000])
def test_every_row_is_seen_once_an_epoch_however_it_is_laid_out(world, packed, capacity):
    made = plan(LENGTHS, world=world, packed=packed, capacity=capacity)
    seen = []
    for step in range(made.steps):
        micro = made.layout(step)
        assert all(len(bins) == world for bins in micro)
        rows = [row for bins in micro for part in bins for row in part]
        assert sorted(rows) == sorted(made.examples(step)), "the layout deals out the step's rows and no others"
        assert max(made.size(part) for bins in micro for part in bins) <= capacity
        if step < made.steps - 1:
            assert all(part for bins in micro for part in bins), "only a run's last step may leave a process idle"
        seen += made.examples(step)
    assert sorted(seen[:101]) == sorted(seen[101:]) == list(range(101)) and seen[:101] != seen[101:]
    assert [s for s in range(1, made.steps + 1) if made.ends_epoch(s)] == [13, 26]


def test_the_order_follows_from_the_seed_and_from_nothing_else():
    rows = [[p.examples(s) for s in range(p.steps)] for p in (plan(LENGTHS), plan(LENGTHS, world=2, capacity=60, packed=False))]
    assert rows[0] == rows[1]
    assert rows[0] != [plan(LENGTHS, seed=2).examples(s) for s in range(26)]
    assert plan(LENGTHS).layout(3) == plan(LENGTHS).layout(3)


def test_packing_fills_passes_evenly_and_pads_nothing(monkeypatch):
    made = plan(LENGTHS, world=2, capacity=150)
    sizes = [[made.size(part) for part in bins] for step in range(made.steps - 1) for bins in made.layout(step)]
    assert np.mean([max(s) - min(s) for s in sizes]) < 0.25 * np.mean(sizes), "two processes have about the same to do"
    assert made.size(made.longest()) == max(map(max, sizes))
    monkeypatch.setattr(batches, "SEARCHED", 0)
    assert made.capacity >= made.size(made.longest()) >= max(map(max, sizes))
    # As few passes as a lower bound allows, in nearly every step.
    least = sum(-(-int(made.lengths[made.examples(s)].sum()) // 300) for s in range(made.steps))
    assert sum(len(made.layout(s)) for s in range(made.steps)) <= 1.35 * least


def test_a_row_is_a_step_of_its_process_with_its_own_positions():
    made = plan([len(row.input_ids) for row in ROWS], batch=4, world=2, capacity=80, epochs=1)

    class Rows(list):
        trained_tokens = np.array([(row.labels != encoding.IGNORE).sum() for row in ROWS])
        trained_weight = trained_tokens.astype(float)

    both = [Steps(made, Rows(ROWS), rank, pad=0) for rank in range(2)]
    assert len(both[0]) == 2
    for step in range(2):
        items = [steps[step] for steps in both]
        assert items[0]["trained"] == items[1]["trained"] == sum(len(b["targets"]) for item in items for b in item["micro_batches"])
        assert len(items[0]["micro_batches"]) == len(items[1]["micro_batches"])
        assert items[0]["tokens"] == sum(len(ROWS[row].input_ids) for row in made.examples(step))
    batch = micro_batch(ROWS, [1, 3], 0, packed=True)
    assert batch["position_ids"].tolist() == [[*range(7), *range(12)]] and batch["cu_seq_lens_q"].tolist() == [0, 7, 19]
    # The last token of a row never predicts the first of the next.
    assert not batch["keep"][0, 6] and not batch["keep"][0, 18]
    assert batch["targets"].tolist() == [*ROWS[1].input_ids[5:7], *ROWS[3].input_ids[5:10]]


def test_padding_that_equals_the_stop_token_does_not_untrain_it():
    ids = np.array([5, 6, 511], dtype=np.int32)
    rows = [Example(ids, np.array([encoding.IGNORE, 6, 511], dtype=np.int32)), ROWS[0]]
    batch = micro_batch(rows, [0, 1], 511, packed=False)
    assert batch["keep"][0].tolist() == [True, True] + [False] * 29
    assert batch["targets"][:2].tolist() == [6, 511] and batch["attention_mask"][0].sum() == 3


# ---- weights


def test_a_token_weighs_in_the_loss_as_much_as_it_should(model):
    """Weighted rows: losses and gradients are those of a plain weighted sum, packed and padded, in chunks and not, and a step divides by its weight."""
    rows = [Example(r.input_ids, r.labels, np.full(len(r.labels), w, np.float32)) for r, w in zip(ROWS, (0.5, 2.0))] + [ROWS[3]]
    expected: dict[str, torch.Tensor] = {}
    total, made = 0.0, model("qwen2").train()
    for row, weight in zip(rows, (0.5, 2.0, 1.0)):
        logits = made(torch.from_numpy(row.input_ids).long()[None]).logits[0, :-1]
        labels = torch.from_numpy(row.labels[1:].astype(np.int64))
        loss = weight * torch.nn.functional.cross_entropy(logits, labels, ignore_index=encoding.IGNORE, reduction="sum")
        loss.backward()
        total += loss.item()
    expected = {name: p.grad.clone() for name, p in made.named_parameters()}
    for chunked in (True, False):
        made.zero_grad()
        batch = micro_batch(rows, [0, 1, 2], 0, packed=False)
        assert len(batch["weights"]) == len(batch["targets"])
        head = HeadLoss(made, chunked=chunked)
        with head.learning(Targets(batch["targets"], None, batch["weights"])):
            out = made(**layout.inputs_of(batch, "cpu"), logits_to_keep=batch["keep"], use_cache=False).logits
        out.sum().backward()
        head.remove()
        assert out.sum().item() == pytest.approx(total, rel=1e-5)
        for name, parameter in made.named_parameters():
            assert torch.allclose(parameter.grad, expected[name], atol=2e-4), name
    assert "weights" not in micro_batch(ROWS, [0, 1], 0, packed=True)
    packed = micro_batch(rows, [1, 2], 0, packed=True)
    assert packed["weights"].tolist() == [2.0] * int((rows[1].labels[1:] != -100).sum()) + [1.0] * int((rows[2].labels[1:] != -100).sum())


def test_as_many_rows_are_measured_as_take_a_fiftieth_of_the_training_and_at_least_64():
    rows = np.full(1000, 50)
    assert batches.rows_to_measure(rows, trained=1_000_000, times=6) == 200  # 60,000 tokens at a third of the cost, over six times
    assert batches.rows_to_measure(rows, trained=1_000, times=6) == 64
    assert batches.rows_to_measure(rows, trained=10**9, times=6) == 1000
    assert batches.rows_to_measure(rows[:10], trained=1_000, times=6) == 10
    assert batches.rows_to_measure(rows[:0], trained=1_000, times=6) == 0
