"""What the stand-ins for Mobilint's compilers share: they check their inputs as strictly as npu-contracts.md (B2, B3, C2) allows and compile nothing.

They are stricter than the real compilers, which take unknown keywords without a word: every parameter is named, none has a default, types are
checked. The file written is filler of the size that the weights would have. STAND_IN_FAULT names a fault to have; see `fault`.
"""

import json
import os
import re
import struct
import time
from pathlib import Path

import numpy as np

FAULT = os.environ.get("STAND_IN_FAULT", "")
FAMILIES = ("llama", "qwen2", "qwen3", "exaone", "exaone4", "cohere2")


def typed(cls):
    """A dataclass whose values must be of exactly the annotated types."""
    import dataclasses

    def check(self):
        for field in dataclasses.fields(self):
            same(f"{cls.__qualname__}({field.name})", getattr(self, field.name), field.type)

    cls.__post_init__ = check
    return dataclasses.dataclass(kw_only=True)(cls)


def same(name: str, value, kind: type) -> None:
    if type(value) is not kind:
        raise TypeError(f"{name} is {value!r}, not {kind.__name__}")


def equal(name: str, value, wanted) -> None:
    if value != wanted or type(value) is not type(wanted):
        raise ValueError(f"{name} is {value!r}, not {wanted!r}")


def hf_config(value: dict, model_kwargs: set[str], tokenizer_kwargs: set[str]) -> None:
    names = {"library", "loader", "tokenizer", "model_args", "model_kwargs", "tokenizer_args", "tokenizer_kwargs"}
    equal("hf_config's keys", sorted(value), sorted(names))
    equal(
        "library, loader, tokenizer",
        [value[k] for k in ("library", "loader", "tokenizer")],
        ["transformers", "AutoModelForCausalLM", "AutoTokenizer"],
    )
    equal("model_args, tokenizer_args", (value["model_args"], value["tokenizer_args"]), ((), ()))
    equal("model_kwargs", set(value["model_kwargs"]), model_kwargs)
    equal("tokenizer_kwargs", set(value["tokenizer_kwargs"]), tokenizer_kwargs)


def headers(model: Path) -> dict[str, list[int]]:
    found = {}
    for file in model.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(struct.unpack("<Q", stream.read(8))[0]))
        found |= {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
    return found


def compile_model(model, calib_data_path, save_path, backend, device, bits: int, longest: int) -> None:
    """Check the model folder and every calibration file, then write filler. longest: tokens a sequence may have."""
    same("model", model, str)
    equal("backend", backend, "torch")
    config, shapes = check_model(Path(model))
    rest = sum(int(np.prod(shape)) for name, shape in shapes.items() if name != "model.embed_tokens.weight")
    finish(calib_data_path, save_path, device, config["hidden_size"], rest, bits, longest, "model", rotated=bits == 4)


def finish(calib_data_path, save_path, device, hidden: int, values: int, bits: int, longest: int, stem: str, rotated: bool = True) -> None:
    """Check every calibration file and write filler for so many weights' values; rotated: a rotation in spinWeight/<stem> too."""
    for name, value in (("calib_data_path", calib_data_path), ("save_path", save_path)):
        same(name, value, str)
    if device not in ("gpu", "cpu"):
        raise ValueError(f"device is {device!r}, not gpu or cpu")
    if device == "gpu" and not os.environ.get("STAND_IN_GPU"):
        raise RuntimeError("Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver")
    check_calibration(Path(calib_data_path), hidden, longest)
    fault(Path(save_path))
    with open(save_path, "wb") as file:
        file.write(b"stand-in for an MXQ file\n")
        file.truncate(1000 if FAULT == "small" else values * bits // 8 + 4096)
    if rotated and FAULT != "no_rotation":
        write_rotation(Path(f"spinWeight/{stem}/R1/global_rotation.pth"), hidden)
    if FAULT == "no_file":
        os.remove(save_path)


def check_model(model: Path) -> tuple[dict, dict]:
    """config.json and tensor shapes of a folder that transformers 4.57 can load."""
    config = json.loads((model / "config.json").read_text())
    if config["model_type"] not in FAMILIES:
        raise ValueError(f"model_type {config['model_type']}")
    if "rope_parameters" in config:
        equal("rope_theta", config.get("rope_theta"), config["rope_parameters"]["rope_theta"])
    tokenizer = json.loads((model / "tokenizer_config.json").read_text())
    if tokenizer.get("tokenizer_class") == "TokenizersBackend" or isinstance(tokenizer.get("extra_special_tokens"), list):
        raise ValueError("a tokenizer_config.json that transformers 4 cannot read")
    if any(file.is_symlink() for file in model.iterdir()):
        raise ValueError("symbolic links lead nowhere in a container")
    return config, headers(model)


def check_calibration(folder: Path, hidden: int, longest: int) -> None:
    numbered = {int(re.fullmatch(r"(?:[A-Za-z][\w-]*_)?inputs_embeds_(\d+)\.npy", file.name)[1]): file.name for file in folder.iterdir()}
    equal("calibration files", sorted(numbered), list(range(len(list(folder.iterdir())))))
    names = list(numbered.values())
    if not names:
        raise ValueError("no calibration files")
    for name in names:
        array = np.load(folder / name, allow_pickle=False)
        if (
            array.dtype != np.float32
            or array.ndim != 3
            or array.shape[0] != 1
            or array.shape[2] != hidden
            or not 0 < array.shape[1] <= longest
        ):
            raise ValueError(f"{name} is {array.dtype} {array.shape}, not float32 (1, 1..{longest}, {hidden})")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} is not finite")


def fault(save_path: Path) -> None:
    """zeropoint, oom, cuda, gpu_oom, package, transformers, disk, keyword, crash, slow; small, no_file, no_rotation, skewed, other_shape come later."""
    if FAULT == "oom":
        os.kill(os.getpid(), 9)
    if FAULT == "slow":
        save_path.write_bytes(b"half a file")
        print("calibrating", flush=True)
        time.sleep(120)
    if FAULT == "package":
        import a_package_the_compiler_needs  # noqa: F401
    if FAULT == "keyword":
        raise TypeError("mxq_compile() got an unexpected keyword argument 'bit_config'")
    known = {
        "zeropoint": RuntimeError("Error. quantize failed. zeropoint=-2147483648 is out of range"),
        "cuda": AssertionError("Torch not compiled with CUDA enabled"),
        "gpu_oom": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        "transformers": ValueError("The checkpoint has model type `qwen3` but Transformers does not recognize this architecture"),
        "disk": OSError(28, "No space left on device"),
        "crash": RuntimeError("something new"),
    }
    if FAULT in known:
        raise known[FAULT]


def write_rotation(path: Path, hidden: int) -> None:
    """A random orthogonal matrix as the only parameter of a TorchScript module; skewed by the fault of that name."""
    import torch

    width = hidden + 1 if FAULT == "other_shape" else hidden
    matrix = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(1)))[0]
    if FAULT == "skewed":
        matrix[0] *= 1.5
    module = torch.nn.Module()
    module.rotation = torch.nn.Parameter(matrix)
    path.parent.mkdir(parents=True)
    torch.jit.script(module).save(str(path))
