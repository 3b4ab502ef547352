import json
from pathlib import Path


class RKLLM:
    def load_huggingface(self, model, model_lora=None, device="cpu", dtype="float32", custom_config=None, load_weight=True):
        return 0 if (Path(model) / "config.json").is_file() and device in ("cpu", "cuda") else -1

    def build(
        self,
        do_quantization=True,
        optimization_level=1,
        quantized_dtype="W8A8",
        quantized_algorithm="normal",
        target_platform="RK3588",
        num_npu_core=3,
        extra_qparams=None,
        dataset=None,
        hybrid_rate=0,
        max_context=4096,
    ):
        rows = json.loads(Path(dataset).read_text())
        fits = (
            quantized_dtype in ("W8A8", "W4A16") and target_platform in ("RK3588", "RK3576", "RK3562", "RV1126B") and 1 <= num_npu_core <= 3
        )
        return 0 if rows and all(row.keys() == {"input", "target"} for row in rows) and fits and max_context > 0 else -2

    def export_rkllm(self, path):
        Path(path).write_bytes(b"stand-in for a model" * 10)
        return 0
