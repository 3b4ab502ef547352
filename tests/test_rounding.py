"""Rounding to 16 bits: unbiased, to one of the two neighbours, and the same bytes however the work is cut."""

import concurrent.futures
import itertools

import numpy as np
import pytest
import torch
from conftest import helps

from src.core.errors import BadData
from src.models import rounding

SIXTEEN = [torch.bfloat16, torch.float16]
both = pytest.mark.parametrize("dtype", SIXTEEN, ids=["bf16", "fp16"])


def every_value(dtype) -> torch.Tensor:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return values[values.isfinite()]


def test_draws_are_splitmix64_of_name_and_position():
    """Literals: a change here changes every file that was ever rounded."""
    assert rounding.key_of("model.layers.0.mlp.up_proj.weight") == 3772720966487044581
    assert rounding.draws(0, 0, 8).tolist() == [52655, 31517, 43065, 57888, 26100, 41401, 40554, 28280]

    def splitmix(state: int) -> int:
        z = state % 2**64
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
        return z ^ z >> 31

    key = rounding.key_of("w")
    for position in (0, 1, 2, 3, 4, 1_000_003, 2**40 + 5):
        word = splitmix(key + (position // 4 + 1) * 0x9E3779B97F4A7C15)
        assert rounding.draws(key, position, 1)[0] == word >> 16 * (position % 4) & 0xFFFF


@both
def test_a_value_the_dtype_holds_stays_as_it_is(dtype):
    values = every_value(dtype)
    again = rounding.narrow(values.float(), dtype, "w")
    assert torch.equal(again.view(torch.int16)[values != 0], values.view(torch.int16)[values != 0])
    assert not again[values == 0].any()


@both
def test_every_result_is_a_neighbour(dtype):
    drawn = torch.Generator().manual_seed(0)
    values = torch.cat([torch.randn(200_000, generator=drawn) * scale for scale in (1, 1e-3, 3e-5, 1e-7)])
    results, grid = rounding.narrow(values.clone(), dtype, "w").double(), every_value(dtype).double().unique()
    at = torch.searchsorted(grid, values.double())
    assert torch.equal(torch.minimum((results - grid[at - 1]).abs(), (results - grid[at]).abs()), torch.zeros_like(results))


@both
@pytest.mark.parametrize("value", [1.0011, -0.02003, 3.1e-5, 1.3e-7, -4.4e-8])
def test_the_expected_value_is_the_exact_one(dtype, value):
    """Each of 400,000 copies goes to one of two neighbours; their mean is within five standard errors of the value that nearest rounding loses."""
    copies = torch.full((400_000,), value)
    rounded = rounding.narrow(copies.clone(), dtype, "w").double()
    wanted = copies[0].double().item()
    spread = rounded.std().item() / len(copies) ** 0.5
    assert abs(rounded.mean().item() - wanted) <= 5 * spread + 1e-16, (rounded.mean().item(), wanted)
    assert rounded.unique().numel() == 2


@both
def test_bytes_do_not_depend_on_blocks_or_threads(dtype):
    values = torch.randn(300_001, generator=torch.Generator().manual_seed(1))
    whole = rounding.narrow(values.clone(), dtype, "w")
    cuts = [0, 1, 6, 65_537, 200_000, 300_001]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        parts = pool.map(lambda cut: rounding.narrow(values[cut[0] : cut[1]].clone(), dtype, "w", start=cut[0]), itertools.pairwise(cuts))
        assert torch.equal(torch.cat(list(parts)).view(torch.int16), whole.view(torch.int16))
    square = rounding.narrow(values[:300_000].reshape(600, 500).clone(), dtype, "w")
    assert torch.equal(square.view(torch.int16).reshape(-1), whole.view(torch.int16)[:300_000])
    into = torch.empty(300_001, dtype=dtype)
    assert rounding.narrow(values.clone(), dtype, "w", out=into) is into and torch.equal(into, whole)
    assert not torch.equal(rounding.narrow(values.clone(), dtype, "another"), whole)


@both
def test_nearest_is_torchs_own_and_other_casts_are_plain(dtype):
    values = torch.randn(10_000)
    assert torch.equal(rounding.narrow(values.clone(), dtype, "w", rounding="nearest"), values.to(dtype))
    assert torch.equal(rounding.narrow(values.to(dtype), torch.float32, "w"), values.to(dtype).float())
    assert torch.equal(rounding.narrow(torch.arange(5), torch.int32, "w"), torch.arange(5, dtype=torch.int32))


@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("how", ["stochastic", "nearest"])
def test_what_is_not_finite_is_refused(dtype, bad, how):
    values = torch.randn(1000)
    values[700] = bad
    with pytest.raises(BadData, match="'w' has values from"):
        rounding.narrow(values, dtype, "w", rounding=how)


@helps("models/rounding.py", "dtype=float32 has the range of the base")
def test_what_is_out_of_range_is_refused_and_the_largest_kept():
    largest = torch.full((1000,), torch.finfo(torch.bfloat16).max)
    assert torch.equal(rounding.narrow(largest.clone(), torch.bfloat16, "w").float(), largest)
    wide = torch.tensor([70_000.0, 1.0], dtype=torch.bfloat16)
    with pytest.raises(BadData, match=r"float16 ends at 6\.55e.*(?s:.*)dtype=float32 has the range of the base"):
        rounding.narrow(wide, torch.float16, "w")
    rounding.narrow(wide, torch.float32, "w")


def test_one_sixteen_bit_type_to_the_other_is_a_narrowing_too():
    values = (torch.ones(100_000) * 1.0009765625).half()  # the fp16 value above 1, an eighth of a bf16 step
    rounded = rounding.narrow(values, torch.bfloat16, "w").float()
    assert abs(rounded.mean().item() - 1.0009765625) < 1e-4 and np.isin(rounded.unique().numpy(), [1.0, 1.0078125]).all()
