"""deploy target=gguf: what stands in the file, read back by the gguf package; rules and messages with a stand-in for llama.cpp; marked slow, llama.cpp itself."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import CHAT, ROOT, helps, refused, save, typed, ways
from makers import KINDS, tokenizer_folder

from src.core import card
from src.core.errors import BadData, MissingInput, ProofFailed, ToolFailed, Unfinished, WrongKind
from src.deploy import contract
from src.deploy.byte_level import symbol_bytes
from src.deploy.gguf import families, llama_cpp, metadata, ollama, proof, reading, vocabulary, weights
from src.deploy.llama2c.chat import find_chat
from src.models import fidelity
from src.settings.targets import Gguf
from src.sizing import budget, takes
from src.sizing.config_reader import shape_of

REAL = ROOT / ".venv-gguf"
SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "original_max_position_embeddings": 64}
LONG |= {"short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5], "long_factor": [2.0, 2.1, 2.2, 2.3, 2.4, 2.5]}
LOCAL = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
# name: model_type, and what its configuration has beside SIZES.
FAMILIES = {
    "llama": ("llama", {}),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": (
        "qwen2",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}},
    ),
    "qwen3": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8, "num_hidden_layers": 7, "rope_parameters": LOCAL},
    ),
    "phi3": ("phi3", {"pad_token_id": 0}),
    "phi4-mini": ("phi3", {"pad_token_id": 0, "partial_rotary_factor": 0.75, "rope_parameters": LONG, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"pad_token_id": 0, "num_hidden_layers": 4}),
    "exaone4": ("exaone4", {"sliding_window": None, "sliding_window_pattern": None, "layer_types": ["full_attention"] * 2}),
    "exaone4 32B": (
        "exaone4",
        {"sliding_window": 8, "num_hidden_layers": 64, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16},
    ),
}


def target(**changes) -> Gguf:
    usual = {
        "name": "gguf",
        "kind": "gguf",
        "weight_type": "q8_0",
        "rows": 0,
        "context_len": 256,
        "kv_cache": "f16",
        "environment": "nowhere",
    }
    return Gguf.model_validate(usual | changes)


@pytest.fixture(scope="module")
def family(tmp_path_factory, one_thread):
    """family(name): (folder, transformers' configuration, model in fp32) of one of FAMILIES, with weights that make every part tell."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(name: str):
        model_type, more = FAMILIES[name]
        config = AutoConfig.for_model(model_type, **(SIZES | more))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, weight in model.named_parameters():
                norm = "norm" in key
                weight.copy_(torch.randn_like(weight) * (0.3 if norm else 2.5 / weight.shape[-1] ** 0.5 if weight.dim() > 1 else 0.5))
                weight += float(norm and model_type not in families.PLUS_ONE)
        folder = tmp_path_factory.mktemp("family") / "model"
        model.save_pretrained(folder)
        return folder, AutoConfig.from_pretrained(folder), model

    return make


def written(folder: Path, config, file: Path, weight_type: str = "f32") -> list[weights.Tensor]:
    """The plan of a file that has been written, with a vocabulary of bytes."""
    vocab = vocabulary.Vocabulary("gpt2", "gpt-2", special={"eos": 299})
    vocab.tokens = [*symbol_bytes(), *(f"[PAD{i}]" for i in range(256, 300))]
    vocab.types, vocab.merges = [vocabulary.NORMAL] * 256 + [vocabulary.UNUSED] * 44, ["a b"]
    plan = weights.plan(folder, config, weight_type)

    def describe(writer) -> None:
        families.describe(writer, config, 300)
        vocabulary.describe(vocab, writer)

    weights.write(file, families.architecture(config.model_type), describe, plan)
    return plan


# ---- weights


@pytest.mark.parametrize("name", [each for each in FAMILIES if each != "exaone4 32B"])
def test_every_tensor_of_every_family_comes_back_as_it_was(family, tmp_path, name):
    folder, config, model = family(name)
    shape = shape_of(json.loads((folder / "config.json").read_text()), "here")
    takes.gguf(json.loads((folder / "config.json").read_text()), shape, where="here")
    plan = written(folder, config, tmp_path / "model.gguf")
    read = reading.tensors(tmp_path / "model.gguf", plan)
    for key, weight in model.named_parameters():
        assert (read(key) - weight).abs().max() <= 3e-7, key  # a norm had 1 added and taken away
    found = {tensor.name for tensor in plan}
    assert ("output.weight" in found) != config.tie_word_embeddings and {"token_embd.weight", "output_norm.weight"} <= found
    assert {"phi3": "blk.0.attn_qkv.weight", "qwen3": "blk.0.attn_q_norm.weight"}.get(name, "blk.1.attn_output.weight") in found
    assert vocabulary.fields_of(tmp_path / "model.gguf")["general.architecture"] == takes.GGUF[config.model_type]


def test_llama_s_halves_are_interleaved_and_gemma_s_norms_are_one_more(family):
    """The literal order of llama.cpp's convert_hf_to_gguf: a head of rows 0 to 7 becomes 0 4 1 5 2 6 3 7."""
    rows = np.arange(16, dtype=np.float32).repeat(2).reshape(16, 2)
    entry = SimpleNamespace()
    turned = weights.Tensor("blk.0.attn_q.weight", "f32", (16, 2), entry, head=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_read", lambda entry, at, count: rows.reshape(-1)[at : at + count])
        order = np.concatenate(list(weights.pieces(turned)))[:, 0]
        assert order.tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
        assert np.array_equal(reading.apart(rows[order.astype(int)], 8), rows)
        patch.setattr(weights, "PIECE", 20)  # a head at a time
        assert np.concatenate(list(weights.pieces(turned)))[:, 0].tolist() == order.tolist()
    for name, heads in (("llama", {"attn_q", "attn_k"}), ("qwen2", set())):
        folder, config, _ = family(name)
        assert {t.name.split(".")[2] for t in weights.plan(folder, config, "f32") if t.head} == heads
    folder, config, _ = family("gemma2")
    plus = {t.name.removeprefix("blk.0.") for t in weights.plan(folder, config, "f32") if t.plus and not t.name.startswith("blk.1")}
    assert plus == {f"{n}.weight" for n in ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm", "output_norm")}


@pytest.mark.parametrize("name", ["llama 3.1", "phi4-mini"])
def test_a_rope_scaling_is_a_tensor_of_what_transformers_divides_by(family, name):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    _, config, _ = family(name)
    made, rope = families.made_tensors(config), families.rope_of(config)
    plain = 1 / rope["rope_theta"] ** (np.arange(0, families.rotary(config), 2) / families.rotary(config))
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, "cpu", seq_len=32)
    assert np.allclose(plain / made[families.SHORT if name == "phi4-mini" else families.FREQUENCIES], scaled, rtol=1e-6)
    assert name != "phi4-mini" or made[families.LONG] == LONG["long_factor"]


def test_types_of_tensors(family, tmp_path):
    folder, config, _ = family("llama")
    kinds = {t.name: t.kind for t in weights.plan(folder, config, "q4_0")}
    assert (kinds["blk.0.attn_q.weight"], kinds["output.weight"], kinds["token_embd.weight"]) == ("q4_0", "q8_0", "q4_0")
    assert kinds["blk.0.attn_norm.weight"] == "f32" and weights.kind_of((4, 40), "q8_0", last=False) == "f16"
    folder, config, _ = family("qwen3")  # tied: the table is the output layer
    assert {t.name: t.kind for t in weights.plan(folder, config, "q4_0")}["token_embd.weight"] == "q8_0"
    for kind, off in (("f16", 1e-3), ("bf16", 4e-3), ("q8_0", 0.01), ("q5_1", 0.05), ("q5_0", 0.06), ("q4_1", 0.1), ("q4_0", 0.11)):
        plan = written(folder, config, tmp_path / f"{kind}.gguf", kind)
        reading.check(tmp_path / f"{kind}.gguf", plan)
        read, name = reading.tensors(tmp_path / f"{kind}.gguf", plan), "model.layers.0.mlp.up_proj.weight"
        weight = weights.safetensors_io.load_wide(weights.safetensors_io.entries(folder)[name])
        assert 0.2 * off < (read(name) - weight).norm() / weight.norm() < off
    with open(tmp_path / "q8_0.gguf", "r+b") as file:
        file.seek(-5000, 2)
        file.write(bytes(3000))
    with pytest.raises(ProofFailed, match="does not explain"):
        reading.check(tmp_path / "q8_0.gguf", weights.plan(folder, config, "q8_0"))


@pytest.mark.parametrize("kind, step", [("f16", 2.0**-11), ("bf16", 2.0**-8)])
def test_a_small_update_of_a_weight_on_the_grid_outlives_16_bits(kind, step):
    """A tenth of a step above 0.5, which the nearest value would lose whole, is there on the mean; and equal bytes in pieces of any size."""
    tensor = weights.Tensor("blk.0.ffn_up.weight", kind, (100, 320), np.zeros(0))
    values = np.full((100, 320), 0.5 + step / 10, np.float32)
    told = weights.rounded(values, tensor)
    assert told.tobytes() == b"".join(weights.rounded(values[at : at + 7], tensor, 320 * at).tobytes() for at in range(0, 100, 7))
    as_floats = (
        told.view(np.float16).astype(np.float32) if kind == "f16" else (told.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    )
    assert as_floats.mean() - 0.5 == pytest.approx(step / 10, rel=0.1)
    plain = np.full((1, 32), 0.5, np.float32)
    assert weights.rounded(plain, tensor).view(np.uint16).tolist() == [[0x3800 if kind == "f16" else 0x3F00] * 32], (
        "a value on the grid stays"
    )


@helps("deploy/gguf/weights.py", "target.weight_type=bf16", "target=openvino_cpu")
def test_values_beyond_16_bits_and_unknown_tensors_are_refused(family, tmp_path):
    tensor = weights.Tensor("blk.0.ffn_up.weight", "f16", (1, 32), weights.safetensors_io.Entry("x", "F32", (1, 32), tmp_path))
    values = np.full((1, 32), 7e4, np.float32)
    with pytest.raises(BadData, match="beyond") as told:
        weights.rounded(values, tensor)
    assert told.value.fix == ["target.weight_type=bf16"]
    weights.rounded(values, weights.Tensor(tensor.name, "bf16", tensor.shape, tensor.source))
    with pytest.raises(BadData, match="no numbers"):
        weights.rounded(values * np.nan, tensor)
    folder, config, _ = family("llama")
    save(folder / "model-more.safetensors", {"model.layers.0.self_attn.gate.weight": np.ones((2, 2))})
    with pytest.raises(WrongKind, match=r"has no place in llama\.cpp's llama") as told:
        weights.plan(folder, config, "q8_0")
    assert told.value.fix == ["target=openvino_cpu"]  # which runs the model's own code


# ---- rules by config.json


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"model_type": "persimmonx"}, "has no architecture"),
        ("llama", {"hidden_act": "gelu"}, "computes silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "no rope scaling 'dynamic'"),
        ("qwen2", {"rope_parameters": LLAMA3}, "no rope scaling 'llama3'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2, "rope_theta": 1e4}},
            "attention_factor 1.2",
        ),
        ("gemma2", {"query_pre_attn_scalar": 144}, "scales attention by 32"),
        ("gemma3", {"layer_types": ["full_attention"] + ["sliding_attention"] * 6}, "every layer 6"),
        ("exaone4", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}, "exaone4"),
        ("smollm3", {"no_rope_layers": [1, 1, 1, 1]}, "every fourth layer"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(family, name, change, words):
    model_type, more = FAMILIES[name]
    config = {"model_type": model_type, **SIZES, **more, **change}
    with pytest.raises(WrongKind, match=words):
        takes.gguf(config, shape_of(config, "here"), where="here")


# ---- tokenizers


@pytest.mark.parametrize("kind", [*KINDS, "made-plain", "tiny-chat"])
def test_ids_by_the_file_s_own_metadata_are_the_tokenizer_s(tmp_path, kind):
    """And those of two texts that begin with a space, which sentencepiece's tokenizers and llama.cpp take differently."""
    from src.models.loading import load_tokenizer

    folder = CHAT if kind == "tiny-chat" else tokenizer_folder(kind)
    tokenizer = load_tokenizer(folder)
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}))
    vocab = vocabulary.of(tokenizer, tmp_path / "model", len(tokenizer) + 5)
    fields = {f"tokenizer.ggml.{n}": v for n, v in vars(vocab).items()} | {"tokenizer.ggml.token_type": vocab.types}
    read = vocabulary.tokenizer_in(fields | {"tokenizer.ggml.add_space_prefix": vocab.prefix in ("always", "unless")})
    (tmp_path / "out").mkdir()
    encode = lambda text: read.encode(vocab.as_given(text), add_special_tokens=False).ids
    counts = contract.prove(tokenizer, tmp_path / "out", lambda texts: list(map(encode, texts)))
    assert counts["texts"] == 8 and (counts["conversations"] > 5 or kind in ("made-plain", "made-mistral"))
    assert vocab.model == ("llama" if kind in ("made-yi", "made-mistral", "made-plain", "tiny-chat") else "gpt2")
    assert vocab.types[-1] == vocabulary.UNUSED and vocab.tokens[-1] == f"[PAD{len(tokenizer) + 4}]"
    assert vocab.special["eos"] == tokenizer.eos_token_id and vocab.types[tokenizer.eos_token_id] == vocabulary.CONTROL
    if kind == "made-yi":  # its eos token does not end a turn
        assert vocab.tokens[vocab.special["eot"]] == "<|im_end|>"
    if kind == "made-qwen3":
        assert vocab.types[vocab.tokens.index("<think>")] == vocabulary.USER_DEFINED
    assert vocab.add_bos == (kind in ("made-mistral", "made-plain"))


SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
LAST = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
SPEC = {"normalizer": None, "pre_tokenizer": None, "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}


def cut(words: str, *before: dict) -> dict:
    pattern = next(pattern for pattern, name in vocabulary.CUTS.items() if name == words)
    return {"type": "Sequence", "pretokenizers": [*before, SPLIT | {"pattern": {"Regex": pattern}}, LAST]}


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"pre_tokenizer": LAST | {"use_regex": True}}, "gpt-2"),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS, LAST | {"use_regex": True}]}}, "smollm"),
        ({"pre_tokenizer": cut("llama3"), "model": {**SPEC["model"], "ignore_merges": True}}, "llama-bpe"),
        ({"pre_tokenizer": cut("llama3")}, "dbrx"),
        ({"pre_tokenizer": cut("qwen2"), "normalizer": {"type": "NFC"}}, "qwen2"),
        ({"pre_tokenizer": cut("qwen3_5")}, "qwen35"),
        ({"pre_tokenizer": cut("tekken"), "model": {**SPEC["model"], "ignore_merges": True}}, "tekken"),
        ({"pre_tokenizer": cut("gpt4o")}, "gpt-4o"),
        ({"pre_tokenizer": cut("qwen2"), "model": {**SPEC["model"], "ignore_merges": True}}, None),
        ({"pre_tokenizer": cut("qwen2", DIGITS)}, None),
        ({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT | {"pattern": {"Regex": "x+"}}, LAST]}}, None),
        ({"pre_tokenizer": cut("qwen2"), "normalizer": {"type": "Lowercase"}}, None),
        ({"model": {"type": "Unigram"}}, None),
        ({"model": {**SPEC["model"], "byte_fallback": False}}, None),
        ({"model": {**SPEC["model"], "byte_fallback": True}}, None),  # nothing turns spaces into its sign for them
        ({"pre_tokenizer": cut("qwen2"), "added_tokens": [{"id": 0, "content": "<mask>", "lstrip": True, "special": True}]}, None),
        ({"pre_tokenizer": cut("qwen2"), "added_tokens": [{"id": 0, "content": "<a>", "rstrip": True, "special": False}]}, None),
    ],
)
@helps("deploy/gguf/vocabulary.py", "target=openvino_cpu")
def test_a_cut_has_its_name_or_is_refused(change, name):
    if name:
        assert vocabulary.read(SPEC | change, "here").pre == name
        return
    with pytest.raises(WrongKind, match="no name for") as told:
        vocabulary.read(SPEC | change, "here")
    assert told.value.fix == ["target=openvino_cpu"]  # its own tokenizer, converted whole


def test_a_phi_3_is_called_so_and_nothing_else_is():
    """llama.cpp takes white space behind control tokens away where the model's name says phi-3."""
    added = [{"id": i, "content": f"<|{n}|>", "rstrip": True, "special": True} for i, n in enumerate(("user", "end"))]
    added += [{"id": 2, "content": "</s>", "rstrip": True, "special": False}, {"id": 3, "content": "<s>", "special": True}]
    spec = SPEC | {"added_tokens": added, "pre_tokenizer": cut("qwen2")}
    strips, plain = vocabulary.read(spec, "here"), vocabulary.Vocabulary("gpt2", "qwen2")
    assert strips.strips
    assert [metadata.title(Path(name), strips) for name in ("Phi-3-mini", "mine")] == ["Phi-3-mini", "mine phi-3"]
    assert [metadata.title(Path(name), plain) for name in ("a-phi-3-like", "mine")] == ["a phi 3 like", "mine"]


# ---- Ollama


def rendered(template: str, messages: list[dict]) -> str:
    """What Go's text/template makes of the few actions that ours have."""
    parts = re.split(r"(\{\{.*?\}\})", template)
    state, out = {"before": ""}, []

    def run(at: int, shown: bool, message: dict | None) -> int:
        while at < len(parts):
            part = parts[at]
            action = part[2:-2].strip() if part.startswith("{{") else None
            at += 1
            if action is None:
                out.extend([part] * shown)
            elif action == "end":
                return at
            elif action == '"{{"':
                out.extend(["{{"] * shown)
            elif action == ".Content":
                out.extend([message["content"]] * shown)
            elif action == "$before = .Role":
                state["before"] = message["role"] if shown else state["before"]
            elif action == "range .Messages":
                for each in messages:
                    after = run(at, shown, each)
                at = after
            elif found := re.fullmatch(r'if eq (\.Role|\$before) "(\w*)"', action):
                value = message["role"] if found[1] == ".Role" else state["before"]
                at = run(at, shown and value == found[2], message)
            else:
                assert action == '$before := ""', action
        return at

    run(0, True, None)
    return "".join(out)


@pytest.mark.parametrize("kind", ["tiny-chat", "made-qwen2", "made-yi", "made-mistral", "made-qwen2.5"])
def test_the_modelfile_s_template_renders_the_contract_as_the_model_s_own(tmp_path, kind):
    from src.chat import encoding
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(CHAT if kind == "tiny-chat" else tokenizer_folder(kind))
    pieces, why = find_chat(tokenizer)
    assert pieces, why
    bos = tokenizer.bos_token if kind == "made-mistral" else ""
    made, compared = ollama.template(pieces, bos), 0
    for name, (messages, tools) in contract.conversations().items():
        if tools or (name in ("system", "korean") and pieces.system_open is None):
            continue
        assert bos + rendered(made, messages) == encoding.render(tokenizer, messages, prompt=True), name
        compared += 1
    assert compared >= 6
    vocab = vocabulary.Vocabulary("gpt2", "qwen2", tokens=["<s>", "<e>"], special={"bos": 0})
    text = ollama.modelfile("m.gguf", pieces, why, vocab, [1], CHAT, 4096)
    assert text.startswith("FROM ./m.gguf\n") and f'TEMPLATE """{ollama.template(pieces, "")}"""' in text
    assert 'PARAMETER num_ctx 4096\nPARAMETER stop "<e>"' in text


def test_a_template_that_is_not_made_of_pieces_is_left_to_the_file_and_that_is_said():
    text = ollama.modelfile("m.gguf", None, "it is dated", vocabulary.Vocabulary("gpt2", "qwen2"), [], CHAT, 64)
    assert "TEMPLATE" not in text and "# no template: it is dated; Ollama takes the nearest of its own" in text
    assert rendered(ollama._literal("a {{ b }}"), []) == "a {{ b }}"


# ---- the stage, with the file read back in place of llama.cpp


@pytest.fixture
def deploy(call, tmp_path):
    return lambda *argv: call("deploy", "run=a", "target=gguf", f"target.environment={tmp_path / 'nowhere'}", *argv)


def manifest(road: Path) -> dict:
    return json.loads((road / "a" / "deploy-gguf" / "manifest.json").read_text())


def test_a_bundle_without_llama_cpp_is_proven_by_what_the_file_holds_and_says_so(road, deploy, call):
    planned = deploy("dry_run=true")
    assert "model-q8_0.gguf: q8_0 by the gguf package" in planned.stderr and "llama.cpp: not in" in planned.stderr
    done = deploy()
    assert done.returncode == 0, done.stderr
    assert "it has not run this file" in done.stderr and "bash scripts/gguf_env.sh" in done.stderr
    metrics, bundle = manifest(road)["metrics"], road / "a" / "deploy-gguf"
    assert metrics["conversations"] == 9 and metrics["proven_by"].keys() == {"gguf"} and "not run by llama.cpp" in metrics["summary"]
    assert 0 < metrics["kl"] < 5e-4 and metrics["proof_tokens"] > 50
    files = {file.name for file in bundle.iterdir()}
    assert files == {"model-q8_0.gguf", "Modelfile", "README.md", "run.sh", "contract.json", "manifest.json"}
    fields = vocabulary.fields_of(bundle / "model-q8_0.gguf")
    assert fields["general.base_model.0.name"] == "base" and fields["tokenizer.chat_template"]
    assert fields[metadata.KEY] == json.loads((road / "a" / "merge" / "manifest.json").read_text())["key"]
    assert fields["general.file_type"] == 7 and fields["llama.context_length"] == 512
    assert call("lineage", bundle, "--verify").returncode == 0
    before = (bundle / "model-q8_0.gguf").read_bytes()
    assert deploy("force=true").returncode == 0 and (bundle / "model-q8_0.gguf").read_bytes() == before


def test_a_licence_is_the_model_card_s(tmp_path):
    assert card.licence_of(tmp_path) == {}
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n")
    assert card.licence_of(tmp_path) == {"license": "apache-2.0"}
    assert metadata.named(Path("/x/models--Qwen--Qwen2.5-0.5B/snapshots/abc")) == ("Qwen", "Qwen2.5-0.5B")


def environment(folder: Path, says: str) -> Path:
    """One whose Python says something and fails."""
    for package in llama_cpp.PACKAGES:
        (folder / "lib" / "python3.11" / "site-packages" / f"{package}-1.dist-info").mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f"#!/bin/sh\necho '{says}'\nexit 3\n")
    (folder / "bin" / "python").chmod(0o755)
    return folder


@helps("deploy/gguf/__init__.py", "target.weight_type=q4_0 needs no llama.cpp")
@helps("deploy/gguf/llama_cpp.py", "bash scripts/gguf_env.sh {}, a minute and 0.2 GB", "target.environment=FOLDER names one that has it")
@helps("deploy/gguf/llama_cpp.py", "bash scripts/gguf_env.sh NEW_FOLDER, then target.environment=NEW_FOLDER")
def test_without_the_quantizer_all_else_is_made_and_kept(road, deploy, with_llama_cpp, monkeypatch, tmp_path):
    done = deploy("target.weight_type=q4_k_m")
    refused(done, Unfinished, "which alone makes q4_k_m", f"bash scripts/gguf_env.sh {tmp_path / 'nowhere'}", "target.weight_type=q4_0")
    partial = road / "a" / "deploy-gguf.partial"
    assert {"source.gguf", "importance.npz"} <= {file.name for file in (partial / ".work").iterdir()}
    with np.load(partial / ".work" / "importance.npz") as weighed:
        assert len(weighed.files) == 14 and weighed["blk.0.ffn_down.weight"].shape == (256,) and (weighed["blk.1.attn_q.weight"] > 0).all()
    with_llama_cpp("no quantizer")  # an older system without npm
    refused(deploy("target.weight_type=q4_k_m"), Unfinished, "which alone makes q4_k_m")
    monkeypatch.undo()
    (tmp_path / "empty").mkdir()
    refused(
        deploy("target.weight_type=q4_k_m", f"target.environment={tmp_path / 'empty'}"),
        Unfinished,
        "NEW_FOLDER, then target.environment=NEW_FOLDER",
    )
    assert deploy("run=b", f"source={road / 'a' / 'merge'}", *typed(ways(done)[-1])).returncode == 0
    with_llama_cpp()  # as the script makes it
    assert deploy("target.weight_type=q4_k_m").returncode == 0


@helps("deploy/gguf/llama_cpp.py", "the log has all that it said; its first line is the command, which can be run by hand")
def test_a_failure_of_llama_cpp_shows_what_it_said_and_where_its_log_is(road, deploy, tmp_path):
    done = deploy(f"target.environment={environment(tmp_path / 'env', 'no such instruction')}")
    assert done.returncode == ToolFailed.exit_code and "could not encode" in done.stderr and "no such instruction" in done.stderr
    log = Path(re.search(r"where: (\S+\.log)", done.stderr)[1])
    assert log.read_text().startswith("$ ") and "its first line is the command" in done.stderr
    assert not (road / "a" / "deploy-gguf").exists()


@helps("deploy/gguf/__init__.py", "target.rows=0")
def test_without_a_calib_split_there_is_no_importance_matrix(road, deploy, call):
    data = call("data", "run=b", f"data.path={road / 'inputs' / 'chats.json'}", "data.val=0.2", "data.calib=0")
    assert data.returncode == 0, data.stderr
    argv = ("run=b", f"source={road / 'a' / 'merge'}", "target.weight_type=q4_k_m")
    done = deploy(*argv)
    refused(done, MissingInput, "importance matrix is made of it")
    refused(deploy(*argv, *typed(ways(done)[0])), Unfinished, "which alone makes")
    assert not (road / "b" / "deploy-gguf.partial" / ".work" / "importance.npz").exists()


def test_importance_is_the_mean_square_of_what_a_matrix_multiplies(family):
    import torch

    from src.core.artifact import outside
    from src.models import by_layer, importance

    folder, _, model = family("llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHAT / name, folder)
    rows, given = [[5, 6, 7, 8, 9], [10, 11]], []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, inputs: given.append(inputs[0][0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row]))
    hook.remove()
    found = importance.of_inputs(by_layer.load(outside(folder, "model"))[0], rows)
    assert len(found) == 14
    assert np.allclose(found["model.layers.1.mlp.down_proj.weight"], torch.cat(given).square().mean(0), rtol=1e-4)


# ---- the stage, with a stand-in for llama.cpp


class StandIn:
    """Answers as inside.py would, by transformers and the file's own metadata. fault: what goes wrong."""

    def __init__(self, model: Path, fault: str = ""):
        self.model, self.fault, self.asked = model, fault, []

    def __call__(self, target: Gguf, work: Path, file: Path):
        def ask(do: str, **what) -> dict:
            self.asked.append((do, file.name))
            return getattr(self, do)(file, **what)

        return ask

    def encode(self, file: Path, texts: list[str], ids: list[int]) -> dict:
        read = vocabulary.tokenizer_in(vocabulary.fields_of(file))
        found = [read.encode(text, add_special_tokens=False).ids for text in texts]
        return {"ids": [row[::-1] for row in found] if self.fault == "ids" else found, "ends": [] if self.fault == "ends" else ids}

    def load(self):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.model).eval()

    def answer(self, file: Path, prompts: list[list[int]], tokens: int) -> dict:
        import torch

        model, said = self.load(), []
        for prompt in prompts:
            row = torch.tensor([prompt])
            out = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=4, pad_token_id=0)[
                0, len(prompt) :
            ]
            said.append([7] * 4 if self.fault == "garbage" else out.tolist())
        return {"ids": said, "tokens_per_second": 10.0, "prompt_tokens_per_second": 99.0, "load_seconds": 0.1}

    def observe(self, file: Path, rows: list[dict]) -> dict:
        import torch

        model, found = self.load(), []
        for row in rows:
            with torch.no_grad():
                logits = model(torch.tensor([row["ids"]])).logits[0, row["keep"]].double()
            logits *= 3 if self.fault == "lossy" else 1.1 if file.name == "plain.gguf" else 1
            said = logits.log_softmax(-1)
            found.append(
                {
                    "losses": (-said[range(len(said)), row["targets"]]).tolist(),
                    "log_probs": said.gather(1, torch.tensor(row["top_k_ids"])).tolist(),
                    "likeliest": said.argmax(1).tolist(),
                }
            )
        return {"rows": found}

    def able(self, file: Path) -> dict:
        return {"quantizes": self.fault != "no quantizer"}

    def quantize(self, file: Path, out: str, type: int, importance: str | None) -> dict:
        shutil.copy(file, out)
        return {"seconds": 0.5}


@pytest.fixture
def with_llama_cpp(road, monkeypatch):
    def use(fault: str = "") -> StandIn:
        stand_in = StandIn(road / "a" / "merge", fault)
        monkeypatch.setattr(llama_cpp, "questioner", stand_in)
        monkeypatch.setattr(llama_cpp, "versions", lambda target: dict.fromkeys(llama_cpp.PACKAGES, "1"))
        return stand_in

    return use


def test_llama_cpp_quantizes_by_the_importance_matrix_and_proves_the_file(road, deploy, with_llama_cpp):
    stand_in = with_llama_cpp("ids")
    refused(deploy("target.weight_type=q4_k_m"), ProofFailed, "the board's tokenizer file", way=False)
    assert [do for do, _ in stand_in.asked] == ["able", *["quantize", "observe"] * 2, "encode"]
    stand_in = with_llama_cpp()
    done = deploy("target.weight_type=q4_k_m")  # goes on behind the quantizer
    assert done.returncode == 0, done.stderr
    assert stand_in.asked == [(do, "model-q4_k_m.gguf") for do in ("encode", "answer", "observe")]
    metrics = manifest(road)["metrics"]
    assert metrics["prompts"] == metrics["prompts_equal"] == 10 and metrics["weighed"] and metrics["kl"] < 1e-9 < metrics["plain_kl"]
    assert metrics["proven_by"] == dict.fromkeys(llama_cpp.PACKAGES, "1") and "10 tokens/s" in metrics["summary"]
    assert not (road / "a" / "deploy-gguf" / ".work").exists()


FAULTS = {
    "ends": (ProofFailed, ["'<|im_end|>', which end the model's turns"]),
    "garbage": (ProofFailed, ["agree with transformers on", "target.weight_type=f16"]),
    "lossy": (ProofFailed, ["more was lost than q8_0 explains", "target.weight_type=f16"]),
}


@pytest.mark.parametrize("fault", FAULTS)
@helps("deploy/gguf/proof.py", "target.weight_type={}")
def test_each_fault_has_its_message_and_publishes_nothing(road, deploy, with_llama_cpp, fault):
    with_llama_cpp(fault)
    before = manifest(road) if (road / "a" / "deploy-gguf").exists() else None
    done, (error, words) = deploy(), FAULTS[fault]
    refused(done, error, *words, way=fault != "ends")
    assert not (road / "a" / "deploy-gguf").exists() and before is None
    if fault == "lossy":  # the way out is taken where a wider type mends it
        with_llama_cpp()
        assert deploy(*typed(ways(done)[0])).returncode == 0


@helps("deploy/gguf/proof.py", "target.weight_type=q8_0 loses less")
def test_a_large_loss_is_said_with_a_type_that_loses_less(capsys):
    change = fidelity.Change(rows=9, tokens=400, before=1.0, after=1.3, loss_waver=0.01, kl=0.3, kl_waver=0.01, agreement=0.8)
    assert proof.judge(change, target(weight_type="q4_0"))["kl"] == 0.3
    assert "target.weight_type=q8_0 loses less" in capsys.readouterr().err
    with pytest.raises(ProofFailed, match="more was lost than q8_0 explains"):
        proof.judge(change, target(weight_type="q8_0"))


def test_wider_types_are_the_way_out_of_a_loss():
    assert proof.wider(target(weight_type="q4_k_m")) == [f"target.weight_type={t}" for t in ("q5_1", "q6_k", "q8_0", "f16")]
    every = set(Gguf.model_fields["weight_type"].annotation.__args__)
    assert {each for types in proof.LIMITS for each in types} == every == set(budget.GGUF_BYTES)
    for each in every:
        assert metadata.file_type(each) >= 0


# ---- llama.cpp itself

real = [
    pytest.mark.slow,
    pytest.mark.skipif(not (REAL / "requirements.sha256").is_file(), reason="no .venv-gguf: bash scripts/gguf_env.sh makes it"),
]


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in FAMILIES])
def test_llama_cpp_s_logits_are_transformers_(family, tmp_path, name):
    import torch

    folder, config, model = family(name)
    written(folder, config, tmp_path / "model.gguf")
    ids = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(ids).logits[0].log_softmax(-1).topk(8)
    ask = llama_cpp.questioner(target(environment=str(REAL)), tmp_path, tmp_path / "model.gguf")
    row = {"ids": ids[0].tolist(), "keep": list(range(120)), "targets": ids[0].tolist(), "top_k_ids": want.indices.tolist()}
    told = ask("observe", rows=[row])["rows"][0]
    kl = (want.values.exp() * (want.values - torch.tensor(told["log_probs"]))).sum(1).mean()
    assert abs(kl) < 1e-3 and np.mean(np.array(told["likeliest"]) == want.indices[:, 0].numpy()) > 0.95


@pytest.mark.parametrize("weight_type", [pytest.param(each, marks=real) for each in ("f16", "q8_0", "q4_0", "q4_k_m")])
def test_a_bundle_is_proven_by_llama_cpp(road, call, weight_type):
    done = call("deploy", "run=a", "target=gguf", f"target.weight_type={weight_type}", f"target.environment={REAL}")
    assert done.returncode == 0, done.stderr
    metrics = manifest(road)["metrics"]
    assert metrics["proven_by"].keys() == set(llama_cpp.PACKAGES) and metrics["conversations"] == 9
    assert metrics["prompts_near"] == metrics["prompts"] or weight_type != "f16"
