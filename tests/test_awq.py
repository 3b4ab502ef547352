"""AWQ a layer at a time: what is scaled up is scaled down before, whatever the family's norms; gptqmodel's own layer reads what was meant; less is lost than by
rounding alone."""

import pytest
import torch
from conftest import helps
from test_by_layer import ROWS, on_disk

from src.core.errors import WrongKind
from src.core.processes import import_quietly
from src.models import awq, awq_layers, gptq, safetensors_io
from src.models.quantizing import quantize

IDS = [row.input_ids for row in ROWS]
SCALED = {"llama": 3, "qwen3": 3, "gemma2": 3, "gemma3_text": 3, "phi3": 2, "gpt2": 2, "olmo2": 1, "mistral": 3}
"""groups of matrices in a layer whose inputs something in it can be divided for; gemma's norms multiply by 1 + weight, olmo2's stand behind"""


def test_eight_outputs_lie_in_a_word_as_gptqmodels_kernels_have_them():
    import_quietly("gptqmodel")
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    values, scales, zeros = awq.rounded(weight, 32)
    parts = awq_layers._packed(values, scales, zeros)
    theirs = dequantize_gemm(parts["qweight"], parts["qzeros"], parts["scales"], 4, 32)
    assert torch.allclose(theirs.T.float(), awq.made_of(values, scales, zeros), atol=2e-3)
    assert torch.equal(awq.unpack(awq.pack(parts["qweight"].new_tensor([list(range(8))]).to(torch.uint8)))[0], torch.arange(8))
    assert (awq.made_of(values, scales, zeros) - weight).norm() < 0.12 * weight.norm()


@pytest.mark.parametrize("kind", sorted(SCALED))
def test_a_layer_says_the_same_once_its_inputs_are_scaled(kind, tmp_path, monkeypatch):
    """Before anything is rounded, else it is refused; then less of its outputs is lost than without scales and cuts."""
    _, found = on_disk(kind, tmp_path)
    taken: list[bool] = []
    shares: list[float] = []
    down = awq_layers._scale_down
    monkeypatch.setattr(awq_layers, "_scale_down", lambda *given: taken.append(bool(maker := down(*given))) or maker)
    with found.held("embedding"):
        passes = [found.start(IDS)]
    with found.held(0), torch.no_grad():
        tensors, losses = awq_layers.quantize_layer(found, 0, passes, awq.Settings(16), shares.append)
    assert sum(taken) == SCALED[kind] and sum(shares) == pytest.approx(1) and len(shares) > 2
    monkeypatch.setattr(awq_layers, "POWERS", [0.0])
    monkeypatch.setattr(awq_layers, "CUTS", [1.0])
    with found.held(0), torch.no_grad():
        _, plain = awq_layers.quantize_layer(found, 0, passes, awq.Settings(16), shares.append)
    assert any(name.endswith(".bias") for name in tensors) == (kind == "gpt2"), "what was scaled is written"
    assert sum(losses) < 0.97 * sum(plain) and all(torch.isfinite(t.float()).all() for t in tensors.values())


def test_norms_that_were_scaled_are_written_with_their_matrices(tmp_path):
    _, found = on_disk("llama", tmp_path / "m")
    quantize(found, IDS, awq.Settings(16), tmp_path / "layers")
    entries = awq.matrices(safetensors_io.entries(tmp_path / "layers", "layer-*.safetensors"))
    norms = {name for name, entry in entries.items() if not isinstance(entry, awq.Stored) and not name.endswith(awq.SCALED)}
    assert norms == {f"model.layers.{n}.{norm}_layernorm.weight" for n in (0, 1) for norm in ("input", "post_attention")}
    stored = entries["model.layers.1.mlp.down_proj.weight"]
    assert stored.shape == tuple(stored().shape)


@helps("models/awq_layers.py", "quantizer=gptq_int4 scales nothing")
def test_a_norm_that_more_depends_on_is_not_scaled(tmp_path):
    _, found = on_disk("llama", tmp_path / "m")
    layer = found.layers[0]
    forward = type(layer.mlp).forward
    layer.mlp.forward = lambda x: forward(layer.mlp, x) + 3 * x
    with pytest.raises(WrongKind, match="uses that elsewhere too"):
        quantize(found, IDS, awq.Settings(16), tmp_path / "layers")
    assert len(quantize(found, IDS, lambda name: gptq.Settings(4, 16, 0.05, False), tmp_path / "g")) > 4
