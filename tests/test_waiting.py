"""Passes that wait within a layer: the bytes of passes that begin anew at each group of matrices, in one pass; threads that end whatever happens."""

import threading
from types import SimpleNamespace

import pytest
import torch
from test_by_layer import ROWS, on_disk
from torch import nn

from src.models import by_layer, gptq, gptq_layers
from src.models.layers import linear_of
from src.models.quantizing import quantize
from src.models.waiting import waiting

IDS = [row.input_ids for row in ROWS]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_waiting_gives_the_bytes_of_beginning_anew_in_one_pass(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(by_layer, "TOGETHER", 1)  # a pass for each row
    made, calls = {}, {}
    for count in (0, 1, len(IDS)):
        _, found = on_disk(kind, place := tmp_path / f"{count}")
        monkeypatch.setattr(gptq_layers, "_together", lambda *given, count=count: count)
        counted: list[int] = []
        linear_of(found, 0)[0].register_forward_hook(lambda *given, counted=counted: counted.append(1))
        quantize(found, IDS, lambda name: gptq.Settings(4, 16, 0.01, False), place / "layers")
        made[count] = {file.name: file.read_bytes() for file in (place / "layers").iterdir()}
        calls[count] = len(counted)
    assert made[0] == made[1] == made[len(IDS)] and len(made[0]) == 2
    assert calls[0] > calls[1] > calls[len(IDS)] == len(IDS) + 1, "one pass finds out which matrices share an input"


def test_no_more_passes_wait_than_memory_is_meant_for(tmp_path, monkeypatch):
    _, found = on_disk("llama", tmp_path)
    widest = max(module.weight.shape[1] for module in linear_of(found, 0))
    passes = [SimpleNamespace(ids=torch.zeros(1, 10))] * 5
    monkeypatch.setattr(gptq_layers, "HELD", 35 * 4 * (3 * found.width + widest))
    assert gptq_layers._together(found, 0, passes) == 3


def two():
    """What `waiting` needs of a model whose one layer calls two matrices in the order that a pass says."""
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)

    def call(number, each):
        for name in each.order:
            given = {"a": a, "b": b}[name](each.hidden)
        return given

    return SimpleNamespace(call=call), a, b


def test_a_pass_goes_on_with_what_weights_became_and_waits_where_it_is_not_asked():
    model, a, b = two()
    passes = [SimpleNamespace(order=order, hidden=torch.ones(1, 4)) for order in ("ab", "b", "ba")]
    left = set[nn.Module]()
    with torch.no_grad(), waiting(model, 0, passes, [a, b], left) as (both, second, turned):
        assert both.at(a) is not None and both.at(a) is not None, "it stays there until the module is left"
        assert second.at(a) is None and turned.at(a) is None, "these begin with the other one"
        left.add(a)
        assert all(torch.equal(one.at(b), torch.ones(1, 4)) for one in (both, second, turned))
        b.weight.data.zero_()
        b.bias.data.fill_(3)
        left.add(b)
        assert torch.equal(both.end(), torch.full((1, 4), 3.0)) and torch.equal(turned.end(), a(torch.ones(1, 4)))


def test_threads_end_with_the_block_and_faults_reach_the_one_who_waits():
    model, a, b = two()
    before = threading.active_count()
    with (
        pytest.raises(ZeroDivisionError),
        waiting(model, 0, [SimpleNamespace(order="ab", hidden=torch.ones(1, 4))] * 3, [a, b], set()) as all_,
    ):
        assert all_[0].at(a) is not None and threading.active_count() == before + 3
        raise ZeroDivisionError
    assert threading.active_count() == before and not a._forward_pre_hooks
    with waiting(model, 0, [SimpleNamespace(order="x", hidden=None)], [a], set()) as (one,), pytest.raises(KeyError):
        one.at(a)
