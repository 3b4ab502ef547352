"""The numbers that boards compute in: each format against the code that makes or reads it elsewhere, and a model taken with them before it is compiled."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHAT, ROOT, go, helps, refused, typed, ways, write_model
from test_by_layer import ROWS, on_disk

from src import evaluate, quantize
from src.chat.encoding import IGNORE, Encoded
from src.chat.rows import rows_of
from src.core import artifact, compose
from src.core.errors import ConfigError, GateFailed, Unfinished, WrongKind
from src.deploy import __main__ as deploy
from src.deploy import embedding
from src.deploy.llama2c import proof
from src.models import by_layer, fidelity, on_board, preview, seen
from src.models.generation import GREEDY, stop_ids
from src.models.llama2c_file import Form, reader_of
from src.models.llama2c_file import read_shape as read_llama2c
from src.models.llama2c_file import write_model as write_llama2c
from src.models.loading import load_any, load_tokenizer
from src.models.safetensors_io import entries, load_wide
from src.settings.evaluations import Gate
from src.sizing import budget, numerics
from src.sizing.config_reader import read_shape
from src.sizing.numerics import BF16, FP32, Floats, Integers, llama2c_integers

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("numerics") / "model")


def how(folder: Path, name: str) -> numerics.Numerics:
    return numerics.of(read_shape(folder), numerics.named()[name])


def lost(folder: Path, kind: numerics.Numerics, rows=ROWS) -> fidelity.Change:
    return preview.previews(artifact.open_any(folder), [kind], rows)[0][0].change


# ---- the formats


def test_every_type_of_every_target_has_its_numbers(model):
    found = numerics.named()
    assert {name for target in compose.options("target") for name in found if name.startswith(target)} == set(found)
    assert {found[name].name for name in found} == set(compose.options("target")) - {"gguf_lora"}, "which is measured with its base"
    for name in found:
        kind = how(model, name)
        assert kind.name == name and all(sentence.endswith(".") for sentence in kind.assumed)
        assert kind.assumed or name.startswith(("llama2c", "gguf")), "no vendor publishes all"


WEIGHTS = np.sin(np.arange(1, 25, dtype=np.float32) ** 1.7).reshape(3, 8).astype(np.float32) * np.array([[1], [-0.3], [0.02]], np.float32)
WEIGHTS[2] = np.abs(WEIGHTS[2]) + 0.01
NNCF = {
    Integers(8, -1, "asymmetric"): (
        [[255, 116, 160, 0, 173, 252, 250, 170], [237, 130, 8, 213, 73, 0, 201, 255], [229, 232, 255, 170, 227, 112, 211, 232]],
        [0.00684875, 0.002044249, 0.00011764],
        [132, 109, 0],
    ),
    Integers(8, -1, "signed"): (
        [[119, -15, 27, -128, 39, 116, 114, 36], [-112, -19, 88, -91, 32, 95, -81, -128], [-115, -116, -128, -86, -114, -56, -106, -117]],
        [0.007070003, -0.002332947, -0.000234362],
        [0, 0, 0],
    ),
    Integers(4, 4, "signed"): (
        [[7, -1, 2, -8, -3, -8, -8, -3], [-8, -1, 6, -6, 2, 6, -5, -8], [-7, -7, -8, -5, -8, -4, -7, -8]],
        [0.113120049, -0.102419153, -0.032697424, -0.037327152, -0.00374979, -0.003418439],
        [0, 0, 0],
    ),
}
"""what nncf 3.4.0's do_integer_quantization makes of WEIGHTS: (integers, scales, zero points)"""


@pytest.mark.parametrize("kind", NNCF, ids=str)
def test_openvino_s_integers_are_nncf_s(kind):
    values, scales, zeros = (np.array(part, np.float64) for part in NNCF[kind])
    groups = (values - zeros[:, None]).reshape(len(scales), -1) * scales[:, None]
    made = on_board.rounded(torch.from_numpy(WEIGHTS), kind)
    assert torch.allclose(made.double(), torch.from_numpy(groups.reshape(3, 8)), atol=1e-6)


@pytest.mark.parametrize("form", [Form(2, 8, 64), Form(2, 8, 16), Form(3, 4, 32)], ids=str)
def test_llama2c_s_integers_are_what_is_written_for_its_program(model, tmp_path, form):
    shape = read_llama2c(model, "int8_v3")
    write_llama2c(model, shape, form, tmp_path / "model.bin")
    written = reader_of(tmp_path / "model.bin", shape, form)
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        kind = llama2c_integers(8 if "embed" in name else form.bits, form.group)
        made = on_board.round_weight(load_wide(entries(model)[name]), kind)
        assert torch.allclose(made, written(name), rtol=1e-6), name


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_a_gguf_s_blocks_are_those_of_its_package(kind):
    from gguf import GGMLQuantizationType, quants

    values, at = np.random.default_rng(0).normal(size=(64, 128)).astype(np.float32), GGMLQuantizationType[kind.upper()]
    theirs = quants.dequantize(quants.quantize(values, at), at)
    ours = on_board.rounded(torch.from_numpy(values), numerics.GGUF_BLOCKS[kind]).numpy()
    step = np.abs(values).reshape(64, 4, 32).max(-1) / {"q8_0": 127, "q5_0": 16, "q4_0": 8}[kind]
    assert np.mean(np.isclose(ours, theirs, atol=1e-6)) > 0.999, "ties apart"
    assert (np.abs(ours - theirs).reshape(64, 4, 32).max(-1) <= 1.01 * step).all()


def test_axera_s_embedding_is_cut_off_as_its_bundle_s_is():
    values = np.random.default_rng(0).normal(size=(8, 16)).astype("<f4")
    bundle = np.frombuffer(embedding.bf16_truncated(values.tobytes(), "F32"), "<u2").astype(np.uint32) << 16
    assert np.array_equal(on_board.rounded(torch.from_numpy(values), Floats("bf16", cut=True)).numpy().ravel(), bundle.view(np.float32))


def test_a_searched_scale_loses_less_and_a_scaled_fp8_holds_small_weights():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) * 1e-3
    error = lambda kind: float((on_board.rounded(weight, kind) - weight).norm() / weight.norm())
    assert error(Integers(4, search=True)) < 0.9 * error(Integers(4))
    assert error(Floats("fp8_e4m3", scaled=True)) < 0.03 < error(Floats("fp8_e4m3"))
    assert error(Integers(8)) < error(Integers(4, 128)) < error(Integers(4)) and error(FP32) == 0


def test_rounding_a_matrix_goes_by_blocks_of_its_outputs(monkeypatch):
    monkeypatch.setattr(on_board, "BLOCK", 100)
    weight = torch.randn(9, 32)
    assert torch.equal(on_board.round_weight(weight.clone(), Integers(4)), on_board.rounded(weight, Integers(4)))
    assert torch.equal(on_board.round_weight(weight.T.clone(), Integers(4), turned=True).T, on_board.rounded(weight, Integers(4)))


# ---- a model with them


def test_more_bits_lose_less_and_fp32_nothing(model):
    kl = {
        name: lost(model, how(model, name)).kl
        for name in ("llama2c_fp32_v0", "ax650_s8", "ax650_s4", "mobilint_aries_w4v8", "mobilint_aries_w4")
    }
    assert kl["llama2c_fp32_v0"] == 0 < 4 * kl["ax650_s8"] < kl["ax650_s4"]
    assert kl["mobilint_aries_w4v8"] < kl["mobilint_aries_w4"]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "gpt2", "mixtral"])
def test_afterwards_the_model_is_what_it_was_and_holds_nothing(kind, tmp_path):
    _, walk = on_disk(kind, tmp_path)
    board = replace(how(write_model(tmp_path / "shape"), "ax650_s4"), weights=Integers(4, 32))
    before = seen.observe(seen.by_layer(walk, "before"), ROWS)
    with on_board.computing(walk, board) as keeps:
        after = seen.observe(seen.by_layer(walk, "on board"), ROWS, before.top_k_ids)
    again = seen.observe(seen.by_layer(walk, "again"), ROWS)
    assert keeps.used
    assert np.array_equal(before.losses, again.losses) and np.abs(after.losses - before.losses).max() > 1e-4
    assert all(parameter.is_meta for layer in walk.layers for parameter in layer.parameters())


def test_keys_and_values_are_rounded_and_nothing_else_with_them(model):
    exact = how(model, "llama2c_fp32_v0")
    kl = [lost(model, replace(exact, kv=kv)).kl for kv in (FP32, Integers(8, -1, "asymmetric"), Integers(4, -1, "asymmetric"))]
    assert 0 == kl[0] < kl[1] < kl[2] / 4


@helps("sizing/numerics.py", "numerics={}_f16")
def test_blocks_that_do_not_divide_a_row_are_refused(tmp_path):
    folder = write_model(tmp_path / "odd", intermediate_size=200)
    with pytest.raises(WrongKind, match="blocks of 32 do not divide the model's rows of 200") as refusal:
        how(folder, "gguf_q8_0")
    assert how(folder, refusal.value.fix[0].partition("=")[2]).name == "gguf_f16"


def test_a_cache_in_8_bits_loses_little_and_takes_half(model):
    shape, named = read_shape(model), numerics.named()
    exact, eight = (lost(model, how(model, name), ROWS) for name in ("gguf_f32", "gguf_f32_kv_q8_0"))
    assert 0 <= exact.kl < eight.kl / 3 and eight.kl < 0.01
    of = lambda name: budget.kv_cache_bytes(shape, budget.format_of(shape, named[name]), 512)
    assert of("gguf_f32_kv_q8_0") == round(34 / 64 * of("gguf_f32"))


def test_hidden_states_are_those_of_a_model_in_bf16(model):
    """In the range of transformers' own bf16, which rounds in a few more places."""
    plain, walk = load_any(artifact.open_any(model), dtype="bfloat16", device="cpu")[0], by_layer.need(artifact.open_any(model))
    before = seen.observe(seen.by_layer(walk, "before"), ROWS)
    board = replace(how(model, "ax650_bf16"), head=BF16)
    change = [fidelity.compare(before, seen.observe(seen.whole(plain, "bf16"), ROWS, before.top_k_ids), len(ROWS))]
    change.append(lost(model, board))
    assert change[1].kl / 3 < change[0].kl < 3 * change[1].kl


class OneLayer(numerics.Numerics):
    """Of which one layer's weights alone are rounded."""

    def of_weight(self, name):
        return Integers(3) if ".1." in name else None


def test_the_layer_to_blame_is_found(model):
    exact = how(model, "llama2c_fp32_v0")
    one = preview.previews(artifact.open_any(model), [OneLayer(**vars(exact))], ROWS)[0][0]
    assert one.worst == 1 and one.layers[0]["error"] == 0 and one.layers[0]["cosine"] == pytest.approx(1)
    assert one.layers[1]["error"] == pytest.approx(one.layers[1]["error_so_far"], rel=1e-5) and one.layers[1]["error"] > 0.01


def generated(walk: by_layer.ByLayer, ids: list[int], count: int) -> list[int]:
    with walk.whole() as whole, torch.no_grad():
        return whole.generate(torch.tensor([ids]), **GREEDY, max_new_tokens=count, eos_token_id=None, pad_token_id=0)[
            0, len(ids) :
        ].tolist()


@pytest.mark.parametrize("name", ["ax650_s8", "gguf_q4_0_kv_q8_0"])
def test_an_answer_goes_on_from_keys_and_values_that_were_rounded(name):
    """Token by token it is what a pass over the whole of it says at each place, and the model is afterwards what it was."""
    walk, tokenizer = by_layer.need(artifact.open_any(CHAT)), load_tokenizer(CHAT)
    kind = replace(how(CHAT, name), kv=Integers(3, 32, scale="fp16"))  # coarse, so that it tells
    told = 0
    for animal in ("duck", "cat", "cow", "dog", "lion"):
        ids = tokenizer(f"<|im_start|>user\nWhat does a {animal} say?<|im_end|>\n<|im_start|>assistant\n").input_ids
        with on_board.computing(walk, kind):
            said = generated(walk, ids, 8)
            row = Encoded(ids + said, [IGNORE] * len(ids) + said)
            assert seen.observe(seen.by_layer(walk, "it"), [row]).likeliest.tolist() == said
        told += generated(walk, ids, 8) != said
    assert told, "keys and values as they are give the same answers, so this does not tell"
    assert all(p.is_meta for places in walk.places.tensors.values() for p in (place.module._parameters[place.name] for place in places))


# ---- held to what is real


@pytest.mark.skipif(not (shutil.which("cc") and shutil.which("make")), reason="no C compiler and make")
@pytest.mark.parametrize("format", ["int8_v2", "int4_v3"])
def test_its_greedy_text_is_the_c_program_s(tmp_path, format):
    from test_llama2c import CHATML, build, save_llama, sentencepiece_like

    folder = save_llama(tmp_path / "llama", sentencepiece_like(CHATML))
    made = build(folder, tmp_path / "bundle", format)
    tokenizer = load_tokenizer(folder)
    texts = list(proof.said(tmp_path / "bundle", tokenizer, stop_ids(folder, tokenizer), read_shape(folder).max_positions))
    said = np.array([id for text in texts for id in text.ids[text.begin :]])
    walk = by_layer.need(artifact.open_any(folder))
    with on_board.computing(walk, how(folder, f"llama2c_{format}")):
        told = seen.observe(seen.by_layer(walk, "on board"), [text.row for text in texts])
    assert len(said) > 200 and np.array_equal(told.likeliest, said)
    for text in texts:
        with on_board.computing(walk, how(folder, f"llama2c_{format}")):
            assert generated(walk, text.ids[: text.begin], len(text.ids) - text.begin) == text.ids[text.begin :]
    assert made["greedy_agreement"] < 1, "fp32 says something else, so this tells"


@pytest.fixture(scope="module")
def quantized(eighty, tmp_path_factory) -> dict[int, artifact.Artifact]:
    """The first layer of the embedded model by GPTQ, {bits: artifact}."""
    from conftest import make_base

    place = tmp_path_factory.mktemp("gptq")
    base = make_base(place / "base", layers=1, blank=False)
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.core.processes.fresh", lambda work, *args: work(*args))
        for bits in (4, 8):
            argv = [
                f"outputs={place}",
                f"run=q{bits}",
                f"source={base}",
                f"dataset={eighty}",
                f"quantizer=gptq_int{bits}",
                "calibration.rows=8",
            ]
            assert go(quantize, *argv) == 0
            found[bits] = artifact.open_artifact(place / f"q{bits}" / "quantize")
    return found


@pytest.mark.parametrize("bits", [4, 8])
def test_a_gptq_folder_says_what_its_own_kernels_say(quantized, bits):
    """On a CPU they compute 4 bits in bf16, 8 in fp32."""
    from transformers import AutoModelForCausalLM

    folder = quantized[bits].path
    board = how(folder, f"ax650_s{bits}")
    assert board.weights is None
    plain = replace(board, embedding=FP32, head=FP32, logits=FP32, hidden=FP32, kv=FP32, inputs=BF16 if bits == 4 else FP32)
    kernels = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    assert any(hasattr(module, "qweight") for module in kernels.modules())
    walk = by_layer.need(quantized[bits])
    theirs = seen.observe(seen.whole(kernels, "kernels"), ROWS)
    with on_board.computing(walk, plain):
        ours = seen.observe(seen.by_layer(walk, "on board"), ROWS, theirs.top_k_ids)
    change = fidelity.compare(theirs, ours, len(ROWS))
    print(f"int{bits}: KL {change.kl:.2e}, losses at most {np.abs(ours.losses - theirs.losses).max():.4f} apart")
    assert change.kl < {4: 2e-4, 8: 1e-6}[bits]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """SmolLM2-135M-Instruct."""
    folder = tmp_path_factory.mktemp("real") / "model"
    done = subprocess.run([sys.executable, ROOT / "scripts" / "real_model.py", folder], capture_output=True, text=True)
    if done.returncode == 7:
        pytest.skip(f"NOT RUN: no real model here, since {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv-openvino").is_dir(), reason="no .venv-openvino: bash scripts/openvino_env.sh makes it")
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_its_kl_is_that_of_openvino_s_bundle(real, eighty, call, tmp_path, weights):
    """On a CPU with AVX512-BF16 or AMX; on another the bundle computes otherwise."""
    from src.deploy.openvino import proof as openvino

    lengths = ["target.context_len=1024", "target.prompt_len=512", f"target.weight_type={weights}"]
    done = call("deploy", "run=o", f"source={real}", "target=openvino_cpu", *lengths)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(real)
    records = [json.loads(line) for line in open(eighty / "train.jsonl")]
    rows = [row for _, row in rows_of(records[:24], tokenizer, "rows")]
    target = numerics.named()[f"openvino_cpu_{weights}"]
    walk = by_layer.need(artifact.open_any(real))
    before = seen.observe(seen.by_layer(walk, "before"), rows)
    bundle = openvino.lost(before, rows, openvino.questioner(target, tmp_path / "outputs" / "o" / "deploy-openvino_cpu", tmp_path), target)
    ours = lost(real, numerics.of(read_shape(real), target), rows)
    print(
        f"{weights}: KL {bundle['kl']:.5f} by the bundle, {ours.kl:.5f} by its numbers; same likeliest {bundle['agreement']:.1%}, {ours.agreement:.1%}"
    )
    assert ours.kl == pytest.approx(bundle["kl"], rel=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / ".venv-gguf").is_dir(), reason="no .venv-gguf: bash scripts/gguf_env.sh makes it")
@pytest.mark.parametrize("name", ["gguf_f16_kv_q8_0", "gguf_q8_0", "gguf_q4_0"])
def test_its_kl_is_that_of_llama_cpp_on_the_file(real, eighty, call, tmp_path, name):
    from src.deploy.gguf import llama_cpp, proof

    target = numerics.named()[name]
    chosen = [f"target.weight_type={target.weight_type}", f"target.kv_cache={target.kv_cache}", "target.context_len=1024"]
    done = call("deploy", "run=g", f"source={real}", "target=gguf", f"target.environment={ROOT / '.venv-gguf'}", *chosen)
    assert done.returncode == 0, done.stderr
    tokenizer = load_tokenizer(real)
    records = [json.loads(line) for line in open(eighty / "train.jsonl")]
    rows = [row for _, row in rows_of(records[:24], tokenizer, "rows")]
    walk = by_layer.need(artifact.open_any(real))
    before = seen.observe(seen.by_layer(walk, "before"), rows)
    target = target.model_copy(update={"environment": str(ROOT / ".venv-gguf")})
    file = next((tmp_path / "outputs" / "g" / "deploy-gguf").glob("*.gguf"))
    program = proof.lost(before, rows, llama_cpp.questioner(target, tmp_path, file), target)
    ours = lost(real, numerics.of(read_shape(real), target), rows)
    print(f"{name}: KL {program['kl']:.5f} by llama.cpp, {ours.kl:.5f} by its numbers; {program['agreement']:.1%}, {ours.agreement:.1%}")
    assert ours.kl == pytest.approx(program["kl"], rel=0.25)


# ---- the verb


@pytest.fixture(scope="module")
def argv(eighty, tmp_path_factory) -> list[str]:
    few = ["evaluation.rows=4", "evaluation.samples=3", "evaluation.max_new_tokens=24"]
    return [f"outputs={tmp_path_factory.mktemp('previews')}", "run=p", f"dataset={eighty}", *few]


def test_all_types_of_a_target_are_put_in_order(argv, capsys):
    assert go(evaluate, *argv, f"source={CHAT}", "numerics=all", "target=ax650", "evaluation.expect='(.|\\n)*'") == 0
    told = capsys.readouterr()
    folder = Path(argv[0].partition("=")[2]) / "p" / "evaluate-tiny-chat-numerics"
    report = json.loads((folder / "report.json").read_text())
    names = [one["name"] for one in report["numerics"]]
    assert len(names) == 6 and names[-1] == "ax650_s4" and all(name.startswith("ax650_") for name in names)
    assert [line.split()[0] for line in told.out.splitlines()[2:]] == names
    assert [one["kl"] for one in report["numerics"]] == sorted(one["kl"] for one in report["numerics"])
    s4 = report["numerics"][-1]
    assert s4["weights"] < report["numerics"][0]["weights"] and s4["tokens_per_second"] > report["numerics"][0]["tokens_per_second"]
    assert len(s4["layers"]) == read_shape(CHAT).layers and s4["formats"]["KV cache"] == "bf16"
    assert all(f"assumed: {sentence}" in told.err for sentence in s4["assumed"])
    assert (folder / "size_kl.png").read_bytes().startswith(b"\x89PNG")
    metrics = artifact.open_artifact(folder).metrics
    assert metrics["numerics"]["ax650_s4"]["kl"] == s4["kl"] and metrics["rows"] == 4
    said = [json.loads(line) for line in open(folder / "answers.jsonl", encoding="utf-8")]
    assert [row["by"] for row in said[::3]] == ["as it is", *names] and len(said) == 21
    assert re.search("as it is: [1-3] of 3 as expected", told.err)
    assert told.out.splitlines()[0].split()[-4:] == ["as", "expected", "same", "answers"]
    for one in report["numerics"]:
        same = [row["answer"] == plain["answer"] for row, plain in zip((r for r in said if r["by"] == one["name"]), said)]
        assert one["answers"]["same_answers"] == pytest.approx(sum(same) / 3)


@helps("evaluate.py", "{}=null")
def test_answers_in_a_board_s_numbers_are_checked_and_can_be_limited(eighty, tmp_path, capsys):
    argv = [f"outputs={tmp_path}", "run=p", f"source={CHAT}", f"dataset={eighty}", "numerics=ax650_s8"]
    for given, way in ((f"evaluation.general={CHAT}", "evaluation.general=null"), (f"parent={CHAT}", "parent=null")):
        assert go(evaluate, *argv, given, "dry_run=true") == ConfigError.exit_code and f"fix:   {way}" in capsys.readouterr().err
        assert go(evaluate, *argv, way, "dry_run=true") == 0
    assert go(evaluate, *argv, "gate.task_drop=0.1", "evaluation.check=none", "dry_run=true") == ConfigError.exit_code
    few = ["evaluation.rows=8", "evaluation.samples=8", "evaluation.max_new_tokens=24", "evaluation.check=number"]
    assert go(evaluate, *argv, *few, "gate.task_drop=0.5") == 0
    told = capsys.readouterr()
    report = json.loads((tmp_path / "p" / "evaluate-tiny-chat-ax650_s8" / "report.json").read_text())
    assert report["task_check"] == "number" and 0 < report["task_prompts"] < 8 and report["parent_task"] == 1
    assert "answers right" in told.out and f"as it is: 100% of {report['task_prompts']} answers right" in told.err
    assert "evaluate: keeps gate.task_drop=0.5" in told.err


@helps("sizing/numerics.py", "{}={}")
def test_a_name_that_is_none_is_refused_with_the_nearest(argv, call, eighty):
    ask = ["evaluate", "run=p", f"source={CHAT}", f"dataset={eighty}", "evaluation.rows=2"]
    done = call(*ask, "numerics=axe650_s8")
    refused(done, ConfigError, "numerics=ax650_s8")
    assert call(*ask, *typed(ways(done)[0])).returncode == 0
    done = call(*ask, "numerics=all", "target=llama2")
    refused(done, ConfigError, "target=llama2c")
    assert call(*ask, "numerics=all", *typed(ways(done)[0])).returncode == 0
    refused(call(*ask, "target=ax650"), ConfigError, "numerics=all")
    refused(call(*ask, "numerics=all", "endpoint.url=http://here:1"), ConfigError, "numbers")


@helps("sizing/numerics.py", "numerics={}_{}")
def test_a_quantized_model_has_its_own_numbers_alone(quantized, argv, capsys):
    ask = [*argv, f"source={quantized[4].path}"]
    assert go(evaluate, *ask, "numerics=ax650_s8") == WrongKind.exit_code
    assert "fix:   numerics=ax650_s4" in capsys.readouterr().err
    assert go(evaluate, *ask, "numerics=ax650_s4") == 0
    assert "GPTQ model's own integers" in capsys.readouterr().err
    assert go(evaluate, *ask, "numerics=all", "target=[ax650,llama2c]", "dry_run=true") == 0
    told = capsys.readouterr().err
    assert (
        "in the numbers of ax650_s4, llama2c_int4_v3\n" in told and "llama2c_int8_v2 is left out" in told and "ax650_s8 is left out" in told
    )


def test_before_a_compile_it_is_tried_on_a_few_rows(eighty, model, capsys):
    limits = lambda **given: Gate(**dict.fromkeys(Gate.model_fields) | given)
    found = preview.before_compile(artifact.open_any(CHAT), numerics.named()["ax650_s4"], eighty, 3, limits(kl=9, perplexity_ratio=9))
    assert "deploy: keeps gate.kl=9" in capsys.readouterr().err
    with pytest.raises(GateFailed, match="1 of 1 limits are not kept"):
        preview.judge(limits(kl=1e-4), found, "here")
    found2 = preview.before_compile(artifact.open_any(CHAT), numerics.named()["ax650_s4"], eighty, 3, limits())
    assert found2 == found and found["preview_kl"] > 1e-4 and found["preview_agreement"] > 0.9
    assert "ax650_s4, before the compile: loss" in capsys.readouterr().err
    tried = lambda target, dataset, count: preview.before_compile(artifact.open_any(CHAT), target, dataset, count, limits())
    assert tried(numerics.named()["ax650_s4"], eighty, 0) == tried(numerics.named()["ax650_s4"], None, 8) == {}
    told = capsys.readouterr().err
    assert "not tried in the numbers of ax650: preview=0" in told and "no dataset is known" in told


@helps("models/preview.py", "gate=none")
@helps("deploy/__main__.py", "gate=none", "preview=8 tries the model in the target's numbers", "gate.{}=null")
@helps("deploy/__main__.py", "python -m src.evaluate gate=strict holds a model to them")
def test_a_gate_stops_a_deploy_before_its_compiler(eighty, tmp_path, monkeypatch, capsys):
    """What was lost is said by a stand-in; without Pulsar2 a deploy that goes on ends by saying so."""
    argv = [f"outputs={tmp_path}", "run=g", f"source={CHAT}", "target=ax650", "target.context_len=256", "target.prompt_len=128"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    lost = {"preview_kl": 0.5, "preview_agreement": 0.9, "preview_perplexity_ratio": 1.01}
    monkeypatch.setattr(preview, "_tried", lambda *given: lost)
    assert go(deploy, *argv, "gate=strict") == GateFailed.exit_code
    assert "2 of 3 limits are not kept" in capsys.readouterr().err and not list(tmp_path.rglob("*embed*"))
    assert go(deploy, *argv, "gate.kl=0.6") == Unfinished.exit_code and list(tmp_path.rglob("*embed*"))
    monkeypatch.setattr(preview, "_tried", lambda *given: {})
    assert go(deploy, *argv, "gate=strict") == ConfigError.exit_code and "was not tried" in capsys.readouterr().err
    assert go(deploy, *argv, "gate=none") == Unfinished.exit_code
    dry = [*argv, "dry_run=true"]
    assert go(deploy, *dry, "gate=strict", "preview=0") == ConfigError.exit_code
    assert go(deploy, *dry, "gate=strict", "preview=8") == go(deploy, *dry, "gate=none", "preview=0") == 0
    assert go(deploy, *dry, "gate.forgetting=1") == ConfigError.exit_code and go(deploy, *dry, "gate.forgetting=null") == 0
    board = [*argv[:3], "target=llama2c", "dry_run=true"]
    assert go(deploy, *board, "gate=strict") == ConfigError.exit_code and go(deploy, *board, "gate=none") == 0
    assert go(evaluate, *argv[:3], f"parent={CHAT}", f"dataset={eighty}", "gate=strict", "dry_run=true") == 0


def test_a_target_that_nothing_is_known_of_is_not_guessed_at(model):
    from src.settings.targets import Target

    with pytest.raises(ConfigError, match="nothing is known of the numbers"):
        numerics.of(read_shape(model), Target(name="new"))
