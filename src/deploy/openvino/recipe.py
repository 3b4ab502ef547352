"""What the exporter is told for a model and a target: group size, argv; and what its environment has. No torch.

Sources: `optimum-cli export openvino --help` of optimum-intel 2.2.0; for the NPU, "OpenVINO GenAI on NPU" (docs.openvino.ai, 2025): symmetric int4,
groups of 128, or whole rows (-1) for models above a billion parameters.
"""

from pathlib import Path

from src.core.artifact import Artifact
from src.models.folder import trust_of
from src.settings.targets import Openvino
from src.sizing.shape import ModelShape
from src.sizing.takes import undivided

TASK = "text-generation-with-past"
BILLION = 10**9
PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers", "optimum_intel", "nncf", "transformers", "torch")


def group_size(shape: ModelShape, target: Openvino) -> tuple[int | None, str]:
    """(int4 weights that share a scale, -1 for a row, None for int8; how it was chosen, in words)."""
    if target.weight_type == "int8":
        return None, "int8, a scale for each row" + (", symmetric" if target.device == "NPU" else "")
    if target.group_size != "auto":
        return target.group_size, f"symmetric int4, target.group_size={target.group_size}"
    if shape.params >= BILLION:
        return -1, f"symmetric int4, a scale for each row (auto: {shape.params:,} parameters, a billion or more)"
    if odd := undivided(shape, 128):
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
