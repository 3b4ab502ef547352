"""What cannot be trained, told from settings and config.json alone: one set of rules for `finetune`, which carries settings out, and `plan`."""

from src.core.errors import ConfigError, WrongKind
from src.settings.verbs import AdapterTuner, FullTuner, QloraTuner

ZERO = {0: "no DeepSpeed", 2: "ZeRO-2", 3: "ZeRO-3"}


def check(tuner: FullTuner | AdapterTuner, *, zero_stage: int, quantization: str | None, where: str) -> None:
    """Raises ConfigError or WrongKind for a tuner that this ZeRO stage or this base does not allow.

    quantization: the base's quant_method, as its config.json has it; None for whole weights. where: the base.
    """
    qlora = isinstance(tuner, QloraTuner)
    if quantization and not (qlora and quantization == "gptq"):
        raise WrongKind(
            f"the base model is quantized ({quantization})",
            where=where,
            fix=["tuner=qlora trains adapters on a GPTQ base", "give the model it was quantized from"],
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
        raise ConfigError("tuner.dora=true: peft has no DoRA for a GPTQ base", fix=["tuner.dora=false", "give the unquantized base"])


def zero_name(stage: int, offload: bool) -> str:
    """A ZeRO stage in words: ZeRO-3 with offload."""
    return ZERO[stage] + (" with offload" if offload else "")
