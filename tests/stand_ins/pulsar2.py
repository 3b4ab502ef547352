"""A stand-in for AXERA's Pulsar2 and for the docker client around it, made after npu-contracts.md (A1, A2, A7, C1). It compiles nothing: its layer
files are the top of an ONNX file and filler of the size that their weights would have. Started as `pulsar2.py pulsar2|docker ARG ...`.

STAND_IN: a JSON object: version, commands ({"llm_build", "llm_build2"}), fault (see FAULTS), log (file that gets each argv), state (folder for containers).
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETTINGS = json.loads(os.environ.get("STAND_IN", "{}"))
VERSION = SETTINGS.get("version", "7.0")
COMMANDS = SETTINGS.get("commands", ["llm_build2"] if VERSION >= "7" else ["llm_build"])
FAULT = SETTINGS.get("fault")
FAULTS = (
    "oom",
    "check_crash",
    "missing_layer",
    "wrong_chunk",
    "empty_layer",
    "short_layer",
    "hollow_layers",
    "hollow_post",
    "not_onnx",
    "other_producer",
    "silent",
    "ocm",
    "unknown_option",
    "slow",
    "two_posts",
)
KNOWN = {"llama", "qwen2", "qwen3", "phi3", "minicpm"}


def parser(command: str) -> argparse.ArgumentParser:
    """The options of one command in this version, as table A1 has them."""
    p = argparse.ArgumentParser(prog=f"pulsar2 {command}", allow_abbrev=False)
    p.add_argument("--input_path", default="")
    p.add_argument("--output_path", default=".")
    p.add_argument("--prefill_len", type=int, default=0)
    p.add_argument("--parallel", type=int, default=1)
    weights = ["fp16", "bf16", "fp32", "s8", "s4"] + (["fp8_e5m2", "fp8_e4m3"] if VERSION >= "4" else [])
    p.add_argument("-t", "--hidden_state_type", default="bf16", choices=["fp16", "bf16", "fp32"])
    p.add_argument("-w", "--weight_type", default="s8", choices=weights)
    p.add_argument("-c", "--check_level", type=int, default=0)
    if command == "llm_build2":
        p.add_argument("--prefill_step_size", type=int, default=None)
        p.add_argument("--max_context", type=int, default=128)
        p.add_argument("--decode_step_size", type=int, default=None)
    else:
        p.add_argument("--kv_cache_len", type=int, default=127)
        if VERSION >= "4":
            p.add_argument("--last_kv_cache_len", type=int, action="append", default=None)
    if VERSION >= "3.1":
        p.add_argument("--chip", default="AX650", choices=["AX620E", "AX650"] + (["LAMBERT"] if VERSION >= "4" else []))
        p.add_argument("--post_topk", type=int, default=0)
        p.add_argument("--post_weight_type", default="s8", choices=["bf16", "s8"] + (["fp8_e5m2", "fp8_e4m3"] if VERSION >= "4" else []))
    if VERSION >= "3.2":
        p.add_argument("--prompt", default="1+1=")
    if VERSION >= "4":
        p.add_argument("--tensor_parallel_size", type=int, default=0)
    if VERSION >= "5":
        p.add_argument("--model_type", default="")
        p.add_argument("--npu_mode", default=None, choices=["NPU1", "NPU2", "NPU3"])
    return p


def build(command: str, words: list[str], mounts: dict[str, str]) -> int:
    if FAULT == "unknown_option":
        words = [*words, "--no_such_option", "1"]
    o = parser(command).parse_args(words)
    source = Path(mounts.get(o.input_path, o.input_path))
    config = json.loads((source / "config.json").read_text())
    if not list(source.glob("*.safetensors")):
        raise SystemExit("AssertionError: no weights")
    chunk = o.prefill_step_size if command == "llm_build2" else o.prefill_len
    if command == "llm_build2":
        assert o.prefill_len % chunk == 0 and o.max_context > o.prefill_len
    elif VERSION >= "4":
        assert all(length % chunk == 0 for length in o.last_kv_cache_len) and o.kv_cache_len >= max(o.last_kv_cache_len)
    family = getattr(o, "model_type", "") or config["model_type"]
    print("Config(")
    if family not in KNOWN:
        print(
            f"Traceback (most recent call last):\nAssertionError: model_type error {family}\nCodeException: (<LLMErrorCode.LLM_PREPARE: 0>, AssertionError)"
        )
        return 1
    print("2026-05-01 10:00:00.000 | SUCCESS  | yamain.command.llm_build:llm_build:109 - prepare llm model done!", flush=True)
    if FAULT == "oom":
        os.kill(os.getpid(), signal.SIGKILL)
    if FAULT == "ocm":
        print("NPUBackendError: ocm alloc failed: need 9437184, have 8388608")
        return 1
    out = Path(o.output_path)
    out.mkdir(exist_ok=True)
    if FAULT == "silent":
        return 0
    layers = config["num_hidden_layers"]
    gptq = config.get("quantization_config")
    width = gptq["bits"] / 8 if gptq else {"s4": 0.5, "s8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1, "bf16": 2, "fp16": 2, "fp32": 4}[o.weight_type]
    sizes = values(source)
    named = chunk * 2 if FAULT == "wrong_chunk" else chunk
    for i in range(layers):
        if FAULT == "slow":
            time.sleep(30 if i else 0.2)
        sys.stdout.write(f"\rbuilding llm decode layers   \x1b[32m━━━━━━\x1b[0m {i + 1}/{layers} 0:00:01")
        sys.stdout.flush()
        if FAULT == "missing_layer" and i == layers - 1:
            continue
        filler = 300 if FAULT == "hollow_layers" else int(sizes[i] * width) + 2000
        content = onnx("pytorch" if FAULT == "other_producer" else "Pulsar2") + b"\x1a\x04none" + bytes(filler)
        if FAULT == "not_onnx":
            content = b"version https://git-lfs.github.com/spec/v1\n" + content
        if i == 1:
            content = b"" if FAULT == "empty_layer" else content[: len(content) * 9 // 10] if FAULT == "short_layer" else content
        (out / f"{family}_p{named}_l{i}_together.axmodel").write_bytes(content)
    print("\rbuilding llm post layer   ━━━━━━━━ 1/1 0:00:01")
    (out / f"{family}_post.axmodel").write_bytes(
        onnx("Pulsar2")
        + bytes(500 if FAULT == "hollow_post" else sizes["head"] * (2 if getattr(o, "post_weight_type", "s8") == "bf16" else 1))
    )
    if FAULT == "two_posts":
        (out / "other_post.axmodel").write_bytes(onnx("Pulsar2"))
    print("2026-05-01 10:05:00.000 | SUCCESS  | yamain.command.llm_build:llm_build:232 - build llm model done!", flush=True)
    if FAULT == "check_crash":
        print("Traceback (most recent call last):\nImportError: Loading a GPTQ quantized model requires gptqmodel")
        return 1
    print("decode layer0_gt layer0_got cos_sim is: 0.9999\ncheck llm model done!")
    return 0


def values(source: Path) -> dict:
    """{index: weights in that layer's matrices, "head": in the output layer}, by the safetensors headers."""
    found: dict = {}
    for file in source.glob("*.safetensors"):
        with open(file, "rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            shape = entry.get("shape", [])
            key = int(m[1]) if (m := re.search(r"layers\.(\d+)\.", name)) else "head" if "embed_tokens" in name else None
            if len(shape) == 2 and key is not None:
                found[key] = found.get(key, 0) + shape[0] * shape[1]
    return found


def onnx(producer: str) -> bytes:
    """The top of a ModelProto: ir_version 10, producer_name."""
    return b"\x08\x0a\x12" + bytes([len(producer)]) + producer.encode()


def pulsar2(words: list[str], mounts: dict[str, str]) -> int:
    if words[:1] == ["version"]:
        print(f"version: {VERSION}\ncommit: 0123abcd")
        return 0
    if words and words[0] in COMMANDS:
        return build(words[0], words[1:], mounts)
    print(f"pulsar2: error: argument command: invalid choice: {words[:1]}", file=sys.stderr)
    return 2


def docker(words: list[str]) -> int:
    """images, image inspect, run and kill, as far as they are used; every unknown word is an error."""
    images, state = SETTINGS.get("images", ["pulsar2:7.0"]), Path(SETTINGS["state"])
    if words[:1] == ["images"]:
        print("\n".join(name for name in images if name.startswith(words[-1] + ":")))
        return 0
    if words[:2] == ["image", "inspect"]:
        if words[-1] not in images:
            return 1
        print("sha256:0000feed")
        return 0
    if words[:1] == ["kill"]:
        file = state / words[-1]
        if not file.is_file():
            return 1
        os.kill(int(file.read_text()), signal.SIGKILL)
        file.unlink(missing_ok=True)
        (state / "killed").write_text(words[-1])
        return 0
    assert words[:2] == ["run", "--rm"], words
    words, mounts, name = words[2:], {}, None
    while words[0].startswith("-"):
        option, value, *words = words
        if option == "-v":
            place, inside = value.removesuffix(":ro").split(":")
            assert Path(place).is_absolute() and Path(place).exists(), value
            mounts[inside] = place
        elif option == "--name":
            name = value
        else:
            assert (option, value) == ("-w", "/data") or (option == "-e" and re.fullmatch(r"[A-Z_]+=\w+", value)), (option, value)
    if single := {inside: place for inside, place in mounts.items() if inside.startswith("/data/model/")}:
        lent = Path(tempfile.mkdtemp(dir=state.parent))
        for inside, place in single.items():
            assert Path(place).is_file() and not Path(place).is_symlink(), place
            shutil.copy(place, lent / Path(inside).name)
        mounts["/data/model"] = str(lent)
    image, *command = words
    assert image in images, image
    if command[0] == "chown":
        assert re.fullmatch(r"\d+:\d+", command[2]) and command[3] == "/work" and "/work" in mounts
        return 0
    assert command[0] == "pulsar2"
    if name is None:
        return pulsar2(command[1:], {})
    # A container goes on when its client dies, so it is a process of another session here.
    child = subprocess.Popen(
        [sys.executable, __file__, "pulsar2", *command[1:]],
        cwd=mounts["/data"],
        env={**os.environ, "STAND_IN_MOUNTS": json.dumps({inside.removeprefix("/data/"): place for inside, place in mounts.items()})},
        start_new_session=True,
    )
    (state / name).write_text(str(child.pid))
    code = child.wait()
    (state / name).unlink(missing_ok=True)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    if log := SETTINGS.get("log"):
        with open(log, "a") as file:
            file.write(json.dumps([program, *rest]) + "\n")
    sys.exit(pulsar2(rest, json.loads(os.environ.get("STAND_IN_MOUNTS", "{}"))) if program == "pulsar2" else docker(rest))
