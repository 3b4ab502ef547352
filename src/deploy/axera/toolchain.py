"""Pulsar2 as it is installed here: where it is, what its help says it offers, and the argv that means the same in either of its two commands.

`llm_build` and `llm_build2` give one option name two meanings: --prefill_len is the chunk in the first and the whole prompt in the second
(AXERA-TECH/Qwen3_5.AXERA, model_convert/README.md). Which of them a version has is asked, not derived from the version.
"""

import os
import re
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path

from src.core.errors import ConfigError, MissingTool, ToolFailed
from src.deploy.vendor import ask, image_id
from src.settings.targets import Axera

DOCUMENTED = {
    # The options and choices of the 7.0 documents, and of those of 5.2 for llm_build, for plans made where no Pulsar2 is.
    "llm_build2": """--input_path --output_path --prefill_len --prefill_step_size --max_context --decode_step_size --parallel
        --hidden_state_type {fp16,bf16,fp32} --weight_type {fp16,bf16,fp32,s8,s4,fp8_e5m2,fp8_e4m3} --chip {AX620E,AX650,LAMBERT} --model_type
        --post_weight_type {bf16,s8,fp8_e5m2,fp8_e4m3} --post_topk --npu_mode {NPU1,NPU2,NPU3} --tensor_parallel_size --check_level --prompt""",
    "llm_build": """--input_path --output_path --prefill_len --kv_cache_len --last_kv_cache_len --parallel
        --hidden_state_type {fp16,bf16,fp32} --weight_type {fp16,bf16,fp32,s8,s4,fp8_e5m2,fp8_e4m3} --chip {AX620E,AX650,LAMBERT} --model_type
        --post_weight_type {bf16,s8,fp8_e5m2,fp8_e4m3} --post_topk --npu_mode {NPU1,NPU2,NPU3} --tensor_parallel_size --check_level --prompt""",
}
EASIER = ("install Pulsar2 so that `pulsar2` is on PATH", "docker load -i ax_pulsar2_VERSION.tar.gz (AXERA-TECH/Pulsar2 on the hub has it)")


@dataclass(frozen=True)
class Toolchain:
    """Pulsar2, found. prefix: argv up to the command's own words. help: {command: its help text} of those it offers. image: None where it is local."""

    prefix: tuple[str, ...]
    version: str
    help: dict[str, str] = field(repr=False)
    image: str | None = None
    image_id: str | None = None
    here: bool = True

    @property
    def command(self) -> str:
        return "llm_build2" if "llm_build2" in self.help else "llm_build"

    def offers(self, option: str) -> bool:
        return re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", self.help[self.command]) is not None

    def choices(self, option: str) -> list[str]:
        """Values the help lists for an option, --chip {AX620E,AX650} or --chip [AX620E|AX650]; empty where it lists none."""
        found = re.search(rf"{re.escape(option)}[\s=]+(?:\{{([^}}]*)\}}|\[([^]]*\|[^]]*)\])", self.help[self.command])
        return re.split(r"\s*[,|]\s*", (found[1] or found[2]).strip()) if found else []


def find(target: Axera) -> Toolchain | None:
    """The installed Pulsar2, or None. Raises MissingTool where it was asked for by name and is not there, ToolFailed where it is there and does not answer."""
    # A relative entry of PATH would be looked for from wherever the compiler is started.
    found = shutil.which("pulsar2")
    local = os.path.abspath(found) if found and not os.path.isabs(found) else "pulsar2"
    if target.toolchain in ("auto", "local") and (version := ask([local, "version"])):
        return _probe((local,), version.stdout + version.stderr)
    if target.toolchain in ("auto", "docker") and (image := _image(target)):
        prefix = ("docker", "run", "--rm", image[0], "pulsar2")
        version = ask([*prefix, "version"])
        return _probe(prefix, version.stdout + version.stderr if version else "", *image)
    if target.image:
        raise MissingTool(f"there is no Docker image '{target.image}'", where="docker image inspect", fix=EASIER[1])
    return None


def _chosen(tool: Toolchain, target: Axera) -> Toolchain:
    """The toolchain with the one command that can do what the target asks for, where it has both: llm_build2, unless it is asked for llm_build's groups."""
    if "llm_build" in tool.help and (target.last_kv_cache_len or "llm_build2" not in tool.help):
        return replace(tool, help={"llm_build": tool.help["llm_build"]})
    return tool


def _image(target: Axera) -> tuple[str, str] | None:
    """(name, id) of the image asked for, or of the newest one called pulsar2."""
    if target.image is None:
        listed = ask(["docker", "images", "--format", "{{.Repository}}:{{.Tag}}", "pulsar2"])
        names = listed.stdout.split() if listed and listed.returncode == 0 else []
        if not names:
            return None
        name = max(names, key=lambda n: [int(part) for part in re.findall(r"\d+", n.partition(":")[2])])
    else:
        name = target.image
    id = image_id(name)
    return (name, id) if id else None


def _probe(prefix: tuple[str, ...], version: str, image: str | None = None, image_id: str | None = None) -> Toolchain:
    helps = {}
    for command in ("llm_build2", "llm_build"):
        answer = ask([*prefix, command, "-h"])
        text = answer.stdout + answer.stderr if answer else ""
        if answer and answer.returncode == 0 and "--input_path" in text:
            helps[command] = text
    if not helps:
        raise ToolFailed(
            "Pulsar2 is here, but offers neither llm_build2 nor llm_build",
            where=" ".join(prefix),
            fix="install Pulsar2 3.0 or newer, or one of the -lite images",
        )
    found = re.search(r"version:\s*(\S+)", version)
    return Toolchain(prefix, found[1] if found else "unknown", helps, image, image_id)


def documented(*commands: str) -> Toolchain:
    """Pulsar2 as its documents describe it, to plan with where none is installed. commands: those it has; none: both."""
    return Toolchain(("pulsar2",), "7.0, as documented", {name: DOCUMENTED[name] for name in commands or DOCUMENTED}, here=False)


def weight_type(target: Axera, quantization: dict | None) -> str | None:
    """What to tell Pulsar2 of the weights' type; None: nothing, it reads it from a GPTQ model (AX620E wants s4 said: HY-MT1.5-1.8B.axera, model_convert)."""
    if quantization is None:
        return "s8" if target.weight_type == "auto" else target.weight_type
    return "s4" if quantization["bits"] == 4 and target.chip == "AX620E" else None


def argv(tool: Toolchain, target: Axera, quantization: dict | None, input_path: str, output_path: str) -> list[str]:
    """Arguments after `pulsar2`, from what this version's help lists. Raises ConfigError where it lacks what the target asks for; every lack at once."""
    tool = _chosen(tool, target)
    weight, faults = weight_type(target, quantization), []
    options: dict[str, list[str]] = {
        "--input_path": [input_path],
        "--output_path": [output_path],
        "--hidden_state_type": [target.hidden_type],
    }
    if weight:
        options["--weight_type"] = [weight]
    chunk, prompt, context = target.prefill_chunk, target.prompt_len, target.context_len
    if tool.command == "llm_build2":
        options |= {"--prefill_len": [str(prompt)], "--prefill_step_size": [str(chunk)], "--max_context": [str(context)]}
        if target.decode_step_size:
            options["--decode_step_size"] = [str(target.decode_step_size)]
        if target.last_kv_cache_len:
            faults.append("target.last_kv_cache_len is an option of llm_build: leave it null, or install a version that has that command")
    else:
        options |= {"--prefill_len": [str(chunk)], "--kv_cache_len": [str(context - 1)]}
        if target.decode_step_size:
            faults.append("target.decode_step_size is an option of llm_build2: leave it null, or install a version that has that command")
        if tool.offers("--last_kv_cache_len"):
            options["--last_kv_cache_len"] = [str(length) for length in target.last_kv_cache_len or range(chunk, prompt + 1, chunk)]
        elif prompt != chunk:
            faults.append(f"it takes prompts of one chunk only: target.prompt_len={chunk}, or Pulsar2 4.0 and newer")
    options |= {"--parallel": [str(target.parallel)]}
    if tool.offers("--chip") or target.chip != "AX650":
        options["--chip"] = [target.chip]
    asked = {
        "--model_type": target.model_type,
        "--post_weight_type": target.post_weight_type if target.post_weight_type != "s8" else None,
        "--post_topk": target.post_topk or None,
        "--npu_mode": target.npu_mode,
        "--tensor_parallel_size": target.tensor_parallel_size or None,
        "--check_level": target.check_level or None,
        "--prompt": target.check_prompt,
    }
    options |= {option: [str(value)] for option, value in asked.items() if value is not None}
    settings = {
        "--weight_type": "target.weight_type",
        "--hidden_state_type": "target.hidden_type",
        "--chip": "target.chip",
        "--prompt": "target.check_prompt",
        **{option: f"target.{option.removeprefix('--')}" for option in asked if option != "--prompt"},
    }
    for option, values in options.items():
        if not tool.offers(option):
            faults.append(f"it has no {option}" + (f", so {settings[option]}={values[0]} cannot be had" if option in settings else ""))
        elif (known := tool.choices(option)) and values[0] not in known:
            faults.append(f"{settings.get(option, option)}={values[0]} is none of what it knows: {', '.join(known)}")
    if faults:
        raise ConfigError(
            f"this Pulsar2 ({tool.version}, {tool.command}) cannot build that:\n" + "\n".join(f"  - {fault}" for fault in faults),
            where=tool.image or "pulsar2 on PATH",
            fix=["leave these settings at their defaults", "target.image=IMAGE of a version that has them"],
        )
    return [tool.command, *(word for option, values in options.items() for value in values for word in (option, value))]


def environment(target: Axera) -> dict[str, str]:
    """What AXERA's recipe exports: a large gain in time to first token on AX650, none on AX620E (HY-MT1.5-1.8B.axera, model_convert)."""
    return {"FLOAT_MATMUL_USE_CONV_EU": "1"} if target.chip == "AX650" else {}


def command_line(tool: Toolchain, target: Axera, arguments: list[str], work: Path, model: Path, name: str) -> list[str]:
    """The whole argv: local as it is; in a container called `name` with `work` as /data and the model read-only at /data/model. A model of symbolic
    links, as a hub's cache has it, is mounted file by file, since in the container they would point nowhere.

    The container runs as root, since Pulsar2's licence files lie under /root and an unknown user breaks it.
    """
    if tool.image is None:
        return [*tool.prefix, *arguments]
    inside = sorted(model.iterdir()) if model.is_dir() else []
    files = [file for file in inside if file.is_file()] if any(file.is_symlink() for file in inside) else []
    lent = [f"{file.resolve()}:/data/model/{file.name}:ro" for file in files] or [f"{model.resolve()}:/data/model:ro"]
    mounts = [word for mount in (f"{work.resolve()}:/data", *lent) for word in ("-v", mount)]
    env = [word for key, value in environment(target).items() for word in ("-e", f"{key}={value}")]
    return ["docker", "run", "--rm", "--name", name, *mounts, "-w", "/data", *env, tool.image, "pulsar2", *arguments]
