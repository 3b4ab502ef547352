"""The folder of what was trained: made complete, looked at, and proven to say what was trained."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from src.chat import encoding
from src.core import processes
from src.core.artifact import Artifact
from src.core.errors import BadData, ProofFailed
from src.core.files import read_json, write_json
from src.models import adapter_files, complete, fidelity, generation, rounding, safetensors_io
from src.models.devices import device_that_fits, give_back_memory
from src.models.folder import stored_dtype
from src.models.seen import Seen
from src.settings.training import FullTuner
from src.settings.verbs import TrainingVerb, Trains


@dataclass(frozen=True)
class Trained:
    """What is left of a training when its model has been saved and let go.

    metrics: for the manifest. names: of the tensors that were saved. parameters: of the whole model. rows, seen: held-out rows, and what the exact
    weights say at them.
    """

    metrics: dict
    names: set[str]
    parameters: int
    rows: list[encoding.Encoded]
    seen: Seen | None


def begun(partial: Path) -> bool:
    """Whether an unfinished run has a checkpoint to go on from."""
    return any(partial.glob("checkpoints/checkpoint-*/whole"))


def saved_dtype(cfg: Trains, base: Path) -> str:
    """Adapters are saved in fp32, whole models in the dtype asked for, or the base's."""
    if not isinstance(cfg.tuner, FullTuner):
        return "float32"
    return stored_dtype(base) if cfg.tuner.dtype == "auto" else cfg.tuner.dtype


def finish(cfg: Trains, base: Path, tokenizer, eos_id: int, out: Path, *, keep_tokenizer: bool, saved: set[str]) -> None:
    """Make the saved folder complete and look at what was saved."""
    full = isinstance(cfg.tuner, FullTuner)
    (out / "training_args.bin").unlink(missing_ok=True)  # a pickle
    (out / "README.md").unlink(missing_ok=True)  # peft's blank model card
    if not full:
        adapter_files.tidy(out)
    generation.write_generation_config(out, base, tokenizer, eos_id)
    write_tokenizer(cfg, base, tokenizer, out, keep=keep_tokenizer)
    if isinstance(cfg.tuner, FullTuner):
        check_moved(out, base)
        rounding.cast_folder(out, saved_dtype(cfg, base), cfg.tuner.rounding)
        generation.write_stop_token(out / "config.json", eos_id)
    adapter_files.check_saved(out, moved=not full, expected=saved)


def write_tokenizer(cfg: Trains, base: Path, tokenizer, out: Path, *, keep: bool) -> None:
    """Write a result's tokenizer, with the base's other files that `out` lacks. keep: as the base's own files with the run's template, no token being new."""
    if not keep:
        tokenizer.save_pretrained(out)
        complete.copy(base, out, tokenizer=False)
        return
    complete.copy(base, out)
    complete.set_chat(out, tokenizer)
    config = read_json(file) if (file := out / "tokenizer_config.json").is_file() else {}
    as_it_is = "PreTrainedTokenizerFast"
    if (
        not isinstance(cfg.tuner, FullTuner)
        and type(tokenizer).__name__ == "TokenizersBackend"
        and config.get("tokenizer_class", as_it_is) != as_it_is
    ):
        # What the base's config.json has transformers read as it is, another class may stand for here, where there is no config.json.
        write_json(file, config | {"tokenizer_class": as_it_is})


def check_tokenizer_kept(cfg: Trains, base: Path, tokenizer, out: Path, *, keep: bool) -> None:
    """Write the result's tokenizer to a folder in `out` and read it again. Raises BadData where transformers would read it otherwise than the base's: it
    chooses a class by config.json too, which an adapter's folder lacks, and may read its own files otherwise than it wrote them."""
    trial = out / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    trial.mkdir()
    if isinstance(cfg.tuner, FullTuner):
        shutil.copy(base / "config.json", trial)
    write_tokenizer(cfg, base, tokenizer, trial, keep=keep)
    kept = complete.token_ids(trial, cfg.model.trust_remote_code)
    shutil.rmtree(trial)
    for text, found, wanted in zip(complete.PROBES, kept, complete.ids_of(tokenizer)):
        if found != wanted:
            raise BadData(
                f"the result would not keep this tokenizer: transformers reads {text!r} there as {found}, here as {wanted}",
                where=f"model.path={cfg.model.path}",
                fix=f'"tokenizer_class": "PreTrainedTokenizerFast" in {base / "tokenizer_config.json"} has it read alike everywhere',
            )


def check_moved(out: Path, base: Path) -> None:
    """Look for a weight that training changed.

    Raises ProofFailed where every weight in `out`, not yet rounded, is the base's to the bit. A base that is no safetensors file is not compared.
    """
    import torch

    saved, stored = safetensors_io.entries(out), safetensors_io.entries(base) if any(base.glob("model*.safetensors")) else {}
    shared = saved.keys() & stored.keys()
    for name in sorted(shared):
        ours, theirs = safetensors_io.load(saved[name]), safetensors_io.load(stored[name])
        known = min(len(ours), len(theirs)) if ours.dim() else None  # a vocabulary may have grown
        if not torch.equal(ours[:known].float(), theirs[:known].float()):
            return
    if shared:
        raise ProofFailed(
            "every weight is what it was in the base: this run learnt nothing",
            where=str(out),
            fix="a higher tuner.learning_rate, with force=true",
        )


def prove(cfg: Trains, base: Path, tokenizer, out: Path, trained: Trained, metrics: dict) -> dict:
    """Load the saved folder in a fresh process: its token ids, and on held-out rows its loss and likeliest tokens, against what was trained.

    Returns the figures. Raises ProofFailed where they differ.
    """
    give_back_memory()
    device = device_that_fits(trained.parameters)
    full, compute = cfg.tuner if isinstance(cfg.tuner, FullTuner) else None, "float32" if metrics["precision"] == "fp32" else "auto"
    made = {"settings": cfg.model_dump(mode="json"), "metrics": metrics, "parents": []}
    saved = Artifact(out, "model" if full else "adapter", "", made, {})
    given = (trained.rows, trained.seen and trained.seen.top_k_ids, None if full else base)
    ids, seen = processes.fresh(fidelity.reload, saved, compute, device, *given)
    complete.compare(ids, complete.ids_of(tokenizer), out)
    if trained.seen is None:
        return {}
    if not full and compute == "float32":  # what a pass in 16 bits says is no measure for a merge
        fidelity.Record(trained.rows, trained.seen).save(out)
    change = fidelity.compare(trained.seen, seen, len(trained.rows))
    fidelity.judge(out.name.removesuffix(".partial"), change, cfg.max_loss_change, out, keeps_more(cfg))
    return change.metrics()


def keeps_more(cfg: TrainingVerb) -> list[str]:
    if not isinstance(cfg.tuner, FullTuner):
        return []
    ways = ["tuner.rounding=stochastic force=true keeps what was learnt"] * (cfg.tuner.rounding == "nearest")
    return [*ways, "tuner.dtype=float32 force=true keeps every bit"]


def judge(cfg: TrainingVerb, made: Artifact) -> None:
    """A finished fine-tune held to a limit that was set since."""
    if "kl" in made.metrics:
        fidelity.hold_loss(fidelity.Change.of(made.metrics), cfg.max_loss_change, made.path, keeps_more(cfg))
