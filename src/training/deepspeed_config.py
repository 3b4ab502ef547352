"""DeepSpeed's configuration from ours, without importing it."""

import sys
from pathlib import Path

from src.core.errors import BadData, ConfigError
from src.core.files import read_json
from src.settings.verbs import Deepspeed


def deepspeed_json(settings: Deepspeed, *, gpu: bool) -> dict:
    """DeepSpeed's configuration. Optimizer and scheduler stay out of it: a block for either silently replaces the one asked for."""
    zero: dict[str, object] = {
        "stage": settings.stage,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": settings.bucket_size,
    }
    if settings.stage == 2:
        zero |= {"allgather_bucket_size": settings.bucket_size, "allgather_partitions": True, "reduce_scatter": True}
    if settings.stage == 3:
        zero |= {"stage3_prefetch_bucket_size": settings.bucket_size, "stage3_gather_16bit_weights_on_model_save": True}
    if settings.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": gpu}
        if settings.stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": gpu}
    config = {
        "zero_optimization": zero,
        # With offload DeepSpeed would insist on its own compiled Adam; torch's is as right and needs no compiler.
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "gradient_clipping": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "steps_per_print": sys.maxsize,
    }
    if settings.config:
        config |= user_deepspeed_json(Path(settings.config), settings.stage)
    return config


def user_deepspeed_json(path: Path, stage: int) -> dict:
    """A user's DeepSpeed file, refused where it contradicts our settings."""
    theirs = read_json(path)
    faults = [
        f"block '{key}' would replace the one from tuner and train settings without a word"
        for key in ("optimizer", "scheduler")
        if key in theirs
    ]
    faults += [
        f"{kind}.{kind}_master_weights_and_grads leaves no fp32 weights, so updates below a step of {kind} would be lost while training"
        for kind in ("bf16", "fp16")
        if isinstance(theirs.get(kind), dict) and theirs[kind].get(f"{kind}_master_weights_and_grads")
    ]
    zero = theirs.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise BadData("zero_optimization must be a JSON object", where=str(path), fix="deepspeed=zero2 or zero3 needs no file")
    if (found := zero.get("stage", stage)) != stage:
        faults.append(f"its ZeRO stage is {found}, the settings say {stage}")
    if faults:
        raise ConfigError(
            "deepspeed.config: " + "; ".join(faults),
            where=str(path),
            fix=["remove them from the file", "drop deepspeed.config; deepspeed=zero2 or zero3 is enough"],
        )
    return theirs
