"""Training: what changes and what does not, resume, several processes, 4-bit bases, and the numbers a run reports."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import go, hear_ctrl_c
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from src import adapters, artifact, data, finetune, merge, modeling, training
from src.compose import compose
from src.config import FinetuneVerb
from src.errors import ConfigError, Moved, WrongKind

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
START, END = 1022, 1023
# Rank 8 trains in a second and, at this rate, visibly within a few steps.
FAST = ["tuner.rank=8", "tuner.learning_rate=3e-3", "train.log_steps=1", "train.eval_steps=1000"]


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return tmp_path_factory.mktemp("finetune")


def make_base(folder: Path, *, tied=True, dtype=torch.float32, blank=True) -> Path:
    """tiny-chat with its two ChatML rows as if never trained: zero, and where untied the mean in the embedding."""
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        with torch.no_grad():
            if blank:
                embedding = model.get_input_embeddings().weight
                embedding[START:] = 0 if tied else embedding[:START].mean(0)
                model.get_output_embeddings().weight[START:] = 0
        model.to(dtype).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            shutil.copy(TINY / name, folder)
    return folder


@pytest.fixture(scope="module")
def dataset(here):
    """80 embedded conversations, an eighth of them held out."""
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:80]
    (here / "chats.json").write_text(json.dumps(rows))
    assert go(data, f"outputs={here}", "run=d", f"data.path={here / 'chats.json'}", "data.val=0.125", "data.calib=0.125") == 0
    return here / "d" / "data"


@pytest.fixture(scope="module")
def train(here, dataset):
    """train(run, *overrides) -> artifact of a finished run on the shared dataset; FAST is on unless overridden."""

    def train(run, *argv, base=TINY):
        fast = [a for a in FAST if "tuner=full" not in argv or "rank" not in a]
        assert go(finetune, f"outputs={here}", f"run={run}", f"source={dataset}", f"model.path={base}", *fast, *argv) == 0
        return artifact.open_artifact(here / run / "finetune")

    return train


@pytest.fixture(scope="module", params=["tied", "untied"])
def tuned(request, here, train):
    """(base folder, adapter artifact) of LoRA on a base that never learnt ChatML."""
    base = make_base(here / f"base-{request.param}", tied=request.param == "tied")
    return base, train(request.param, "train.max_steps=25", "train.warmup=0.2", "train.eval_steps=25", base=base)


# ---- what a LoRA run does


def test_the_loss_falls(tuned):
    m = tuned[1].metrics
    first, last = sum(c["loss"] for c in m["curve"][:3]) / 3, sum(c["loss"] for c in m["curve"][-3:]) / 3
    print(f"train loss {first:.3f} -> {last:.3f}, validation {m['val_loss_first']:.3f} -> {m['val_loss']:.3f}")
    assert last < 0.7 * first
    assert m["val_loss"] < 0.7 * m["val_loss_first"]
    assert len(m["curve"]) == m["steps"] == 25 and m["tokens_seen"] > 25 * 8 * 10


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
    assert adapters.untrained(model, [START, END], 1024) == [], "nothing is flagged once it was trained"


def test_plain_peft_loads_the_adapter_with_equal_outputs(tuned, monkeypatch):
    import importlib.util

    import peft.tuners.trainable_tokens.layer as layer
    from peft import PeftModel

    base, adapter = tuned
    ours, _ = modeling.load_any(adapter)
    ours = modeling.logits(ours)
    spec = importlib.util.spec_from_file_location("peft.tuners.trainable_tokens.as_shipped", layer.__file__)
    shipped = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(shipped)
    monkeypatch.setattr(layer.TrainableTokensLayer, "forward_adapters", shipped.TrainableTokensLayer.forward_adapters)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), adapter.path).eval()
    assert abs(modeling.logits(plain) - ours).max() < 1e-4
    with plain.disable_adapter():
        assert abs(modeling.logits(plain) - ours).max() > 0.1, "the adapter does something"


def test_the_rate_follows_a_cosine_after_its_warm_up(tuned):
    curve = tuned[1].metrics["curve"]
    warm, steps, peak = 5, 25, 3e-3
    for c in curve:
        k = c["step"] - 1  # the first step uses the rate of step 0
        share = k / warm if k < warm else 0.5 * (1 + math.cos(math.pi * (k - warm) / (steps - warm)))
        assert c["learning_rate"] == pytest.approx(peak * share, abs=1e-9), c
    assert max(c["learning_rate"] for c in curve) == pytest.approx(peak)


def test_the_adapter_folder_is_complete_and_plain(tuned):
    base, adapter = tuned
    assert {"adapter_config.json", "adapter_model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} == set(
        adapter.files
    )
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
    base = make_base(here / f"base-{dtype}", dtype=getattr(torch, dtype), blank=False)
    model = train(f"full-{dtype}", "tuner=full", "train.max_steps=2", base=base)
    before, after = load_file(base / "model.safetensors"), load_file(model.path / "model.safetensors")
    assert before.keys() == after.keys() and model.kind == "model"
    assert {t.dtype for t in after.values()} == {getattr(torch, dtype)}
    config = json.loads((model.path / "config.json").read_text())
    assert config["dtype"] == dtype and config["eos_token_id"] == END
    assert all(not torch.equal(before[n], after[n]) for n in before if n.endswith("_proj.weight"))
    assert AutoModelForCausalLM.from_pretrained(model.path, local_files_only=True).dtype == getattr(torch, dtype)


# ---- numbers


def test_over_long_rows_are_dropped_and_counted(train, dataset, capsys):
    tokenizer = modeling.load_tokenizer(TINY)
    lengths = [
        len(tokenizer.apply_chat_template(json.loads(line)["messages"], return_dict=False)) for line in open(dataset / "train.jsonl")
    ]
    limit = sorted(lengths)[len(lengths) // 2]
    long = [n for n in lengths if n > limit]
    done = train("short", f"train.max_length={limit}", "train.epochs=0.5", "train.global_batch_size=3", "train.micro_batch_size=3")
    assert done.metrics["train_rows"] == len(lengths) - len(long)
    assert (
        f"train: dropped {len(long)} of {len(lengths)} rows ({sum(long):,} tokens) longer than train.max_length={limit}"
        in capsys.readouterr().err
    )
    assert done.metrics["steps"] == math.ceil(round(0.5 * done.metrics["train_rows"]) / 3)


def test_nothing_left_to_train_on_is_the_user_s_error(here, dataset, capsys):
    assert go(finetune, f"outputs={here}", "run=none", f"source={dataset}", "train.max_length=3") == 3
    assert "raise train.max_length" in capsys.readouterr().err


def test_without_a_validation_split_nothing_is_evaluated(here, capsys):
    assert go(data, f"outputs={here}", "run=no-val", f"data.path={here / 'chats.json'}", "data.val=0", "data.calib=0") == 0
    assert go(finetune, f"outputs={here}", "run=no-val", *FAST, "train.max_steps=2") == 0
    assert "val_loss" not in artifact.open_artifact(here / "no-val" / "finetune").metrics
    assert "validation" not in capsys.readouterr().err


def plan(size, micro, world):
    return finetune.batch_plan(SimpleNamespace(train=SimpleNamespace(global_batch_size=size, micro_batch_size=micro)), world)


@pytest.mark.parametrize("size", range(1, 33))
@pytest.mark.parametrize("world", [1, 2, 3, 4, 8])
def test_the_global_batch_is_what_was_asked_for_or_an_error(size, world):
    if size % world:
        with pytest.raises(ConfigError) as error:
            plan(size, "auto", world)
        fits = int(error.value.fix[0].split("=")[1])
        assert fits % world == 0 and size < fits < size + world
        return
    micro, steps = plan(size, "auto", world)
    assert micro * steps * world == size and 1 <= micro <= 4
    for given in range(1, size // world + 1):
        if size // world % given:
            with pytest.raises(ConfigError):
                plan(size, given, world)
        else:
            assert plan(size, given, world) == (given, size // world // given)


def test_micro_batches_do_not_change_what_is_learnt(train):
    """One step's gradient is that of the global batch, every trained token weighing the same, however it is cut into passes."""
    runs = [train(f"micro{m}", "train.max_steps=4", "tuner.dropout=0", f"train.micro_batch_size={m}") for m in (8, 2)]
    whole, cut = ([c["loss"] for c in r.metrics["curve"]] for r in runs)
    assert whole == pytest.approx(cut, abs=1e-5)
    a, b = (load_file(r.path / "adapter_model.safetensors") for r in runs)
    assert max((a[n] - b[n]).norm() / a[n].norm() for n in a) < 1e-3


# ---- resume


def process(*argv, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "src.finetune", *map(str, argv)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )


@pytest.fixture(scope="module")
def killed(here, dataset):
    """(overrides, folder, step) of a run killed with -9 soon after its second checkpoint."""
    argv = [
        f"outputs={here}",
        "run=killed",
        f"source={dataset}",
        f"model.path={make_base(here / 'base-tied')}",
        *FAST,
        "train.max_steps=24",
        "train.checkpoint_steps=4",
    ]
    partial = here / "killed" / "finetune.partial"
    child = process(*argv)
    deadline = time.monotonic() + 120
    while not list(partial.glob("checkpoints/checkpoint-8/whole")):
        assert child.poll() is None and time.monotonic() < deadline, "ended before it could be killed:\n" + child.stderr.read()
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stderr.close()
    step = max(int(p.parent.name.split("-")[1]) for p in partial.glob("checkpoints/checkpoint-*/whole"))
    assert step < 24 and not (here / "killed" / "finetune").exists()
    return argv, partial, step


def test_another_number_of_processes_is_refused_once_and_with_its_own_code(killed):
    argv, partial, _step = killed
    kept = [p.name for p in partial.glob("checkpoints/*")]
    child = process(*argv, "launch.nproc_per_node=2")
    _, err = child.communicate(timeout=200)
    assert child.returncode == Moved.exit_code, err
    assert err.count("trained by 1 processes and cannot go on with 2") == 1 and err.count("launch.nproc_per_node=1") == 1, err
    assert "Traceback" not in err
    assert [p.name for p in partial.glob("checkpoints/*")] == kept, "the checkpoint is still there to go on from"


def test_a_killed_run_goes_on_to_the_same_bytes(killed, here, dataset, capsys):
    argv, partial, step = killed
    assert go(finetune, *argv) == 0
    assert f"goes on from step {step}" in capsys.readouterr().err
    assert go(finetune, *[a.replace("run=killed", "run=undisturbed") for a in argv]) == 0
    a, b = (here / run / "finetune" for run in ("killed", "undisturbed"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "generation_config.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    curves = [artifact.open_artifact(p).metrics["curve"] for p in (a, b)]
    assert curves[0] == curves[1]
    assert not partial.exists() and not list(a.glob("checkpoint*"))


def test_a_checkpoint_without_its_mark_is_not_looked_at(tmp_path):
    for step, mark in ((4, "1"), (8, None), (12, "1")):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if mark:
            (folder / "whole").write_text(mark)
    assert training.Checkpoints.last(tmp_path, 1).name == "checkpoint-12"
    (tmp_path / "checkpoint-12" / "whole").unlink()
    assert training.Checkpoints.last(tmp_path, 1).name == "checkpoint-4"
    with pytest.raises(Moved):
        training.Checkpoints.last(tmp_path, 2)
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert training.Checkpoints.last(tmp_path, 1) is None


# ---- several processes


@pytest.fixture(scope="module")
def alone(here, train):
    """Four steps by one process without DeepSpeed, with trained rows and no dropout, whose draws depend on the process."""
    return train("alone", "train.max_steps=4", "tuner.dropout=0", base=make_base(here / "base-tied"))


@pytest.mark.parametrize(
    "deepspeed,processes,tuner",
    [
        ("zero2", 2, "lora"),
        pytest.param("zero3", 2, "lora", marks=pytest.mark.slow),
        pytest.param("none", 2, "lora", marks=pytest.mark.slow),
        pytest.param("zero2_offload", 2, "lora", marks=pytest.mark.slow),
        pytest.param("zero3_offload", 1, "lora", marks=pytest.mark.slow),
        pytest.param("zero2", 2, "full", marks=pytest.mark.slow),
        pytest.param("zero3", 2, "full", marks=pytest.mark.slow),
        pytest.param("zero2", 2, "qlora", marks=pytest.mark.slow),
    ],
)
def test_several_processes_learn_what_one_does(deepspeed, processes, tuner, here, dataset, train, request):
    base, own = (
        make_base(here / "base-tied"),
        ["tuner=full", *FAST[1:]] if tuner == "full" else [f"tuner={tuner}", *FAST, "tuner.dropout=0"],
    )
    if tuner == "lora":
        one = request.getfixturevalue("alone")
    else:
        assert (
            go(finetune, f"outputs={here}", f"run=one-{tuner}", f"source={dataset}", f"model.path={base}", *own, "train.max_steps=4") == 0
        )
        one = artifact.open_artifact(here / f"one-{tuner}" / "finetune")
    run = f"{tuner}-{deepspeed}-{processes}"
    child = process(
        f"outputs={here}",
        f"run={run}",
        f"source={dataset}",
        f"model.path={base}",
        *own,
        "train.max_steps=4",
        f"deepspeed={deepspeed}",
        f"launch.nproc_per_node={processes}",
    )
    _, err = child.communicate(timeout=600)
    assert child.returncode == 0, err
    many = artifact.open_artifact(here / run / "finetune")
    assert many.metrics["processes"] == processes
    losses = [[c["loss"] for c in a.metrics["curve"]] for a in (one, many)]
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
def test_a_run_of_two_processes_resumes_to_the_same_bytes(here, dataset):
    common = [
        f"outputs={here}",
        f"source={dataset}",
        f"model.path={make_base(here / 'base-tied')}",
        *FAST,
        "train.max_steps=40",
        "train.checkpoint_steps=4",
        "deepspeed=zero2",
        "launch.nproc_per_node=2",
    ]
    child = process("run=killed2", *common)
    partial = here / "killed2" / "finetune.partial"
    while not list(partial.glob("checkpoints/checkpoint-8/whole")):
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGTERM)
    child.communicate()
    assert partial.is_dir()
    for run in ("killed2", "undisturbed2"):
        child = process(f"run={run}", *common)
        _, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        assert ("goes on from step" in err) == (run == "killed2")
    name = "adapter_model.safetensors"
    assert (here / "killed2" / "finetune" / name).read_bytes() == (here / "undisturbed2" / "finetune" / name).read_bytes()


@pytest.mark.slow
def test_a_failed_self_check_in_workers_keeps_its_code_and_is_said_once(here, dataset):
    """A loss that is not a number stops every process; one message, exit code 8, nothing published."""
    child = process(
        f"outputs={here}",
        "run=nan",
        f"source={dataset}",
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
    tokenizer = modeling.load_tokenizer(TINY)
    torch.manual_seed(0)
    model, _rows, nf4 = finetune.prepare(cfg, artifact.open_any(TINY), tokenizer, END, [], "cpu", "fp32")
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
        modeling.greedy(model, tokenizer, [[{"role": "user", "content": "Hi!"}]], max_new_tokens=2, end=END)
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
def test_what_cannot_work_is_said(argv, code, words, here, dataset, capsys):
    assert go(finetune, f"outputs={here}", "run=refused", f"source={dataset}", *argv) == code
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "content,words",
    [
        ({"optimizer": {}}, "'optimizer'"),
        ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'"),
        ({"zero_optimization": {"stage": 3}}, "its ZeRO stage is 3, the settings say 2"),
    ],
)
def test_a_deepspeed_file_may_not_contradict_the_settings(content, words, tmp_path):
    from src.zero import user_deepspeed_json

    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"deepspeed\.config") as error:
        user_deepspeed_json(tmp_path / "ds.json", 2)
    assert words in str(error.value)


def test_a_quantized_base_needs_qlora(tmp_path):
    config = json.loads((TINY / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    cfg = compose("finetune", [f"model.path={tmp_path}"], FinetuneVerb)
    with pytest.raises(WrongKind, match="gptq"):
        finetune.check(cfg, {"model": artifact.open_any(tmp_path)})


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_workers_end_quietly_and_the_run_goes_on(tmp_path, number, code):
    """Ctrl-C reaches every process of the terminal; a batch system's SIGTERM only the one it started."""
    outputs = tmp_path / "outputs"
    subprocess.run([sys.executable, "-m", "src.data", f"outputs={outputs}"], check=True, capture_output=True, cwd=ROOT)
    argv = [
        f"outputs={outputs}",
        "deepspeed=zero2",
        "launch.nproc_per_node=2",
        "train.max_steps=40",
        "train.checkpoint_steps=5",
        "train.log_steps=1",
    ]
    command = [sys.executable, "-m", "src.finetune", *argv]
    started = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=hear_ctrl_c)
    for line in started.stderr:
        if "step 8/" in line:
            break
    if number == signal.SIGINT:
        os.killpg(started.pid, number)
    else:
        started.send_signal(number)
    said = started.stderr.read()
    assert started.wait(timeout=60) == code
    assert "interrupted; the same command goes on" in said and "Traceback" not in said
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "goes on from step" in again.stderr, again.stderr
