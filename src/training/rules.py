"""What cannot be trained, and how much goes into a forward pass, by settings and sizes alone: one set of rules for `finetune`, which carries settings
out, and `plan`, which foretells it. No torch."""

from collections.abc import Callable
from typing import Literal

from src.core.errors import ConfigError, WrongKind
from src.settings.training import AdapterTuner, FullTuner, QloraTuner

ZERO = {0: "no DeepSpeed", 2: "ZeRO-2", 3: "ZeRO-3"}
LOGITS, ON_CPU = 128 << 20, 64 << 20
"""bytes of fp32 logits that a chunk of the loss may have, and on a CPU, where half as many cost 3 % of the output layer's time (docs/benchmarks.md)"""
FEW = 4
"""conversations a forward pass takes under ZeRO-3, where what fits cannot be measured before the model is partitioned"""


def check(tuner: FullTuner | AdapterTuner, *, zero_stage: int, quantization: str | None, where: str) -> None:
    """Raises ConfigError or WrongKind for a tuner that this ZeRO stage or this base does not allow.

    quantization: the base's quant_method, as its config.json has it; None for whole weights. where: the base.
    """
    qlora = isinstance(tuner, QloraTuner)
    if quantization and not (qlora and quantization == "gptq"):
        raise WrongKind(
            f"the base model is quantized ({quantization})",
            where=where,
            fix=["tuner=qlora trains adapters on a GPTQ base", "give the model that it was quantized from"],
        )
    if qlora and zero_stage == 3:
        raise ConfigError(
            "tuner=qlora with ZeRO-3: a 4-bit base cannot be partitioned", fix=["deepspeed=zero2", "tuner=lora deepspeed=zero3"]
        )
    if isinstance(tuner, FullTuner):
        return
    whole = [what for what, used in (("tuner.dora=true", tuner.dora), (f"tuner.init={tuner.init}", tuner.takes_from_base)) if used]
    if whole and zero_stage == 3:
        raise ConfigError(f"{whole[0]} reads whole base weights, which ZeRO-3 has partitioned", fix=["deepspeed=zero2", f"drop {whole[0]}"])
    if tuner.dora and quantization:
        raise ConfigError(
            "tuner.dora=true: peft has no DoRA for a GPTQ base", fix=["tuner.dora=false", "give the model that it was quantized from"]
        )


def check_length(max_length: int, reach: int | None, *, where: str) -> None:
    """Raises ConfigError for conversations longer than the positions the base knows. reach: those, by its config.json; None: not said."""
    if reach and max_length > reach:
        raise ConfigError(
            f"train.max_length={max_length} is beyond the {reach} positions the model knows", where=where, fix=f"train.max_length={reach}"
        )


def check_batch(batch: int, processes: int, *, fewer: str, machines: int = 1) -> None:
    """Raises ConfigError for a step that cannot be shared equally. fewer: the setting that says how many processes each machine has."""
    if batch % processes:
        dividing = [n for n in range(1, processes // machines) if batch % (n * machines) == 0]
        raise ConfigError(
            f"train.global_batch_size={batch} cannot be shared by {processes} processes",
            fix=[f"train.global_batch_size={-(-batch // processes) * processes}", *(f"{fewer}={n}" for n in dividing[-1:])],
        )


def tokens_that_fit(left: float, kept: float, *, trained: float, shards: int, offload: bool) -> int:
    """Tokens of a forward pass whose activations fit into `left` bytes, beside gradients, Adam's states and the chunks of the loss.

    kept: bytes a token keeps for the backward pass, which holds gradients of some of them too; of what is recomputed those of one layer. trained: values; shards: processes that share their
    gradients and states; offload: those are in the host's memory.
    """
    fixed = needed(0, kept, trained=0 if offload else trained, shards=shards)
    return int((0.8 * left - fixed) / (1.3 * kept))


def needed(tokens: int, kept: float, *, trained: float, shards: int) -> float:
    """Bytes beside the weights for a forward and backward pass over so many tokens; see tokens_that_fit."""
    return 1.3 * kept * tokens + 12 * trained / shards + 3 * LOGITS


def layout(
    *,
    share: int,
    longest: int,
    micro_batch: int | Literal["auto"],
    checkpointing: bool | Literal["auto"],
    partitioned: bool,
    useful: int,
    fits: Callable[[bool], int],
) -> tuple[int, bool]:
    """(tokens a forward pass may hold, whether activations are recomputed).

    share: conversations a process has in a step. longest: tokens of the longest. partitioned: ZeRO-3, where nothing is measured. useful: tokens beyond
    which a pass is no quicker. fits: tokens that fit with activations recomputed (True) or kept.
    """
    wanted = min(share, FEW if partitioned else share) if micro_batch == "auto" else min(share, micro_batch)
    if partitioned:
        return wanted * longest if micro_batch != "auto" else max(longest, min(wanted * longest, useful)), checkpointing is True
    if micro_batch != "auto" and checkpointing != "auto":
        return wanted * longest, checkpointing
    recomputed = checkpointing is True
    there = fits(recomputed)
    if checkpointing == "auto" and there < (longest if micro_batch == "auto" else wanted * longest):
        recomputed = True
        there = fits(True) if micro_batch == "auto" else there
    return wanted * longest if micro_batch != "auto" else max(longest, min(there, share * longest, useful)), recomputed


def zero_name(stage: int, offload: bool) -> str:
    """A ZeRO stage in words: ZeRO-3 with offload."""
    return ZERO[stage] + (" with offload" if offload else "")
