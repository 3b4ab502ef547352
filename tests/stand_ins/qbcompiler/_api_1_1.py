"""The keywords of 1.1.2: nested settings classes, and two more keywords for 4-bit weights."""

import mobilint_compiler as stand_in
from mobilint_compiler import equal, same, typed

__all__ = ["BitConfig", "CalibrationConfig", "EquivalentTransformationConfig", "LlmConfig", "SearchWeightScaleConfig", "mxq_compile"]
HF = {"trust_remote_code"}


@typed
class CalibrationConfig:
    method: int
    output: int
    mode: int


@typed
class Weight:
    query: int
    key: int
    value: int
    output: int
    ffn: int
    head: int


@typed
class BitTransformer:
    weight: Weight


BitTransformer.Weight = Weight


@typed
class BitConfig:
    transformer: BitTransformer


BitConfig.Transformer = BitTransformer


@typed
class Calibration:
    use_full_seq_length: bool


@typed
class Runtime:
    batch_size: int
    npu_core_ids: list


@typed
class Attributes:
    max_data_length: int
    max_sequence_length: int
    max_cache_length: int
    max_core_data_length: int
    calibration: Calibration
    runtime: Runtime


Attributes.Calibration, Attributes.Runtime = Calibration, Runtime


@typed
class LlmConfig:
    apply: bool
    attributes: Attributes


LlmConfig.Attributes = Attributes


@typed
class ScaleTransformer:
    query: bool
    key: bool
    value: bool
    out: bool
    ffn: bool


@typed
class SearchWeightScaleConfig:
    apply: bool
    transformer: ScaleTransformer


SearchWeightScaleConfig.Transformer = ScaleTransformer


def switch(name: str) -> type:
    return typed(type(name, (), {"__annotations__": {"apply": bool}}))


NormConv, Qk, Ud, Vo, FeedForwardMultiLut, SpinR1, SpinR2, QkRotation, OptimizeFfn = map(
    switch, ("NormConv", "Qk", "Ud", "Vo", "FeedForwardMultiLut", "SpinR1", "SpinR2", "QkRotation", "OptimizeFfn")
)


@typed
class EquivalentTransformationConfig:
    norm_conv: NormConv
    qk: Qk
    ud: Ud
    vo: Vo
    feed_forward_multi_lut: FeedForwardMultiLut
    spin_r1: SpinR1
    spin_r2: SpinR2
    qk_rotation: QkRotation
    optimize_ffn: OptimizeFfn


for part in (NormConv, Qk, Ud, Vo, FeedForwardMultiLut, SpinR1, SpinR2, QkRotation, OptimizeFfn):
    setattr(EquivalentTransformationConfig, part.__name__, part)


def mxq_compile(
    *,
    model,
    calib_data_path,
    save_path,
    backend,
    device,
    calibration_config,
    bit_config,
    llm_config,
    hf_config,
    search_weight_scale_config=None,
    equivalent_transformation_config=None,
):
    equal("calibration_config", vars(calibration_config), {"method": 1, "output": 0, "mode": 1})
    same("bit_config", bit_config, BitConfig)
    same("llm_config", llm_config, LlmConfig)
    equal("npu_core_ids", llm_config.attributes.runtime.npu_core_ids, [0])
    weight = bit_config.transformer.weight
    four = weight.query == 4
    equal("bits", set(vars(weight).values()) - {8}, {4} if four else set())
    if four:
        same("search_weight_scale_config", search_weight_scale_config, SearchWeightScaleConfig)
        same("equivalent_transformation_config", equivalent_transformation_config, EquivalentTransformationConfig)
        equal("every transformation", {part.apply for part in vars(equivalent_transformation_config).values()}, {True})
    elif search_weight_scale_config or equivalent_transformation_config:
        raise ValueError("settings of 4-bit weights for 8-bit ones")
    stand_in.hf_config(hf_config, HF, HF)
    stand_in.compile_model(model, calib_data_path, save_path, backend, device, weight.query, llm_config.attributes.max_sequence_length)
