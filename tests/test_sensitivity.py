"""What each part of a model loses alone, told from one pass back, against the KL measured with that part rounded; and the bits that follow from it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import go, make_base

from src import data
from src.chat import encoding
from src.chat.rows import rows_of
from src.core import artifact
from src.models import by_layer, calibration, fidelity, gptq, safetensors_io, seen, sensitivity
from src.models.loading import load_tokenizer
from src.models.quantized_folder import rules
from src.models.sensitivity import Part
from src.sizing.budget import bits_with_scale

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "assets" / "tiny-chat"


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    here = tmp_path_factory.mktemp("rows")
    assert go(data, f"outputs={here}", "run=r", f"data.path={ROOT / 'assets' / 'conversations.json'}", "data.val=0.3") == 0
    tokenizer = load_tokenizer(TINY)
    encoding.ensure_chat(tokenizer)
    records = [json.loads(line) for line in open(here / "r" / "data" / "val.jsonl")][:100]
    return [row for _, row in rows_of(records, tokenizer, "rows")]


def rounded_alone(found, part: Part, bits: int, rows, before, source: Path = TINY) -> float:
    stored = safetensors_io.entries(source)

    def tensor(name: str) -> torch.Tensor:
        weight = safetensors_io.load_wide(stored[name])
        return gptq.nearest(weight, gptq.Nearest(bits, 32)).weight if name.removesuffix(".weight") in part.names else weight

    found.take(tensor)
    return fidelity.compare(before, seen.observe(seen.by_layer(found, "alone"), rows, before.top_k_ids), len(rows)).kl


def test_what_a_part_loses_is_told_from_one_pass_back(rows, tmp_path):
    """4 bits in groups of 32: parts that differ by a hundred times in KL come out within a factor of two, in their order."""
    start = artifact.open_any(TINY)
    before = seen.observe(seen.by_layer(by_layer.need(start), "before"), rows)
    parts = sensitivity.measure(by_layer.need(start), rows, (4, 8), 32, tmp_path)
    assert sorted(name for part in parts for name in part.names) == sorted(
        name.removesuffix(".weight") for name, e in safetensors_io.entries(TINY).items() if ".layers." in name and len(e.shape) == 2
    )
    assert {len(part.names) for part in parts} == {1, 2, 3}, "q, k, v and gate, up have one input"
    told = np.array([part.kl[4] for part in parts])
    found = np.array([rounded_alone(by_layer.need(start), part, 4, rows, before) for part in parts])
    print(np.round(np.log2(told / found), 2), found)
    assert np.abs(np.log2(told / found)).max() < 1.5 and np.abs(np.log2(told / found)).mean() < 0.6
    order = [np.argsort(np.argsort(each)) for each in (told, found)]
    assert np.corrcoef(*order)[0, 1] > 0.9
    assert all(part.kl[8] < part.kl[4] / 30 for part in parts), "four bits more are 16 times finer: 256 times less"
    assert not list(tmp_path.iterdir())


def test_an_output_layer_of_its_own_is_a_part_too(rows, tmp_path):
    start = artifact.open_any(make_base(tmp_path / "untied", tied=False, blank=False))
    before = seen.observe(seen.by_layer(by_layer.need(start), "before"), rows)
    (tmp_path / "hidden").mkdir()
    *_, part = sensitivity.measure(by_layer.need(start), rows, (4, 8), 32, tmp_path / "hidden", head=True)
    assert part.names == ("lm_head",) and part.weights == safetensors_io.entries(TINY)["model.embed_tokens.weight"].size // 4
    found = rounded_alone(by_layer.need(start), part, 4, rows, before, start.path)
    print(part.kl, found)
    assert abs(np.log2(part.kl[4] / found)) < 1 and part.kl[8] < part.kl[4] / 30


def test_the_parts_that_gain_most_for_their_size_are_wider_as_far_as_the_size_goes():
    parts = [Part((f"l.{i}.a", f"l.{i}.b"), 100 * (i + 1), {4: kl, 8: kl / 200}) for i, kl in enumerate((1.0, 8.0, 3.0, 0.1))]
    for size in (4.2, 4.5, 5.5, 7, 9):
        bits = sensitivity.bits_of(parts, size, 128)
        wide = {int(name[2]) for name, width in bits.items() if width == 8}
        used = sum(part.weights * bits_with_scale(bits[part.names[0]], 128) for part in parts) / 1000
        assert used <= size and wide == {4.2: set(), 4.5: set(), 5.5: {0, 1}, 7: {0, 1, 2}, 9: {0, 1, 2, 3}}[size], (size, wide)
        assert all(bits[part.names[0]] == bits[part.names[1]] for part in parts)


def test_rules_name_the_wide_matrices_and_what_vllm_fuses_them_into():
    import re

    bits = {f"model.layers.{n}.self_attn.{m}_proj": 8 if n in (1, 11) else 4 for n in (0, 1, 11) for m in "qkvo"} | {"lm_head": 8}
    found = rules(bits)

    def width(name: str) -> int:
        return next((rule["bits"] for pattern, rule in found.items() if re.match(pattern.removeprefix("+:"), name)), 4)

    assert all(width(name) == bits[name] for name in bits)
    assert width("model.layers.11.self_attn.qkv_proj") == 8 and width("model.layers.111.self_attn.qkv_proj") == 4


def test_calibration_rows_are_of_all_lengths_and_seeded():
    lengths = [(i * 37) % 100 for i in range(100)]
    some = calibration.drawn(lengths, 10, 0)
    assert some == calibration.drawn(lengths, 10, 0) != calibration.drawn(lengths, 10, 1)
    assert sorted(int(lengths[i] // 10) for i in some) == list(range(10)) and some == sorted(some)
    assert calibration.drawn(lengths, 200, 0) == list(range(100))
