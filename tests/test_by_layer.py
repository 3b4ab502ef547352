"""A model taken layer by layer from its shards says what the whole model says, or is taken whole: every family that transformers has, made tiny."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAT
from safetensors.torch import load_file, save_file
from test_packing import SAFE, tiny
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from src.chat.encoding import Encoded
from src.core import artifact
from src.core.errors import ProofFailed, WrongKind
from src.models import by_layer, gptq, quantized_folder, quantizing, seen

ROWS = [Encoded(row, row) for row in (list(range(5, 20)), list(range(30, 37)), list(range(50, 90)))]
OFTEN = {"llama", "qwen3", "gemma3_text", "mixtral", "gpt2"}
BROKEN = {"bailing_hybrid", "kimi_linear"}
FORM = gptq.Settings(4, 32, 0.05, False)


def how(name: str) -> gptq.Settings:
    return FORM


def on_disk(kind: str, folder):
    """(the family's tiny model, the same layer by layer or None) ; (None, None) where it cannot be made tiny."""
    try:
        if not (model := tiny(kind, torch.float32)):
            return None, None
        model.save_pretrained(folder)
    except Exception as error:
        return pytest.skip(f"cannot be made tiny: {type(error).__name__}")
    found = by_layer._on_disk(folder)
    found = found and by_layer.ByLayer(found)
    return model, found if found and found.works() else None


def apart(model, found) -> float:
    one, other = (seen.observe(read, ROWS) for read in (seen.by_layer(found, "by layer"), seen.whole(model.eval(), "whole")))
    return float(np.abs(one.losses - other.losses).max())


@pytest.mark.parametrize("kind", sorted(OFTEN))
def test_it_says_what_the_whole_model_says(kind, tmp_path):
    model, found = on_disk(kind, tmp_path)
    assert all(parameter.is_meta for layer in found.layers for parameter in layer.parameters())
    assert apart(model, found) < 1e-4
    assert all(parameter.is_meta for layer in found.layers for parameter in layer.parameters()), "nothing is held afterwards"


def test_what_is_not_layer_after_layer_is_taken_whole(tmp_path):
    assert on_disk("bamba", tmp_path)[1] is None


def test_rows_that_do_not_fit_together_go_in_rounds(tmp_path, monkeypatch):
    model, found = on_disk("llama", tmp_path)
    monkeypatch.setattr(by_layer, "HIDDEN", 4 * 64 * 20)
    assert apart(model, found) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - OFTEN))
def test_every_family_says_the_same_or_is_taken_whole(kind, tmp_path):
    model, found = on_disk(kind, tmp_path)
    if found is None:
        assert kind not in SAFE
    elif kind in BROKEN:
        pytest.skip("made so tiny it cannot be run at all")
    else:
        assert apart(model, found) < 1e-3


def test_experts_that_are_no_linear_layers_are_not_left_unquantized_in_silence(tmp_path):
    _, found = on_disk("mixtral", tmp_path)
    with pytest.raises(WrongKind, match=r"mlp\.experts\.\w+ of layer 0 is none"):
        quantizing.quantize(found, [row.input_ids for row in ROWS], how, tmp_path / "layers")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_quantization_that_was_killed_goes_on_behind_the_last_layer(kind, tmp_path):
    rows = [row.input_ids for row in ROWS]
    for name in ("whole", "killed"):
        _, found = on_disk(kind, tmp_path / kind)
        if name == "killed":
            quantizing.quantize(found, rows, how, tmp_path / name)
            (tmp_path / name / "layer-00001.safetensors").unlink()
            (tmp_path / name / "layer-00001.partial").write_bytes(b"half")
        losses = quantizing.quantize(found, rows, how, tmp_path / name)
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "killed" / file.name).read_bytes()
    assert len(losses) == 2 * {"llama": 4, "gpt2": 4}[kind] and len(list((tmp_path / "killed").iterdir())) == 2


def test_a_folder_that_leaves_out_how_names_begin_is_read_back(tmp_path):
    """As GPT-2's own on the hub does."""
    tiny("gpt2", torch.float32).save_pretrained(source := tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHAT / name, source)
    stored = load_file(source / "model.safetensors")
    save_file({name.removeprefix("transformer."): t for name, t in stored.items()}, source / "model.safetensors", {"format": "pt"})
    start = artifact.open_any(source)
    found = by_layer.need(start)
    before = seen.observe(seen.by_layer(found, "before"), ROWS)
    quantizing.quantize(found, [row.input_ids for row in ROWS], lambda name: gptq.Settings(8, 32, 0.05, False), tmp_path / "layers")
    quantized_folder.write(source, tmp_path / "layers", out := Path(shutil.copytree(source, tmp_path / "out")))
    after = seen.observe(seen.by_layer(quantizing.opened(start, out), "after"), ROWS, before.top_k_ids)
    assert 0 < np.abs(after.losses - before.losses).max() < 0.2


def test_a_matrix_that_no_row_reaches_is_rounded_to_the_nearest_and_that_is_said(tmp_path, capsys):
    model, found = on_disk("llama", tmp_path)
    found.layers[0].mlp.forward = torch.zeros_like
    quantizing.quantize(found, [row.input_ids for row in ROWS], how, tmp_path / "layers")
    assert "no calibration row reaches model.layers.0.mlp.gate_proj" in capsys.readouterr().err
    stored = load_file(tmp_path / "layers" / "layer-00000.safetensors")
    made = gptq.widen({suffix: stored[f"model.layers.0.mlp.up_proj.{suffix}"] for suffix in gptq.SUFFIXES})
    weight = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    step = stored["model.layers.0.mlp.up_proj.scales"].float().T.repeat_interleave(FORM.group, 1)
    kept = (weight < 7.4 * step) & (weight > -8.4 * step)  # of those that its scale cuts, none
    assert ((made - weight).abs() <= 0.51 * step + 1e-6)[kept].all() and kept.float().mean() > 0.9


def test_activations_that_are_no_numbers_are_named(tmp_path):
    model, found = on_disk("llama", tmp_path)
    weights = model.state_dict()
    found.take(lambda name: weights[name].clone().fill_(torch.nan) if "o_proj" in name else weights[name].clone())
    with pytest.raises(ProofFailed, match=r"model\.layers\.0\.mlp\.gate_proj"):
        quantizing.quantize(found, [row.input_ids for row in ROWS], how, tmp_path / "layers")
