"""Quantize a model layer by layer: with GPTQ, calibrated on the dataset's calib split rendered through the training template, in one width or in two
(quantizer=mixed); with AWQ; or, as what that has to be better than, rounded to the nearest (quantizer=rtn_int8, rtn_int4, rtn_int3); for GPUs also to what
bitsandbytes runs (quantizer=bnb_nf4, bnb_int8).

A merged adapter is quantized from the exact sum, not from the 16 bits its merge was rounded to. The layout is what gptqmodel writes, with everything
that is not quantized as the source stores it, or what transformers saves; one width loads in transformers as it is, two in gptqmodel and vLLM. Equal
inputs give equal bytes.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from src.chat import encoding
from src.core import artifact, processes, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput, ProofFailed, WrongKind
from src.core.files import read_json, write_json
from src.core.log import say
from src.core.room import Needs
from src.models import calibration, complete, exact_sum, fidelity, quantized_folder, safetensors_io, seen
from src.models.devices import device, give_back_memory
from src.models.folder import check_folder, check_tokenizer, trust_of
from src.models.loading import load_tokenizer
from src.settings.quantizers import AnyQuantizer, AwqQuantizer, BnbQuantizer, GptqQuantizer, MixedQuantizer, RtnQuantizer
from src.settings.verbs import QuantizeVerb
from src.sizing import budget, host
from src.sizing.config_reader import read_shape

LIMITS = {8: (0.02, 0.95), 4: (0.6, 0.6), 3: (2.5, 0.3)}
"""by the fewest bits of a matrix: KL in nats and share of likeliest tokens, beyond which something else than rounding must have happened"""
SENSITIVE = 8192, 64
"""tokens and conversations that tell what each part of a model alone would lose"""


def find(cfg: QuantizeVerb, run: stage.Run) -> dict[str, Artifact]:
    model = run.source(cfg.source, "merge", "finetune", "cpt", "pretrain", kinds={"model"})
    inputs = {"model": model, "dataset": stage.data_sources(run, cfg.dataset), **exact_sum.parents(model, cfg.weights, run.cache)}
    if cfg.calibration.text is None and cfg.calibration.text_share != "auto":
        raise ConfigError(
            f"calibration.text_share={cfg.calibration.text_share:g} is the part of a text, and calibration.text names none",
            fix=["calibration.text=FILE names it", "calibration.text_share=auto"],
        )
    if cfg.calibration.text is not None:
        if not (text := Path(cfg.calibration.text)).is_file():
            raise MissingInput("calibration.text is no file", where=str(text), fix="calibration.text=null leaves it out")
        inputs["text"] = artifact.outside(text, "file", run.cache)
    return inputs


def check(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> list[str]:
    model, dataset, q = inputs["model"], inputs["dataset"], cfg.quantizer
    config = check_folder(model.path, trust_remote_code=trust_of(model))
    if calibrates(cfg) and not dataset.files["calib.jsonl"]["size"]:
        raise MissingInput("the calib split is empty", where=str(dataset.path), fix=stage.made_again(dataset, "data.calib=0.1"))
    if not isinstance(q, BnbQuantizer):
        check_widths(q, model, config)
    check_tokenizer(model.path, trust_remote_code=trust_of(model))
    if trust_of(model):
        raise WrongKind(
            "a model is quantized layer by layer, and this one runs code of its own, which may do otherwise", where=str(model.path)
        )
    if "text" in inputs and calibrates(cfg):
        calibration.check_text(inputs["text"].path)
    how = f"calibrated on {dataset.path}/calib.jsonl" if calibrates(cfg) else "each weight rounded to the nearest; calibration= is not used"
    return [
        f"{in_words(q)}, of {model.path}, {how}",
        *exact_sum.cost(inputs, Path(cfg.outputs) / cfg.run / "quantize.partial" / "scratch" / "exact"),
    ]


def check_widths(q: GptqQuantizer | MixedQuantizer | RtnQuantizer | AwqQuantizer, model: Artifact, config: dict) -> None:
    """Raises ConfigError where the layout has no place for a matrix."""
    linear = [e for e in safetensors_io.entries(model.path).values() if ".layers." in e.name and len(e.shape) == 2]
    pack = max(map(budget.filling, q.widths))
    if narrow := [e for e in linear if e.shape[0] % pack or e.shape[1] % pack]:
        raise ConfigError(
            f"{narrow[0].name} is {narrow[0].shape[0]} x {narrow[0].shape[1]}, which int{min(q.widths)} cannot pack by {pack}",
            where=str(model.path),
            fix=["quantizer=gptq_int8"] * (min(q.widths) < 8 and all(n % 4 == 0 for e in linear for n in e.shape))
            + ["python -m src.deploy target=llama2c target.format=int8_v2 quantizes it by itself"] * (config.get("model_type") == "llama"),
        )
    odd = [e for e in linear if q.group_size > 0 and e.shape[1] % q.group_size]
    if odd:
        divisors = [g for g in (128, 64, 32, 16) if all(e.shape[1] % g == 0 for e in linear)]
        raise ConfigError(
            f"quantizer.group_size={q.group_size} does not divide the width {odd[0].shape[1]} of {odd[0].name}",
            where=str(model.path),
            fix=[f"quantizer.group_size={g}" for g in divisors[:1]] + ["quantizer.group_size=-1"],
        )
    if isinstance(q, MixedQuantizer) and q.bits_per_weight < (least := budget.bits_with_scale(4, q.group_size)):
        raise ConfigError(
            f"quantizer.bits_per_weight={q.bits_per_weight:g} is less than int4 in groups of {q.group_size} takes, {least:.3f}",
            fix=["quantizer.bits_per_weight=4.5"] * (least <= 4.5) + ["quantizer=gptq_int3"],
        )


def calibrates(cfg: QuantizeVerb) -> bool:
    return isinstance(cfg.quantizer, GptqQuantizer | MixedQuantizer | AwqQuantizer)


def in_words(q: AnyQuantizer) -> str:
    if isinstance(q, BnbQuantizer):
        return f"bitsandbytes' {'NF4' if q.bits == 4 else 'int8'}"
    if isinstance(q, MixedQuantizer):
        return f"GPTQ int4 and int8, {q.bits_per_weight:g} bits a weight, group {q.group_size}"
    return f"{q.kind.upper()} int{q.widths[0]}, group {q.group_size}"


@dataclass(frozen=True)
class Made:
    """A folder that has been written. figures: of its making. rows, before: what the weights it was made from say at them. held_out: whether they are
    held-out conversations. ids: of its source's tokenizer, see complete. bits: of each matrix; None where all have one width."""

    start: Artifact
    figures: dict
    rows: list[encoding.Encoded]
    before: seen.Seen
    held_out: bool
    ids: list[list[int]]
    bits: dict[str, int] | None


def quantize(cfg: QuantizeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Each part in a process of its own, so that the second reads the result from disk alone, and neither holds what the other needs."""
    made = processes.fresh(make, cfg, inputs, out)
    figures = prove(cfg, made, inputs["model"].path.resolve(), out)
    shutil.rmtree(out / "scratch")
    return {**made.figures, **figures}


def make(cfg: QuantizeVerb, inputs: dict[str, Artifact], out: Path) -> Made:
    """Write the quantized folder, and ask what it was made from for held-out rows, or for the calibration's first where there are none."""
    from src.models import by_layer, quantizing

    source, data = inputs["model"].path.resolve(), inputs["dataset"].path
    tokenizer = load_tokenizer(source, trust_remote_code=trust_of(inputs["model"]))
    ids = complete.ids_of(tokenizer)  # before it is given a template that the folder lacks
    text = inputs["text"].path if "text" in inputs else None
    rows = calibration.read(cfg.calibration, data / "calib.jsonl", text, tokenizer) if calibrates(cfg) else calibration.Rows([], [])
    scratch = out / "scratch"
    scratch.mkdir(exist_ok=True)
    start = exact_sum.write(inputs, scratch / "exact")
    if not (found := by_layer.load(start, device=device())):
        raise WrongKind(
            f"a model is quantized layer by layer, and this {read_json(source / 'config.json').get('model_type')} model's layers hand more to each other than their hidden states, "
            "or are no one list",
            where=str(source),
        )
    bits = mixture(cfg, found[0], rows.chats, scratch)
    how = settings_of(cfg, bits)
    head = how(found[0].own_head) if bits and found[0].own_head in bits else None
    losses = quantizing.quantize(found[0], rows.ids, how, scratch / "layers", head)
    del found
    give_back_memory()  # of the Hessians, before the source is asked
    quantized_folder.write(source, scratch / "layers", out)
    complete.copy(source, out)
    quantized_folder.complete_config(cfg.quantizer, bits, source, out)
    held = fidelity.held_out(data, tokenizer, source)
    asked = (
        held
        or [encoding.Encoded(row[:256], row[:256]) for row in rows.ids[:8]]
        or fidelity.probes(read_json(out / "config.json")["vocab_size"])
    )
    before = seen.observe(fidelity.reader(start, "float32"), asked)
    figures = {"calibration_rows": len(rows.ids), "calibration_tokens": rows.tokens, "module_loss": sum(losses) / len(losses)}
    if bits:
        figures["matrices_in_8_bits"] = sum(width == 8 for width in bits.values())
    return Made(start, figures, asked, before, bool(held), ids, bits)


def mixture(cfg: QuantizeVerb, model, chats: list[encoding.Encoded], scratch: Path) -> dict[str, int] | None:
    """{matrix: bits} by what each part alone would lose; None where all have one width. A killed run finds what was measured in `scratch`."""
    from src.models import sensitivity

    q = cfg.quantizer
    if not isinstance(q, MixedQuantizer):
        return None
    if not (file := scratch / "bits.json").is_file():
        shutil.rmtree(hidden := scratch / "hidden", ignore_errors=True)
        hidden.mkdir()
        tokens, rows = SENSITIVE
        some = fidelity.within(chats[:: max(1, len(chats) // rows)][:rows], cfg.calibration.max_length, tokens)
        parts = sensitivity.measure(model, some, q.widths, q.group_size, hidden, head=with_head(q, model))
        write_json(file, sensitivity.bits_of(parts, q.bits_per_weight, q.group_size))
        told = sorted(parts, key=lambda part: -part.kl[4])
        say(
            "quantize: parts that lose most in 4 bits: "
            + ", ".join(f"{part.names[0]}{' and others' * (len(part.names) > 1)} (KL {part.kl[4]:.1e})" for part in told[:3])
        )
    bits = read_json(file)
    say(f"quantize: {sum(width == 8 for width in bits.values())} of {len(bits)} matrices are int8")
    return bits


def with_head(q: MixedQuantizer, model) -> bool:
    """Whether the output layer is quantized too."""
    if not q.output_layer:
        return False
    rows, pack = model.model.get_output_embeddings().weight.shape[0], budget.filling(min(q.widths))
    why = "it is the embedding too" if model.own_head is None else f"int4 packs by {pack}, and it has {rows:,} rows" if rows % pack else ""
    if why:
        say(f"quantize: the output layer stays as it is stored: {why}")
    return not why


def settings_of(cfg: QuantizeVerb, bits: dict[str, int] | None):
    """{matrix: how it is quantized}, as a function; or how a layer is."""
    from src.models import awq, bnb, gptq

    q = cfg.quantizer
    if isinstance(q, AwqQuantizer):
        return awq.Settings(q.group_size)
    if isinstance(q, BnbQuantizer):
        return lambda name: bnb.Nf4(q.double_quant) if q.bits == 4 else bnb.Int8()
    if isinstance(q, RtnQuantizer):
        return lambda name: gptq.Nearest(q.bits, q.group_size)
    return lambda name: gptq.Settings(bits[name] if bits else q.widths[0], q.group_size, q.damp, q.act_order)


def read_back(*given) -> tuple:
    from src.models import quantizing

    return quantizing.read_back(*given)


def check_first_layer(*given) -> None:
    from src.models import quantizing

    quantizing.check_first_layer(*given)


def prove(cfg: QuantizeVerb, made: Made, source: Path, out: Path) -> dict:
    """The proof's figures: loss, KL and likeliest tokens against the weights that were quantized, by the folder alone, read in a fresh process, and each
    of its tensors held to the source's; its tokenizer is compared too. Raises ProofFailed where it is further from the source than its bits explain."""
    shutil.rmtree(first := out / "scratch" / "first", ignore_errors=True)
    first.mkdir(parents=True)
    processes.fresh(check_first_layer, made.start, out, first)
    ids, after = processes.fresh(read_back, made.start, source, out / "scratch" / "layers", out, made.rows, made.before.top_k_ids)
    complete.compare(ids, made.ids, out)
    error = fidelity.distance(made.before, after)
    if not error < 1:
        raise ProofFailed(
            f"the quantized model's log-probabilities are {error:.2f} of their own size away from the source's", where=str(out)
        )
    by = "gptqmodel" if made.bits else "transformers"
    say(f"quantize: {by} reads the folder alone; log-probabilities within {error:.1%} of the source's")
    if not made.held_out:
        return {"logit_error": error}
    change, better = fidelity.compare(made.before, after, len(made.rows)), better_than(cfg.quantizer)
    figures = fidelity.report("quantize", change, "quantized", " ".join(f"{way} loses less" for way in better))
    hold(cfg, change, out)
    return {"logit_error": error, **figures}


def hold(cfg: QuantizeVerb, change: fidelity.Change, where: Path) -> None:
    """Raises ProofFailed where more was lost than the limits allow."""
    kl, agreement = LIMITS[min(cfg.quantizer.widths)]
    kl, agreement = kl if cfg.max_kl == "auto" else cfg.max_kl, agreement if cfg.min_agreement == "auto" else cfg.min_agreement
    fidelity.hold(change, kl, agreement, where, [f"{way} force=true" for way in better_than(cfg.quantizer)])


def judge(cfg: QuantizeVerb, made: Artifact) -> None:
    """A finished model held to limits that were set since."""
    if "kl" in made.metrics:
        hold(cfg, fidelity.Change.of(made.metrics), made.path)


def better_than(q: AnyQuantizer) -> list[str]:
    """The quantizer that loses less; none where it is the best."""
    return [] if isinstance(q, GptqQuantizer) and q.bits == 8 else ["quantizer=gptq_int8"]


def needs(cfg: QuantizeVerb, inputs: dict[str, Artifact]) -> Needs:
    split = host.conversations(inputs["dataset"].path / "calib.jsonl")
    return host.quantize(
        read_shape(inputs["model"].path), cfg.quantizer, cfg.calibration, split, exact=exact_sum.ROLES["adapter"] in inputs
    )


STAGE = stage.Stage(
    verb="quantize",
    version=5,
    schema=QuantizeVerb,
    kind="quantized",
    find=find,
    check=check,
    needs=needs,
    run=quantize,
    judge=judge,
    doc=__doc__,
    resumes=lambda partial: any(partial.glob("scratch/layers/layer-*.safetensors")) or (partial / "scratch" / "bits.json").is_file(),
)

if __name__ == "__main__":
    stage.main(STAGE)
