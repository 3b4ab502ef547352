"""A folder whose tensors are not those its model needs is refused, naming them: transformers and peft would draw the missing ones at random."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from conftest import helps, write_model
from safetensors.torch import load_file, save_file

from src.core.artifact import open_any
from src.core.errors import AGAIN, BadData, WrongKind
from src.models.loading import load_any, load_model, load_tokenizer


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model", tie_word_embeddings=False)


def rewrite(folder, change, file="model.safetensors") -> None:
    tensors = change(load_file(folder / file))
    save_file(tensors, folder / file, metadata={"format": "pt"})


def configure(folder, file="config.json", **changes) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))


WRONG = {
    "a prefix of a wrapper": (lambda t: {f"module.{name}": v for name, v in t.items()}, {}, "missing"),
    "a prefix of torch.compile": (lambda t: {f"_orig_mod.{name}": v for name, v in t.items()}, {}, "missing"),
    "a layer missing": (lambda t: {name: v for name, v in t.items() if "layers.1." not in name}, {}, "model.layers.1."),
    "a matrix missing": (lambda t: {name: v for name, v in t.items() if not name.endswith("layers.0.mlp.up_proj.weight")}, {}, "up_proj"),
    "half converted": (lambda t: {name.replace("q_proj", "wq"): v for name, v in t.items()}, {}, "q_proj.weight"),
    "fewer layers in config.json": (dict, {"num_hidden_layers": 1}, "beyond what config.json describes, such as model.layers.1."),
    "more layers in config.json": (dict, {"num_hidden_layers": 3}, "missing, such as model.layers.2."),
    "another family": (dict, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "k_proj.bias"),
    "another width": (
        lambda t: t | {"model.layers.0.mlp.up_proj.weight": torch.ones(64, 128)},
        {},
        "other shapes than config.json describes",
    ),
    "no output layer": (lambda t: {name: v for name, v in t.items() if name != "lm_head.weight"}, {}, "lm_head.weight"),
}


@helps("models/loading.py", "take config.json and weights of one and the same model, with its names for the tensors")
@pytest.mark.parametrize("what", WRONG)
def test_a_model_that_lacks_what_it_needs_is_refused(model, what):
    change, config, named = WRONG[what]
    rewrite(model, change)
    configure(model, **config)
    with pytest.raises(BadData) as error:
        load_model(model)
    assert named in error.value.what
    if error.value.fix != [AGAIN]:
        assert error.value.fix == ["take config.json and weights of one and the same model, with its names for the tensors"]
    shutil.rmtree(model)
    load_model(write_model(model, tie_word_embeddings=False))


def test_what_belongs_to_no_part_of_it_is_named_and_left(model, capsys):
    rewrite(model, lambda t: t | {"mtp.layers.0.weight": torch.ones(2)})
    load_model(model)
    assert "1 tensors belong to no part of the model and are not used, such as mtp.layers.0.weight" in capsys.readouterr().err


@pytest.fixture
def adapter(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load_model(model), config).save_pretrained(tmp_path / "adapter")
    shutil.copy(model / "tokenizer_config.json", tmp_path / "adapter")
    shutil.copy(model / "tokenizer.json", tmp_path / "adapter")
    configure(tmp_path / "adapter", "adapter_config.json", base_model_name_or_path=str(model))
    return tmp_path / "adapter"


LACKING = {
    "no tensors": (lambda t: {"x": torch.ones(1)}, "missing"),
    "a matrix missing": (
        lambda t: {name: v for name, v in t.items() if "layers.1.self_attn.v_proj.lora_B" not in name},
        "1 tensors are missing",
    ),
    "unknown modules": (lambda t: t | {"base_model.model.model.layers.0.moe.lora_A.weight": torch.ones(2, 4)}, "1 tensors are unknown"),
    "another prefix": (lambda t: {f"module.{name}": v for name, v in t.items()}, "unknown"),
}


def test_a_whole_adapter_loads(adapter):
    load_any(open_any(adapter))


@helps("models/loading.py", "give the base it was trained on, with all files of the adapter")
@pytest.mark.parametrize("what", LACKING)
def test_an_adapter_that_lacks_what_it_needs_is_refused(adapter, what):
    change, named = LACKING[what]
    whole = (adapter / "adapter_model.safetensors").read_bytes()
    rewrite(adapter, change, "adapter_model.safetensors")
    with pytest.raises(BadData) as error:
        load_any(open_any(adapter))
    assert named in error.value.what and error.value.fix == ["give the base it was trained on, with all files of the adapter"]
    (adapter / "adapter_model.safetensors").write_bytes(whole)
    load_any(open_any(adapter))


@pytest.mark.parametrize("name", ["x.bin", "../model.safetensors", "model.safetensors/..", 7, "pytorch_model.pt"])
def test_an_index_that_names_anything_but_the_safetensors_beside_it_is_refused(model, name):
    (model / "x.bin").write_bytes(b"pickled")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(BadData, match="names something else than the"):
        load_model(model)


@helps("models/folder.py", "save it again with peft's save_pretrained, which writes adapter_model.safetensors")
def test_a_pickled_adapter_is_never_opened(adapter):
    from peft import PeftModel

    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(WrongKind, match="are a pickle"):
        load_any(open_any(adapter))
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    PeftModel.from_pretrained(load_model(Path(base)), adapter).save_pretrained(adapter)
    load_any(open_any(adapter))


HUGE = [
    ("num_hidden_layers", 10**9, "no model has more than 1,000"),
    ("num_hidden_layers", 900, "the weights are 21 tensors"),
    ("num_attention_heads", 10**9, "no model has more than"),
    ("max_position_embeddings", 10**12, "no model has more than"),
    ("vocab_size", 10**11, "the weights are"),
    ("hidden_size", 10**10, "the weights are"),
    ("text_config", {"num_hidden_layers": 10**9}, "'num_hidden_layers' is 1,000,000,000"),
    ("vision_config", {"stages": [{"num_layers": 1e9}]}, "'num_layers' is 1,000,000,000"),
]


@pytest.mark.parametrize("key, value, words", HUGE)
def test_a_size_beyond_the_weights_is_refused_before_anything_is_made_of_it(model, key, value, words):
    configure(model, **{key: value})
    start = time.process_time()  # on whatever machine: made, it would take hours
    with pytest.raises(BadData, match=words):
        load_model(model)
    assert time.process_time() - start < 30


@pytest.mark.parametrize("where", [{"num_hidden_layers": 10**9}, {"text_config": {"num_layers": 10**9}}])
def test_a_tokenizer_of_such_a_model_is_refused_too(model, where):
    configure(model, **where)
    with pytest.raises(BadData, match="is 1,000,000,000; no model has more than"):
        load_tokenizer(model)


@pytest.mark.parametrize("changes", [{"r": 10**12}, {"rank_pattern": {"q_proj": 10**12}}])
def test_an_adapter_s_rank_beyond_its_tensors_is_refused(adapter, changes):
    configure(adapter, "adapter_config.json", **changes)
    with pytest.raises(BadData, match="a rank of 1,000,000,000,000"):
        load_any(open_any(adapter))
