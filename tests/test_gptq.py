"""GPTQ by our own hand: the loss of gptqmodel's on the same Hessian or less, its layout as its own layers read it."""

import contextlib
import math

import pytest
import torch
from safetensors.torch import save_file

from src.core.errors import BadData
from src.core.processes import import_quietly
from src.models import cholesky, gptq, safetensors_io

import_quietly("gptqmodel")


def matrix(outputs=96, inputs=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=g) * 0.05
    mix = torch.randn(inputs, inputs, generator=g) / math.sqrt(inputs)
    tokens = torch.randn(2048, inputs, generator=g) @ mix * (1 + 10 * torch.rand(inputs, generator=g) ** 8)
    return weight, tokens


def ours(weight, tokens, how: gptq.Settings, *, passes_on: bool = True) -> gptq.Quantized:
    """passes_on: False rounds to the nearest."""
    hessian = gptq.Hessian(weight.shape[1])
    for part in tokens.split(700):
        hessian.add(part)
    hessian.close()
    if not passes_on:
        hessian.sum = torch.diag(hessian.sum.diagonal())
    seen = hessian.sum.diagonal() != 0
    order = hessian.order(how)
    return gptq.quantize(weight, order, hessian.factor(order, how.damp), seen, how)


def lost(weight, tokens, made) -> float:
    return float(((tokens @ (weight - made).T) ** 2).sum())


@pytest.mark.parametrize("bits, group, act_order", [(4, 128, False), (4, 32, False), (4, 128, True), (8, 64, False), (4, -1, False)])
def test_what_is_lost_is_no_more_than_with_gptqmodel(bits, group, act_order, monkeypatch):
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    weight, tokens = matrix()
    tokens[:, 7] = 0
    made = ours(weight, tokens, gptq.Settings(bits, group, 0.05, act_order))
    layer = torch.nn.Linear(256, 96, bias=False)
    layer.weight.data = weight.clone()
    peer = GPTQ(
        layer,
        QuantizeConfig(
            bits=bits, group_size=group, desc_act=act_order, sym=True, damp_percent=0.05, act_group_aware=group > 0 and not act_order
        ),
    )
    peer.quantizer.configure(perchannel=True)
    peer.add_batch(tokens, None)
    theirs, scale, *_ = peer.quantize()
    rounded = ours(weight, tokens, gptq.Settings(bits, group, 0.05, act_order), passes_on=False).weight
    one, other, nearest = (lost(weight, tokens, w) for w in (made.weight, theirs, rounded))
    assert one < 1.02 * other and one < 0.9 * nearest
    monkeypatch.setattr(gptq, "SHRUNK", (1.0,))
    plain = ours(weight, tokens, gptq.Settings(bits, group, 0.05, act_order))
    assert one < {4: 0.97, 8: 1.02}[bits] * lost(weight, tokens, plain.weight), "smaller scales that round finer"
    if group == 128:  # the same choices but where rounding the scale to fp16 first tips one, and what follows from it
        assert ((plain.weight - theirs).abs() > 0.1 * scale.max()).float().mean() < 0.05


@pytest.mark.parametrize("bits, act_order", [(3, False), (3, True), (4, False), (4, True), (8, False)])
def test_gptqmodels_own_layer_reads_what_was_meant(bits, act_order):
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    weight, tokens = matrix()
    made = ours(weight, tokens, gptq.Settings(bits, 64, 0.05, act_order))
    layer = TorchLinear(
        bits=bits, group_size=64, sym=True, desc_act=act_order, in_features=256, out_features=96, bias=False, register_buffers=True
    )
    layer.load_state_dict(made.tensors, strict=False)
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    convert_gptq_v1_to_v2_format_module(layer, bits=bits, pack_dtype=torch.int32)
    layer.post_init()
    assert torch.allclose(layer.dequantize_weight().T.float(), made.weight, atol=2e-3 * float(weight.abs().max()))
    assert torch.equal(gptq.widen(made.tensors), made.weight)


@pytest.mark.parametrize("bits, group", [(3, 64), (4, 64), (8, 64), (4, -1)])
def test_rounding_to_the_nearest_loses_more_and_is_nearest(bits, group):
    weight, tokens = matrix()
    made, better = gptq.nearest(weight, gptq.Nearest(bits, group)), ours(weight, tokens, gptq.Settings(bits, group, 0.05, False))
    assert torch.equal(gptq.widen(made.tensors), made.weight) and lost(weight, tokens, better.weight) < lost(weight, tokens, made.weight)
    assert (made.weight - weight).square().sum() <= (better.weight - weight).square().sum() + 1e-6
    assert made.loss == pytest.approx(float((made.weight - weight).square().mean()) / 2)


@pytest.mark.parametrize("damage", ["beyond", "negative", "empty", "short scales", "floats"])
def test_a_matrix_whose_tensors_do_not_belong_together_is_named(damage, tmp_path):
    tensors = {f"layers.3.up.{suffix}": t for suffix, t in gptq.nearest(matrix()[0], gptq.Nearest(4, 64)).tensors.items()}
    whole = dict(tensors)
    g_idx = tensors["layers.3.up.g_idx"].clone()
    if damage in ("beyond", "negative"):
        g_idx[7] = 10**6 if damage == "beyond" else -1
        tensors["layers.3.up.g_idx"] = g_idx
    elif damage == "empty":
        tensors["layers.3.up.g_idx"] = g_idx[:0]
    elif damage == "short scales":
        tensors["layers.3.up.scales"] = tensors["layers.3.up.scales"][:2].clone()
    else:
        tensors["layers.3.up.qweight"] = tensors["layers.3.up.qweight"].float()
    for stored, fails in ((whole, False), (tensors, True)):
        save_file(stored, tmp_path / "model.safetensors")
        found = gptq.matrices(safetensors_io.entries(tmp_path))["layers.3.up.weight"]
        with pytest.raises(BadData, match=r"layers\.3\.up\.weight") if fails else contextlib.nullcontext():
            assert found().shape == (96, 256)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_packing_is_a_stream_of_bits_and_undone(bits):
    values = torch.randint(0, 1 << bits, (64, 24), dtype=torch.uint8)
    words = gptq.pack(values, bits)
    assert torch.equal(gptq.unpack(words, bits), values) and len(words) == 2 * bits
    stream = sum(int(value) << (bits * i) for i, value in enumerate(values[:, 0]))
    assert [int(word) % 2**32 for word in words[:, 0]] == [stream >> (32 * i) & 0xFFFFFFFF for i in range(2 * bits)]
    assert gptq.pack(torch.arange(8, dtype=torch.uint8)[:, None], 4).item() == 0x76543210


def test_inputs_that_are_always_zero_and_groups_of_zeros_do_no_harm():
    weight, tokens = matrix()
    weight[:, :64] = 0
    tokens[:, 100:200] = 0
    made = ours(weight, tokens, gptq.Settings(4, 64, 0.05, False))
    assert made.weight.isfinite().all() and lost(weight, tokens, made.weight) < 0.02 * lost(weight, tokens, 0 * weight)


def test_the_factor_is_that_of_the_damped_inverse_in_order(monkeypatch):
    monkeypatch.setattr(gptq, "GATHERED", 4 * 256 * 600)
    _, tokens = matrix()
    hessian = gptq.Hessian(256)
    for part in tokens.split(500):
        hessian.add(part)
    hessian.close()
    assert torch.allclose(hessian.sum, tokens.T @ tokens, rtol=1e-4, atol=1e-2)
    whole, order = hessian.sum.double(), torch.randperm(256)
    ordered = whole[order][:, order]
    ordered.diagonal().add_(0.05 * ordered.diagonal().mean())
    factor = hessian.factor(order, 0.05).double()
    assert torch.equal(factor, factor.triu()) and torch.allclose(
        factor.T @ factor @ ordered, torch.eye(256, dtype=torch.float64), atol=1e-3
    )


@pytest.mark.parametrize("width", [64, 100, 256])
def test_the_factor_of_an_inverse_takes_its_matrix_s_place(width, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 64)
    tokens = torch.randn(500, width, dtype=torch.float64)
    matrix = tokens.T @ tokens
    meant = torch.linalg.cholesky(torch.linalg.inv(matrix), upper=True)
    assert cholesky.factor_of_inverse(matrix) and torch.allclose(matrix, meant, atol=1e-9)


@pytest.mark.parametrize("fault", [-1e6, math.nan, math.inf])
@pytest.mark.parametrize("at", [(3, 3), (70, 70), (199, 199), (150, 2), (140, 130)])
def test_a_matrix_without_a_factor_stays_as_it_was(at, fault, monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 64)
    tokens = torch.randn(500, 200)
    matrix = tokens.T @ tokens
    matrix = (matrix + matrix.T) / 2
    matrix[at] = matrix[at[::-1]] = fault
    before = matrix.clone()
    assert not cholesky.factor_of_inverse(matrix) and torch.equal(matrix.nan_to_num(7), before.nan_to_num(7))


def test_a_hessian_that_is_not_positive_is_damped_until_it_is(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 64)
    hessian = gptq.Hessian(200)
    hessian.sum.fill_diagonal_(1)
    hessian.sum[20, 10] = hessian.sum[10, 20] = 1.03  # an eigenvalue of -0.03
    damped = hessian.sum.double()
    damped.diagonal().add_(0.04)
    factor = hessian.factor(torch.arange(200), 0.02).double()
    assert torch.allclose(factor.T @ factor @ damped, torch.eye(200, dtype=torch.float64), atol=1e-3)


def test_a_hessian_that_is_no_number_is_refused():
    hessian = gptq.Hessian(8)
    hessian.add(torch.full((4, 8), math.nan))
    hessian.close()
    with pytest.raises(gptq.NotPositive):
        hessian.factor(torch.arange(8), 0.05)
