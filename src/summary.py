"""One table of a run: each finished artifact with its seconds, its size on disk and the figure that matters."""

from pathlib import Path

from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import MissingInput
from src.core.log import duration, out, size, table
from src.settings.verbs import Verb

ORDER = ("pretrain", "cpt", "data", "finetune", "evaluate-finetune", "merge", "evaluate-merge", "quantize", "evaluate-quantize")


def headline(a: Artifact) -> str:
    """The one figure a person asks of this stage."""
    m = a.metrics
    if a.stage == "data":
        return f"{m['train_rows']} train, {m['val_rows']} val, {m['calib_rows']} calib of {m['rows_in']} rows"
    if a.stage in ("finetune", "pretrain", "cpt"):
        if "val_loss" in m:
            return f"validation loss {m['val_loss_first']:.3f} -> {m['val_loss']:.3f} in {m['steps']} steps"
        return f"training loss {m['train_loss_first']:.3f} -> {m['train_loss_last']:.3f} in {m['steps']} steps"
    if a.stage == "merge":
        return lost(m) or f"logits within {m['logit_error']:.0e} of adapter on base"
    if a.stage == "quantize":
        return lost(m) or f"logits within {m['logit_error']:.1%} of the unquantized"
    if a.stage == "evaluate":
        parts = [f"perplexity {m['perplexity']:.3f}"] if "perplexity" in m else []
        if "parent_perplexity" in m:
            parts.append(f"parent {m['parent_perplexity']:.3f}")
        if "kl" in m:
            parts.append(f"KL {m['kl']:.4f}")
        if "expected" in m:
            parts.append(f"{m['expected']}/{m['prompts']} as expected")
        if "same_answers" in m:
            parts.append(f"{m['same_answers']:.0%} of answers as the parent's")
        if "first_token_seconds" in m:
            parts.append(f"first token {m['first_token_seconds']:.2f} s")
        if "tokens_per_second" in m:
            parts.append(f"{m['tokens_per_second']:.1f} tokens/s")
        return ", ".join(parts)
    if a.stage == "deploy":
        return ", ".join(filter(None, (lost(m), m["summary"])))
    return ""


def lost(m: dict) -> str:
    """From what was trained to what this holds, on held-out conversations; empty where that was not measured."""
    return f"held-out loss {m['loss_before']:.4f} -> {m['loss_after']:.4f}, KL {m['kl']:.4f}" if "kl" in m else ""


def artifacts(folder: Path) -> list[tuple[Artifact, str]]:
    names = sorted(
        (p.name for p in folder.iterdir() if artifact.is_finished(p)), key=lambda n: (ORDER.index(n) if n in ORDER else len(ORDER), n)
    )
    return [(artifact.open_artifact(folder / name), name) for name in names]


def prepared(folder: Path) -> list[Path]:
    """Bundles that wait for something: their vendor's compiler, or the same command again."""
    begun = (artifact.unfinished(path.with_suffix("")) for path in sorted(folder.glob("deploy-*.partial")))
    return [found.path for found in begun if found]


def summary(cfg: Verb) -> int:
    folder = Path(cfg.outputs) / cfg.run
    if not folder.is_dir():
        raise MissingInput(
            f"there is no run '{cfg.run}'", where=str(folder), fix=f"python -m src.data {stage.Run(folder).overrides} starts one"
        )
    lines, bundles, total = [], [], 0.0
    for a, name in artifacts(folder):
        old = "  (its source was made anew since)" if artifact.replaced_since(a) else ""
        seconds = a.manifest["seconds"] if a.manifest else 0.0
        lines.append((name, f"{seconds:.1f}", size(sum(f["size"] for f in a.files.values())), headline(a) + old))
        total += seconds
        bundles += [a.path] if a.kind == "bundle" else []
    print(table(("stage", "seconds", "on disk", "result"), lines, right=(1, 2)))
    out(f"{len(lines)} artifact{'s' * (len(lines) != 1)}, {duration(total)}")
    for bundle in bundles:
        out(f"bundle: {bundle}")
    for partial in prepared(folder):
        out(f"prepared: {partial}, not finished; the same deploy goes on from there")
    return 0


if __name__ == "__main__":
    stage.main_plain("summary", __doc__, Verb, summary)
