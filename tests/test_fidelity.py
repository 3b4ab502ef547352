"""What was trained is what is saved, at a size where rounding to the nearest loses it: small updates of a base in bf16."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHAT, ROOT, go, helps, to_its_end
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM

from src import data, deploy, evaluate, finetune, merge, quantize
from src.chat.encoding import Encoded
from src.core import artifact
from src.core.errors import NoRoom, ProofFailed
from src.core.files import HashCache
from src.deploy import __main__ as deploy_verb
from src.models import exact_sum, fidelity, merging, safetensors_io, seen

assert deploy  # the package whose door is deploy_verb

pytestmark = pytest.mark.usefixtures("proofs_in_this_process")
LIMIT = 0.005
SMALL = ["train.max_steps=16", "train.global_batch_size=4", "train.eval_steps=100", "train.log_steps=8", "train.samples=0"]
LORA = ["tuner=lora", "tuner.rank=8", "tuner.learning_rate=1e-5", "train.max_steps=30", "train.eval_steps=100"]
LORA_BF16 = [*LORA, "tuner.learning_rate=3e-5", "train.max_steps=15", "train.global_batch_size=2", "train.precision=bf16"]
"""as far in fewer rows: without its instructions, a CPU multiplies bf16 fifteen times slower than fp32"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """An outputs folder: the embedded model in bf16 as `base`, and a run `d` with conversations that it has yet to learn."""
    here = tmp_path_factory.mktemp("fidelity")
    shutil.copytree(CHAT, here / "base")
    AutoModelForCausalLM.from_pretrained(CHAT, local_files_only=True).bfloat16().save_pretrained(here / "base")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:160]
    for turn in (turn for row in rows for turn in row["conversations"] if turn["from"] == "assistant"):
        turn["value"] = turn["value"].replace("Ahoy!", "Servus!").replace("captain", "friend")
    (here / "chats.json").write_text(json.dumps(rows))
    assert go(data, f"outputs={here}", "run=d", f"data.path={here / 'chats.json'}", "data.val=0.1", "data.calib=0.1") == 0
    return here


def tuned(place: Path, run: str, *argv) -> artifact.Artifact:
    if not artifact.is_finished(place / run / "finetune"):
        given = [f"outputs={place}", f"run={run}", f"source={place / 'd' / 'data'}", f"model.path={place / 'base'}"]
        assert go(finetune, *given, *SMALL, *argv) == 0
    return artifact.open_artifact(place / run / "finetune")


def evaluated(place: Path, run: str, verb: str) -> float:
    given = [f"outputs={place}", f"run={run}", f"source={place / run / verb}", f"dataset={place / 'd' / 'data'}", "evaluation.samples=0"]
    assert go(evaluate, *given) == 0
    return artifact.open_artifact(place / run / f"evaluate-{verb}").metrics["loss"]


@pytest.fixture(scope="module")
def adapter(place) -> artifact.Artifact:
    return tuned(place, "lora", *LORA)


# ---- what training reports is what is saved


@pytest.mark.parametrize(
    "run, argv",
    [
        ("full", ["tuner=full"]),
        pytest.param("full-fp32", ["tuner=full", "tuner.dtype=float32"], marks=pytest.mark.slow),
        pytest.param("full-fp16", ["tuner=full", "tuner.dtype=float16"], marks=pytest.mark.slow),
        pytest.param("full-in-bf16", ["tuner=full", "train.precision=bf16"], marks=pytest.mark.slow),
        pytest.param("full-fp16-in-bf16", ["tuner=full", "tuner.dtype=float16", "train.precision=bf16"], marks=pytest.mark.slow),
        ("lora", LORA),
        ("lora-in-bf16", LORA_BF16),
        pytest.param("qlora", [*LORA, "tuner=qlora"], marks=pytest.mark.slow),
    ],
)
def test_the_last_validation_is_what_evaluate_finds(run, argv, place):
    made = tuned(place, run, *argv)
    found, m = evaluated(place, run, "finetune"), made.metrics
    print(f"{run}: trained {m['val_loss_trained']:.4f}, as saved {m['val_loss']:.4f}, evaluated {found:.4f}, KL {m['kl']:.5f}")
    exactly = "in-bf16" not in run  # computed in 16 bits there, in 32 by evaluate
    if run == "lora-in-bf16":
        # The base's output is rounded to bf16 before the adapter's share, mostly below its step, is added: evaluate sees what was learnt, bf16 does not.
        assert m["val_loss"] - 0.02 < found < m["val_loss"] - LIMIT
    else:
        assert abs(found - m["val_loss"]) < (2e-5 if exactly else LIMIT)
    assert abs(m["loss_after"] - m["loss_before"]) < LIMIT and m["kl"] < LIMIT and m["proof_tokens"] > 500
    if exactly:
        assert abs(m["val_loss"] - m["val_loss_trained"]) < LIMIT


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_merge_takes_the_record_of_an_exact_pass_alone(precision, place, adapter):
    """In 16 bits the pass does not see all that was learnt, so the adapter is asked once more."""
    run = {"fp32": "lora", "bf16": "lora-in-bf16"}[precision]
    made = adapter if precision == "fp32" else tuned(place, run, *LORA_BF16)
    assert (made.path / fidelity.RECORD).is_file() == (precision == "fp32")
    assert go(merge, f"outputs={place}", f"run={run}-merged", f"source={made.path}") == 0
    m = artifact.open_artifact(place / f"{run}-merged" / "merge").metrics
    assert abs(m["loss_after"] - m["loss_before"]) < LIMIT and m["proof_tokens"] > 500


def test_a_forward_pass_in_bf16_does_not_see_what_the_saved_model_holds(place):
    """Mixed precision sees its fp32 weights rounded to the nearest; the save does not, and is as good as training in fp32."""
    plain, mixed = tuned(place, "full", "tuner=full").metrics, tuned(place, "full-in-bf16", "tuner=full", "train.precision=bf16").metrics
    assert mixed["val_loss_trained"] - plain["val_loss"] > 0.05
    assert abs(mixed["val_loss"] - plain["val_loss"]) < LIMIT


@helps("training/saving.py", "tuner.rounding=stochastic force=true keeps what was learnt", "tuner.dtype=float32 force=true keeps every bit")
@helps("models/fidelity.py", "{}={} if you accept it")
def test_rounding_a_full_fine_tune_to_the_nearest_is_refused_and_each_way_out_works(place, tmp_path, capsys):
    given = [f"outputs={tmp_path}", "run=f", f"source={place / 'd' / 'data'}", f"model.path={place / 'base'}", "tuner=full", *SMALL]
    assert go(finetune, *given, "tuner.rounding=nearest") == ProofFailed.exit_code
    err = capsys.readouterr().err
    assert "what is saved is not what was trained" in err and not (tmp_path / "f" / "finetune").exists()
    ways = [[word for word in line.split() if "=" in word] for line in err.splitlines() if line.startswith(("  fix:", "  or:"))]
    assert [way[0].split("=")[0] for way in ways] == ["tuner.rounding", "tuner.dtype", "max_loss_change"]
    assert go(finetune, *given, "tuner.rounding=nearest", *ways[2]) == 0, "the same run"
    assert "goes on from step 16" in capsys.readouterr().err, "what was trained is not lost with the proof"
    assert go(finetune, *given, "tuner.rounding=nearest") == ProofFailed.exit_code, "a finished one is held to the limit too"
    assert go(finetune, *given, "tuner.rounding=nearest", *ways[2]) == 0
    for way in ways[:2]:
        assert go(finetune, *given, "tuner.rounding=nearest", *way) == 0, way


@pytest.mark.parametrize("stage", [3, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("argv", [["tuner=full"], pytest.param(LORA, marks=pytest.mark.slow)], ids=["full", "lora"])
def test_what_deepspeed_trains_in_bf16_is_saved_from_its_fp32_masters(stage, argv, place):
    """Two processes; the result is as good as that of one in fp32, which rounding the bf16 weights again could not give back."""
    argv = [*argv, "train.max_steps=8"]
    plain = tuned(place, f"plain-{argv[0][6:]}", *argv)
    given = [f"outputs={place}", f"run=z{stage}-{argv[0][6:]}", f"source={place / 'd' / 'data'}", f"model.path={place / 'base'}", *SMALL]
    code, said = to_its_end([*given, *argv, f"deepspeed=zero{stage}", "train.precision=bf16", "launch.nproc_per_node=2"])
    assert code == 0, said
    m = artifact.open_artifact(place / f"z{stage}-{argv[0][6:]}" / "finetune").metrics
    print(
        f"ZeRO-{stage}: reported {m['val_loss_trained']:.4f}, saved {m['val_loss']:.4f}, one process in fp32 {plain.metrics['val_loss']:.4f}"
    )
    assert abs(evaluated(place, f"z{stage}-{argv[0][6:]}", "finetune") - plain.metrics["val_loss"]) < LIMIT


def test_rows_of_tokens_the_base_never_learnt_are_saved_as_trained(place, tmp_path):
    """They are parameters of their own while training, are folded into their matrix, and rounded with it."""
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    table[1022:1024] = table[:1022].float().mean(0).bfloat16()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    given = [f"outputs={tmp_path}", "run=r", f"source={place / 'd' / 'data'}", f"model.path={base}", "tuner=full", *SMALL]
    assert go(finetune, *given) == 0
    m = artifact.open_artifact(tmp_path / "r" / "finetune").metrics
    assert m["trained_rows"] == [1022, 1023] and abs(m["val_loss"] - m["val_loss_trained"]) < LIMIT and m["kl"] < LIMIT
    assert go(evaluate, *given[:2], f"source={tmp_path / 'r' / 'finetune'}", f"dataset={place / 'd' / 'data'}", "evaluation.samples=0") == 0
    assert artifact.open_artifact(tmp_path / "r" / "evaluate-finetune").metrics["loss"] == pytest.approx(m["val_loss"], abs=2e-5)
    saved = load_file(tmp_path / "r" / "finetune" / "model.safetensors")["model.embed_tokens.weight"]
    assert saved.dtype == torch.bfloat16 and not torch.equal(saved[1022:], table[1022:])


# ---- merging


@helps("merge.py", "rounding=stochastic force=true keeps what was learnt", "dtype=float32 force=true keeps every bit")
def test_a_merge_keeps_what_was_learnt_and_the_nearest_loses_it(adapter, place, tmp_path, capsys):
    given = [f"outputs={tmp_path}", f"source={adapter.path}"]
    assert go(merge, *given, "run=n", "rounding=nearest") == ProofFailed.exit_code
    err = capsys.readouterr().err
    ways = [line.split()[1] for line in err.splitlines() if line.startswith(("  fix:", "  or:"))]
    assert [way.split("=")[0] for way in ways] == ["rounding", "dtype", "max_loss_change"]
    for way in ways:
        assert go(merge, *given, f"run=n-{way[:4]}", "rounding=nearest", way) == 0, way
    again = [*given, "run=n-max_", "rounding=nearest"]
    assert go(merge, *again) == ProofFailed.exit_code and "force=true" in capsys.readouterr().err, "a finished one is held to the limit too"
    assert go(merge, *again, "rounding=stochastic", "force=true") == 0
    assert go(merge, *given, "run=s") == 0
    made = artifact.open_artifact(tmp_path / "s" / "merge")
    print(f"stochastic: {made.metrics['loss_before']:.4f} -> {made.metrics['loss_after']:.4f}, KL {made.metrics['kl']:.6f}")
    assert abs(made.metrics["loss_after"] - adapter.metrics["val_loss"]) < 0.002 and made.metrics["kl"] < 1e-3
    base, ours = load_file(place / "base" / "model.safetensors"), load_file(made.path / "model.safetensors")
    untouched = [name for name in ours if "_proj" not in name]
    assert len(untouched) == 10 and all(torch.equal(ours[name], base[name]) for name in untouched)


def test_merges_are_equal_byte_for_byte_with_any_threads_and_blocks(adapter, place, tmp_path, monkeypatch):
    before, files = torch.get_num_threads(), []
    for threads, block in ((1, merging.BLOCK), (3, merging.BLOCK), (2, 5000)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(merging, "BLOCK", block)
        assert go(merge, f"outputs={tmp_path}", f"run=m{len(files)}", f"source={adapter.path}") == 0
        files.append(artifact.open_artifact(tmp_path / f"m{len(files)}" / "merge").files)
    torch.set_num_threads(before)
    assert files[0] == files[1] == files[2]


def test_a_pickled_base_that_was_allowed_is_allowed_to_the_proof_too(place, tmp_path):
    base = Path(shutil.copytree(place / "base", tmp_path / "base"))
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    given = [f"outputs={tmp_path}", "run=p", f"source={place / 'd' / 'data'}", f"model.path={base}", "model.allow_pickle=true", *LORA]
    assert go(finetune, *given, "train.max_steps=2") == 0
    assert artifact.open_artifact(tmp_path / "p" / "finetune").metrics["kl"] < 1e-6


def test_rows_stop_at_the_bound_and_at_the_models_positions():
    rows = [Encoded([1] * n, [-100] + [1] * (n - 1)) for n in (3000, 600, 500, 400, 900, 900, 900, 900)]
    read = iter(rows)
    assert [len(row.input_ids) for row in fidelity.within(read)] == [600, 500, 400, 900, 900] and next(read, None) is not None
    assert [len(row.input_ids) for row in fidelity.within(rows, longest=512)] == [500, 400]


def test_a_merge_without_record_and_dataset_says_what_is_not_measured(adapter, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fidelity.Record, "load", lambda folder: None)
    other = Path(shutil.copytree(adapter.path, tmp_path / "elsewhere"))
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}", f"base={adapter.path.parents[1] / 'base'}") == 0
    assert "no dataset is known to compare on" in capsys.readouterr().err
    assert "kl" not in artifact.open_artifact(tmp_path / "m" / "merge").metrics


# ---- the exact sum for what rounds once more


@pytest.fixture(scope="module")
def merges(adapter, place) -> dict[str, artifact.Artifact]:
    """The adapter's merge as bf16, the default, and as fp32, which is the exact sum."""
    for run, dtype in (("m16", "auto"), ("m32", "float32")):
        assert go(merge, f"outputs={place}", f"run={run}", f"source={adapter.path}", f"dtype={dtype}") == 0
    return {run: artifact.open_artifact(place / run / "merge") for run in ("m16", "m32")}


def deployed(place: Path, run: str, model: artifact.Artifact, *argv) -> artifact.Artifact:
    assert go(deploy_verb, f"outputs={place}", f"run={run}", f"source={model.path}", "target=llama2c", *argv) == 0
    return artifact.open_artifact(place / run / "deploy-llama2c")


@pytest.mark.parametrize("format", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("fp32_v0", "fp32_v1")), "int8_v2"])
def test_a_bundle_of_a_rounded_merge_is_that_of_the_exact_sum(format, merges, place, tmp_path):
    from_bf16, from_fp32, from_stored = (
        deployed(tmp_path, f"{run}{len(argv)}", merges[run], f"target.format={format}", *argv)
        for run, argv in (("m16", []), ("m32", []), ("m16", ["weights=stored"]))
    )
    assert from_bf16.files["model.bin"] == from_fp32.files["model.bin"] != from_stored.files["model.bin"]
    assert {p["role"] for p in from_bf16.manifest["parents"]} == {"model", "exact_adapter", "exact_base"}
    assert not list(from_bf16.path.glob(".*")), "the exact sum is gone"
    m, bits8 = from_bf16.metrics, format == "int8_v2"
    print(f"{format}: {m['loss_before']:.5f} -> {m['loss_after']:.5f}, KL {m['kl']:.6f}")
    assert abs(m["loss_after"] - m["loss_before"]) < (0.05 if bits8 else 1e-5) and (m["kl"] > 1e-7) == bits8


def test_what_is_quantized_is_the_exact_sum_and_what_is_not_stays_as_stored(merges, place):
    made = {}
    for run in ("m16", "m32"):
        given = [f"outputs={os.path.relpath(place)}", f"run={run}", f"dataset={place / 'd' / 'data'}", "calibration.rows=8"]
        assert go(quantize, *given) == 0
        made[run] = load_file(place / run / "quantize" / "model.safetensors")
    stored = load_file(merges["m16"].path / "model.safetensors")
    assert made["m16"].keys() == made["m32"].keys()
    packed = [name for name in made["m16"] if name.endswith(("qweight", "qzeros", "scales", "g_idx"))]
    assert len(packed) == 4 * 28 and all(torch.equal(made["m16"][name], made["m32"][name]) for name in packed)
    plain = made["m16"].keys() - set(packed)
    assert plain == {name for name in stored if "_proj" not in name}
    assert all(torch.equal(made["m16"][name], stored[name]) and stored[name].dtype == torch.bfloat16 for name in plain)
    assert not (place / "m16" / "quantize" / "scratch").exists()
    m = artifact.open_artifact(place / "m16" / "quantize").metrics
    assert m["kl"] > 0 and abs(m["loss_before"] - merges["m32"].metrics["loss_before"]) < 1e-4


def test_the_plan_says_what_the_exact_sum_costs_and_how_to_decline(merges, place, capsys):
    given = [f"outputs={place}", "run=m16", f"dataset={place / 'd' / 'data'}", "dry_run=true", "force=true"]
    assert go(quantize, *given) == 0
    size = sum(entry.size for entry in safetensors_io.entries(merges["m32"].path).values())
    err = capsys.readouterr().err
    assert f"{size / 1e6:.1f} MB of disk in fp32 while this works; weights=stored takes the merge as it was rounded" in err
    assert go(quantize, *given, "weights=stored") == 0 and "of disk in fp32" not in capsys.readouterr().err


@helps("models/exact_sum.py", "weights=stored takes the merge as it was rounded")
@helps("core/errors.py", "move the outputs folder to a larger disk and name it with outputs=FOLDER")
def test_each_way_out_of_a_disk_without_room_for_the_exact_sum(merges, place, tmp_path, monkeypatch, capsys):
    given = ["run=m16", f"dataset={place / 'd' / 'data'}", "dry_run=true", "force=true", "room=ignore"]
    room = lambda path: SimpleNamespace(free=1000 if Path(path).is_relative_to(place) else 1 << 40)
    monkeypatch.setattr(exact_sum.shutil, "disk_usage", room)
    assert go(quantize, f"outputs={place}", *given) == NoRoom.exit_code
    ways = re.findall("  (?:fix:  |or:   ) (.*)", capsys.readouterr().err)
    assert [way.split()[0] for way in ways] == ["free", "move", "weights=stored"]
    assert go(quantize, f"outputs={place}", *given, "weights=stored") == 0
    assert go(quantize, f"outputs={shutil.copytree(place, tmp_path / 'moved')}", *given) == 0
    assert "of disk in fp32 while this works" in capsys.readouterr().err
    monkeypatch.undo()
    assert go(quantize, f"outputs={place}", *given) == 0


def test_an_adapter_that_is_gone_is_said_and_the_stored_weights_are_taken(adapter, place, tmp_path, capsys):
    copy = Path(shutil.copytree(adapter.path, tmp_path / "o" / "a" / "finetune"))
    assert go(merge, f"outputs={tmp_path / 'o'}", "run=a", f"base={place / 'base'}") == 0
    found = artifact.open_artifact(tmp_path / "o" / "a" / "merge")
    assert exact_sum.parents(found, "exact", HashCache(tmp_path / "hashes.json")).keys() == {"exact_adapter", "exact_base"}
    assert exact_sum.parents(found, "stored", HashCache(tmp_path / "hashes.json")) == {}
    for harm in (lambda: (copy / "adapter_config.json").write_text("{}"), lambda: shutil.rmtree(copy), lambda: copy.mkdir()):
        harm()
        capsys.readouterr()
        assert exact_sum.parents(found, "exact", HashCache(tmp_path / "hashes.json")) == {}
        assert f"{copy} is no longer the adapter it was made from" in capsys.readouterr().err


# ---- the measure


def test_the_measure_is_kl_loss_and_agreement():
    """Against torch, on a vocabulary small enough that nothing counts together; and never above the truth where something does."""
    draw = torch.Generator().manual_seed(0)
    before, after = (torch.randn(300, 50, generator=draw) for _ in range(2))
    row = Encoded(list(range(301)), [-100] + [i % 50 for i in range(300)])
    one = seen.observe(seen.one_by_one(lambda _: before, "one"), [row])
    change = fidelity.compare(one, seen.observe(seen.one_by_one(lambda _: after, "other"), [row], one.top_k_ids), 1)
    true = kl_div(after.double().log_softmax(-1), before.double().log_softmax(-1), log_target=True, reduction="batchmean").item()
    targets = torch.tensor(row.labels[1:])
    losses = [torch.nn.functional.cross_entropy(logits.double(), targets).item() for logits in (before, after)]
    assert change.kl == pytest.approx(true, rel=1e-5) and change.tokens == 300
    assert (change.before, change.after) == (pytest.approx(losses[0], rel=1e-6), pytest.approx(losses[1], rel=1e-6))
    assert change.agreement == (before.argmax(-1) == after.argmax(-1)).double().mean().item()
    few = seen.observe(seen.one_by_one(lambda _: before, "one"), [row], top_k=5)
    assert few.top_k_ids.shape == (300, 5)
    assert 0 < fidelity.compare(few, seen.observe(seen.one_by_one(lambda _: after, "other"), [row], few.top_k_ids), 1).kl < true


@pytest.mark.parametrize(
    "loss, kl, fails",
    [
        (0.004, 0.0, False),
        (-0.004, 0.0, False),
        (0.2, 0.0, True),
        (-0.2, 0.0, True),
        (0.0, 0.2, True),
        (float("nan"), 0.0, True),
        (0.0, float("nan"), True),
    ],
)
def test_the_limit_is_on_loss_either_way_and_on_kl(loss, kl, fails):
    change = fidelity.Change(1, 100, 1.0, 1.0 + loss, 0.01, kl, 0.01, 1.0)
    with (
        pytest.raises(ProofFailed) if fails else contextlib.nullcontext() as told,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        fidelity.judge("merge", change, LIMIT, Path("somewhere"), [])
    ways = told.value.fix if fails else []
    assert bool(ways) == (fails and np.isfinite(loss + kl)), "nothing is to be accepted where a figure is no number"
    for way in ways:
        with contextlib.redirect_stderr(io.StringIO()):
            fidelity.judge("merge", change, float(way.split()[0].removeprefix("max_loss_change=")), Path("somewhere"), [])


@pytest.mark.parametrize(
    "parameters, tokens, exact", [(10**6, 4096, 4096), (134_515_008, 1115, 1115), (494_032_768, 1024, 303), (7_600_000_000, 1024, 256)]
)
def test_larger_models_are_compared_on_fewer_tokens(parameters, tokens, exact, monkeypatch):
    monkeypatch.setattr(fidelity, "_parameters", lambda folder: parameters)
    assert (fidelity.enough(CHAT), fidelity.enough(CHAT, fidelity.FEWEST_EXACT)) == (tokens, exact)


def test_a_row_longer_than_all_that_is_compared_is_compared_alone():
    rows = [Encoded([1] * n, [1] * n) for n in (1025, 700, 40)]
    assert fidelity.within(rows, most=256) == rows[1:2] and fidelity.within(rows, most=740) == rows[1:]


def test_rows_are_bounded_and_come_from_val_then_calib(place, tmp_path, monkeypatch):
    from src.models.loading import load_tokenizer

    tokenizer, dataset = load_tokenizer(CHAT), place / "d" / "data"
    val = fidelity.held_out(dataset, tokenizer, CHAT)
    assert 5 < len(val) <= sum(1 for _ in open(dataset / "val.jsonl"))
    monkeypatch.setattr(fidelity, "enough", lambda folder, least: 200)
    few = fidelity.held_out(dataset, tokenizer, CHAT)
    assert 0 < sum(len(row.input_ids) for row in few) <= 200 and all(row in val for row in few)
    other = Path(shutil.copytree(dataset, tmp_path / "data"))
    (other / "val.jsonl").write_text("")
    calib = fidelity.held_out(other, tokenizer, CHAT)
    assert calib and calib[0].input_ids not in [row.input_ids for row in val]
    assert np.mean([row.trained > 0 for row in calib]) == 1
