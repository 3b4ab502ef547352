"""What is saved of a training: an adapter's folder written and tidied, and every saved tensor looked at."""

import json
import math
import re
from pathlib import Path

from src.core import descent
from src.core.errors import ProofFailed
from src.models import safetensors_io


def save(attached, folder: Path, *, state_dict: dict | None, writes: bool, finished: bool) -> None:
    """Write the adapter without the embedding (what is trained in it is kept as rows or as a layer of its own).

    writes: whether this process does. finished: the result is for the untouched base, which whoever loads it has; a checkpoint keeps the matrices
    as they are trained, since a resumed run takes the same part out of its base again.
    """
    attached.save_pretrained(str(folder), state_dict=state_dict, save_embedding_layers=False, is_main_process=writes)
    if finished and writes and hasattr(attached, "initial"):
        as_plain_lora(Path(folder), attached.initial)


def as_plain_lora(folder: Path, initial: dict) -> None:
    """Rewrite a saved adapter for the base as it was: W - s B0 A0 + s B A = W + s [B, -B0] [A; A0], of twice the rank and the same scale.

    initial: the saved tensors' values before training. What else is saved (rows, whole layers) stays as it is.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = load_file(file)
    for name, start in initial.items():
        trained = tensors[name]
        start = start.to(trained.dtype)
        first = name.removesuffix(".weight").endswith("_A")
        tensors[name] = torch.cat([trained, start], 0) if first else torch.cat([trained, -start], 1)
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads(settings.read_text())
    config["r"] *= 2
    config["lora_alpha"] *= math.sqrt(2) if config["use_rslora"] else 2
    settings.write_text(json.dumps(config, indent=2) + "\n")


def tidy(folder: Path) -> None:
    """peft writes names of layers in the order of a set, which differs between runs, the weights for the owner's eyes only, and a base of the hub by where
    it lies in the cache of this machine."""
    config = folder / "adapter_config.json"
    content = json.loads(config.read_text())
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        content[key] = content.get(key) and sorted(content[key])
    base = content.get("base_model_name_or_path")
    content["base_model_name_or_path"] = (base and descent.hub_id(Path(base))) or base
    config.write_text(json.dumps(content, indent=2) + "\n")
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)


def saved_names(model) -> set[str]:
    """Names that a save of what is trained must hold: an adapter's matrices, rows and whole layers, or every weight of a model."""
    if hasattr(model, "peft_config"):
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        names = {name.replace(".modules_to_save.default", "").replace(".default", "") for name in trained}
        # peft saves DoRA's lengths under the name they had before they were a layer of their own.
        return {name.replace(".lora_magnitude_vector.weight", ".lora_magnitude_vector") for name in names}
    return {folded_name(name) for name, _ in model.named_parameters() if not name.endswith(".rows")}


def folded_name(name: str) -> str:
    """The name that a parameter of a model trained whole is saved under; rows.py keeps a matrix whose rows are split off as `base`."""
    return name.replace(".base.weight", ".weight")


def check_saved(folder: Path, *, moved: bool, expected: set[str]) -> int:
    """Open what was saved: every expected name there, no tensor empty or not finite and, with `moved`, every adapter's update not zero.

    Returns the tensors seen.
    """
    from safetensors import safe_open

    seen, missing = 0, set(expected)
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():
                tensor = weights.get_tensor(name)
                missing.discard(name)
                seen += 1
                if tensor.numel() == 0 or not tensor.isfinite().all():
                    raise ProofFailed(
                        f"'{name}' was saved {'empty' if tensor.numel() == 0 else 'with values that are not finite'}", where=str(file)
                    )
                first = name.replace("lora_B", "lora_A").replace("lora_embedding_B", "lora_embedding_A")
                if moved and first != name and is_no_update(weights.get_tensor(first), tensor):
                    raise ProofFailed(
                        f"'{name}' changes nothing: this adapter learnt nothing",
                        where=str(file),
                        fix="a higher tuner.learning_rate, with force=true",
                    )
    if not seen:
        raise ProofFailed("no weights were saved", where=str(folder))
    if missing:
        raise ProofFailed(f"{len(missing)} tensors were not saved, such as '{min(missing)}'", where=str(folder))
    return seen


TABLE = re.compile(r"\b(embed_tokens|wte|lm_head)(\.(modules_to_save|original_module))?\.weight$")
"""names of an embedding or output layer that is held whole, as peft saves them for a resized vocabulary, twice and with the base's own beside it"""


def streams(folder: Path) -> bool:
    """Whether an adapter can be computed on a base whose layers stay on disk: inside them it has plain A and B alone, no lengths, rows or whole layers."""
    names = safetensors_io.entries(folder, "adapter_model*.safetensors")
    return all(name.endswith((".lora_A.weight", ".lora_B.weight", ".trainable_tokens_delta")) or TABLE.search(name) for name in names)


def table_rows(folder: Path) -> int | None:
    """Rows of the embedding or output layer that an adapter's file holds whole; None without any."""
    found = safetensors_io.entries(folder, "adapter_model*.safetensors").items()
    return max((entry.shape[0] for name, entry in found if TABLE.search(name)), default=None)


def is_no_update(a, b) -> bool:
    """Whether B A is zero, or what rounding leaves of it: |B A|^2 = sum of (A A^T) x (B^T B), of shape (rank, rank) in fp64.

    It counts as zero below 1e-10, too: added to fp32 weights above 0.004, whose half steps are larger, it would leave each as it is.
    """
    a, b = a.double(), b.double()
    inside, outside = a @ a.T, b.T @ b
    return bool((inside * outside).sum() <= max(1e-20, 1e-12 * inside.trace() * outside.trace()))
