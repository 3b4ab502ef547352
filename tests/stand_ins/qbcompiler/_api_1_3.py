"""The keywords of 1.3 (npu-contracts-2.md): two steps, a model object into an .mblt file and that into an .mxq file, for ARIES and REGULUS."""

import json
from pathlib import Path

import mobilint_compiler as stand_in
from mobilint_compiler import equal, same, typed

from qbcompiler._api_1_1 import (
    BitConfig,
    Calibration,
    CalibrationConfig,
    Runtime,
    SearchWeightScaleConfig,
)
from qbcompiler._api_1_1 import EquivalentTransformationConfig as Every

__all__ = [
    "BitConfig",
    "CalibrationConfig",
    "EquivalentTransformationConfig",
    "LlmConfig",
    "SearchWeightScaleConfig",
    "mblt_compile",
    "mxq_compile",
]
SCHEMES = {"aries-rb": "all", "regulus-rb": "single"}
PARTS = {"norm_conv", "qk", "ud", "vo", "feed_forward_multi_lut", "spin_r1", "spin_r2", "qk_rotation", "optimize_ffn"}


@typed
class Attributes:
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


class EquivalentTransformationConfig:
    """Any of its parts, each of its own class."""

    def __init__(self, **parts):
        if wrong := parts.keys() - PARTS:
            raise TypeError(f"unexpected keyword argument {sorted(wrong)}")
        for name, part in parts.items():
            same(name, part, Every.__annotations__[name])
        self.applied = {name for name, part in parts.items() if part.apply}


for name in PARTS:
    kind = Every.__annotations__[name]
    setattr(EquivalentTransformationConfig, kind.__name__, kind)


def mblt_compile(*, model, backend, target_device, mblt_save_path, feed_dict, dynamic_axes):
    import torch

    equal("backend", backend, "torch")
    if target_device not in SCHEMES:
        raise ValueError(f"{target_device} not supported in current qbcompiler version")
    if not isinstance(model, torch.nn.Module) or model.training:
        raise TypeError("model is not a torch model in eval mode")
    same("mblt_save_path", mblt_save_path, str)
    same("feed_dict", feed_dict, dict)
    equal("input_ids, attention_mask", (feed_dict["input_ids"], feed_dict["attention_mask"]), (None, None))
    embeds = feed_dict["inputs_embeds"]
    equal("inputs_embeds' shape", (embeds.shape[0], embeds.shape[2], embeds.requires_grad), (1, model.config.hidden_size, False))
    equal("dynamic_axes", dynamic_axes, {"inputs_embeds": [-2]})
    embedding = model.get_input_embeddings().weight.numel()
    rest = sum(parameter.numel() for parameter in model.parameters()) - embedding
    Path(mblt_save_path).write_text(json.dumps({"device": target_device, "hidden": model.config.hidden_size, "values": rest}))


def mxq_compile(
    *,
    model,
    target_device,
    calib_data_path,
    save_path,
    device,
    inference_scheme,
    calibration_config,
    bit_config,
    llm_config,
    equivalent_transformation_config,
    search_weight_scale_config=None,
):
    parsed = json.loads(Path(model).read_text())
    if not model.endswith(".mblt"):
        raise ValueError(f"{model} is not an .mblt file")
    equal("target_device", target_device, parsed["device"])
    equal("inference_scheme", inference_scheme, SCHEMES[target_device])
    equal("calibration_config", vars(calibration_config), {"method": 1, "output": 0, "mode": 1})
    same("bit_config", bit_config, BitConfig)
    same("llm_config", llm_config, LlmConfig)
    attributes, weight = llm_config.attributes, vars(bit_config.transformer.weight)
    equal("npu_core_ids", attributes.runtime.npu_core_ids, [0])
    equal("use_full_seq_length", attributes.calibration.use_full_seq_length, True)
    equal("max_cache_length", attributes.max_cache_length, attributes.max_sequence_length)
    four = weight["query"] == 4
    equal("bits", weight, {**dict.fromkeys(weight, 4 if four else 8), "value": 8})
    same("equivalent_transformation_config", equivalent_transformation_config, EquivalentTransformationConfig)
    equal("transformations", equivalent_transformation_config.applied, PARTS if four else {"spin_r1"})
    if four:
        same("search_weight_scale_config", search_weight_scale_config, SearchWeightScaleConfig)
    elif search_weight_scale_config is not None:
        raise ValueError("settings of 4-bit weights for 8-bit ones")
    stand_in.finish(
        calib_data_path,
        save_path,
        device,
        parsed["hidden"],
        parsed["values"],
        weight["query"],
        attributes.max_sequence_length,
        Path(model).stem,
    )
