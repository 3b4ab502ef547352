"""The sum of an adapter and its base, tensor by tensor: what changes, what each weight becomes, and the folder they make.

Each adapted weight is V = W + (B A) x scale in fp32, with DoRA each output's weights of V brought to the length that was trained; the value peft
computes too, byte for byte where it is rounded to nearest. An adapter trained on NF4 adds to the base as NF4 made it, since that is what it was
trained against. Where an adapter changes one end only of a base whose embedding and output layer are one matrix, the result holds two.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import WrongKind
from src.core.files import read_json
from src.core.log import say
from src.core.processes import import_quietly
from src.models import adapter_files, complete, rounding, safetensors_io
from src.models.folder import check_adapter_file, has_tokenizer, trust_of
from src.models.vocabulary import mean_row

UNKNOWN = (
    "lora_bias",
    "megatron_config",
    "alora_invocation_tokens",
    "use_bdlora",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "arrow_config",
    "target_parameters",
    "layer_replication",
)
"""keys of adapter_config.json that change what an adapter computes in ways this merge does not know"""
LORA = {"lora_A", "lora_embedding_A"}
BLOCK = 1 << 19
"""values merged at a time: their fp32 forms stay in the processor's cache"""
HEAD = "lm_head.weight"
TABLES = ("embed_tokens.weight", "wte.weight")


def plan(adapter: Artifact, base: Path, dtype: str = "auto") -> tuple[list[safetensors_io.Entry], dict[str, dict]]:
    """(tensors to write, in the base's order; for each its entry in the base as "base", beside what `changes_of` found).

    dtype: float32, bfloat16 or float16, or auto for what the base stores each tensor as. Raises WrongKind where the adapter does not fit the base, or uses what this merge does not know.
    """
    settings = read_json(adapter.path / "adapter_config.json")
    unknown = [k for k in UNKNOWN if settings.get(k)]
    unknown += ["bias"] if settings.get("bias", "none") != "none" else []
    if settings.get("peft_type") != "LORA" or unknown:
        raise WrongKind(
            f"cannot merge this kind of adapter: {', '.join(unknown) or settings.get('peft_type')}",
            where=str(adapter.path),
            fix=[
                "peft's merge_and_unload() merges it; give what it makes to quantize, evaluate and deploy",
                "tuner=lora trains one that merges here",
            ],
        )
    if str(start := settings.get("init_lora_weights")).startswith(("pissa", "olora", "corda", "lora_ga")):
        raise WrongKind(
            f"this adapter was saved for a base that init_lora_weights={start} took a part out of",
            where=str(adapter.path),
            fix="save it with peft's path_initial_model_for_weight_conversion, which makes it one for the base as it was",
        )
    config = read_json(base / "config.json")
    stored = safetensors_io.entries(base)
    changes = changes_of(adapter, settings)
    if config.get("tie_word_embeddings", HEAD not in stored):
        untie(stored, changes, keep=bool(settings.get("ensure_weight_tying")))
    if missing := [name for name in changes if name not in stored]:
        raise WrongKind(
            f"the adapter changes weights this base does not have, such as {missing[0]}",
            where=str(base),
            fix="base=FOLDER names the base it was trained on",
        )
    vocabulary = table_rows(adapter, config["vocab_size"])
    written = []
    for name, entry in stored.items():
        changes.setdefault(name, {})["base"] = entry
        rows = (vocabulary,) if name.endswith((*TABLES, HEAD)) and entry.shape[0] == config["vocab_size"] else entry.shape[:1]
        kind = entry.dtype if dtype == "auto" or not entry.dtype.startswith(("F", "BF")) else safetensors_io.NAME[dtype]
        written.append(replace(entry, name=name, dtype=kind, shape=(*rows, *entry.shape[1:])))
    return written, changes


def table_rows(adapter: Artifact, base: int) -> int:
    """Rows of the embedding that an adapter was trained with: those of the table it holds whole, else the base's, or more where its tokenizer has more.

    Raises WrongKind where its tokenizer has more tokens than the table it holds.
    """
    tokens = len(load_vocabulary(adapter.path)) if has_tokenizer(adapter.path) else 0
    rows = adapter_files.table_rows(adapter.path)
    if rows is None:
        return max(base, tokens)
    if tokens > rows:
        raise WrongKind(
            f"the adapter's tokenizer has {tokens} tokens, its embedding {rows} rows",
            where=str(adapter.path),
            fix="copy the tokenizer that it was trained with into its folder",
        )
    return rows


def changes_of(adapter: Artifact, settings: dict) -> dict[str, dict]:
    """{name of a base weight: what the adapter holds for it}, entries of its file: "lora_A" and "lora_B", or "lora_embedding_A" and "..._B", with
    "lora_magnitude_vector" for DoRA; "rows", with their "index"; "whole"."""
    check_adapter_file(adapter.path)
    rows = settings.get("trainable_token_indices") or {}
    changes: dict[str, dict] = {}
    for name, entry in safetensors_io.entries(adapter.path, "adapter_model*.safetensors").items():
        module, _, what = name.removeprefix("base_model.model.").rpartition(".")
        if module.endswith((".lora_A", ".lora_B")):
            module, _, what = module.rpartition(".")
        if module.endswith(".original_module"):
            continue  # peft's copy of the base's own layer, beside the one that was trained
        module = module.removesuffix(".modules_to_save")
        if what.startswith("lora_"):
            changes.setdefault(f"{module}.weight", {})[what] = entry
        elif what == "trainable_tokens_delta":
            layer = module.removesuffix(".token_adapter")
            index = rows[layer.rsplit(".", 1)[-1]] if isinstance(rows, dict) else rows
            changes.setdefault(f"{layer}.weight", {}).update(rows=entry, index=index)
        else:
            changes.setdefault(f"{module.removesuffix('.token_adapter.base_layer')}.{what}", {})["whole"] = entry
    return changes


def untie(stored: dict[str, safetensors_io.Entry], changes: dict[str, dict], *, keep: bool) -> None:
    """For a base whose output layer is its embedding: make it a tensor of its own in `stored` where the adapter changes the two apart.

    keep: what was trained whole was trained as the one matrix it is (peft's ensure_weight_tying), and was saved under both names; so are rows.
    """
    stored.pop(HEAD, None)
    table = next(name for name in stored if name.endswith(TABLES))
    embedding, head = changes.get(table, {}), changes.pop(HEAD, {})
    apart = {what for what in (*embedding, *head) if what not in ("rows", "index")}
    if not apart - ({"whole"} if keep or _one_table(embedding, head) else set()):
        return
    say(f"merge: the adapter changes {table} and {HEAD} apart, which are one matrix in the base; the result holds both")
    stored[HEAD] = stored[table]
    shared = {what: value for what, value in (*head.items(), *embedding.items()) if what in ("rows", "index")}
    changes[HEAD] = head | shared
    if embedding or shared:
        changes[table] = embedding | shared


def _one_table(embedding: dict, head: dict) -> bool:
    """Whether both ends were saved whole and are equal, as peft saves the two of a tied model whose vocabulary was resized."""
    if not ("whole" in embedding and "whole" in head):
        return False
    import torch

    return torch.equal(safetensors_io.load(embedding["whole"]), safetensors_io.load(head["whole"]))


def load_vocabulary(folder: Path) -> dict:
    """All tokens of a folder's tokenizer.json, added ones included; empty where it has another form."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return {}
    content = read_json(file)
    vocabulary = content["model"].get("vocab", {})
    tokens = set(vocabulary) if isinstance(vocabulary, dict) else {piece for piece, _ in vocabulary}
    return dict.fromkeys(tokens | {t["content"] for t in content.get("added_tokens", [])})


def merged_tensors(
    adapter: Artifact, base: Path, written: list[safetensors_io.Entry], changes: dict[str, dict], how: str = "stochastic"
) -> Callable:
    """A function from a tensor's name to its merged value, computed when asked for, or to its entry in the base where that stays as it is.

    how: rounding to 16 bits, stochastic or nearest; see rounding.narrow.
    """
    import torch

    settings = read_json(adapter.path / "adapter_config.json")
    quantized = nf4_layers(adapter, base)
    plans = {entry.name: entry for entry in written}

    def tensor(name: str):
        entry, change = plans[name], changes[name]
        source, module, dtype = change["base"], name.removesuffix(".weight"), getattr(torch, safetensors_io.TORCH[entry.dtype])
        if len(change) == 1 and module not in quantized and (entry.dtype, entry.shape) == (source.dtype, source.shape):
            return source
        weight = safetensors_io.load(change.get("whole", source))
        if module in quantized:
            weight = as_nf4_made_it(weight, adapter.metrics["nf4"])
        if entry.shape[:1] > weight.shape[:1]:
            weight = weight.float()
            weight = torch.cat([weight, mean_row(weight).expand(entry.shape[0] - weight.shape[0], -1)])
        weight = weight[: entry.shape[0]] if weight.dim() else weight
        if LORA & change.keys():
            weight = adapted(weight, change, settings, name, base, dtype, how)
        weight = rounding.narrow(weight, dtype, name, rounding=how)
        if "rows" in change:
            rows, width = safetensors_io.load(change["rows"]), weight[0].numel()
            for row, at in zip(rows, change["index"], strict=True):
                weight[at] = rounding.narrow(row, dtype, name, start=at * width, rounding=how)
        return weight

    return tensor


def adapted(weight, change: dict, settings: dict, name: str, base: Path, dtype, how: str):
    """V = W + (B A) x scale, computed in fp32, of W's shape, in `dtype`; with DoRA each output's weights of V at their trained length (Liu et al. 2024,
    arXiv:2402.09353, eq. 5; peft takes it over the vocabulary for an embedding, whose outputs are its columns). W's memory is used up."""
    import torch

    first, second = ("lora_A", "lora_B") if "lora_A" in change else ("lora_embedding_A", "lora_embedding_B")
    a, b = safetensors_io.load(change[first]).float(), safetensors_io.load(change[second]).float()
    # Weights of embeddings and of GPT-2's layers are stored as (in, out).
    turned = first == "lora_embedding_A" or settings.get("fan_in_fan_out")
    shape = (b.shape[0], a.shape[1])
    if (shape[::-1] if turned else shape) != tuple(weight.shape):
        raise WrongKind(f"{name}: the adapter is for shape {shape}, the base has {tuple(weight.shape)}", where=str(base))
    factor = scale(settings, name.removesuffix(".weight"), a.shape[0])
    lengths = safetensors_io.load(change["lora_magnitude_vector"]).float().view(-1, 1) if "lora_magnitude_vector" in change else None
    if turned:
        # Laid out as the weight is, as in peft: the norm sums in the order of the memory.
        merged = weight.float().add_((b @ a).mul_(factor).T)
        merged = merged if lengths is None else _at_length(merged.T, lengths).T
        return rounding.narrow(merged, dtype, name, rounding=how)
    out = weight if weight.dtype == dtype else torch.empty(weight.shape, dtype=dtype)
    count = -(-weight.numel() // BLOCK)
    for part in torch.arange(len(weight)).chunk(count):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        merged = (b[rows] @ a).mul_(factor).add_(weight[rows].float())
        merged = merged if lengths is None else _at_length(merged, lengths[rows])
        rounding.narrow(merged, dtype, name, start=int(part[0]) * weight.shape[1], rounding=how, out=out[rows])
    return out


def _at_length(outputs, lengths):
    """Rows brought to their lengths, of shape (rows, 1), in place."""
    import torch

    return outputs.mul_(lengths / torch.linalg.norm(outputs, dim=1, keepdim=True))


def scale(settings: dict, module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rsLoRA. Patterns are regular expressions for the end of a name (peft.utils.other.get_pattern_key)."""
    patterns = settings.get("alpha_pattern") or {}
    alpha = next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


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


def add_files(adapter: Artifact, base: Path, out: Path, written: list[safetensors_io.Entry]) -> None:
    """config.json of the base with what the adapter changed, and every file a model folder needs beside its weights."""
    config = read_json(base / "config.json")
    embedding = next(entry for entry in written if entry.name.endswith(TABLES))
    if (rows := embedding.shape[0]) != config["vocab_size"]:
        say(f"merge: the vocabulary of {config['vocab_size']:,} rows becomes one of {rows:,}, as the adapter was trained")
    config["vocab_size"] = rows
    if any(entry.name == HEAD for entry in written):
        config["tie_word_embeddings"] = False
    config["dtype"] = {v: k for k, v in safetensors_io.NAME.items()}.get(embedding.dtype, "float32")
    config.pop("torch_dtype", None)
    if end := adapter.metrics.get("turn_end"):
        config["eos_token_id"] = end
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if has_tokenizer(adapter.path):
        complete.copy(adapter.path, out)
    complete.copy(base, out, tokenizer=not has_tokenizer(adapter.path))
