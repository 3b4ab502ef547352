"""The keywords of 1.0.0: groups of settings made by from_kwargs and get_... functions."""

import mobilint_compiler as stand_in
from mobilint_compiler import equal, same, typed

__all__ = [
    "BitConfig",
    "CalibrationConfig",
    "LlmConfig",
    "get_advanced_quantization_config",
    "get_equivalent_transformation_config",
    "get_quantization_config",
    "get_search_weight_scale_config",
    "mxq_compile",
]
HF = {"trust_remote_code"}


class FromKwargs:
    @classmethod
    def from_kwargs(cls, **values):
        return cls(**values)


@typed
class LlmConfig(FromKwargs):
    llm_config_apply: bool
    max_data_length: int
    max_sequence_length: int
    max_cache_length: int
    max_core_data_length: int
    use_full_seq_length: bool
    batch_size: int
    npu_core_ids: list


@typed
class CalibrationConfig(FromKwargs):
    quantization_method: int
    quantization_output: int
    quantization_mode: int
    percentile: float
    topk_ratio: float


@typed
class BitConfig(FromKwargs):
    query_weight_bits: int
    key_weight_bits: int
    value_weight_bits: int
    output_weight_bits: int
    ffn_weight_bits: int
    head_weight_bits: int


def get_quantization_config(*, calibration, bit):
    same("calibration", calibration, CalibrationConfig)
    same("bit", bit, BitConfig)
    return ("quantization", calibration, bit)


def get_equivalent_transformation_config(
    *,
    norm_conv_apply=False,
    qk_apply=False,
    ud_apply=False,
    vo_apply=False,
    ff_multi_lut_apply=False,
    spin_r1_apply=False,
    spin_r2_apply=False,
    qk_rotation_apply=False,
    optimize_ffn_apply=False,
):
    return ("transformation", set(locals().values()))


def get_search_weight_scale_config(*, apply, query=False, key=False, value=False, out=False, ffn=False):
    return ("scale", {apply, query, key, value, out, ffn})


def get_advanced_quantization_config(*, equivalent_transformation, search_weight_scale):
    return ("advanced", equivalent_transformation, search_weight_scale)


def mxq_compile(
    *, model, calib_data_path, save_path, backend, device, llm_config, quantization_config, advanced_quantization_config, hf_config
):
    same("llm_config", llm_config, LlmConfig)
    equal("npu_core_ids", llm_config.npu_core_ids, [0])
    kind, calibration, bit = quantization_config
    equal("quantization_config", kind, "quantization")
    equal(
        "calibration",
        vars(calibration),
        vars(CalibrationConfig(quantization_method=1, quantization_output=0, quantization_mode=1, percentile=0.9999, topk_ratio=0.01)),
    )
    bits, four = bit.query_weight_bits, bit.query_weight_bits == 4
    equal("bits", set(vars(bit).values()) - {8}, {4} if four else set())
    kind, transformation, scale = advanced_quantization_config
    equal("advanced", (kind, transformation, scale), ("advanced", ("transformation", {four}), ("scale", {four})))
    stand_in.hf_config(hf_config, HF, HF)
    stand_in.compile_model(model, calib_data_path, save_path, backend, device, bits, llm_config.max_sequence_length)
