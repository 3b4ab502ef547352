"""A model from nothing on plain text, and one that is gone on with: proven, killed and resumed, and taken by every other verb."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAT, ROOT, begun, go, helps, in_process, refused, to_its_end
from safetensors.numpy import load_file

from src import cpt, data, evaluate, finetune, merge, pretrain, quantize
from src.core import artifact
from src.core.errors import BadData, ConfigError, Moved, ProofFailed
from src.models.loading import load_model, load_tokenizer
from src.sizing import host
from src.sizing.config_reader import read_shape, shape_of

pytestmark = pytest.mark.usefixtures("proofs_in_this_process", "one_thread")
SHAPE = "hidden=32 layers=2 heads=4 kv_heads=2 intermediate=auto vocab=300 max_length=64"
STEPS = "train.global_batch_size=8 train.max_steps=12 train.log_steps=1 train.eval_steps=6 tuner.learning_rate=1e-2 val=0.2"
TINY = [*(f"size.{one}" for one in SHAPE.split()), *STEPS.split()]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """What the embedded conversations say, as documents."""
    chats = json.loads((ROOT / "assets" / "conversations.json").read_text())[:120]
    folder = tmp_path_factory.mktemp("text")
    (folder / "talk.txt").write_text("\n<|endoftext|>\n".join(" ".join(t["value"] for t in chat["conversations"]) for chat in chats))
    return folder


@pytest.fixture(scope="module")
def outputs(text, tmp_path_factory) -> Path:
    """An outputs folder whose run `m` has a model from nothing."""
    folder = tmp_path_factory.mktemp("outputs")
    done = in_process("pretrain", f"outputs={folder}", "run=m", f"text={text}", *TINY)
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stderr)
    return folder


@pytest.fixture(scope="module")
def made(outputs) -> artifact.Artifact:
    return artifact.open_artifact(outputs / "m" / "pretrain")


# ---- a model from nothing


def test_a_model_of_text_is_quantized_and_measured_on_text_as_it_stands(made, outputs, tmp_path):
    """It has no template, so what is learnt of a text is the text: its tokens are those that its tokenizer gives, all of which count."""
    text = outputs.parent / "lines.txt"
    text.write_text(
        "\n".join(
            turn["value"]
            for chat in json.loads((ROOT / "assets" / "conversations.json").read_text())[:60]
            for turn in chat["conversations"]
        )
    )
    assert go(data, f"outputs={tmp_path}", "run=t", f"data.path={text}", "data.val=0.2", "data.calib=0.3") == 0
    argv = [f"outputs={tmp_path}", "run=t", f"source={made.path}"]
    assert go(quantize, *argv, "quantizer=gptq_int8", "quantizer.group_size=-1") == 0
    assert go(evaluate, *argv, "evaluation.prompts=['Ahoy! The','What']", "evaluation.max_new_tokens=8") == 0
    assert artifact.open_artifact(tmp_path / "t" / "quantize").metrics["agreement"] > 0.97
    tokenizer, model = load_tokenizer(made.path), load_model(made.path, dtype="float32").eval()
    losses = []
    for line in open(tmp_path / "t" / "data" / "val.jsonl"):
        ids = torch.tensor([tokenizer(json.loads(line)["messages"][0]["content"]).input_ids])
        with torch.no_grad():
            losses.append(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    for line in open(tmp_path / "t" / "evaluate-pretrain" / "answers.jsonl"):
        ids = tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids
        said = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True) == json.loads(line)["answer"]
    told = json.loads((tmp_path / "t" / "evaluate-pretrain" / "report.json").read_text())
    assert told["tokens"] == len(torch.cat(losses)) and told["loss"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-4)


def test_it_learns_and_is_proven_to_be_what_was_trained(made, outputs):
    said, metrics = (outputs / "said").read_text(), made.metrics
    assert metrics["val_loss"] < metrics["val_loss_first"] - 1 and abs(metrics["val_loss_first"] - np.log(300)) < 0.3
    assert made.kind == "model" and metrics["loss_before"] == pytest.approx(metrics["loss_after"], abs=1e-5) and metrics["agreement"] == 1
    counted = metrics["text"]["val"]
    assert metrics["val_bits_per_byte"] == pytest.approx(
        metrics["val_loss"] / np.log(2) * (counted["tokens"] - counted["documents"]) / counted["bytes"]
    )
    for words in (
        "talk.txt: documents are parted by <|endoftext|>",
        "it goes on: ",
        "tokens/s",
        "of sgemm",
        "document ends",
        "bytes a token",
    ):
        assert words in said, words
    assert {f.name for f in made.path.iterdir()} == {
        *("README.md", "config.json", "generation_config.json", "manifest.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    }, "no start, no checkpoint, no template"
    assert [sample["prompt"] for sample in metrics["samples"]] and len(metrics["curve"]) == 12


def test_the_shapes_by_name_are_those_of_llama2_c():
    from src.core.compose import compose
    from src.models import fresh
    from src.settings.verbs import PretrainVerb

    for name, params, heads in (
        ("260k", 260_032, (8, 4)),
        ("15m", 15_191_712, (6, 6)),
        ("42m", 41_689_600, (8, 8)),
        ("110m", 109_529_856, (12, 12)),
    ):
        size = compose("pretrain", ["text=x", f"size={name}"], PretrainVerb).size
        shape = shape_of(fresh.config_of(size, size.vocab, {}), name)
        assert (shape.params, (shape.heads, shape.kv_heads)) == (params, heads)


def test_qwen3_s_shape_with_a_tokenizer_of_another_model(text, tmp_path, capsys):
    argv = ["size.family=qwen3", f"tokenizer={CHAT}", "train.max_steps=2", "size.tied=false", "tuner.dtype=bfloat16"]
    assert go(pretrain, f"outputs={tmp_path}", "run=q", f"text={text}", *TINY, *argv) == 0
    assert "the vocabulary is the tokenizer's, 1,024, not size.vocab=300" in capsys.readouterr().err
    folder = tmp_path / "q" / "pretrain"
    config, weights = json.loads((folder / "config.json").read_text()), artifact.open_artifact(folder)
    assert config["model_type"] == "qwen3" and config["vocab_size"] == 1024 and config["dtype"] == "bfloat16"
    assert weights.parent("tokenizer") and "chat_template" in (folder / "tokenizer_config.json").read_text()
    model = load_model(folder)
    assert model.num_parameters() == read_shape(folder).params and "lm_head.weight" in dict(model.named_parameters())


# ---- killed


@pytest.mark.parametrize("road", ["one", pytest.param("zero2", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)])
def test_a_killed_run_ends_in_the_same_bytes(road, text, made, tmp_path):
    argv = [*TINY, f"text={text}", "train.checkpoint_steps=1"]
    argv += [] if road == "one" else [f"deepspeed={road}", "launch.nproc_per_node=2"]
    heard = []
    with begun([f"outputs={tmp_path}", "run=k", *argv], "src.pretrain") as (child, lines):
        for line in lines:
            heard.append(line)
            if "step 7/12" in line:
                os.killpg(child.pid, signal.SIGKILL)
                break
    assert child.exitcode == -signal.SIGKILL, "".join(heard)
    if road == "one":
        assert go(pretrain, f"outputs={tmp_path}", "run=k", *argv) == 0
        undisturbed = made
    else:
        for run in ("k", "u"):
            code, said = to_its_end([f"outputs={tmp_path}", f"run={run}", *argv], "src.pretrain")
            assert code == 0 and ("goes on from step" in said) is (run == "k"), said
        undisturbed = artifact.open_artifact(tmp_path / "u" / "pretrain")
    again = artifact.open_artifact(tmp_path / "k" / "pretrain")
    assert again.files == undisturbed.files and again.metrics["curve"] == undisturbed.metrics["curve"]
    assert again.metrics["samples"] == undisturbed.metrics["samples"]


# ---- what others make of it


def test_its_greedy_text_is_the_c_program_s(outputs, made):
    """The stage compares ids and texts itself; here once more, from outside."""
    import subprocess

    import torch

    done = in_process("deploy", f"outputs={outputs}", "run=m", "target=llama2c")
    assert done.returncode == 0, done.stderr
    bundle = artifact.open_artifact(outputs / "m" / "deploy-llama2c")
    assert bundle.metrics["prompts_equal"] == bundle.metrics["prompts"] >= 3
    model, tokenizer = load_model(made.path), load_tokenizer(made.path)
    ids = tokenizer("What", return_tensors="pt").input_ids
    theirs = model.generate(ids, do_sample=False, max_new_tokens=40, attention_mask=torch.ones_like(ids))[0]
    run = [bundle.path / "run", bundle.path / "model.bin", "-t", "0", "-n", str(len(theirs) - 1), "-i", "What"]
    said = subprocess.run(run, capture_output=True, text=True, timeout=60).stdout
    assert said.strip() == tokenizer.decode(theirs, skip_special_tokens=True).strip()


@helps("models/loading.py", "python -m src.finetune gives a model without a chat template ChatML and its tokens")
def test_it_is_fine_tuned_as_any_base_without_a_template(outputs, made, eighty, capsys):
    """Before that it has no rows for the tokens of a conversation, which evaluate says; after it, it is measured."""
    measured = [f"outputs={outputs}", "run=m", f"dataset={eighty}", "evaluation.rows=4", "evaluation.samples=0"]
    refused(in_process("evaluate", *measured), BadData, "token id 301, and the model has 300 rows", "python -m src.finetune gives")
    argv = [
        f"source={eighty}",
        f"model.path={made.path}",
        "tuner=full",
        "train.max_steps=3",
        "train.max_length=64",
        "train.long_rows=keep_end",
    ]
    assert go(finetune, f"outputs={outputs}", "run=m", *argv, "train.long_share=1", "tuner.learning_rate=1e-3") == 0
    assert "added its tokens <|im_start|> <|im_end|>" in capsys.readouterr().err
    tuned = artifact.open_artifact(outputs / "m" / "finetune")
    assert json.loads((tuned.path / "config.json").read_text())["vocab_size"] == 302
    assert any(record["stage"] == "pretrain" for record in tuned.manifest["ancestors"].values())
    assert in_process("evaluate", *measured).returncode == 0


# ---- going on


def test_cpt_goes_on_with_every_weight_or_with_adapters_that_merge(outputs, made, text, tmp_path):
    few = [f"text={text}", f"model.path={made.path}", "train.max_length=64", "train.max_steps=4", "train.global_batch_size=8", "val=0.2"]
    for tuner, rate, kind in (("full", "3e-3", "model"), ("lora", "1e-2", "adapter")):
        argv = [*few, f"tuner={tuner}", f"tuner.learning_rate={rate}", *(["tuner.rank=4"] if tuner == "lora" else [])]
        assert go(cpt, f"outputs={tmp_path}", f"run={tuner}", *argv) == 0
        gone_on = artifact.open_artifact(tmp_path / tuner / "cpt")
        assert gone_on.kind == kind and gone_on.metrics["val_loss"] < gone_on.metrics["val_loss_first"]
        assert gone_on.metrics["val_loss_first"] == pytest.approx(made.metrics["val_loss"], abs=1e-4), "it begins where the other ended"
        assert gone_on.metrics["loss_after"] == pytest.approx(gone_on.metrics["loss_before"], abs=1e-4)
    assert go(merge, f"outputs={tmp_path}", "run=lora") == 0
    merged = artifact.open_artifact(tmp_path / "lora" / "merge")
    assert merged.metrics["loss_after"] == pytest.approx(gone_on.metrics["val_loss"], abs=0.01)
    base, after = (load_file(folder / "model.safetensors") for folder in (made.path, merged.path))
    assert base.keys() == after.keys() and not np.array_equal(
        base["model.layers.0.mlp.up_proj.weight"], after["model.layers.0.mlp.up_proj.weight"]
    )


def test_the_same_command_is_skipped_and_another_text_is_not(outputs, text, capsys, tmp_path):
    argv = [f"outputs={outputs}", "run=m", *TINY]
    assert go(pretrain, *argv, f"text={text}") == 0 and "up to date, skipped" in capsys.readouterr().err
    other = Path(shutil.copytree(text, tmp_path / "text"))
    (other / "more.txt").write_text("More.")
    refused(in_process("pretrain", *argv, f"text={other}"), Moved, "parent text")


# ---- what cannot be


def test_settings_that_do_not_go_together_are_told_at_once():
    shapes = ["size.hidden=50", "size.heads=4", "size.kv_heads=3", "train.warmup=2"]
    words = ("2 faults", "size.hidden=56 can", "size.kv_heads=2 divides them", "train.warmup=2")
    refused(in_process("pretrain", "text=x", *shapes), ConfigError, *words)
    refused(
        in_process("pretrain", "text=x", "size.vocab=100", "train.max_length=600"), ConfigError, "size.vocab=259", "train.max_length=512"
    )
    refused(in_process("pretrain", "size=260k"), ConfigError, "text: must be given")
    refused(in_process("pretrain", "text=x", "tuner=lora"), ConfigError, "adapters on a model there is are cpt's")
    refused(in_process("pretrain", "text=x", "size=1b"), ConfigError, "there is 110m, 15m, 260k, 42m")


def test_what_it_takes_of_memory_and_disk_grows_with_the_model_and_the_text(text):
    from src.core.compose import compose
    from src.settings.verbs import PretrainVerb

    def needs(*argv: str):
        cfg = compose("pretrain", [f"text={text}", *argv], PretrainVerb)
        return pretrain.needs(cfg, {"text": artifact.outside(text, "file")})

    small, large = needs("size=260k"), needs("size=110m")
    assert large.memory > 16 * 109e6 > small.memory and large.disk > 40 * 109e6 > small.disk
    assert host.with_text(small, 1e9).disk - small.disk >= 1e9
    assert needs("size=110m", "train.gradient_checkpointing=false").ways


def test_a_model_that_does_not_move_is_not_published(text, tmp_path):
    done = in_process(
        "pretrain",
        f"outputs={tmp_path}",
        "run=s",
        f"text={text}",
        *TINY,
        "tuner.learning_rate=1e-12",
        "train.max_steps=21",
        "train.log_steps=50",
    )
    refused(done, ProofFailed, "a higher tuner.learning_rate", "records of the last step: '")
    assert not (tmp_path / "s" / "pretrain").exists()
