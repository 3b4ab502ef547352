"""Merge a LoRA adapter into its base, tensor by tensor, and prove the result: reloaded alone, it says on held-out conversations what the adapter on its
base says.

The sum is exact in fp32. Where the base stores 16 bits it is rounded stochastically, which keeps what was learnt; rounding=nearest gives peft's bytes,
and loses most of a small update (docs/fidelity.md).
"""

import math
from dataclasses import dataclass
from pathlib import Path

from src.chat import encoding
from src.core import processes, stage
from src.core.artifact import Artifact
from src.core.errors import ProofFailed, WrongKind
from src.core.files import read_json
from src.core.log import say, ticks
from src.core.room import Needs
from src.models import adapter_files, complete, fidelity, merging, safetensors_io, seen
from src.models.folder import base_of, check_folder, trust_of
from src.models.loading import tokenizer_of
from src.settings.verbs import MergeVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

# Relative L2 distance of log-probabilities that rounding to the stored dtype alone explains, with room to spare (8, 11 and 24 bits of mantissa).
TOLERANCE = {"bfloat16": 5e-2, "float16": 5e-3, "float32": 1e-4}


def find(cfg: MergeVerb, run: stage.Run) -> dict[str, Artifact]:
    adapter = run.source(cfg.source, "finetune", "cpt", kinds={"adapter"})
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


@dataclass(frozen=True)
class Trained:
    """What the adapter on its base is. rows, seen: what it says at them. held_out: whether they are conversations. ids: of its tokenizer, see complete."""

    rows: list[encoding.Encoded]
    seen: seen.Seen
    held_out: bool
    ids: list[list[int]]


def merge(cfg: MergeVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Each part in a process of its own, so that the second reads the result from disk alone, and neither holds what the other needs."""
    adapter, base = inputs["adapter"], inputs["model"].path
    figures = processes.fresh(write, cfg, adapter, base, out, waits=False)
    trained = processes.fresh(observe, adapter, base, out)
    return {**figures, **prove(cfg, adapter, out, trained)}


def write(cfg: MergeVerb, adapter: Artifact, base: Path, out: Path) -> dict:
    """Make the merged folder."""
    written, changes = merging.plan(adapter, base, cfg.dtype)
    tensor = merging.merged_tensors(adapter, base, written, changes, cfg.rounding)
    with ticks(len(written), "merging tensors") as tick:
        safetensors_io.write(out, written, tensor, safetensors_io.parse_size(cfg.shard_size), tick)
    merging.add_files(adapter, base, out, written)
    return {"tensors": len(written), "adapted": sum(bool(merging.LORA & change.keys()) for change in changes.values())}


def observe(adapter: Artifact, base: Path, out: Path) -> Trained:
    """What training's last pass said, where it is on record; else the adapter on its base is asked for held-out rows, or for random tokens."""
    tokenizer = tokenizer_of(adapter, base)
    ids = complete.ids_of(tokenizer)
    if known := fidelity.Record.load(adapter.path):
        return Trained(known.rows, known.seen, True, ids)
    held = fidelity.held_out(fidelity.dataset_of(adapter), tokenizer, out, fidelity.FEWEST_EXACT)
    rows = held or fidelity.probes(read_json(out / "config.json")["vocab_size"])
    return Trained(rows, seen.observe(fidelity.reader(adapter, "float32", None, base), rows), bool(held), ids)


def prove(cfg: MergeVerb, adapter: Artifact, out: Path, trained: Trained) -> dict:
    """The proof's figures: the adapter on its base against the merged folder, loaded alone, in a fresh process, offline; tokenizers are compared too.

    Raises ProofFailed where log-probabilities, or the loss on held-out conversations, differ by more than their limits.
    """
    merged = Artifact(out, "model", "", adapter.manifest, {})
    ids, saved = processes.fresh(fidelity.reload, merged, "float32", None, trained.rows, trained.seen.top_k_ids, None)
    complete.compare(ids, trained.ids, out)
    error = fidelity.distance(trained.seen, saved)
    tolerance = TOLERANCE[read_json(out / "config.json")["dtype"]] if cfg.tolerance == "auto" else cfg.tolerance
    if not error <= tolerance:
        raise ProofFailed(
            f"the merged model's log-probabilities differ from the adapter's on its base by {error:.2e}, above the tolerance {tolerance:.0e}",
            where=str(out),
            fix=["dtype=float32 rounds less", *([f"tolerance={error * 1.5:.1e} if you accept it"] if math.isfinite(error) else [])],
        )
    say(f"merge: log-probabilities equal those of the adapter on its base within {error:.1e} (tolerance {tolerance:.0e})")
    figures = {"logit_error": error, "tolerance": tolerance}
    if not trained.held_out:
        return figures
    change = fidelity.compare(trained.seen, saved, len(trained.rows))
    fidelity.judge("merge", change, cfg.max_loss_change, out, keeps_more(cfg))
    return figures | change.metrics()


def keeps_more(cfg: MergeVerb) -> list[str]:
    return ["rounding=stochastic force=true keeps what was learnt"] * (cfg.rounding == "nearest") + [
        "dtype=float32 force=true keeps every bit"
    ]


def judge(cfg: MergeVerb, made: Artifact) -> None:
    """A finished model held to a limit that was set since."""
    if "kl" in made.metrics:
        fidelity.hold_loss(fidelity.Change.of(made.metrics), cfg.max_loss_change, made.path, keeps_more(cfg))


def needs(cfg: MergeVerb, inputs: dict[str, Artifact]) -> Needs:
    adapter = inputs["adapter"]
    asked = None if (adapter.path / fidelity.RECORD).is_file() else sum(file["size"] for file in adapter.files.values())
    return host.merge(read_shape(inputs["model"].path), asked, cfg.dtype, ends=bool(adapter_files.table_rows(adapter.path)))


STAGE = stage.Stage(
    verb="merge", version=2, schema=MergeVerb, kind="model", find=find, check=check, needs=needs, run=merge, judge=judge, doc=__doc__
)

if __name__ == "__main__":
    stage.main(STAGE)
