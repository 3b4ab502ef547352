"""What ends a run that has gone wrong or cannot go through, and what it says; and that looking for it changes nothing."""

import json
import time
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAT, go, helps, make_base

from src import data, finetune
from src.core import artifact
from src.core.compose import compose
from src.core.errors import MissingTool, NoMemory, NoRoom, ProofFailed
from src.settings.verbs import FinetuneVerb
from src.training import batches, choices, layout, probe, reports, rules, session

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")
FAST = ["tuner.learning_rate=3e-3", "train.log_steps=1", "train.eval_steps=1000", "train.samples=0"]


@pytest.fixture
def run(tmp_path, eighty, capsys):
    """run(name, *overrides) -> (exit code, what was said) of a run on the shared dataset."""

    def run(name, *argv, base=CHAT, source=eighty):
        code = go(finetune, f"outputs={tmp_path}", f"run={name}", f"source={source}", f"model.path={base}", *FAST, *argv)
        return code, capsys.readouterr().err

    return run


@helps("training/reports.py", "a lower tuner.learning_rate, with force=true")
def test_a_loss_that_is_not_a_number_stops_the_run_with_its_step_and_records(run, eighty, tmp_path, monkeypatch):
    plans, made = [], batches.BatchPlan
    monkeypatch.setattr(session, "BatchPlan", lambda *given: plans.append(made(*given)) or plans[-1])
    code, said = run("nan", "tuner.learning_rate=1e30", "train.warmup=0", "train.max_grad_norm=0", "train.max_steps=20")
    assert code == ProofFailed.exit_code and "Traceback" not in said
    step = int(said.split("the loss became nan at step ")[1].split()[0])
    ids = [json.loads(line)["id"] for line in open(eighty / "train.jsonl")]
    named = said.split("records ")[1].split("\n")[0].split(", ")
    assert sorted(named) == sorted(ids[row] for row in plans[-1].examples(step - 1)), "those of the step, and no others"
    assert "a lower tuner.learning_rate, with force=true" in said and not (tmp_path / "nan" / "finetune").exists()
    code, said = run("nan", "tuner.learning_rate=1e-4", "train.warmup=0", "train.max_grad_norm=0", "train.max_steps=2", "force=true")
    assert code == 0, said


@pytest.mark.slow
def test_a_loss_that_does_not_move_stops_the_run(run):
    code, said = run("still", "tuner.learning_rate=1e-12", "train.max_steps=40", "train.eval_steps=10")
    assert code == ProofFailed.exit_code and "the loss does not move: by step 20" in said and "a higher tuner.learning_rate" in said
    assert "on the validation split, as before the first step" in said


@helps("training/reports.py", "a higher tuner.learning_rate, with force=true")
def test_a_constant_training_loss_stops_the_run_without_a_validation_split(run, tmp_path):
    one = [{"id": "x", "conversations": [{"from": "user", "value": "What is 1?"}, {"from": "assistant", "value": "It is a number."}]}]
    (tmp_path / "one.json").write_text(json.dumps(one))
    assert go(data, f"outputs={tmp_path}", "run=one", f"data.path={tmp_path / 'one.json'}", "data.val=0", "data.calib=0") == 0
    still = ["tuner.learning_rate=1e-12", "tuner.dropout=0", "train.max_steps=40", "train.global_batch_size=1"]
    code, said = run("constant", *still, source=tmp_path / "one" / "data")
    assert code == ProofFailed.exit_code and "for 20 steps" in said and "records of the last step: x" in said
    moving = ["tuner.learning_rate=1e-3", *still[1:], "train.max_steps=21", "force=true"]
    code, said = run("constant", *moving, source=tmp_path / "one" / "data")
    assert code == 0, said


def test_three_reports_without_a_gradient_stop_the_run():
    seen = SimpleNamespace(plan=SimpleNamespace(epoch=lambda step: 1.0, examples=lambda step: [0]), examples=SimpleNamespace(lines=[1]))
    watched = reports.Reports.__new__(reports.Reports)
    watched.trainer, watched.zero_norms, watched.lesson = seen, 2, SimpleNamespace(source=CHAT / "none.jsonl")
    watched.record_ids = lambda step: ["a"]
    with pytest.raises(ProofFailed, match="no gradient in three reports"):
        watched.on_log(None, SimpleNamespace(global_step=9), None, logs={"loss": 1.0, "grad_norm": 0.0, "learning_rate": 1e-3})


@pytest.mark.parametrize("tuner", [["tuner.rank=8"], ["tuner=full"]])
def test_the_probe_leaves_no_trace(run, tmp_path, monkeypatch, tuner):
    """The same weights and losses to the last bit, dropout and trained rows included, as without it."""
    argv, base = [*tuner, "train.max_steps=3"], make_base(tmp_path / "base")
    code, said = run("probed", *argv, base=base)
    assert code == 0 and "forward, backward, optimizer step and saving" in said, said
    monkeypatch.setattr(probe.Probe, "on_train_begin", lambda *args, **kwargs: None)
    code, said = run("plain", *argv, base=base)
    assert code == 0 and "forward, backward" not in said
    one, other = (artifact.open_artifact(tmp_path / name / "finetune") for name in ("probed", "plain"))
    assert one.files == other.files, "equal hashes"
    assert one.metrics["curve"] == other.metrics["curve"]


def test_too_little_room_for_the_checkpoints_is_said_before_the_first_step(run, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(probe.shutil, "disk_usage", lambda folder: Usage(100, 99, 1))
    code, said = run("full-disk", "train.max_steps=3", "room=ignore")
    assert code == NoRoom.exit_code and "the run's checkpoints and result need about" in said and "step 1/" not in said


def machine(monkeypatch, total: float, available: float):
    Memory = namedtuple("Memory", "total available")
    monkeypatch.setattr(layout.psutil, "virtual_memory", lambda: Memory(total, available))
    monkeypatch.setattr(layout, "available", lambda: available)


def test_activations_are_recomputed_only_where_memory_is_short(run, monkeypatch):
    code, said = run("roomy", "train.max_steps=2")
    assert code == 0, said
    assert "activations kept" in said
    need = (
        3 * rules.LOGITS + 4e6
    )  # more than the gradients and optimizer states of these adapters, less than a conversation's activations too
    machine(monkeypatch, 64e9, need / 0.8 + 5e6)
    code, said = run("short", "train.max_steps=2")
    assert code == 0 and "activations recomputed" in said, said


def test_a_layer_that_is_recomputed_counts_as_held(run, monkeypatch):
    """Of what a pass keeps while activations are recomputed: the checkpoints, and one layer's activations, which are there again when their turn comes."""
    asked, kept = [], layout.kept_bytes

    def note(left, each, **more):
        asked.append(each)
        return 10**6

    tokens = {}

    def measured(model, batch):
        found = kept(model, batch)
        tokens[model.get_base_model().is_gradient_checkpointing] = found / batch["input_ids"].numel()
        return found

    monkeypatch.setattr(rules, "tokens_that_fit", note)
    monkeypatch.setattr(layout, "kept_bytes", measured)
    code, said = run("recomputed", "train.max_steps=2", "train.gradient_checkpointing=true")
    assert code == 0 and "activations recomputed" in said, said
    layers = json.loads((CHAT / "config.json").read_text())["num_hidden_layers"]
    assert tokens[True] < tokens[False] and asked == [pytest.approx(tokens[True] + tokens[False] / layers)]


def test_a_given_micro_batch_is_recomputed_too_where_it_does_not_fit(run, monkeypatch):
    """A conversation fits while activations are kept, two do not."""
    monkeypatch.setattr(rules, "tokens_that_fit", lambda left, each, **more: 60)
    code, said = run("given", "train.max_steps=2", "train.micro_batch_size=8")
    assert code == 0 and "activations recomputed" in said, said


@helps("training/layout.py", "train.gradient_checkpointing=true")
def test_a_machine_that_cannot_hold_one_conversation_says_so(run, monkeypatch):
    asked, needed = [], rules.needed
    monkeypatch.setattr(rules, "needed", lambda *given, **more: asked.append(needed(*given, **more)) or asked[-1])
    machine(monkeypatch, 1e8, 1e8)
    for given, way in (("false", "fix:   train.gradient_checkpointing=true"), ("true", "fix:   train.max_length=N, lower")):
        code, said = run("tiny", "train.max_steps=2", f"train.gradient_checkpointing={given}")
        assert code == NoMemory.exit_code and way in said and "this machine has 100 MB" in said
    kept, recomputed = asked
    machine(monkeypatch, (kept + recomputed) / 2, 1e8)
    assert run("tiny", "train.max_steps=2", "train.gradient_checkpointing=false")[0] == NoMemory.exit_code
    assert run("tiny", "train.max_steps=2", "train.gradient_checkpointing=true")[0] == 0


def test_what_takes_less_memory_is_advised_where_it_would(monkeypatch):
    def advised(*argv, gpu=True, checkpointing=False, one=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
        cfg = compose("finetune", argv, FinetuneVerb)
        return [way.split(",")[0].split(" or ")[0] for way in layout.smaller(cfg, checkpointing=checkpointing, one=one)]

    every = ["train.micro_batch_size=1", "train.gradient_checkpointing=true", "train.max_length=N", "tuner=lora", "deepspeed=zero3_offload"]
    assert advised("tuner=full") == every
    assert advised("tuner=full", gpu=False) == every[:-1]  # a machine has no other memory to move anything to
    assert advised("tuner=full", "deepspeed=zero3_offload") == every[:-1]
    assert advised("tuner=lora", checkpointing=True, one=True) == [every[2], every[4]]
    assert advised("tuner=qlora", checkpointing=True, one=True) == [every[2]]  # a 4-bit base cannot be partitioned


@helps("training/layout.py", "train.{}=auto")
def test_what_a_model_is_not_proven_to_take_is_an_error_only_where_it_was_asked_for(run, monkeypatch):
    monkeypatch.setattr(layout, "packs", lambda *args: False)
    code, said = run("padded", "train.max_steps=2")
    assert code == 0 and "batches: padded" in said
    code, said = run("asked", "train.max_steps=2", "train.packing=true")
    assert code == ProofFailed.exit_code and "train.packing=auto" in said
    assert run("auto", "train.max_steps=2", "train.packing=auto")[0] == 0


# ---- choices by device


@helps("training/choices.py", "train.precision=auto", "train.optimizer=auto", "train.kernels=auto")
def test_what_a_cpu_cannot_do_is_refused():
    from src.core.errors import ConfigError

    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    for refused in (lambda: choices.precision_of("fp16"), lambda: choices.optimizer_of("adamw_8bit")):
        with pytest.raises(ConfigError, match="needs a GPU"):
            refused()
    assert choices.precision_of("auto") and choices.optimizer_of("auto")
    with pytest.raises(MissingTool, match="liger"):
        choices.apply_kernels(None, "liger")
    choices.apply_kernels(torch.nn.Module(), "auto")


def test_a_cpu_trains_in_bf16_only_where_it_has_units_for_it(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    for there, chosen in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda there=there: there)
        assert choices.precision_of("auto") == chosen and choices.precision_of("bf16") == "bf16"


@pytest.mark.parametrize(
    "name,tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("Tesla T4", 65),
        ("Radeon RX 7900", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name, tflops):
    found = choices.peak_operations(name)
    assert found == (tflops and pytest.approx(tflops * 1e12, rel=0.05))


def test_operations_of_a_token_count_what_is_trained_and_what_is_looked_up():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHAT, local_files_only=True)
    count = sum(p.numel() for p in model.parameters())
    assert model.config.tie_word_embeddings and reports.operations_per_token(model) == 6 * count
    for parameter in model.parameters():
        parameter.requires_grad = False
    assert reports.operations_per_token(model) == 4 * count
    assert reports.operations(model, 10, 10) == 40 * count
    assert reports.operations(model, 10, 3) == 40 * count - 4 * 7 * model.get_output_embeddings().weight.numel()


def test_the_speed_of_matrix_products_is_measured_as_they_are():
    """Within a factor of a product of the same shape: other work on the machine comes and goes."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(CHAT, local_files_only=True)
    width = model.config.hidden_size
    x, w = torch.ones(512, width), torch.ones(4 * width, width)
    begun = time.perf_counter()
    for _ in range(20):
        x @ w.T
    plain = 20 * 2 * x.numel() * len(w) / (time.perf_counter() - begun)
    assert plain / 10 < choices.sgemm_operations(model) < plain * 10
