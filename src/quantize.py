"""Quantize a model with GPTQ, calibrated on the dataset's calib split rendered through the training template.

A merged adapter is quantized from the exact sum, not from the 16 bits its merge was rounded to. The output is what gptqmodel writes, with everything
that is not quantized as the source stores it; it loads in transformers as it is, and equal inputs give equal bytes.
"""

import contextlib
import csv
import itertools
import json
import math
import shutil
import struct
from dataclasses import replace
from functools import partial
from pathlib import Path

from src.chat import encoding
from src.chat.rows import rows_of
from src.core import processes, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput, ProofFailed
from src.core.files import read_json
from src.core.log import say, warn
from src.core.processes import silenced
from src.core.room import Needs
from src.models import complete, exact_sum, fidelity, safetensors_io
from src.models.devices import device, fits_whole, give_back_memory
from src.models.folder import check_folder, check_tokenizer, stored_dtype, trust_of
from src.models.generation import logits
from src.models.loading import load_model, load_tokenizer, prepare_gptq
from src.settings.verbs import QuantizeVerb
from src.sizing import host
from src.sizing.config_reader import read_shape


def find(cfg: QuantizeVerb, run: stage.Run) -> dict[str, Artifact]:
    model = run.source(cfg.source, "merge", "finetune", kinds={"model"})
    return {"model": model, "dataset": stage.data_sources(run, cfg.dataset), **exact_sum.parents(model, cfg.weights, run.cache)}


def check(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> list[str]:
    model, dataset = inputs["model"], inputs["dataset"]
    config = check_folder(model.path, trust_remote_code=trust_of(model))
    if not dataset.files["calib.jsonl"]["size"]:
        raise MissingInput("the calib split is empty", where=str(dataset.path), fix=stage.made_again(dataset, "data.calib=0.1"))
    group = cfg.quantizer.group_size
    linear = [e for e in safetensors_io.entries(model.path).values() if ".layers." in e.name and len(e.shape) == 2]
    # gptqmodel packs 32 / bits output columns into one word.
    pack = 32 // cfg.quantizer.bits
    if narrow := [e for e in linear if e.shape[0] % pack]:
        raise ConfigError(
            f"{narrow[0].name} has {narrow[0].shape[0]} rows, which int{cfg.quantizer.bits} cannot pack by {pack}",
            where=str(model.path),
            fix=["quantizer=gptq_int8"] * (cfg.quantizer.bits == 4 and all(e.shape[0] % 4 == 0 for e in linear))
            + ["python -m src.deploy target=llama2c target.format=int8_v2 quantizes it by itself"] * (config.get("model_type") == "llama"),
        )
    odd = [e for e in linear if group > 0 and e.shape[1] % group]
    if odd:
        divisors = [g for g in (128, 64, 32, 16) if all(e.shape[1] % g == 0 for e in linear)]
        raise ConfigError(
            f"quantizer.group_size={group} does not divide the width {odd[0].shape[1]} of {odd[0].name}",
            where=str(model.path),
            fix=[f"quantizer.group_size={g}" for g in divisors[:1]] + ["quantizer.group_size=-1"],
        )
    check_tokenizer(model.path, trust_remote_code=trust_of(model))
    return [
        f"GPTQ int{cfg.quantizer.bits}, group {group}, of {model.path}, calibrated on {dataset.path}/calib.jsonl",
        *exact_sum.cost(inputs, Path(cfg.outputs) / cfg.run / "quantize.partial" / "exact"),
    ]


def quantize(cfg: QuantizeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    import torch

    prepare_gptq()
    from gptqmodel import GPTQModel, QuantizeConfig

    source, target = inputs["model"].path.resolve(), out.resolve()
    trust = trust_of(inputs["model"])
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    rows, tokens = calibration_rows(cfg, inputs["dataset"].path / "calib.jsonl", tokenizer)
    torch.manual_seed(0)
    q = cfg.quantizer
    config = QuantizeConfig(
        bits=q.bits, group_size=q.group_size, desc_act=q.act_order, sym=True, damp_percent=q.damp, offload_to_disk=False
    )
    scratch = out / "scratch"
    scratch.mkdir()
    start = exact_sum.write(inputs, scratch / "exact")
    begin = str(start.path.resolve())
    # gptqmodel would take fp32 weights as bf16 on a GPU, by its "auto".
    wide = device() == "cpu" or stored_dtype(start.path) == "float32"
    # gptqmodel writes a folder of logs wherever it is run.
    with silenced(), contextlib.chdir(scratch):
        model = GPTQModel.load(
            begin,
            config,
            trust_remote_code=trust,
            device=device(),
            dtype=torch.float32 if wide else "auto",
        )
        model.quantize(rows, batch_size=cfg.calibration.batch_size)
        model.save(str(target))
    del model
    losses = module_losses(out)
    keep_own_files(out)
    make_reproducible(out)
    keep_stored(source, out, scratch / "kept")
    complete.copy(source, out)
    complete_config(source, out)
    figures = prove(start, out, trust, tokenizer, inputs["dataset"].path, [row["input_ids"][:256] for row in rows[:8]])
    shutil.rmtree(scratch)
    return {"calibration_rows": len(rows), "calibration_tokens": tokens, "module_loss": losses, **figures}


def calibration_rows(cfg: QuantizeVerb, path: Path, tokenizer) -> tuple[list[dict], int]:
    """(rows of {"input_ids", "attention_mask"} as gptqmodel takes them, tokens in all): whole conversations, as in training."""
    encoding.ensure_chat(tokenizer)
    rows: list[dict] = []
    cut = 0
    for _, row in itertools.islice(rows_of(map(json.loads, open(path, encoding="utf-8")), tokenizer, "calibration"), cfg.calibration.rows):
        ids = row.input_ids
        cut += len(ids) > cfg.calibration.max_length
        ids = ids[: cfg.calibration.max_length]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids)})
    tokens = sum(len(row["input_ids"]) for row in rows)
    say(
        f"quantize: calibrates on {len(rows)} conversations, {tokens:,} tokens"
        + (f"; {cut} were cut at {cfg.calibration.max_length} tokens" if cut else "")
    )
    if tokens < 4096:
        warn(f"{tokens:,} calibration tokens are few; more records, or a larger data.calib, quantize better")
    return rows, tokens


def module_losses(out: Path) -> float:
    """Mean of gptqmodel's error per module, from the log it leaves; the log itself holds timings, so it is not kept."""
    log = out / "quant_log.csv"
    with open(log, newline="") as file:
        losses = [
            float(row["loss"])
            for row in csv.DictReader(file)
            if row.get("loss") and row["loss"].replace(".", "").replace("e-", "").isdigit()
        ]
    log.unlink()
    return sum(losses) / len(losses) if losses else float("nan")


def keep_own_files(out: Path) -> None:
    """Remove the tokenizer and generation files gptqmodel wrote: it rewrites them, and the source's own are copied instead."""
    for file in out.iterdir():
        if (
            file.is_file()
            and file.suffix != ".safetensors"
            and file.name not in ("config.json", "quantize_config.json", "model.safetensors.index.json")
        ):
            file.unlink()


def make_reproducible(out: Path) -> None:
    """Take out what differs between equal runs: gptqmodel writes the name of a temporary folder into its metadata."""
    for name in ("config.json", "quantize_config.json"):
        content = read_json(out / name)
        for block in (content, content.get("quantization_config", {})):
            for key in ("offload_to_disk_path", "offload_to_disk"):
                block.pop(key, None)
                block.get("meta", {}).pop(key, None)
        (out / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    for file in out.glob("*.safetensors"):
        plain_metadata(file)


def plain_metadata(file: Path) -> None:
    """Replace a safetensors file's metadata by {"format": "pt"}, in place where the header's room allows, which it does: it only gets shorter."""
    with open(file, "r+b") as stream:
        length = struct.unpack("<Q", stream.read(8))[0]
        header = json.loads(stream.read(length))
        header["__metadata__"] = {"format": "pt"}
        text = json.dumps(header, separators=(",", ":")).encode()
        stream.seek(8)
        stream.write(text.ljust(length))


def keep_stored(source: Path, out: Path, scratch: Path) -> None:
    """Put the source's own tensors in place of those that gptqmodel only cast to the dtype it computed in: embedding, norms, output layer."""
    stored, kept, values = safetensors_io.entries(source), [], {}
    for name, entry in safetensors_io.entries(out).items():
        own = stored.get(name)
        values[name] = own if own and own.shape == entry.shape and own.dtype.startswith(("F", "BF")) else entry
        kept.append(replace(entry, dtype=values[name].dtype))
    scratch.mkdir()
    safetensors_io.write(scratch, kept, values.get, safetensors_io.parse_size("5GB"))
    for file in out.glob("model*.safetensors*"):
        file.unlink()
    for file in scratch.iterdir():
        file.rename(out / file.name)
    scratch.rmdir()


def complete_config(source: Path, out: Path) -> None:
    """The source's config with the quantization block added: gptqmodel's own copy loses fields it does not know."""
    theirs, ours = read_json(out / "config.json"), read_json(source / "config.json")
    ours["quantization_config"] = theirs["quantization_config"]
    (out / "config.json").write_text(json.dumps(ours, indent=2) + "\n")


def prove(start: Artifact, out: Path, trust: bool, tokenizer, dataset: Path, probes: list[list[int]]) -> dict:
    """The proof's figures: loss, KL and likeliest tokens on held-out conversations against the weights that were quantized, and logits of `probes`.

    The folder is loaded alone by transformers in a fresh process; its tokenizer is compared too. Raises ProofFailed where the logits have
    nothing to do with the source's.
    """
    import torch

    rows = fidelity.held_out(dataset, tokenizer, read_json(out / "config.json"))
    parameters = sum(math.prod(entry.shape) for entry in safetensors_io.entries(start.path).values())
    compute = "float32" if fits_whole(parameters, "cpu") else "auto"
    model = load_model(start.path, dtype=compute, trust_remote_code=trust).eval()
    whole = fidelity.observe(partial(fidelity.trained_logits, model), rows, "proof") if rows else None
    before = torch.from_numpy(logits(model, probes))
    del model
    give_back_memory()
    quantized = Artifact(out, "quantized", "", start.manifest, {})
    ids, after, seen = processes.fresh(fidelity.reload, quantized, compute, "cpu", rows, whole and whole.top_k_ids, None, probes)
    complete.compare(ids, tokenizer, out)
    after = torch.from_numpy(after)
    error = ((before - after).norm() / before.norm()).item()
    if not error < 1:
        raise ProofFailed(f"the quantized model's logits are {error:.2f} of their own size away from the source's", where=str(out))
    say(f"quantize: loads in transformers alone; logits of the calibration within {error:.1%} of the source's")
    figures = {"logit_error": error}
    if whole:
        change = fidelity.compare(whole, seen, len(rows))
        ways = "quantizer=gptq_int8 loses less" if read_json(out / "config.json")["quantization_config"]["bits"] == 4 else ""
        figures |= fidelity.report("quantize", change, "quantized", ways)
    return figures


def needs(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> Needs:
    split = host.conversations(inputs["dataset"].path / "calib.jsonl")
    return host.quantize(read_shape(inputs["model"].path), cfg.calibration, split, exact=exact_sum.ROLES["adapter"] in inputs)


STAGE = stage.Stage(
    verb="quantize", version=2, schema=QuantizeVerb, kind="quantized", find=find, check=check, needs=needs, run=quantize, doc=__doc__
)

if __name__ == "__main__":
    stage.main(STAGE)
