"""Three optimizer steps of `finetune` are those of a plain loop over torch.optim.AdamW, for a full fine-tune and for LoRA.

The loop below is written from the papers and torch's documentation, not from the trainer: AdamW with both betas and decoupled weight decay
(Loshchilov & Hutter 2019, arXiv:1711.05101), the gradient's norm clipped, a cosine schedule with linear warm-up, and a loss that is the mean over
the trained tokens of a whole step, however the step is cut into forward passes.
"""

import json
import math

import numpy as np
import pytest
import torch
from conftest import helps, in_process, write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from src.core.errors import ProofFailed

STEPS, BATCH, SEED = 3, 4, 1234
RATE, BETAS, DECAY, CLIP, WARMUP = 3e-3, (0.8, 0.9), 0.3, 0.5, 0.4
TALKS = [
    ("Hi!", "Hello there."),
    ("What is the capital of Sweden?", "The capital of Sweden is Stockholm."),
    ("Tell me a story.", "Once there was a duck. It went quack all day, and that is all there is to tell."),
    ("Bye", "See you."),
    ("Count to five, please.", "One, two, three, four, five."),
    ("Name an animal.", "A goat."),
    ("And another?", "An owl, which sleeps by day and flies by night."),
]
SETTINGS = [
    f"train.global_batch_size={BATCH}",
    f"train.max_steps={STEPS}",
    f"train.warmup={WARMUP}",
    f"train.weight_decay={DECAY}",
    f"train.adam_beta1={BETAS[0]}",
    f"train.adam_beta2={BETAS[1]}",
    f"train.max_grad_norm={CLIP}",
    f"train.seed={SEED}",
    f"tuner.learning_rate={RATE}",
    "train.precision=fp32",
    "train.log_steps=1",
    "train.samples=0",
    "train_new_tokens=never",
    "max_loss_change=1",
    "launch.nproc_per_node=1",
]


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """The dataset artifact of TALKS, all for training."""
    folder = tmp_path_factory.mktemp("talks")
    records = [
        {"id": str(i), "conversations": [{"from": "user", "value": q}, {"from": "assistant", "value": a}]} for i, (q, a) in enumerate(TALKS)
    ]
    (folder / "talks.json").write_text(json.dumps(records))
    done = in_process("data", f"outputs={folder}", "run=d", f"data.path={folder / 'talks.json'}", "data.val=0", "data.calib=0")
    assert done.returncode == 0, done.stderr
    return folder / "d" / "data"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("base") / "model", tie_word_embeddings=False)


def examples(folder, tokenizer) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ids, labels) of each record in the split's order: the assistant's words and the token that ends its turn are trained."""
    found = []
    for line in open(folder / "train.jsonl", encoding="utf-8"):
        messages = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        stop = ids.index(tokenizer.convert_tokens_to_ids("<|im_end|>"), start)
        labels = [-100] * start + ids[start : stop + 1] + [-100] * (len(ids) - stop - 1)
        found.append((torch.tensor(ids), torch.tensor(labels)))
    return found


def order() -> list[list[int]]:
    """Which examples are in which step: each epoch a permutation drawn from (seed, epoch), laid end to end."""
    row = np.concatenate([np.random.default_rng([SEED, epoch]).permutation(len(TALKS)) for epoch in range(2)])
    return [row[i * BATCH : (i + 1) * BATCH].tolist() for i in range(STEPS)]


def rate_at(step: int) -> float:
    """The learning rate of a step counted from 0: up to RATE, from above 0, in ceil(WARMUP x STEPS) steps, then half a cosine down."""
    rise = math.ceil(WARMUP * STEPS)
    if step < rise:
        return RATE * (step + 1) / (rise + 1)
    return RATE * 0.5 * (1 + math.cos(math.pi * (step - rise) / (STEPS - rise)))


def plain(model, rows, decayed) -> tuple[list[float], list[float]]:
    """Train `model` in place; (loss, norm of the gradient before clipping) of each step. decayed(name): whether weight decay applies."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in named if decayed(name)], "weight_decay": DECAY},
        {"params": [p for name, p in named if not decayed(name)], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=BETAS, eps=1e-8)
    losses, norms = [], []
    for step, chosen in enumerate(order()):
        trained = sum(int((rows[i][1] != -100).sum()) for i in chosen)
        total = 0.0
        for ids, labels in (rows[i] for i in chosen):
            logits = model(ids[None]).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum") / trained
            loss.backward()
            total += loss.item()
        norms.append(torch.nn.utils.clip_grad_norm_([p for _, p in named], CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, norms


def logged(err: str) -> tuple[list[float], list[float]]:
    """(losses, gradient norms) as the run said them, a line a step."""
    lines = [line for line in err.splitlines() if line.startswith("  step ") and "  loss " in line]
    return [float(line.split("  loss ")[1].split()[0]) for line in lines], [float(line.split("  grad ")[1].split()[0]) for line in lines]


@pytest.mark.usefixtures("proofs_in_this_process")
@pytest.mark.parametrize("micro", [1, 4])
def test_a_full_fine_tune_is_the_plain_loop(micro, base, talks, tmp_path):
    argv = [f"outputs={tmp_path}", f"source={talks}", f"model.path={base}", "tuner=full", f"train.micro_batch_size={micro}"]
    done = in_process("finetune", *argv, *SETTINGS)
    assert done.returncode == 0, done.stderr
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses, norms = plain(model.train(), examples(talks, tokenizer), lambda name: "norm" not in name)
    said = logged(done.stderr)
    assert said[0] == pytest.approx(losses, abs=6e-5) and said[1] == pytest.approx(norms, abs=6e-3)
    assert min(norms) > CLIP, "clipping has to matter here"
    ours = load_file(tmp_path / "default" / "finetune" / "model.safetensors")
    for name, wanted in model.named_parameters():
        moved = (wanted - begun[name]).norm()
        assert moved > 0 and (ours[name] - wanted).norm() < 2e-3 * moved, name


@pytest.mark.usefixtures("proofs_in_this_process")
def test_lora_is_the_plain_loop(base, talks, tmp_path):
    """peft draws the A matrices from the seed; they are taken from a run of no rate at all, whose steps leave them as drawn."""
    argv = [f"source={talks}", f"model.path={base}", "tuner=lora", "tuner.rank=4", "tuner.alpha=8", "tuner.dropout=0"]
    done = in_process("finetune", f"outputs={tmp_path / 'ours'}", *argv, *SETTINGS)
    assert done.returncode == 0, done.stderr
    start = initial(base, tmp_path / "start")
    from peft import PeftModel

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), start, is_trainable=True)
    losses, norms = plain(model.train(), examples(talks, AutoTokenizer.from_pretrained(base)), lambda name: True)
    said = logged(done.stderr)
    assert said[0] == pytest.approx(losses, abs=6e-5) and said[1] == pytest.approx(norms, abs=6e-3)
    ours = load_file(tmp_path / "ours" / "default" / "finetune" / "adapter_model.safetensors")
    first = load_file(start / "adapter_model.safetensors")
    wanted = {name.replace(".default", ""): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    assert wanted.keys() == ours.keys()
    for name, value in wanted.items():
        moved = (value - first[name]).norm()
        assert moved > 0 and (ours[name] - value).norm() < 5e-3 * moved, name


def initial(base, folder):
    """The adapter as the run begins it, B zero: drawn by peft after the run's seed is set, as finetune does before it loads the base."""
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(SEED)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear", bias="none")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


SHORT = [f"train.global_batch_size={len(TALKS)}", "train.log_steps=1", "train.samples=0", "train.precision=fp32", "launch.nproc_per_node=1"]
GOLDEN = {
    "full": [7.1713, 6.2013],
    "lora": [7.1713, 6.4118],
    "qlora": [7.1122, 6.3506],
}
"""losses of the first two steps with each tuner's own defaults but a rate that shows (CPU, fp32); the second is what one step of it taught"""


@pytest.mark.usefixtures("proofs_in_this_process")
@pytest.mark.parametrize("tuner", GOLDEN)
def test_one_step_of_each_tuner_teaches_what_it_always_did(tuner, base, talks, tmp_path):
    argv = [f"outputs={tmp_path}", f"source={talks}", f"model.path={base}", f"tuner={tuner}", "tuner.learning_rate=1e-2", "train.warmup=0"]
    done = in_process("finetune", *argv, *SHORT, "train.max_steps=2", "max_loss_change=1")
    assert done.returncode == 0, done.stderr
    assert logged(done.stderr)[0] == pytest.approx(GOLDEN[tuner], abs=2e-3)


@helps("models/adapter_files.py", "a higher tuner.learning_rate, with force=true")
@helps("training/saving.py", "a higher tuner.learning_rate, with force=true")
@pytest.mark.usefixtures("proofs_in_this_process")
@pytest.mark.parametrize("tuner", ["full", "lora"])
def test_a_run_of_one_step_teaches_and_one_of_no_rate_is_refused(tuner, base, talks, tmp_path):
    """One step is all warm-up: it is taken at half the rate. The way out that the refusal names is taken, too."""
    argv = [f"outputs={tmp_path}", f"source={talks}", f"model.path={base}", f"tuner={tuner}", "train.max_steps=1", *SHORT]
    tiny = in_process("finetune", *argv, "tuner.learning_rate=1e-30", "max_loss_change=1")
    assert (
        tiny.returncode == ProofFailed.exit_code
        and "learnt nothing" in tiny.stderr
        and "a higher tuner.learning_rate, with force=true" in tiny.stderr
    )
    assert not (tmp_path / "default" / "finetune").exists()
    done = in_process("finetune", *argv, "tuner.learning_rate=1e-3", "max_loss_change=1", "force=true")
    assert done.returncode == 0, done.stderr
    assert "lr 5.00e-04" in done.stderr
