"""Training: what changes and what does not, resume, several processes, 4-bit bases, and the numbers a run reports."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import END, START, go, helps, in_terminal, make_base, process, to_its_end
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from src import data, finetune, merge
from src.core import artifact
from src.core.compose import compose
from src.core.errors import BadData, WrongKind
from src.models import generation, token_rows
from src.models.held import is_held
from src.models.loading import load_any, load_tokenizer
from src.settings.verbs import FinetuneVerb
from src.training import session
from src.training.deepspeed_config import CPU_BUCKET, deepspeed_json
from src.training.partitions import share_masters

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
# Rank 8 trains in a second and, at this rate, visibly within a few steps.
STEPS = 15
FAST = ["tuner.rank=8", "tuner.learning_rate=3e-3", "train.log_steps=1", "train.eval_steps=1000", "train.samples=0"]


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


@pytest.fixture(scope="module")
def train(here, eighty):
    """train(run, *overrides) -> artifact of a finished run on the shared eighty; FAST is on unless overridden."""

    def train(run, *argv, base=TINY):
        fast = [a for a in FAST if "tuner=full" not in argv or "rank" not in a]
        assert go(finetune, f"outputs={here}", f"run={run}", f"source={eighty}", f"model.path={base}", *fast, *argv) == 0
        return artifact.open_artifact(here / run / "finetune")

    return train


@pytest.fixture(scope="module", params=["tied", "untied"])
def tuned(request, here, train):
    """(base folder, adapter artifact) of LoRA on a base that never learnt ChatML."""
    base = make_base(here / f"base-{request.param}", tied=request.param == "tied")
    return base, train(request.param, f"train.max_steps={STEPS}", "train.warmup=0.2", "train.eval_steps=1000", base=base)


# ---- what a LoRA run does


def test_the_loss_falls(tuned):
    m = tuned[1].metrics
    first, last = sum(c["loss"] for c in m["curve"][:3]) / 3, sum(c["loss"] for c in m["curve"][-3:]) / 3
    print(f"train loss {first:.3f} -> {last:.3f}, validation {m['val_loss_first']:.3f} -> {m['val_loss']:.3f}")
    assert last < 0.7 * first
    assert m["val_loss"] < 0.7 * m["val_loss_first"]
    assert len(m["curve"]) == m["steps"] == STEPS and m["tokens_seen"] > STEPS * 8 * 10


def test_a_reported_loss_is_the_mean_of_the_steps_since_the_report_before(train):
    each, fifth = (
        [(c["step"], c["loss"]) for c in train(f"every-{n}", "train.max_steps=10", f"train.log_steps={n}").metrics["curve"]] for n in (1, 5)
    )
    mean = lambda begin, end: pytest.approx(sum(loss for _, loss in each[begin:end]) / (end - begin), rel=1e-5)
    assert [step for step, _ in each] == [*range(1, 11)] and fifth == [(1, mean(0, 1)), (5, mean(1, 5)), (10, mean(5, 10))]


def test_what_training_says_fits_the_terminal(here, eighty):
    argv = [f"outputs={here}", "run=columns", f"source={eighty}", f"model.path={TINY}", *FAST, "train.max_steps=6", "train.eval_steps=3"]
    said, _ = in_terminal(["-m", "src.finetune", *argv], columns=40)
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", said)]
    reports = [line for line in lines if re.match("  step|  loss|training|validation", line)]
    assert max(map(len, reports)) <= 40
    assert any(re.fullmatch(r"  step 6/6  loss \d\.\d{4}  [\d,]+ tokens/s", line) for line in reports)
    assert any(re.fullmatch(r"  step 3  validation loss \d\.\d{4}", line) for line in reports)
    assert any(re.match(r"training .*\d/6 ", line) for line in reports)


def test_the_rows_the_base_never_learnt_are_trained_and_no_other(tuned, here):
    base, adapter = tuned
    assert adapter.metrics["trained_rows"] == [START, END]
    run = adapter.path.parent.name
    assert go(merge, f"outputs={here}", f"run={run}") == 0
    before, after = load_file(base / "model.safetensors"), load_file(here / run / "merge" / "model.safetensors")
    assert before.keys() == after.keys()
    matrices = [n for n in before if "embed_tokens" in n or "lm_head" in n]
    assert len(matrices) == (1 if run == "tied" else 2)
    for name in matrices:
        changed = (before[name] != after[name]).any(1).nonzero().flatten().tolist()
        assert changed == [START, END], name
    for name in before.keys() - set(matrices):
        assert torch.equal(before[name], after[name]) != name.endswith("_proj.weight"), name
    model = AutoModelForCausalLM.from_pretrained(here / run / "merge", local_files_only=True)
    assert token_rows.untrained(model, [START, END], 1024) == [], "nothing is flagged once it was trained"


def test_plain_peft_loads_the_adapter_with_equal_outputs(tuned, monkeypatch):
    import importlib.util

    import peft.tuners.trainable_tokens.layer as layer
    from peft import PeftModel

    base, adapter = tuned
    ours, _ = load_any(adapter)
    ours = generation.logits(ours)
    spec = importlib.util.spec_from_file_location("peft.tuners.trainable_tokens.as_shipped", layer.__file__)
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    monkeypatch.setattr(layer.TrainableTokensLayer, "forward_adapters", shipped.TrainableTokensLayer.forward_adapters)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), adapter.path).eval()
    assert abs(generation.logits(plain) - ours).max() < 1e-4
    with plain.disable_adapter():
        assert abs(generation.logits(plain) - ours).max() > 0.1, "the adapter does something"


def test_the_rate_follows_a_cosine_after_its_warm_up(tuned):
    curve = tuned[1].metrics["curve"]
    warm, steps, peak = 3, STEPS, 3e-3
    for c in curve:
        k = c["step"] - 1  # the first step uses the rate of step 0
        share = (k + 1) / (warm + 1) if k < warm else 0.5 * (1 + math.cos(math.pi * (k - warm) / (steps - warm)))
        assert c["learning_rate"] == pytest.approx(peak * share, abs=1e-9), c
    assert max(c["learning_rate"] for c in curve) == pytest.approx(peak)


def test_the_adapter_folder_is_complete_and_plain(tuned):
    base, adapter = tuned
    names = (
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "generation_config.json",
        "proof.npz",
        "tokenizer.json",
        "tokenizer_config.json",
    )
    assert set(names) == set(adapter.files)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (adapter.path / name).read_bytes() == (base / name).read_bytes()
    assert artifact.verify(adapter) == []
    assert oct((adapter.path / "adapter_model.safetensors").stat().st_mode)[-3:] == "644"
    shapes = {n: t.shape for n, t in load_file(adapter.path / "adapter_model.safetensors").items()}
    assert max(s[0] for s in shapes.values()) < 1000, "no whole embedding in an adapter"


def test_new_rows_may_be_left_alone(train, here, capsys):
    adapter = train("never", "train.max_steps=2", "train_new_tokens=never", base=make_base(here / "base-tied"))
    assert adapter.metrics["trained_rows"] == []
    assert not [n for n in load_file(adapter.path / "adapter_model.safetensors") if "trainable_tokens" in n]
    assert "train_new_tokens=never" in capsys.readouterr().err


def test_a_base_that_knows_chatml_trains_no_rows(train):
    adapter = train("plain", "train.max_steps=2")
    assert adapter.metrics["trained_rows"] == [] and adapter.metrics["turn_end"] == END


# ---- full fine-tuning


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_fine_tune_is_saved_in_the_base_s_dtype(dtype, here, train):
    base = make_base(here / f"base-{dtype}", dtype=dtype, blank=False)
    model = train(f"full-{dtype}", "tuner=full", "train.max_steps=2", base=base)
    before, after = load_file(base / "model.safetensors"), load_file(model.path / "model.safetensors")
    assert before.keys() == after.keys() and model.kind == "model"
    assert {t.dtype for t in after.values()} == {getattr(torch, dtype)}
    config = json.loads((model.path / "config.json").read_text())
    assert config["dtype"] == dtype and config["eos_token_id"] == END
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("_proj.weight"))
    assert AutoModelForCausalLM.from_pretrained(model.path, local_files_only=True).dtype == getattr(torch, dtype)


# ---- numbers


def test_over_long_rows_are_dropped_and_counted(train, eighty, capsys):
    tokenizer = load_tokenizer(TINY)
    lengths = [len(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)) for line in open(eighty / "train.jsonl")]
    limit = sorted(lengths)[len(lengths) // 2]
    long = [n for n in lengths if n > limit]
    done = train("short", f"train.max_length={limit}", "train.long_share=1", "train.epochs=0.5", "train.global_batch_size=3")
    assert done.metrics["train_rows"] == len(lengths) - len(long)
    assert (
        f"train: dropped {len(long)} of {len(lengths)} rows ({sum(long):,} tokens) longer than train.max_length={limit}"
        in capsys.readouterr().err
    )
    assert done.metrics["steps"] == math.ceil(round(0.5 * done.metrics["train_rows"]) / 3)


@helps("training/chats.py", "a higher train.max_length")
def test_nothing_left_to_train_on_is_the_user_s_error(here, eighty, capsys):
    assert go(finetune, f"outputs={here}", "run=none", f"source={eighty}", "train.max_length=3", "train.long_share=1") == 3
    assert "a higher train.max_length" in capsys.readouterr().err
    assert go(finetune, f"outputs={here}", "run=none", f"source={eighty}", *FAST, "train.max_steps=1", "train.max_length=256") == 0


def test_more_long_rows_than_allowed_stop_the_run(here, eighty, capsys):
    assert go(finetune, f"outputs={here}", "run=long", f"source={eighty}", "train.max_length=60") == BadData.exit_code
    said = capsys.readouterr().err
    assert "more than train.long_share=0.1 allows" in said and "train.long_rows=split_turns" in said


def test_a_bf16_base_is_held_so_and_its_losses_are_those_of_its_values_in_fp32(here, train, monkeypatch):
    base, wide = make_base(here / "narrow", dtype="bfloat16"), here / "wide"
    shutil.copytree(base, wide)
    save_file({name: t.float() for name, t in load_file(base / "model.safetensors").items()}, wide / "model.safetensors")
    held, hold = [], session.hold
    monkeypatch.setattr(session, "hold", lambda model: (hold(model), held.append(sum(is_held(m) for m in model.modules()))))
    curves = []
    for name, folder in (("narrow", base), ("wide", wide)):
        made = train(f"held-{name}", "train.max_steps=3", "train.warmup=0", base=folder)
        curves.append([*(point["loss"] for point in made.metrics["curve"]), made.metrics["val_loss"]])
    assert held[0] > 20 and held[1] == 0
    assert max(abs(a - b) for a, b in zip(*curves)) < 1e-5


def test_validation_rows_may_be_fewer_and_that_is_said(train, here, capsys):
    train("few", "train.max_steps=1", "train.eval_rows=2", "train.samples=0")
    assert "validation: on 2 of " in capsys.readouterr().err


def zero_settings(gpu: bool, *more: str) -> dict:
    return deepspeed_json(compose("finetune", ["deepspeed=zero3", *more], FinetuneVerb), gpu=gpu)["zero_optimization"]


def test_on_a_cpu_zero_3_keeps_no_layer_that_is_not_computed_and_small_buckets():
    here = zero_settings(gpu=False)
    held = ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance")
    assert [here[name] for name in held] == [0, 0, 0] and here["reduce_bucket_size"] == here["sub_group_size"] == CPU_BUCKET


def test_on_a_gpu_zero_3_sends_and_keeps_by_the_models_width(tmp_path):
    names = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")

    def filled(*more):
        config = HfTrainerDeepSpeedConfig({"zero_optimization": zero_settings(True, *more)})
        model = SimpleNamespace(config=SimpleNamespace(hidden_size=100))
        config.trainer_config_finalize(TrainingArguments(output_dir=str(tmp_path), use_cpu=True), model, 1)
        return [config.get_value(f"zero_optimization.{name}") for name in names]

    assert filled() == [10_000, 9_000, 1_000] and filled("deepspeed.bucket_size=7") == [7, 7, 1_000]
    assert not {"stage3_max_live_parameters", "sub_group_size"} & set(zero_settings(True))


def test_fp32_weights_are_their_own_masters():
    weights = [torch.arange(4.0), torch.arange(4.0).bfloat16(), torch.zeros(2)]
    masters = [weights[0].clone(), weights[1].float(), torch.ones(2)]
    share_masters(masters, weights)
    masters[0].add_(1)
    assert [master.data_ptr() == weight.data_ptr() for master, weight in zip(masters, weights)] == [True, False, False]
    assert weights[0].tolist() == [1, 2, 3, 4]


def test_without_a_validation_split_nothing_is_evaluated(here, eighty, capsys):
    assert go(data, f"outputs={here}", "run=no-val", f"data.path={eighty.parent.parent / 'chats.json'}", "data.val=0", "data.calib=0") == 0
    assert go(finetune, f"outputs={here}", "run=no-val", *FAST, "train.max_steps=2") == 0
    assert "val_loss" not in artifact.open_artifact(here / "no-val" / "finetune").metrics
    assert "validation" not in capsys.readouterr().err


def test_micro_batches_do_not_change_what_is_learnt(train, here):
    """One step's gradient is that of the global batch, every trained token weighing the same, however it is cut into passes."""
    base, layouts = (
        small(here),
        (["train.micro_batch_size=8"], ["train.micro_batch_size=1"], ["train.packing=false", "train.chunked_loss=false"]),
    )
    layouts += (["train.gradient_checkpointing=true"],)
    runs = [train(f"layout{i}", "train.max_steps=4", "tuner.dropout=0", *argv, base=base) for i, argv in enumerate(layouts)]
    curves = [[c["loss"] for c in r.metrics["curve"]] for r in runs]
    weights = [load_file(r.path / "adapter_model.safetensors") for r in runs]
    assert [r.metrics["packed"] for r in runs] == [True, True, False, True]
    for curve, other in zip(curves[1:], weights[1:]):
        assert curve == pytest.approx(curves[0], abs=1e-5)
        assert max((weights[0][n] - other[n]).norm() / other[n].norm() for n in other) < 1e-3


# ---- several processes


# The shorter a forward pass, the more of them a step takes.
MICRO = ["train.micro_batch_size=1"]
WHOLE = ["tuner.modules_to_save=[down_proj]"]


def small(here) -> Path:
    """Two layers: ZeRO-3 gathers each matrix for each pass, and each token of a sample is one."""
    return make_base(here / "base-small", layers=2)


@pytest.fixture(scope="module")
def alone(here, train):
    """Four steps by one process without DeepSpeed, with trained rows and no dropout, whose draws depend on the process."""
    return train("alone", "train.max_steps=4", "tuner.dropout=0", base=small(here))


@pytest.mark.parametrize(
    "deepspeed,processes,tuner,layout",
    [
        ("zero2", 2, "lora", MICRO),
        pytest.param("zero3", 2, "lora", [], marks=pytest.mark.slow),  # test_fidelity.py has it in bf16
        pytest.param("none", 2, "lora", MICRO, marks=pytest.mark.slow),
        pytest.param("zero3", 2, "lora", MICRO, marks=pytest.mark.slow),
        pytest.param("zero2_offload", 2, "lora", MICRO, marks=pytest.mark.slow),
        pytest.param("zero3_offload", 1, "lora", MICRO, marks=pytest.mark.slow),
        pytest.param("zero2", 2, "full", [], marks=pytest.mark.slow),
        pytest.param("zero3", 2, "full", MICRO, marks=pytest.mark.slow),
        pytest.param("zero3", 2, "full", ["train.gradient_checkpointing=true"], marks=pytest.mark.slow),
        pytest.param("zero2", 2, "qlora", [], marks=pytest.mark.slow),
        pytest.param("zero2", 2, "lora", WHOLE, marks=pytest.mark.slow),
        pytest.param("zero3", 2, "lora", WHOLE, marks=pytest.mark.slow),
        pytest.param("zero2", 2, "lora", [*MICRO, "train.packing=false", "train.chunked_loss=false"], marks=pytest.mark.slow),
    ],
)
def test_several_processes_learn_what_one_does(deepspeed, processes, tuner, layout, here, eighty, train, request):
    """ZeRO-0, 2 and 3, in one forward pass a step or in several: the same losses and the same weights."""
    base, own = (
        small(here),
        ["tuner=full", *FAST[1:]] if tuner == "full" else [f"tuner={tuner}", *FAST, "tuner.dropout=0"],
    )
    if layout == WHOLE:
        own += WHOLE
    if tuner == "lora" and layout != WHOLE:
        one = request.getfixturevalue("alone")
    else:
        assert go(finetune, f"outputs={here}", f"run=one-{tuner}", f"source={eighty}", f"model.path={base}", *own, "train.max_steps=4") == 0
        one = artifact.open_artifact(here / f"one-{tuner}" / "finetune")
    run = re.sub(r"\W+", "-", request.node.name).strip("-")
    argv = [f"outputs={here}", f"run={run}", f"source={eighty}", f"model.path={base}", *own, *layout]
    argv += ["train.max_steps=4", f"deepspeed={deepspeed}", f"launch.nproc_per_node={processes}"]
    code, err = to_its_end(argv)
    assert code == 0, err
    many = artifact.open_artifact(here / run / "finetune")
    assert many.metrics["processes"] == processes
    losses = [[c["loss"] for c in a.metrics["curve"]] for a in (one, many)]
    rates = [[c["learning_rate"] for c in a.metrics["curve"]] for a in (one, many)]
    assert rates[0] == rates[1], "DeepSpeed keeps the schedule asked for"
    apart = max(abs(a - b) for a, b in zip(*losses))
    print(f"{run}: losses differ by {apart:.1e}")
    assert len(losses[0]) == len(losses[1]) == 4 and apart <= 1e-4
    assert one.metrics["val_loss"] == pytest.approx(many.metrics["val_loss"], abs=1e-4)
    assert one.metrics["trained_rows"] == many.metrics["trained_rows"]
    name = "model.safetensors" if tuner == "full" else "adapter_model.safetensors"
    a, b = load_file(one.path / name), load_file(many.path / name)
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}
    worst = max(((a[n] - b[n]).norm() / a[n].norm()).item() for n in a)
    print(f"{run}: weights differ by {worst:.1e}")
    assert worst < 2e-2


@pytest.mark.slow
def test_a_failed_self_check_in_workers_keeps_its_code_and_is_said_once(here, eighty):
    """A loss that is not a number stops every process; one message, exit code 8, nothing published."""
    child = process(
        f"outputs={here}",
        "run=nan",
        f"source={eighty}",
        *FAST,
        "tuner.learning_rate=1e30",
        "train.warmup=0",
        "train.max_grad_norm=0",
        "train.max_steps=20",
        "launch.nproc_per_node=2",
    )
    _, err = child.communicate(timeout=200)
    assert child.returncode == 8, err
    assert err.count("self-check failed") == 1, err
    assert "the loss became nan" in err and "lower tuner.learning_rate" in err and "Traceback" not in err
    assert not (here / "nan" / "finetune").exists()


# ---- 4-bit bases


def test_gradients_after_an_evaluation_equal_those_without_one():
    """bitsandbytes repacks 4-bit weights for inference at the first evaluation on some CPUs; gradients must not notice."""
    cfg = compose("finetune", ["tuner=qlora", "tuner.dropout=0", "tuner.rank=4", f"model.path={TINY}"], FinetuneVerb)
    tokenizer = load_tokenizer(TINY)
    torch.manual_seed(0)
    model, _rows, nf4 = session.prepare(cfg, artifact.open_any(TINY), tokenizer, "cpu", "fp32", control=[END])
    four = [m for m in model.modules() if type(m).__name__ == "Linear4bit" and not hasattr(m, "base_layer")]
    assert len(four) == 28 and nf4 == {"double_quant": True, "compute_dtype": "float32"}
    assert all(m.support_avx512bf16_for_cpu is False for m in four), "what forbids the repacking"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += torch.randn_like(parameter) * 0.02
    ids = tokenizer("<|im_start|>user\nWhat does a cat say?<|im_end|>\n", return_tensors="pt").input_ids

    def gradients():
        model.zero_grad()
        model.train()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.no_grad():
        model(input_ids=ids)
        generation.greedy(model, tokenizer, [[{"role": "user", "content": "Hi!"}]], max_new_tokens=2, eos_id=END)
    after = gradients()
    assert before.keys() == after.keys() and all("lora" in n for n in before) and len(before) == 56
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(g.any() for g in before.values())


# ---- refused before anything is spent


@pytest.mark.parametrize(
    "argv,code,words",
    [
        (["tuner=qlora", "deepspeed=zero3", "launch.nproc_per_node=1"], 2, "cannot be partitioned"),
        (["train.global_batch_size=7", "launch.nproc_per_node=2"], 2, "cannot be shared by 2 processes"),
        (["deepspeed.config=ds.json"], 3, "ds.json"),
        (["model.path=/nowhere/model"], 3, "no such model folder"),
        (["tuner.target_modules=[c_attn]", "train.max_steps=1"], 2, "no layer called c_attn"),
    ],
)
def test_what_cannot_work_is_said(argv, code, words, here, eighty, capsys):
    assert go(finetune, f"outputs={here}", "run=refused", f"source={eighty}", *argv) == code
    assert words in capsys.readouterr().err


def test_a_quantized_base_needs_qlora(tmp_path):
    config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    cfg = compose("finetune", [f"model.path={tmp_path}"], FinetuneVerb)
    with pytest.raises(WrongKind, match="gptq"):
        finetune.check(cfg, {"model": artifact.open_any(tmp_path)})
