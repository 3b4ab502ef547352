"""What the exporter is told for a model and a target: known families, group size, argv; and what its environment has. No torch.

Sources: `optimum-cli export openvino --help` of optimum-intel 2.2.0; for the NPU, "OpenVINO GenAI on NPU" (docs.openvino.ai, 2025): symmetric int4,
groups of 128, or whole rows (-1) for models above a billion parameters.
"""

from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import ConfigError, WrongKind
from src.models.folder import trust_of
from src.settings.targets import Openvino
from src.sizing.shape import ModelShape

TASK = "text-generation-with-past"
BILLION = 10**9
# config.json's model_type of every decoder-only family that optimum-intel 2.2.0 registers for TASK.
FAMILIES = {
    "afmoe", "aquila", "arcee", "arctic", "baichuan", "biogpt", "bitnet", "bloom", "chatglm", "codegen", "cohere", "cohere2", "dbrx",
    "deci", "deepseek", "deepseek_v2", "deepseek_v3", "exaone", "exaone4", "falcon", "falcon_mamba", "gemma", "gemma2", "gemma3_text",
    "gemma3n_text", "gemma4_text", "gemma4_unified_text", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gpt_neox_japanese", "gpt_oss", "gptj", "granite", "granitemoe", "granitemoehybrid", "hunyuan_v1_dense", "internlm", "internlm2",
    "jais", "lfm2", "lfm2_moe", "llama", "llama4", "llama4_text", "mamba", "minicpm", "minicpm3", "mistral", "mixtral", "mpt",
    "muse_glimmer_text", "olmo", "olmo2", "opt", "orion", "ouro", "persimmon", "phi", "phi3", "phimoe", "qwen", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "qwen3_vl_text", "smollm3", "stablelm", "starcoder2",
    "xglm", "xverse", "zamba2",
}  # fmt: skip
PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers", "optimum_intel", "nncf", "transformers", "torch")


def check_settings(shape: ModelShape, target: Openvino, where: Path) -> None:
    """Raises WrongKind for a family the exporter does not know, ConfigError with every setting that this model contradicts."""
    if shape.model_type not in FAMILIES:
        raise WrongKind(
            f"OpenVINO's exporter (optimum-intel 2.2.0) does not know the model family '{shape.model_type}'",
            where=str(where / "config.json"),
            fix=["a model of one of its families: llama, mistral, qwen2, qwen3, phi3, gemma2, ...", "another target"],
        )
    faults, ways = [], []
    limit = shape.max_positions
    if limit and target.context_len > limit:
        faults.append(f"target.context_len={target.context_len} is above the model's own limit of {limit}")
        ways.append(f"target.context_len={limit} target.prompt_len={min(target.prompt_len, limit // 2)}")
    if (
        target.weight_type == "int4"
        and target.group_size != "auto"
        and target.group_size > 0
        and (odd := _undivided(shape, target.group_size))
    ):
        fitting = next((g for g in (128, 64, 32) if not _undivided(shape, g)), -1)
        faults.append(f"target.group_size={target.group_size} does not divide the model's rows of {', '.join(map(str, odd))}")
        ways.append(f"target.group_size={fitting if target.device == 'CPU' or fitting == 128 else -1}")
    if faults:
        what = "\n".join(["the settings do not go with this model:", *(f"  - {fault}" for fault in faults)])
        raise ConfigError(what, where=str(where), fix=" ".join(ways))


def _undivided(shape: ModelShape, group: int) -> list[int]:
    """Row lengths of the layers' matrices that `group` does not divide."""
    return sorted({m.columns for layer in shape.stack for m in layer.matrices if m.columns % group})


def group_size(shape: ModelShape, target: Openvino) -> tuple[int | None, str]:
    """(int4 weights that share a scale, -1 for a row, None for int8; how it was chosen, in words)."""
    if target.weight_type == "int8":
        return None, "int8, a scale for each row" + (", symmetric" if target.device == "NPU" else "")
    if target.group_size != "auto":
        return target.group_size, f"symmetric int4, target.group_size={target.group_size}"
    if shape.params >= BILLION:
        return -1, f"symmetric int4, a scale for each row (auto: {shape.params:,} parameters, a billion or more)"
    if odd := _undivided(shape, 128):
        return -1, f"symmetric int4, a scale for each row (auto: 128 does not divide rows of {', '.join(map(str, odd))})"
    return 128, f"symmetric int4 in groups of 128 (auto: {shape.params:,} parameters, below a billion)"


def export_argv(model: Artifact, shape: ModelShape, target: Openvino, folder: str) -> list[str]:
    """The exporter's argv; it writes into `folder`. An NPU takes symmetric weights only, so int8 is made so for it; the embedding and the output
    layer stay int8 in an int4 model, as the exporter has it."""
    group, _ = group_size(shape, target)
    weights = ["--weight-format", target.weight_type]
    weights += ["--sym"] if group is not None or target.device == "NPU" else []
    weights += ["--ratio", "1.0", "--group-size", str(group)] if group is not None else []
    return [
        str(python(target)),
        *("-I", "-m", "optimum.commands.optimum_cli", "export", "openvino"),
        *("--model", str(model.path.resolve()), "--task", TASK),
        *weights,
        *(["--trust-remote-code"] if trust_of(model) else []),
        folder,
    ]


def python(target: Openvino) -> Path:
    """The environment's interpreter, not resolved: a venv's is a link to another."""
    return Path(target.environment).expanduser().absolute() / "bin" / "python"


def versions(target: Openvino) -> dict[str, str]:
    """{package: version} of what is installed in the environment, told by the names of its dist-info folders; a missing package is left out."""
    if not python(target).exists():
        return {}
    found = {}
    for info in python(target).parents[1].glob("lib/python3*/site-packages/*.dist-info"):
        name, _, version = info.stem.rpartition("-")
        found[name.lower()] = version
    return {name: found[name] for name in PACKAGES if name in found}


def environment_line(target: Openvino) -> str:
    """What is known of the exporter's environment, for the plan."""
    have = versions(target)
    if missing := [name for name in PACKAGES if name not in have]:
        return f"exporter: {target.environment} lacks {', '.join(missing)}; this stops before it (bash scripts/openvino_env.sh makes it)"
    return "exporter: " + ", ".join(f"{name} {have[name]}" for name in PACKAGES) + f" in {target.environment}"
