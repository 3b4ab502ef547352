"""Merging: byte for byte what peft computes, proven by reloading, and refused where it cannot be right."""

import json
import os
import re
import shutil
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import go, helps
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from src import data, finetune, merge
from src.chat import encoding
from src.core import artifact, processes
from src.core.errors import ProofFailed, WrongKind
from src.models import by_layer, fidelity, generation, merging, seen
from src.models.folder import check_folder
from src.models.loading import load_any, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
real_fresh = processes.fresh


pytestmark = pytest.mark.usefixtures("proofs_in_this_process")


def weights(folder: Path) -> dict:
    return {name: t for file in sorted(folder.glob("model*.safetensors")) for name, t in load_file(file).items()}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))


def make_base(folder: Path, *, tied=True, dtype=torch.float32, shard="5GB") -> Path:
    if not folder.is_dir():
        model = AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True)
        if not tied:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.1)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        for name in TOKENIZER:
            shutil.copy(TINY / name, folder)
    return folder


def make_adapter(folder: Path, base: Path, *, rows=None, targets="all-linear", **changes) -> Path:
    """An adapter as plain peft makes it, with random weights, and its base as peft names it."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    model = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, trainable_token_indices=rows, **changes)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def by_peft(base: Path, adapter: Path) -> dict:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, local_files_only=True), adapter)
    return model.merge_and_unload().state_dict()


PATTERNS = {"rank_pattern": {"q_proj": 2, "mlp.down_proj": 6}, "alpha_pattern": {"v_proj": 4, r"layers\.[01]\.self_attn\.q_proj": 32}}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "how,changes",
    [
        ("plain", {}),
        ("patterns and rslora, sharded", PATTERNS | {"use_rslora": True}),
        ("trained rows", {"rows": [5, 1022, 1023]}),
    ],
)
def test_every_tensor_is_what_peft_makes(how, changes, dtype, tied, tmp_path):
    base = make_base(tmp_path / "base", tied=tied, dtype=dtype, shard="500KB" if "sharded" in how else "5GB")
    assert (len(list(base.glob("*.safetensors"))) > 3) == ("sharded" in how)
    if "rows" in changes and not tied:
        changes = changes | {"rows": {"embed_tokens": [5, 1022], "lm_head": [1023]}}
    adapter = make_adapter(tmp_path / "adapter", base, **changes)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}", "rounding=nearest") == 0
    ours, theirs, before = weights(tmp_path / "m" / "merge"), by_peft(base, adapter), weights(base)
    if tied:
        theirs.pop("lm_head.weight")
    assert ours.keys() == theirs.keys() == before.keys()
    assert [n for n in ours if not same_bytes(ours[n], theirs[n])] == []
    moved = {n.split(".")[-2] for n in ours if not same_bytes(ours[n], before[n])}
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert moved == linear | (set() if "rows" not in changes else {"embed_tokens"} | (set() if tied else {"lm_head"}))


def test_patterns_pick_layers_as_peft_does(tmp_path):
    """A pattern is a regular expression for the end of a layer's name, from a dot on: `proj` is no match for `q_proj`."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(
        tmp_path / "adapter", base, alpha_pattern={"proj": 64, "layers.2.*": 16, "attn.v_proj": 128, r".*\.mlp\.(up|gate)_proj": 1}
    )
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}") == 0
    ours, theirs = weights(tmp_path / "m" / "merge"), by_peft(base, adapter)
    assert [n for n in ours if not same_bytes(ours[n], theirs[n])] == []


def test_the_merged_folder_is_complete_and_small_shards_are_indexed(tmp_path):
    """The one test here that proves in a fresh process, as users do."""
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "fresh", real_fresh)
        assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}", "shard_size=1MB") == 0
    out = tmp_path / "m" / "merge"
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and all(s.stat().st_size < 1.05e6 for s in shards)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    held = {name: s.name for s in shards for name in load_file(s)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for s in shards for t in load_file(s).values())
    for name in TOKENIZER:
        assert (out / name).read_bytes() == (base / name).read_bytes()
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    assert [n for n, t in by_peft(base, adapter).items() if not torch.equal(t, model.state_dict()[n])] == []
    done = artifact.open_artifact(out)
    assert done.metrics["logit_error"] <= done.metrics["tolerance"] == 1e-4 and done.metrics["adapted"] == 28


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_asked_for_is_written(dtype, tmp_path):
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}", f"dtype={dtype}", "rounding=nearest") == 0
    ours, theirs = weights(tmp_path / "m" / "merge"), by_peft(base, adapter)
    assert all(same_bytes(t, theirs[n].to(getattr(torch, dtype))) for n, t in ours.items())
    assert json.loads((tmp_path / "m" / "merge" / "config.json").read_text())["dtype"] == dtype


# ---- what our own fine-tuning makes


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    here = tmp_path_factory.mktemp("data")
    rows = json.loads((ROOT / "assets" / "conversations.json").read_text())[:60]
    (here / "chats.json").write_text(json.dumps(rows))
    assert go(data, f"outputs={here}", "run=d", f"data.path={here / 'chats.json'}", "data.val=0.1", "data.calib=0.1") == 0
    return here / "d" / "data"


def tune(outputs, dataset, base, *argv):
    argv = ["tuner.rank=8", "tuner.learning_rate=3e-3", "train.log_steps=1", "train.eval_steps=1000", "train.samples=0", *argv]
    assert go(finetune, f"outputs={outputs}", "run=r", f"source={dataset}", f"model.path={base}", *argv) == 0
    return artifact.open_artifact(outputs / "r" / "finetune")


@pytest.mark.parametrize("padded", [0, 10], ids=["grown", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_base_without_chatml_grows_by_its_tokens(tied, padded, dataset, tmp_path):
    """tiny-chat with its two ChatML tokens cut off: training adds them; merging writes the mean row and the trained rows over it. With rows to spare
    in the matrix, the tokens take those and nothing grows."""
    base = make_base(tmp_path / "base", tied=tied)
    tensors = load_file(base / "model.safetensors")
    for name in tensors.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        tensors[name] = torch.cat([tensors[name][:1022], torch.full((padded, 128), 0.01)]).contiguous()
    from safetensors.torch import save_file

    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    for name, change in (
        ("config.json", {"vocab_size": 1022 + padded, "eos_token_id": 1021}),
        ("generation_config.json", {"eos_token_id": 1021}),
    ):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
    content = json.loads((base / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["id"] < 1022]
    content["model"]["vocab"] = {t: i for t, i in content["model"]["vocab"].items() if i < 1022}
    (base / "tokenizer.json").write_text(json.dumps(content))
    settings = json.loads((base / "tokenizer_config.json").read_text()) | {"eos_token": "<|endoftext|>"}
    (base / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))

    adapter = tune(tmp_path, dataset, base, "train.max_steps=4")
    assert adapter.metrics["added_tokens"] == ["<|im_start|>", "<|im_end|>"] and adapter.metrics["trained_rows"] == [1022, 1023]
    assert max(t.shape[0] for t in load_file(adapter.path / "adapter_model.safetensors").values()) < 1000, "no whole embedding in it"
    assert go(merge, f"outputs={tmp_path}", "run=r") == 0
    out, rows = tmp_path / "r" / "merge", 1024 if not padded else 1032
    model = AutoModelForCausalLM.from_pretrained(out, local_files_only=True)
    tokenizer = load_tokenizer(out)
    assert model.config.vocab_size == rows and len(tokenizer) == 1024 and model.config.eos_token_id == 1023
    assert tokenizer("<|im_start|>a<|im_end|>").input_ids[0::2] == [1022, 1023]
    before, after, delta = tensors, weights(out), load_file(adapter.path / "adapter_model.safetensors")
    for name in before.keys() & {"model.embed_tokens.weight", "lm_head.weight"}:
        assert after[name].shape == (rows, 128) and torch.equal(after[name][:1022], before[name][:1022])
        assert torch.equal(after[name][1024:], before[name][1024:])
        trained = [t for n, t in delta.items() if "trainable_tokens" in n and (name.split(".")[-2] in n)]
        assert torch.equal(after[name][1022:1024], trained[0])
        start = before[name][1022:1024] if padded else before[name].mean(0)
        assert (after[name][1022:1024] - start).abs().max() > 1e-4, "and they moved"
    answers = generation.greedy(model.eval(), tokenizer, [[{"role": "user", "content": "Hi!"}]], max_new_tokens=3, eos_id=1023)
    assert len(answers) == 1


@pytest.mark.parametrize("dora", ["false", "true"])
@helps("merge.py", "tuner=qlora on the unquantized base trains one on NF4, which merges")
def test_nf4_merges_into_what_it_was_trained_against(dora, dataset, tmp_path):
    """Merged with the dequantized base, the model is the one that was trained; merged with the base's own weights it is another."""
    adapter = tune(tmp_path, dataset, TINY, "tuner=qlora", f"tuner.dora={dora}", "train.max_steps=6")
    assert adapter.metrics["nf4"] == {"double_quant": True, "compute_dtype": "float32"}
    assert go(merge, f"outputs={tmp_path}", "run=r") == 0
    trained, _ = load_any(adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "merge", local_files_only=True).eval()
    naive = (
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(TINY, local_files_only=True), adapter.path).merge_and_unload().eval()
    )
    wanted, ours, other = (torch.from_numpy(generation.logits(m)) for m in (trained, merged, naive))
    ours, other = (((x - wanted).norm() / wanted.norm()).item() for x in (ours, other))
    print(f"relative logit error: merged as NF4 made it {ours:.1e}, into the original base {other:.1e}")
    assert ours < 1e-4 and other > 20 * ours and other > 1e-2


def test_rank_and_alpha_of_our_own_runs_reach_the_merge(dataset, tmp_path):
    adapter = tune(tmp_path, dataset, TINY, "train.max_steps=2", "tuner.alpha=5", "tuner.target_modules=[q_proj,down_proj]")
    assert go(merge, f"outputs={tmp_path}", "run=r") == 0
    ours, theirs = weights(tmp_path / "r" / "merge"), by_peft(TINY, adapter.path)
    assert [n for n in ours if not same_bytes(ours[n], theirs[n])] == []
    assert artifact.open_artifact(tmp_path / "r" / "merge").metrics["adapted"] == 8


# ---- refusals and proofs


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(base, adapter) to refuse or damage; read only."""
    here = tmp_path_factory.mktemp("pair")
    base = make_base(here / "base")
    return base, make_adapter(here / "adapter", base, rows=[1022, 1023])


def damage_weight(name, value):
    if name != "model.layers.2.mlp.up_proj.weight":
        return value
    value = value.clone()
    value[0] += 1
    return value


def damage_row(name, value):
    if name != "model.embed_tokens.weight":
        return value
    value = value.clone()
    value[1023] = value[1000]
    return value


def damage_all(name, value):
    return value * float("nan") if torch.is_tensor(value) else value


@pytest.mark.parametrize("damage", [damage_weight, damage_row, damage_all], ids=["weight", "row", "nan"])
def test_a_wrong_tensor_fails_the_proof_and_publishes_nothing(damage, pair, tmp_path, monkeypatch, capsys):
    true = merging.merged_tensors

    def wrong(*args):
        tensor = true(*args)
        return lambda name: damage(name, tensor(name))

    monkeypatch.setattr(merging, "merged_tensors", wrong)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={pair[1]}") == 8
    err = capsys.readouterr().err
    assert "self-check failed: the merged model's log-probabilities differ" in err and "fix:" in err and "tolerance=nan" not in err
    assert not list((tmp_path / "m").glob("merge*")), "neither finished nor half-made"
    monkeypatch.setattr(merging, "merged_tensors", true)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={pair[1]}") == 0


@helps("merge.py", "dtype=float32 rounds less", "tolerance={} if you accept it")
def test_each_way_out_of_logits_that_rounding_moved(tmp_path, capsys):
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", base)
    given = [f"outputs={tmp_path}", f"source={adapter}", f"base={base}", "max_loss_change=9"]
    assert go(merge, *given, "run=m", "tolerance=1e-5") == ProofFailed.exit_code
    dtype, accepted = re.findall("  (?:fix:  |or:   ) (.*)", capsys.readouterr().err)
    assert dtype == "dtype=float32 rounds less"
    assert go(merge, *given, "run=d", "tolerance=1e-5", dtype.split()[0]) == 0
    assert go(merge, *given, "run=t", accepted.split()[0]) == 0


def test_another_tokenizer_in_the_result_fails_the_proof(pair, tmp_path, monkeypatch, capsys):
    add_files = merging.add_files

    def spoilt(adapter, base, out, written):
        add_files(adapter, base, out, written)
        content = json.loads((out / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary[","], vocabulary["."] = vocabulary["."], vocabulary[","]
        (out / "tokenizer.json").write_text(json.dumps(content))

    monkeypatch.setattr(merging, "add_files", spoilt)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={pair[1]}") == 8
    assert "tokenizer differs" in capsys.readouterr().err and not (tmp_path / "m" / "merge").exists()


def changed(folder: Path, target: Path, file: str, **changes) -> Path:
    shutil.copytree(folder, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | changes))
    return target


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"bias": "all"}, "cannot merge"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_of_other_kinds_are_refused(changes, words, pair, tmp_path, capsys):
    other = changed(pair[1], tmp_path / "adapter", "adapter_config.json", **changes)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}") == 4
    assert words in capsys.readouterr().err


@helps("models/merging.py", "peft's merge_and_unload() merges it; give what it makes to quantize, evaluate and deploy")
@helps("models/merging.py", "save it with peft's path_initial_model_for_weight_conversion, which makes it one for the base as it was")
@helps("models/merging.py", "tuner=lora trains one that merges here")  # as all adapters here that merge
def test_each_way_out_of_an_adapter_that_does_not_merge(tmp_path, capsys):
    from peft import IA3Config

    base = make_base(tmp_path / "base")
    load = lambda: AutoModelForCausalLM.from_pretrained(base, local_files_only=True)
    given = [f"outputs={tmp_path}", f"base={base}", "dry_run=true"]
    get_peft_model(load(), IA3Config(task_type="CAUSAL_LM")).save_pretrained(tmp_path / "ia3")
    assert go(merge, *given, f"source={tmp_path / 'ia3'}") == WrongKind.exit_code
    PeftModel.from_pretrained(load(), tmp_path / "ia3").merge_and_unload().save_pretrained(tmp_path / "whole")
    assert artifact.open_any(tmp_path / "whole").kind == "model" and check_folder(tmp_path / "whole")

    tuned = get_peft_model(load(), LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj"], task_type="CAUSAL_LM"))
    tuned.peft_config["default"].init_lora_weights = True
    tuned.save_pretrained(tmp_path / "begin")
    tuned.peft_config["default"].init_lora_weights = "pissa"
    tuned.save_pretrained(tmp_path / "pissa")
    assert go(merge, *given, f"source={tmp_path / 'pissa'}") == WrongKind.exit_code
    tuned.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "begin"))
    assert "peft's merge_and_unload() merges it" in (err := capsys.readouterr().err) and "path_initial_model_for_weight_conversion" in err
    assert go(merge, *given, f"source={tmp_path / 'plain'}") == 0


def test_an_adapter_on_a_gptq_base_is_refused(pair, tmp_path, capsys):
    base = changed(pair[0], tmp_path / "gptq", "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={pair[1]}", f"base={base}") == 4
    err = capsys.readouterr().err
    assert "GPTQ base has no whole weights" in err and "NF4" in err


def test_another_base_than_the_one_trained_on_is_refused(dataset, tmp_path, capsys):
    tune(tmp_path, dataset, TINY, "train.max_steps=1", "train.warmup=0", "train.lr_scheduler=constant")
    other = make_base(tmp_path / "other", tied=False)
    assert go(merge, f"outputs={tmp_path}", "run=r", f"base={other}") == 4
    assert "not the base the adapter was trained on" in capsys.readouterr().err
    same = Path(shutil.copytree(TINY, tmp_path / "moved"))
    assert go(merge, f"outputs={tmp_path}", "run=r", f"base={same}") == 0, "the same content elsewhere is the same base"


def test_an_adapter_that_does_not_fit_is_refused(pair, tmp_path, capsys):
    from safetensors.torch import save_file

    other = Path(shutil.copytree(pair[1], tmp_path / "adapter"))
    file = other / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n.replace("layers.3", "layers.9"): t for n, t in tensors.items()}, file)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}") == 4
    assert "weights this base does not have, such as model.layers.9" in capsys.readouterr().err
    save_file({n: torch.ones(4, 96) if "q_proj.lora_A" in n else t for n, t in tensors.items()}, file)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}") == 4
    assert "the adapter is for shape (128, 96), the base has (128, 128)" in capsys.readouterr().err


@pytest.fixture
def threads():
    """threads(n): torch has n threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 3])
def test_no_more_merged_tensors_are_in_memory_than_threads_work_on(count, pair, tmp_path, monkeypatch, threads):
    true, alive, most = merging.merged_tensors, [], []

    def counted(*args):
        tensor = true(*args)

        def one(name):
            most.append(sum(r() is not None for r in alive))
            value = tensor(name)
            alive.extend([weakref.ref(value)] if torch.is_tensor(value) else [])
            return value

        return one

    monkeypatch.setattr(merging, "merged_tensors", counted)
    threads(count)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={pair[1]}") == 0
    assert len(most) == 38 and len(alive) == 29 and max(most) < count, "each is gone before its thread makes the next one"
    assert torch.get_num_threads() == count


def test_weights_too_large_for_one_block_are_what_peft_makes_of_them_whole(tmp_path, threads):
    """Qwen2.5-0.5B's widest layers, on several threads: a product made a part of its rows at a time has the same bits."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    threads(2)
    torch.manual_seed(0)
    shape = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 1024}
    LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1, tie_word_embeddings=True)).to(torch.bfloat16).save_pretrained(
        tmp_path / "base"
    )
    for name in TOKENIZER:
        shutil.copy(TINY / name, tmp_path / "base")
    assert 8 * merging.BLOCK < 896 * 4864
    for dora in (False, True):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", local_files_only=True)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=64, lora_alpha=16, target_modules="all-linear", use_dora=dora))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        adapter = tmp_path / f"adapter-{dora}"
        model.save_pretrained(adapter)
        assert go(merge, f"outputs={tmp_path}", f"run=m-{dora}", f"source={adapter}", f"base={tmp_path / 'base'}", "rounding=nearest") == 0
        ours, theirs = weights(tmp_path / f"m-{dora}" / "merge"), by_peft(tmp_path / "base", adapter)
        assert [n for n in ours if not same_bytes(ours[n], theirs[n])] == []


def test_a_fault_in_one_thread_ends_the_writing(tmp_path, threads):
    from src.models import safetensors_io

    threads(4)
    asked = []

    def tensor(name):
        asked.append(name)
        if name == "w3":
            raise OSError("no room")
        time.sleep(0.001)  # however busy the machine, the fault is seen before all are asked for
        return torch.zeros(4, 4)

    entries = [safetensors_io.Entry(f"w{i}", "F32", (4, 4), tmp_path) for i in range(1000)]
    with pytest.raises(OSError, match="no room"):
        safetensors_io.write(tmp_path, entries, tensor, 10**9)
    assert len(asked) < 1000 and torch.get_num_threads() == 4
    with pytest.raises(ValueError, match=r"w0: planned F32 \(4, 4\), got torch.float16"):
        safetensors_io.write(tmp_path, entries[:1], lambda name: torch.zeros(4, 4, dtype=torch.float16), 10**9)


def test_outside_adapter_without_its_base_says_what_to_do(pair, tmp_path, capsys):
    other = changed(pair[1], tmp_path / "adapter", "adapter_config.json", base_model_name_or_path="/gone/base")
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}") == 3
    assert "base=FOLDER" in capsys.readouterr().err
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={other}", f"base={pair[0]}") == 0
    assert os.listdir(tmp_path / "m") and (tmp_path / "m" / "merge" / "manifest.json").is_file()


@pytest.mark.parametrize(
    "tied, changes, by_itself", [(True, {}, True), (False, {"use_rslora": True}, True), (True, {"use_dora": True}, False)]
)
def test_the_proof_takes_layers_from_disk_and_what_cannot_be_taken_so_is_computed_whole(
    tied, changes, by_itself, dataset, tmp_path, monkeypatch, capsys
):
    """DoRA's lengths need the weights they belong to, so there, where memory is short, the stored dtype is computed in, which is said."""
    base = make_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(tmp_path / "adapter", base, **changes)
    monkeypatch.setattr("src.models.devices.available", lambda: 1000)
    assert go(merge, f"outputs={tmp_path}", "run=m", f"source={adapter}", f"base={base}") == 0
    assert ("computed in the dtype that is stored" in capsys.readouterr().err) == (not by_itself)


@pytest.mark.parametrize("tied, rows_trained", [(True, None), (False, None), (True, [508, 509])])
def test_layer_by_layer_is_the_whole_model(tied, rows_trained, tmp_path):
    base = make_base(tmp_path / "base", tied=tied)
    folders = [artifact.open_any(base), artifact.open_any(make_adapter(tmp_path / "adapter", base, rows=rows_trained))]
    rows = [encoding.Encoded(ids, ids) for ids in ([5, 6, 7, 8], list(range(9, 60)), list(range(3, 54)), [3, 1])]
    for found in folders:
        walk, _ = by_layer.load(found, base if found.kind == "adapter" else None)
        assert {"embedding", "head"} <= walk.places.tensors.keys(), "which stay on disk under trained rows too"
        assert all(p.is_meta for name, p in walk.layers[0].named_parameters() if "lora" not in name)
        apart, together = (
            seen.observe(read, rows) for read in (seen.by_layer(walk, "a"), seen.whole(load_any(found, dtype="float32", base=base)[0], "b"))
        )
        assert (apart.likeliest == together.likeliest).all()
        assert np.abs(apart.losses - together.losses).max() < 1e-5


def test_a_model_whose_layers_are_no_one_list_is_computed_whole(pair, monkeypatch):
    base, adapter = pair
    monkeypatch.setattr(by_layer, "_on_disk", lambda *_, **__: None)
    assert by_layer.load(artifact.open_any(base)) is by_layer.load(artifact.open_any(adapter), base) is None
    rows = fidelity.probes(64)
    assert len(seen.observe(fidelity.reader(artifact.open_any(adapter), "float32", "cpu", base), rows)) == 96
