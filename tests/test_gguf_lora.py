"""deploy target=gguf_lora: what stands in an adapter's file, and what it may not hold; marked slow, llama.cpp itself with the file beside its base."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import CHAT, helps, refused
from test_gguf import FAMILIES, REAL, family, real, target, written  # noqa: F401

from src.core import artifact
from src.core.errors import ProofFailed, Unfinished, WrongKind
from src.deploy.gguf import families, llama_cpp, lora, metadata, vocabulary, weights

PATTERNS = {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 40.0, "qkv_proj": 40.0}}


def adapter_on(base: Path, model, folder: Path, **changes):
    """(an adapter of random A and B on all matrices of the layers, saved in a folder of its own; the model with it on)."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    how = {"r": 8, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | changes
    tuned = get_peft_model(model, LoraConfig(**how)).eval()
    with torch.no_grad():
        for name, weight in tuned.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                weight.copy_(torch.randn_like(weight) * 0.5 / weight.shape[-1] ** 0.5)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return artifact.open_any(folder), tuned


def file_of(adapter, base: Path, config, file: Path) -> float:
    alpha, plan = lora.plan(adapter, base, config, "f32")
    vocab = vocabulary.Vocabulary("gpt2", "gpt-2")
    weights.write(
        file,
        families.architecture(config.model_type),
        lambda writer: metadata.describe_adapter(writer, adapter, vocab, alpha, "f32"),
        plan,
    )
    return alpha


@pytest.mark.parametrize("how", [{}, PATTERNS, {"use_rslora": True, **PATTERNS}], ids=["plain", "patterns", "rslora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "phi3"])
def test_the_file_s_product_is_the_adapter_s_change_of_each_matrix(family, tmp_path, name, how):  # noqa: F811
    """alpha / rank x B A, with rows where llama.cpp has them, as src/llama-adapter.cpp takes it."""
    folder, config, model = family(name)
    adapter, tuned = adapter_on(folder, model, tmp_path / "adapter", **how)
    alpha = file_of(adapter, folder, config, tmp_path / "adapter.gguf")
    fields = vocabulary.fields_of(tmp_path / "adapter.gguf")
    assert (fields["general.type"], fields["adapter.type"]) == ("adapter", "lora") and np.isclose(fields["adapter.lora.alpha"], alpha)
    assert fields["general.architecture"] == {"llama": "llama", "qwen3": "qwen3", "phi3": "phi3"}[name]
    held, before = read(tmp_path / "adapter.gguf"), read(base_file(folder, config, tmp_path))
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    written(tmp_path / "merged", config, tmp_path / "merged.gguf")
    after = read(tmp_path / "merged.gguf")
    changed = {each.removesuffix(".lora_a") for each in held if each.endswith(".lora_a")}
    assert len(changed) == len(held) // 2 == {"llama": 14, "qwen3": 14, "phi3": 8}[name]
    for each in changed:
        a, b = held[f"{each}.lora_a"], held[f"{each}.lora_b"]
        np.testing.assert_allclose(alpha / a.shape[0] * (b @ a), after[each] - before[each], atol=2e-5)


def base_file(folder: Path, config, tmp_path: Path) -> Path:
    written(folder, config, tmp_path / "base.gguf")
    return tmp_path / "base.gguf"


def read(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize(
    "how, words",
    [
        ({"use_dora": True}, "lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "'lm_head.weight' has whole"),
        ({"trainable_token_indices": [5, 6]}, "index, rows"),
    ],
)
def test_what_else_was_trained_is_refused(family, tmp_path, how, words):  # noqa: F811
    folder, _, model = family("llama")
    adapter, _ = adapter_on(folder, model, tmp_path / "adapter", **how)
    with pytest.raises(WrongKind, match=words) as refusal:
        lora.factors(adapter, folder)
    assert lora.MERGED in refusal.value.fix


@pytest.fixture
def deploy(call, road):
    return lambda *argv: call("deploy", "run=a", "target=gguf_lora", *argv)


@helps("deploy/gguf/lora.py", "python -m src.merge, then target=gguf, whose file holds all that was trained")
def test_without_llama_cpp_the_adapter_is_written_and_not_called_finished(deploy, road, call, tmp_path):
    planned = deploy("dry_run=true", "target.environment=nowhere")
    assert planned.returncode == 0 and "adapter-f16.gguf: A and B of" in planned.stderr, planned.stderr
    done = deploy(f"target.environment={tmp_path / 'nowhere'}")
    refused(done, Unfinished, "which proves it on its base, is not in", f"bash scripts/gguf_env.sh {tmp_path / 'nowhere'}")
    partial = road / "a" / "deploy-gguf_lora.partial"
    assert {"adapter-f16.gguf", "chat_template.jinja", "Modelfile", "run.sh", "README.md"} <= {file.name for file in partial.iterdir()}
    assert "FROM ./BASE.gguf\nADAPTER ./adapter-f16.gguf\n" in (partial / "Modelfile").read_text()
    assert "--chat-template-file" in (partial / "run.sh").read_text() and not (road / "a" / "deploy-gguf_lora").exists()
    refused(call("deploy", "run=a", f"source={road / 'a' / 'merge'}", "target=gguf_lora"), WrongKind, "takes adapter, not model")
    # The way out of what a LoRA of llama.cpp cannot hold.
    done = call("deploy", "run=a", "target=gguf", f"target.environment={tmp_path / 'nowhere'}")
    assert done.returncode == 0, done.stderr


# ---- llama.cpp itself


@pytest.mark.parametrize("name", [pytest.param(name, marks=real) for name in FAMILIES])
def test_llama_cpp_with_the_adapter_says_what_peft_says(family, tmp_path, name):  # noqa: F811
    import torch

    folder, config, model = family(name)
    ids = torch.randint(0, 256, (1, 120), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model(ids).logits[0].log_softmax(-1)
    adapter, tuned = adapter_on(folder, model, tmp_path / "adapter", **PATTERNS)
    base_file(folder, config, tmp_path)
    file_of(adapter, folder, config, tmp_path / "adapter.gguf")
    with torch.no_grad():
        with_it = tuned(ids).logits[0].log_softmax(-1)
    want = with_it.topk(8)
    assert (with_it.exp() * (with_it - plain)).sum(1).mean() > 0.02, "the adapter tells"
    ask = llama_cpp.questioner(target(environment=str(REAL)), tmp_path, tmp_path / "base.gguf", tmp_path / "adapter.gguf")
    row = {"ids": ids[0].tolist(), "keep": list(range(120)), "targets": ids[0].tolist(), "top_k_ids": want.indices.tolist()}
    told = ask("observe", rows=[row])["rows"][0]
    kl = (want.values.exp() * (want.values - torch.tensor(told["log_probs"]))).sum(1).mean()
    assert abs(kl) < 1e-3 and np.mean(np.array(told["likeliest"]) == want.indices[:, 0].numpy()) > 0.95


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "requirements.sha256").is_file(), reason="no .venv-gguf: bash scripts/gguf_env.sh makes it")
def test_an_adapter_is_proven_on_its_base_and_a_wrong_one_is_not(cli, call, road, monkeypatch):
    steps = ["tuner=lora", "tuner.rank=4", "train.max_steps=3", "train.samples=0", "train.global_batch_size=4", "tuner.learning_rate=0.003"]
    for argv in (["data", f"data.path={road / 'inputs' / 'chats.json'}", "data.val=0.2"], ["finetune", f"model.path={CHAT}", *steps]):
        done = cli(argv[0], "run=l", *argv[1:])
        assert done.returncode == 0, done.stderr
    deploy = ["deploy", "run=l", "target=gguf_lora", f"target.environment={REAL}"]
    monkeypatch.setattr(lora.merging, "scale", lambda settings, module, rank: 9.0)
    done = call(*deploy)
    assert done.returncode == ProofFailed.exit_code and "transformers" in done.stderr, done.stderr
    monkeypatch.undo()
    done = call(*deploy)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((road / "l" / "deploy-gguf_lora" / "manifest.json").read_text())["metrics"]
    assert metrics["kl"] < 5e-4 and metrics["prompts_near"] == metrics["prompts"] and metrics["conversations"] == 9
