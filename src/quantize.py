"""Quantize a model layer by layer: with GPTQ, calibrated on the dataset's calib split rendered through the training template, or, as what that has to be
better than, rounded to the nearest (quantizer=rtn_int4, rtn_int8).

A merged adapter is quantized from the exact sum, not from the 16 bits its merge was rounded to. The layout is what gptqmodel writes, with everything
that is not quantized as the source stores it; it loads in transformers as it is, and equal inputs give equal bytes.
"""

import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from src import __version__
from src.chat import encoding
from src.chat.rows import rows_of
from src.core import processes, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput, ProofFailed, WrongKind
from src.core.files import read_json, write_json
from src.core.log import progress, say, warn
from src.core.room import Needs
from src.models import complete, exact_sum, fidelity, safetensors_io, seen
from src.models.devices import device, give_back_memory
from src.models.folder import check_folder, check_tokenizer, trust_of
from src.models.loading import load_tokenizer
from src.models.safetensors_io import Entry
from src.settings.verbs import QuantizeVerb, RtnQuantizer
from src.sizing import host
from src.sizing.config_reader import read_shape


def find(cfg: QuantizeVerb, run: stage.Run) -> dict[str, Artifact]:
    model = run.source(cfg.source, "merge", "finetune", kinds={"model"})
    return {"model": model, "dataset": stage.data_sources(run, cfg.dataset), **exact_sum.parents(model, cfg.weights, run.cache)}


def check(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> list[str]:
    model, dataset = inputs["model"], inputs["dataset"]
    config = check_folder(model.path, trust_remote_code=trust_of(model))
    if calibrates(cfg) and not dataset.files["calib.jsonl"]["size"]:
        raise MissingInput("the calib split is empty", where=str(dataset.path), fix=stage.made_again(dataset, "data.calib=0.1"))
    group = cfg.quantizer.group_size
    linear = [e for e in safetensors_io.entries(model.path).values() if ".layers." in e.name and len(e.shape) == 2]
    pack = 32 // cfg.quantizer.bits  # values in a word, of inputs and of outputs
    if narrow := [e for e in linear if e.shape[0] % pack or e.shape[1] % pack]:
        raise ConfigError(
            f"{narrow[0].name} is {narrow[0].shape[0]} x {narrow[0].shape[1]}, which int{cfg.quantizer.bits} cannot pack by {pack}",
            where=str(model.path),
            fix=["quantizer=gptq_int8"] * (cfg.quantizer.bits == 4 and all(n % 4 == 0 for e in linear for n in e.shape))
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
    if trust_of(model):
        raise WrongKind("GPTQ goes layer by layer, and this model runs code of its own, which may do otherwise", where=str(model.path))
    return [
        f"{cfg.quantizer.kind.upper()} int{cfg.quantizer.bits}, group {group}, of {model.path}, "
        + (
            f"calibrated on {dataset.path}/calib.jsonl"
            if calibrates(cfg)
            else "each weight rounded to the nearest; calibration= is not used"
        ),
        *exact_sum.cost(inputs, Path(cfg.outputs) / cfg.run / "quantize.partial" / "scratch" / "exact"),
    ]


@dataclass(frozen=True)
class Made:
    """A folder that has been written. figures: of its making. rows, before: what the weights it was made from say at them. held_out: whether they are
    held-out conversations. ids: of its source's tokenizer, see complete."""

    start: Artifact
    figures: dict
    rows: list[encoding.Encoded]
    before: seen.Seen
    held_out: bool
    ids: list[list[int]]


def quantize(cfg: QuantizeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Each part in a process of its own, so that the second reads the result from disk alone, and neither holds what the other needs."""
    made = processes.fresh(make, cfg, inputs, out)
    figures = prove(made, out, best=calibrates(cfg) and cfg.quantizer.bits == 8)
    shutil.rmtree(out / "scratch")
    return {**made.figures, **figures}


def make(cfg: QuantizeVerb, inputs: dict[str, Artifact], out: Path) -> Made:
    """Write the quantized folder, and ask what it was made from for held-out rows, or for the calibration's first where there are none."""
    from src.models import by_layer, gptq, gptq_layers

    source, data = inputs["model"].path.resolve(), inputs["dataset"].path
    tokenizer = load_tokenizer(source, trust_remote_code=trust_of(inputs["model"]))
    rows, tokens = calibration_rows(cfg, data / "calib.jsonl", tokenizer) if calibrates(cfg) else ([], 0)
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    start = exact_sum.write(inputs, scratch / "exact")
    if not (found := by_layer.load(start, device=device())):
        raise WrongKind(
            f"GPTQ goes layer by layer, and this {read_json(source / 'config.json').get('model_type')} model's layers hand more to each other than their hidden states, "
            "or are no one list",
            where=str(source),
        )
    q = cfg.quantizer
    how = gptq.Nearest(q.bits, q.group_size) if isinstance(q, RtnQuantizer) else gptq.Settings(q.bits, q.group_size, q.damp, q.act_order)
    losses = gptq_layers.quantize(found[0], rows, how, scratch / "layers")
    del found
    give_back_memory()  # of the Hessians, before the source is asked
    write(source, scratch / "layers", out)
    complete.copy(source, out)
    complete_config(cfg, source, out)
    held = fidelity.held_out(data, tokenizer, source)
    asked = (
        held
        or [encoding.Encoded(row[:256], row[:256]) for row in rows[:8]]
        or fidelity.probes(read_json(out / "config.json")["vocab_size"])
    )
    before = seen.observe(fidelity.reader(start, "float32"), asked)
    figures = {"calibration_rows": len(rows), "calibration_tokens": tokens, "module_loss": sum(losses) / len(losses)}
    return Made(start, figures, asked, before, bool(held), complete.ids_of(tokenizer))


def calibrates(cfg: QuantizeVerb) -> bool:
    return not isinstance(cfg.quantizer, RtnQuantizer)


def calibration_rows(cfg: QuantizeVerb, path: Path, tokenizer) -> tuple[list[list[int]], int]:
    """(token ids of each row, tokens in all): whole conversations, as in training."""
    encoding.ensure_chat(tokenizer)
    rows: list[list[int]] = []
    cut = 0
    count = min(cfg.calibration.rows, sum(1 for _ in open(path, "rb")))
    found = map(json.loads, open(path, encoding="utf-8"))
    for _, row in progress(
        itertools.islice(rows_of(found, tokenizer, "calibration"), cfg.calibration.rows), "tokenizing calibration", count
    ):
        cut += len(row.input_ids) > cfg.calibration.max_length
        rows.append(row.input_ids[: cfg.calibration.max_length])
    tokens = sum(map(len, rows))
    say(
        f"quantize: calibrates on {len(rows)} conversations, {tokens:,} tokens"
        + (f"; {cut} were cut at {cfg.calibration.max_length} tokens" if cut else "")
    )
    if tokens < 4096:
        warn(f"{tokens:,} calibration tokens are few; more records, or a larger data.calib, quantize better")
    return rows, tokens


def write(source: Path, layers: Path, out: Path) -> None:
    """The source's tensors as it stores them, in its order, with what the files in `layers` hold in place of those that were quantized."""
    from src.models.gptq import SUFFIXES

    quantized = safetensors_io.entries(layers, "layer-*.safetensors")
    written: list[Entry] = []
    for name, entry in safetensors_io.entries(source).items():
        parts = [quantized.get(f"{name.removesuffix('.weight')}.{suffix}") for suffix in SUFFIXES]
        written += [entry] if None in parts else [part for part in parts if part]
    stored = {entry.name: entry for entry in written}
    safetensors_io.write(out, written, stored.__getitem__, safetensors_io.parse_size("5GB"))


def complete_config(cfg: QuantizeVerb, source: Path, out: Path) -> None:
    """The source's config.json with the block that says how it is quantized, and quantize_config.json, where AutoGPTQ's readers look for it."""
    q = cfg.quantizer
    block = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": q.bits,
        "group_size": q.group_size,
        "desc_act": not isinstance(q, RtnQuantizer) and q.act_order,
        "sym": True,
        "lm_head": False,
        **({} if isinstance(q, RtnQuantizer) else {"damp_percent": q.damp}),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"boardwalk:{__version__}"]},
    }
    write_json(out / "config.json", read_json(source / "config.json") | {"quantization_config": block})
    write_json(out / "quantize_config.json", block)


def read_back(*given) -> tuple:
    from src.models import gptq_layers

    return gptq_layers.read_back(*given)


def check_first_layer(*given) -> None:
    from src.models import gptq_layers

    gptq_layers.check_first_layer(*given)


def prove(made: Made, out: Path, *, best: bool) -> dict:
    """The proof's figures: loss, KL and likeliest tokens against the weights that were quantized, by the folder alone, read in a fresh process; its
    tokenizer is compared too. best: no other quantizer loses less. Raises ProofFailed where what it says has nothing to do with the source's."""
    shutil.rmtree(first := out / "scratch" / "first", ignore_errors=True)
    first.mkdir(parents=True)
    processes.fresh(check_first_layer, made.start, out, first)
    ids, after = processes.fresh(read_back, made.start, out, made.rows, made.before.top_k_ids)
    complete.compare(ids, made.ids, out)
    error = fidelity.distance(made.before, after)
    if not error < 1:
        raise ProofFailed(
            f"the quantized model's log-probabilities are {error:.2f} of their own size away from the source's", where=str(out)
        )
    say(f"quantize: transformers reads the folder alone; log-probabilities within {error:.1%} of the source's")
    change = fidelity.compare(made.before, after, len(made.rows))
    figures = fidelity.report("quantize", change, "quantized", "" if best else "quantizer=gptq_int8 loses less")
    return {"logit_error": error, **(figures if made.held_out else {})}


def needs(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> Needs:
    split = host.conversations(inputs["dataset"].path / "calib.jsonl")
    return host.quantize(read_shape(inputs["model"].path), cfg.calibration, split, exact=exact_sum.ROLES["adapter"] in inputs)


STAGE = stage.Stage(
    verb="quantize",
    version=3,
    schema=QuantizeVerb,
    kind="quantized",
    find=find,
    check=check,
    needs=needs,
    run=quantize,
    doc=__doc__,
    resumes=lambda partial: any(partial.glob("scratch/layers/layer-*.safetensors")),
)

if __name__ == "__main__":
    stage.main(STAGE)
