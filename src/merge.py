"""Merge a LoRA adapter into its base, tensor by tensor, and prove the result: reloaded alone, it says on held-out conversations what the adapter on its
base says.

The sum is exact in fp32. Where the base stores 16 bits it is rounded stochastically, which keeps what was learnt; rounding=nearest gives peft's bytes,
and loses most of a small update (docs/fidelity.md).
"""

import math
from functools import partial
from pathlib import Path

from src.core import processes, stage
from src.core.artifact import Artifact
from src.core.errors import ProofFailed, WrongKind
from src.core.files import read_json
from src.core.log import say, size
from src.core.room import Needs
from src.models import adapter_files, complete, fidelity, merging, safetensors_io
from src.models.devices import device_that_fits, fits_whole, give_back_memory
from src.models.folder import base_of, check_folder, trust_of
from src.models.generation import logits
from src.models.loading import load_any
from src.settings.verbs import MergeVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

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
            fix=["base=FOLDER names the one it was trained on", "fine-tune again on this base"],
        )
    return {"adapter": adapter, "model": base}


def check(cfg: MergeVerb, inputs: dict[str, Artifact]) -> list[str]:
    base, adapter = inputs["model"], inputs["adapter"]
    if base.kind == "quantized":
        raise WrongKind(
            "an adapter trained on a GPTQ base has no whole weights to merge into",
            where=str(base.path),
            fix=[
                f"python -m src.evaluate source={adapter.path} measures it as it is",
                "tuner=qlora on the unquantized base trains one on NF4, which merges",
            ],
        )
    check_folder(base.path, allow_pickle=False, trust_remote_code=trust_of(adapter))
    merging.plan(adapter, base.path, cfg.dtype)
    return [f"{adapter.path} into {base.path}, written as {cfg.dtype}, rounding {cfg.rounding}"]


def merge(cfg: MergeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    adapter, base = inputs["adapter"], inputs["model"].path
    written, changes = merging.plan(adapter, base, cfg.dtype)
    tensor = merging.merged_tensors(adapter, base, written, changes, cfg.rounding)
    safetensors_io.write(out, written, tensor, safetensors_io.parse_size(cfg.shard_size))
    merging.add_files(adapter, base, out, written)
    adapted = sum(bool(merging.LORA & change.keys()) for change in changes.values())
    return {"tensors": len(written), "adapted": adapted, **prove(cfg, adapter, base, out, written)}


def prove(cfg: MergeVerb, adapter: Artifact, base: Path, out: Path, written: list[safetensors_io.Entry]) -> dict:
    """The proof's figures: the adapter on its base against the merged folder, loaded alone, in a fresh process, offline; tokenizers are compared too.

    Raises ProofFailed where logits of random tokens, or the loss on held-out conversations, differ by more than their limits.
    """
    import torch

    parameters = sum(math.prod(entry.shape) for entry in written)
    device = device_that_fits(parameters)
    whole = fits_whole(parameters, device)
    streamed = not whole and adapter_files.streams(adapter.path) and not adapter.metrics.get("nf4")
    device, compute = "cpu" if streamed else device, "float32" if whole or streamed else "auto"
    if not whole:
        how = "goes layer by layer, each read when its turn comes" if streamed else "computes in the dtype that is stored"
        say(f"merge: twice the model in fp32, {size(8 * parameters)}, does not fit in memory, so the proof {how}")
    model, tokenizer = load_any(adapter, dtype=compute, device=device, base=base, streamed=streamed)
    rows = fidelity.held_out(fidelity.dataset_of(adapter), tokenizer, read_json(out / "config.json"))
    trained = fidelity.observe(partial(fidelity.trained_logits, model), rows, "proof") if rows else None
    before = torch.from_numpy(logits(model))
    del model
    give_back_memory()
    merged = Artifact(out, "model", "", adapter.manifest, {})
    at = trained and trained.top_k_ids
    ids, after, saved = processes.fresh(fidelity.reload, merged, compute, device, rows, at, None, None, streamed)
    complete.compare(ids, tokenizer, out)
    after = torch.from_numpy(after)
    error = ((before - after).norm() / before.norm()).item()
    tolerance = TOLERANCE[read_json(out / "config.json")["dtype"]] if cfg.tolerance == "auto" else cfg.tolerance
    if not error <= tolerance:
        raise ProofFailed(
            f"the merged model's logits differ from the adapter's on its base by {error:.2e}, above the tolerance {tolerance:.0e}",
            where=str(out),
            fix=["dtype=float32 rounds less", *([f"tolerance={error * 1.5:.1e} if you accept it"] if math.isfinite(error) else [])],
        )
    say(f"merge: logits of random tokens equal those of the adapter on its base within {error:.1e} (tolerance {tolerance:.0e})")
    figures = {"logit_error": error, "tolerance": tolerance}
    if trained is None:
        return figures
    change = fidelity.compare(trained, saved, len(rows))
    ways = ["rounding=stochastic keeps what was learnt"] * (cfg.rounding == "nearest") + ["dtype=float32 keeps every bit"]
    fidelity.judge("merge", change, cfg.max_loss_change, out, ways)
    return figures | change.metrics()


def needs(cfg: MergeVerb, inputs: dict[str, Artifact]) -> Needs:
    return host.merge(read_shape(inputs["model"].path), cfg.dtype)


STAGE = stage.Stage(verb="merge", version=2, schema=MergeVerb, kind="model", find=find, check=check, needs=needs, run=merge, doc=__doc__)

if __name__ == "__main__":
    stage.main(STAGE)
