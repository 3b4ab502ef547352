"""A stand-in for Mobilint's qubee 0.11 and 0.12, by the version in its metadata; see mobilint_compiler.py."""

import importlib.metadata

import mobilint_compiler as stand_in


def _compile(model, calib_data_path, save_path, backend, singlecore_compile, hf_config, use_gpu_only_for_calibration, weight_dtype, device):
    stand_in.equal("singlecore_compile", singlecore_compile, True)
    stand_in.equal("weight_dtype", weight_dtype, "bfloat16")
    stand_in.same("use_gpu_only_for_calibration", use_gpu_only_for_calibration, bool)
    stand_in.hf_config(hf_config, {"torch_dtype", "device_map", "trust_remote_code"}, set())
    stand_in.compile_model(model, calib_data_path, save_path, backend, device, 8, 2048)


if importlib.metadata.version("qubee").startswith("0.11."):

    def mxq_compile(
        *,
        model,
        calib_data_path,
        save_path,
        backend,
        singlecore_compile,
        quant_output,
        hf_config,
        use_gpu_only_for_calibration,
        weight_dtype,
        device,
    ):
        stand_in.equal("quant_output", quant_output, "layer")
        _compile(
            model, calib_data_path, save_path, backend, singlecore_compile, hf_config, use_gpu_only_for_calibration, weight_dtype, device
        )
else:

    def mxq_compile(
        *,
        model,
        calib_data_path,
        save_path,
        backend,
        singlecore_compile,
        quantization_output,
        hf_config,
        use_gpu_only_for_calibration,
        weight_dtype,
        device,
    ):
        stand_in.equal("quantization_output", quantization_output, 0)
        _compile(
            model, calib_data_path, save_path, backend, singlecore_compile, hf_config, use_gpu_only_for_calibration, weight_dtype, device
        )
