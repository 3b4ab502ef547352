"""What follows from the device: precision, optimizer, kernels; each choice is said."""

import ctypes
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from transformers import TrainingArguments, set_seed

from src import ROOT
from src.core.errors import ConfigError, MissingTool, using
from src.core.files import read_json
from src.core.log import say
from src.models.devices import device, say_device, trim_sparingly
from src.settings.verbs import TrainingVerb
from src.training import kernels
from src.training.deepspeed_config import AUTO, NO_FILE, deepspeed_json

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""glibc's malloc.h"""
GPUS = ROOT / "configs" / "gpu"


def start(cfg: TrainingVerb) -> tuple[str, str]:
    """Join the other processes and seed; returns (device, precision)."""
    init_distributed(cfg.deepspeed.stage)
    if cfg.deepspeed.config:
        check_zero(Path(cfg.deepspeed.config))
    set_seed(cfg.train.seed)
    name = device()
    if name == "cpu":
        keep_freed_memory()
    say_device(name)
    precision = precision_of(cfg.train.precision)
    optimizer = optimizer_of(cfg.train.optimizer)
    say(f"precision {precision}, optimizer {optimizer}, {'compiled' if cfg.train.compile else 'not compiled'}")
    return name, precision


def keep_freed_memory() -> None:
    """Have glibc keep freed tensors of up to 4 MB, which a layer makes again at once, and return larger ones.

    A tensor in memory fresh from the system costs a page fault every 4 kB, a sixth of a step at 0.5B; larger ones would lie scattered where they are kept.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 4 << 20)
        mallopt(M_TRIM_THRESHOLD, 64 << 20)


def trim_on_the_way(model) -> None:
    """On a CPU, have glibc give back what layers have freed, on the way through a forward pass that keeps its activations.

    Small objects split the holes that freed tensors leave, so that the next tensor of that size takes fresh memory: a third more than a pass keeps
    (SmolLM2-135M: 554 MB for 344).
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
    stacks = (m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count)
    if torch.cuda.is_available() or not (stack := next(stacks, None)):
        return
    for layer in stack:
        layer.register_forward_pre_hook(lambda layer, given: trim_sparingly() if torch.is_grad_enabled() else None)


def init_distributed(deepspeed_stage: int) -> None:
    """Join the other processes. On a CPU the trainer would leave DeepSpeed's part out, which ZeRO-3 needs before the model is made."""
    if "WORLD_SIZE" not in os.environ:
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not deepspeed_stage:
        dist.init_process_group(backend)
        return
    import deepspeed
    import deepspeed.ops

    # DeepSpeed would compile a shared-memory all-reduce for CPUs (40 s), and a compile killed half-way hangs every later run.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def check_zero(path: Path) -> None:
    """Raises BadData where DeepSpeed does not take the zero_optimization block of a user's file."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    block = read_json(path).get("zero_optimization", {})
    with using("deepspeed.config", path, ["remove what is named from the file", NO_FILE]):
        DeepSpeedZeroConfig(**{key: value for key, value in block.items() if value != AUTO})


def precision_of(asked: str) -> str:
    """fp32, bf16 or fp16: what was asked for, or what the device has units for."""
    if asked == "fp16" and not torch.cuda.is_available():
        raise ConfigError("train.precision=fp16 needs a GPU", fix="train.precision=auto")
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    # Without AMX a CPU does bf16 products more slowly than fp32 ones.
    return "bf16" if torch.cpu._is_amx_tile_supported() else "fp32"


def optimizer_of(asked: str) -> str:
    """The name transformers gives the optimizer."""
    if asked == "adamw_8bit" and not torch.cuda.is_available():
        raise ConfigError("train.optimizer=adamw_8bit needs a GPU", fix="train.optimizer=auto")
    return {"auto": "adamw_torch_fused", "adamw": "adamw_torch", "adamw_8bit": "adamw_bnb_8bit"}[asked]


def apply_kernels(model, asked: str, *, partitioned: bool = False) -> None:
    """Put Liger's kernels into a model where they are wanted and a GPU is there; its loss is not used, see head.py. On a CPU ours.

    partitioned: ZeRO-3, which has to see every layer called.
    """
    import importlib.util

    there = importlib.util.find_spec("liger_kernel") is not None
    if asked == "liger" and not (there and torch.cuda.is_available()):
        raise MissingTool("train.kernels=liger needs a GPU and liger-kernel", fix="train.kernels=auto")
    if asked == "auto" and not torch.cuda.is_available() and not partitioned:
        kernels.replace(model)
    if asked == "torch" or not there or not torch.cuda.is_available():
        return
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)
    say("kernels: Liger's for norms, rotation and MLP")


def peak_operations(name: str) -> float | None:
    """FLOP/s in 16 bit of the GPU torch calls so, such as "NVIDIA H100 80GB HBM3", by its datasheet; None where configs/gpu does not know it."""
    plain = re.sub(r"\W", "", name.lower())
    for file in sorted(GPUS.glob("*.yaml"), key=lambda f: -len(f.stem)):
        if all(part in plain for part in file.stem.split("_")):
            return (yaml.safe_load(file.read_text()) or {}).get("tflops", 0) * 1e12 or None
    return None


def sgemm_operations(model) -> float:
    """FLOP/s of fp32 matrix products on this CPU, with the threads there are: 512 tokens from the model's width to four times it, for 0.2 s."""
    width = getattr(model.config.get_text_config(), "hidden_size", 1024)
    inner = 4 * width
    x, w, out = torch.ones(512, width), torch.ones(inner, width), torch.empty(512, inner)
    torch.mm(x, w.T, out=out)
    begun, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begun) < 0.2:
        torch.mm(x, w.T, out=out)
        count += 1
    return 2.0 * 512 * width * inner * count / passed


def arguments(cfg: TrainingVerb, out: Path, steps: int, precision: str, *, world: int, evaluates: bool) -> TrainingArguments:
    """transformers' TrainingArguments for our settings. What a step holds is the plan's affair, and trackers, saving of the result and reports are
    ours, so its own are off."""
    t, gpu = cfg.train, torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        per_device_train_batch_size=t.global_batch_size // world,
        gradient_accumulation_steps=1,
        max_steps=steps,
        learning_rate=cfg.tuner.learning_rate,
        lr_scheduler_type=t.lr_scheduler,
        # transformers 5 reads a float below 1 as a share of the steps and rounds up.
        warmup_steps=t.warmup,
        weight_decay=t.weight_decay,
        adam_beta1=t.adam_beta1,
        adam_beta2=t.adam_beta2,
        max_grad_norm=t.max_grad_norm,
        optim=optimizer_of(t.optimizer),
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        torch_compile=t.compile,
        eval_strategy="no",
        eval_on_start=evaluates,
        save_strategy="steps",
        save_steps=t.checkpoint_steps,
        logging_steps=t.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        report_to=[],
        disable_tqdm=True,
        log_level="error",
        log_level_replica="error",
        dataloader_pin_memory=gpu,
        use_cpu=not gpu,
        ddp_find_unused_parameters=False,
        remove_unused_columns=False,
        seed=t.seed,
        data_seed=t.seed,
        deepspeed=deepspeed_json(cfg, gpu=gpu) if cfg.deepspeed.stage else None,
    )
