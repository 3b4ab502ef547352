"""What the exporter is told for a model and a target: group size, argv; and what its environment has. No torch.

Source: `optimum-cli export openvino --help` of optimum-intel 2.2.0.
"""

from pathlib import Path

from src.core.artifact import Artifact
from src.deploy.vendor import installed, interpreter
from src.models.folder import trust_of
from src.settings.targets import Openvino
from src.sizing.shape import ModelShape
from src.sizing.takes import openvino_group

TASK = "text-generation-with-past"
PACKAGES = ("openvino", "openvino_genai", "openvino_tokenizers", "optimum_intel", "nncf", "transformers", "torch")


def export_argv(model: Artifact, shape: ModelShape, target: Openvino, folder: str) -> list[str]:
    """The exporter's argv; it writes into `folder`. An NPU takes symmetric weights only, so int8 is made so for it; the embedding and the output
    layer stay int8 in an int4 model, as the exporter has it."""
    group, _ = openvino_group(shape, target)
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
    return interpreter(target.environment)


def versions(target: Openvino) -> dict[str, str]:
    """{package: version} of what is installed in the environment; a missing package is left out."""
    return installed(target.environment, PACKAGES)


def environment_line(target: Openvino) -> str:
    """What is known of the exporter's environment, for the plan."""
    have = versions(target)
    if missing := [name for name in PACKAGES if name not in have]:
        return f"exporter: {target.environment} lacks {', '.join(missing)}; this stops before it (bash scripts/openvino_env.sh makes it)"
    return "exporter: " + ", ".join(f"{name} {have[name]}" for name in PACKAGES) + f" in {target.environment}"
