"""DeepSpeed's configuration from ours, without importing it."""

import json
import sys
from pathlib import Path

from src.core.errors import BadData, ConfigError
from src.core.files import read_json
from src.settings.verbs import TrainingVerb

GPU_BUCKET, CPU_BUCKET = 200_000_000, 5_000_000
"""elements that are sent at a time: on a GPU while it computes; on a CPU nothing runs beside the sending, and a bucket is only memory"""

AUTO = "auto"
"""what a DeepSpeed file says for a number that the trainer gives"""
WIDE = {"reduce_bucket_size": AUTO, "stage3_prefetch_bucket_size": AUTO, "stage3_param_persistence_threshold": AUTO}
ONE_LAYER = {"stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}


def deepspeed_json(cfg: TrainingVerb, *, gpu: bool) -> dict:
    """DeepSpeed's configuration. Optimizer and scheduler stay out of it: a block for either silently replaces the one asked for.

    On a GPU what ZeRO-3 gathers ahead, sends together and leaves whole is for transformers to say by the model's width, as DeepSpeed's authors advise:
    0.9 h^2, h^2 and 10 h elements (transformers/integrations/deepspeed.py, `trainer_config_finalize`; snowflakedb/ArcticTraining#270). How much
    may be gathered at once keeps DeepSpeed's default, for which transformers has no such rule.
    """
    settings = cfg.deepspeed
    bucket = (GPU_BUCKET if gpu else CPU_BUCKET) if settings.bucket_size == "auto" else settings.bucket_size
    zero: dict[str, object] = {
        "stage": settings.stage,
        "overlap_comm": gpu,
        "contiguous_gradients": True,
        "reduce_bucket_size": bucket,
    }
    if settings.stage == 2:
        zero |= {"allgather_bucket_size": bucket, "allgather_partitions": True, "reduce_scatter": True}
    if settings.stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        # A CPU gathers and computes in turn, so whole weights that wait or are kept for a second use save no time: a layer's are let go after it. Its
        # optimizer's step copies the gradients of a group of weights, which by default is all there are.
        zero |= WIDE if gpu else {**ONE_LAYER, "sub_group_size": bucket}
        if gpu and settings.bucket_size != "auto":
            zero |= {"reduce_bucket_size": bucket, "stage3_prefetch_bucket_size": bucket}
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
        config |= user_deepspeed_json(Path(settings.config), cfg)
    return config


NO_FILE = "deepspeed=zero2 or deepspeed=zero3 needs no file"


def user_deepspeed_json(path: Path, cfg: TrainingVerb) -> dict:
    """A user's DeepSpeed file, refused where it contradicts our settings; a number that is theirs and ours alike becomes `auto`."""
    theirs, stage = read_json(path), cfg.deepspeed.stage
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
        raise BadData("zero_optimization must be a JSON object", where=str(path), fix=NO_FILE)
    if (found := zero.get("stage", stage)) != stage:
        faults.append(f"its ZeRO stage is {found}, the settings say {stage}")
    faults += numbers_against(theirs, cfg)
    if faults:
        raise ConfigError(
            "deepspeed.config: " + "; ".join(faults),
            where=str(path),
            fix=["remove what is named from the file", NO_FILE],
        )
    return theirs | {key: AUTO for key in OURS if key in theirs}


OURS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "gradient_clipping": "train.max_grad_norm",
}
"""keys of a DeepSpeed file -> the setting that says the same here; accumulation follows from it and train.global_batch_size"""


def numbers_against(theirs: dict, cfg: TrainingVerb) -> list[str]:
    """What of a DeepSpeed file's own numbers is not what the settings say, each with what would make it so."""
    train, faults = cfg.train, []
    says = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": train.max_grad_norm,
    }
    for key, setting in OURS.items():
        if (value := theirs.get(key, AUTO)) not in (AUTO, says[key]):
            typed = f"{setting}={json.dumps(value)}" if key != "gradient_accumulation_steps" else setting
            faults.append(f'{key}={json.dumps(value)} is for {typed} to say; write "auto" in the file')
    for kind in ("bf16", "fp16"):
        block = theirs.get(kind, {})
        if not isinstance(block, dict):
            faults.append(f"{kind} is {json.dumps(block)}, not a block")
        elif (on := block.get("enabled", AUTO)) != AUTO and train.precision != AUTO and bool(on) != (train.precision == kind):
            faults.append(f"{kind}.enabled={json.dumps(on)} beside train.precision={train.precision}")
        elif on is True and train.precision == AUTO:
            faults.append(f'{kind}.enabled=true is for train.precision={kind} to say; write "auto" in the file')
    return faults
