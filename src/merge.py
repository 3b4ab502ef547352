"""Merge a LoRA adapter into its base, tensor by tensor, and prove the result: its logits, reloaded alone, equal those of the adapter on the base.

Each adapted weight is (W + (B A) x scale) in fp32, rounded once to the stored dtype, which is byte for byte what peft computes. An adapter trained
on NF4 merges into the base as NF4 made it, since that is what it was trained against.
"""

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

from src import aux_files, shards, stage
from src.artifact import Artifact, read_json
from src.config import MergeVerb
from src.errors import MissingInput, ProofFailed, WrongKind
from src.log import say
from src.modeling import base_of, check_folder, fresh, has_tokenizer, import_quietly, logits, trust_of

# Relative L2 distance of logits that rounding to the stored dtype alone explains, with room to spare (8, 11 and 24 bits of mantissa).
TOLERANCE = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-4}


def find(cfg: MergeVerb, run: stage.Run) -> dict[str, Artifact]:
    adapter = run.source(cfg.source, "finetune", kinds={"adapter"})
    base = run.source(cfg.base or str(base_of(adapter)), kinds={"model", "quantized"})
    recorded = adapter.parent("model")
    if recorded and recorded["key"] != base.key:
        raise WrongKind(
            "this is not the base the adapter was trained on: its content differs",
            where=f"{base.path} ({base.key[:12]}), trained on {recorded['path']} ({recorded['key'][:12]})",
            fix=["base=FOLDER names the right one", "fine-tune again on this base"],
        )
    return {"adapter": adapter, "model": base}


def check(cfg: MergeVerb, inputs: dict[str, Artifact]) -> list[str]:
    base, adapter = inputs["model"], inputs["adapter"]
    if base.kind == "quantized":
        raise WrongKind(
            "an adapter trained on a GPTQ base has no whole weights to merge into",
            where=str(base.path),
            fix=[
                f"evaluate or serve it as it is: python -m src.evaluate source={adapter.path}",
                "train with tuner=qlora on the unquantized base (NF4), then merge and quantize",
            ],
        )
    check_folder(base.path, allow_pickle=False, trust_remote_code=trust_of(adapter))
    plan(cfg, adapter, base.path)
    return [f"{adapter.path} into {base.path}, written as {cfg.dtype}"]


def plan(cfg: MergeVerb, adapter: Artifact, base: Path) -> tuple[list[shards.Entry], dict]:
    """(tensors to write, in the base's order; what the adapter holds for each: {"lora": ..., "rows": ..., "whole": ...}).

    Raises WrongKind where the adapter does not fit the base, or uses what this merge does not know.
    """
    settings = read_json(adapter.path / "adapter_config.json")
    unknown = [k for k in ("use_dora", "lora_bias", "megatron_config", "alora_invocation_tokens") if settings.get(k)]
    unknown += ["bias"] if settings.get("bias", "none") != "none" else []
    if settings.get("peft_type") != "LORA" or unknown:
        raise WrongKind(
            f"cannot merge this kind of adapter: {', '.join(unknown) or settings.get('peft_type')}",
            where=str(adapter.path),
            fix="tuner=lora trains one that merges; for others peft has merge_and_unload()",
        )
    rows = settings.get("trainable_token_indices") or {}
    config = read_json(base / "config.json")
    stored = shards.entries(base)
    changes: dict[str, dict] = {}
    if not list(adapter.path.glob("adapter_model*.safetensors")):
        raise MissingInput(
            "the adapter has no adapter_model.safetensors",
            where=str(adapter.path),
            fix="copy it again, or save it with safe_serialization=True",
        )
    for name in shards.entries(adapter.path, "adapter_model*.safetensors"):
        module, _, what = name.removeprefix("base_model.model.").rpartition(".")
        if module.endswith((".lora_A", ".lora_B")):
            module, _, what = module.rpartition(".")
            changes.setdefault(f"{module}.weight", {})[what] = name
        elif what == "trainable_tokens_delta":
            layer = module.removesuffix(".token_adapter")
            if layer == "lm_head" and config.get("tie_word_embeddings"):
                continue  # peft saves the rows of a tied matrix twice
            changes.setdefault(f"{layer}.weight", {}).update(
                rows=name, index=rows[layer.rsplit(".", 1)[-1]] if isinstance(rows, dict) else rows
            )
        else:
            changes.setdefault(f"{module.removesuffix('.token_adapter.base_layer')}.{what}", {})["whole"] = name
    if missing := [name for name in changes if name not in stored and not (name == "lm_head.weight" and config.get("tie_word_embeddings"))]:
        raise WrongKind(
            f"the adapter changes weights this base does not have, such as {missing[0]}",
            where=str(base),
            fix="base=FOLDER names the base it was trained on",
        )
    vocabulary = config["vocab_size"]
    grown = max(vocabulary, len(load_vocabulary(adapter.path)) if has_tokenizer(adapter.path) else 0)
    tied = "lm_head.weight" in stored and config.get("tie_word_embeddings")
    written = []
    for entry in stored.values():
        if tied and entry.name == "lm_head.weight":
            continue
        shape = (
            (grown, *entry.shape[1:])
            if entry.name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")) and entry.shape[0] == vocabulary
            else entry.shape
        )
        dtype = entry.dtype if cfg.dtype == "auto" or not entry.dtype.startswith(("F", "BF")) else shards.NAME[cfg.dtype]
        written.append(shards.Entry(entry.name, dtype, shape, entry.file))
    return written, changes


def load_vocabulary(folder: Path) -> dict:
    """All tokens of a folder's tokenizer.json, added ones included; empty where it has another form."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    vocabulary = content["model"].get("vocab", {})
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return dict.fromkeys(tokens | {t["content"] for t in content.get("added_tokens", [])})


def merge(cfg: MergeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    adapter, base = inputs["adapter"], inputs["model"].path
    written, changes = plan(cfg, adapter, base)
    tensor = merged_tensors(adapter, base, written, changes)
    shards.write(out, written, tensor, shards.parse_size(cfg.shard_size))
    complete(adapter, base, out, written)
    error, tolerance = prove(cfg, adapter, base, out, written)
    return {"tensors": len(written), "adapted": sum("lora_A" in c for c in changes.values()), "logit_error": error, "tolerance": tolerance}


def merged_tensors(adapter: Artifact, base: Path, written: list[shards.Entry], changes: dict) -> Callable:
    """A function from a tensor's name to its merged value, computed when asked for."""
    import torch
    from safetensors import safe_open

    from src.modeling import mean_row

    settings = read_json(adapter.path / "adapter_config.json")
    files = {}
    delta = safe_open(next(adapter.path.glob("adapter_model*.safetensors")), "pt")
    quantized = nf4_layers(adapter, base)
    plans = {entry.name: entry for entry in written}
    dtypes = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}

    def scale(module: str, rank: int) -> float:
        # peft's keys are regular expressions for the end of a name (peft.utils.other.get_pattern_key).
        alpha = next(
            (v for k, v in (settings.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({k})$", module)), settings["lora_alpha"]
        )
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)

    def tensor(name: str):
        entry, change = plans[name], changes.get(name, {})
        source = files.setdefault(entry.file, safe_open(entry.file, "pt"))
        weight = delta.get_tensor(change["whole"]) if "whole" in change else source.get_tensor(name)
        dtype = dtypes.get(entry.dtype, weight.dtype)
        if (module := name.removesuffix(".weight")) in quantized:
            weight = as_nf4_made_it(weight, adapter.metrics["nf4"])
        if "lora_A" in change:
            a, b = delta.get_tensor(change["lora_A"]).float(), delta.get_tensor(change["lora_B"]).float()
            if (b.shape[0], a.shape[1]) != tuple(weight.shape):
                raise WrongKind(
                    f"{name}: the adapter is for shape {(b.shape[0], a.shape[1])}, the base has {tuple(weight.shape)}", where=str(base)
                )
            weight = weight.float() + (b @ a) * scale(module, a.shape[0])
        weight = weight.to(dtype)
        if entry.shape[:1] > weight.shape[:1]:
            weight = torch.cat([weight, mean_row(weight).expand(entry.shape[0] - weight.shape[0], -1)])
        if "rows" in change:
            weight = weight.index_copy(0, torch.tensor(change["index"]), delta.get_tensor(change["rows"]).to(dtype))
        return weight

    return tensor


def nf4_layers(adapter: Artifact, base: Path) -> set[str]:
    """Names of the layers that were 4-bit while this adapter was trained: every linear layer but the output, as transformers does it."""
    if not adapter.metrics.get("nf4"):
        return set()
    import torch

    import_quietly("bitsandbytes", "transformers.modeling_utils", "transformers.quantizers.auto")
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(base, trust_remote_code=trust_of(adapter)), trust_remote_code=trust_of(adapter)
        )
    head = model.get_output_embeddings()
    return {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and module is not head}


def as_nf4_made_it(weight, nf4: dict):
    """The weight after NF4 quantization and back, in the dtype it was computed in."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.to(getattr(torch, nf4["compute_dtype"])), quant_type="nf4", compress_statistics=nf4["double_quant"]
    )
    return dequantize_4bit(packed, state)


def complete(adapter: Artifact, base: Path, out: Path, written: list[shards.Entry]) -> None:
    """config.json of the base with what the adapter changed, and every file a model folder needs beside its weights."""
    config = read_json(base / "config.json")
    embedding = max(
        (e for e in written if len(e.shape) == 2 and e.shape[0] >= config["vocab_size"]), key=lambda e: "embed" in e.name or "wte" in e.name
    )
    config["vocab_size"] = embedding.shape[0]
    config["dtype"] = {v: k for k, v in shards.NAME.items()}.get(embedding.dtype, "float32")
    config.pop("torch_dtype", None)
    if end := adapter.metrics.get("turn_end"):
        config["eos_token_id"] = end
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if has_tokenizer(adapter.path):
        aux_files.copy(adapter.path, out)
    aux_files.copy(base, out, tokenizer=not has_tokenizer(adapter.path))


def prove(cfg: MergeVerb, adapter: Artifact, base: Path, out: Path, written: list[shards.Entry]) -> tuple[float, float]:
    """(relative L2 distance of the logits, tolerance). The merged folder is loaded alone, in a fresh process, offline; its tokenizer is compared too.

    Raises ProofFailed above the tolerance.
    """
    import torch

    from src.modeling import load_any

    dtype = read_json(out / "config.json")["dtype"]
    size = sum(math.prod(e.shape) for e in written) * 4
    compute = "float32" if size * 2 < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") else "auto"
    ids, after = fresh(aux_files.reload, out, trust_of(adapter), compute)
    model, tokenizer = load_any(adapter, dtype=compute, base=base)
    aux_files.compare(ids, tokenizer, out)
    before, after = torch.from_numpy(logits(model)), torch.from_numpy(after)
    error = ((before - after).norm() / before.norm()).item()
    tolerance = TOLERANCE[dtype] if cfg.tolerance == "auto" else cfg.tolerance
    agree = (before.argmax(-1) == after.argmax(-1)).float().mean().item()
    if not error <= tolerance:
        raise ProofFailed(
            f"the merged model's logits differ from the adapter's on its base by {error:.2e}, above the tolerance {tolerance:.0e}",
            where=str(out),
            fix=["dtype=float32 rounds less", f"tolerance={error * 1.5:.1e} if you accept it"],
        )
    say(
        f"merge: logits equal those of the adapter on its base within {error:.1e} (tolerance {tolerance:.0e}); same top token at {agree:.1%} of positions"
    )
    return error, tolerance


STAGE = stage.Stage(verb="merge", version=1, schema=MergeVerb, kind="model", find=find, check=check, run=merge, doc=__doc__)

if __name__ == "__main__":
    stage.main(STAGE)
