"""deploy target=openvino_npu or openvino_cpu: a model folder becomes OpenVINO's model, tokenizer and detokenizer, by optimum-intel's exporter.

The exporter needs a transformers of its own, so it runs in an environment of its own (scripts/openvino_env.sh). One and the same folder is what
openvino_genai's LLMPipeline loads on "NPU" and on "CPU", so every bundle is proven on this machine's CPU before it is published.
"""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import Unfinished
from src.core.files import write_json
from src.core.log import size
from src.deploy import preflight
from src.deploy.embedding import find_embedding
from src.deploy.openvino import card, proof, recipe
from src.deploy.openvino.exporter import ANOTHER, LOG, MADE, export
from src.deploy.vendor import finish, work_folder
from src.models import exact_sum, fidelity, safetensors_io
from src.models.folder import check_tokenizer, trust_of
from src.models.loading import load_tokenizer
from src.settings.targets import Openvino
from src.sizing import takes
from src.sizing.config_reader import read_shape

TAKES = {"model"}


def wants_dataset(target: Openvino) -> bool:
    return False


def check(inputs: dict[str, Artifact], target: Openvino, out: Path) -> list[str]:
    """The plan: how the weights are rounded, what it takes, the exact argv. Raises WrongKind and BadData for a model that cannot be exported,
    ConfigError for settings that do not go with it, NoRoom for too small a disk; in milliseconds, without torch."""
    model = inputs["model"]
    shape = read_shape(model.path)
    takes.openvino(shape, target, where=str(model.path / "config.json"))
    check_tokenizer(model.path, trust_remote_code=trust_of(model))
    start = replace(model, path=exact_sum.folder(inputs, out / exact_sum.FOLDER))
    stored = sum(entry.size for entry in safetensors_io.entries(model.path).values())
    return [
        *preflight.check_headers(model.path, shape, find_embedding(model.path)),
        f"weights: {size(stored)} become {takes.openvino_group(shape, target)[1]}",
        *preflight.check_room(out, exact_sum.shape(shape, inputs), target, also=exact_sum.size_to_write(inputs, out / exact_sum.FOLDER)),
        recipe.environment_line(target),
        f"in .work: {' '.join(recipe.export_argv(start, shape, target, MADE))}",
    ]


def build(inputs: dict[str, Artifact], out: Path, target: Openvino) -> dict:
    """Export, prove on this CPU, and describe; an export that ended well is not repeated when something after it failed. Returns the metrics.

    Raises Unfinished where the exporter's environment is not whole, ToolFailed and NoRoom for the exporter's faults, ProofFailed where the bundle
    and transformers disagree.
    """
    model = inputs["model"]
    shape, trust = read_shape(model.path), bool(trust_of(model))
    work = work_folder(out)
    card.write(out, shape, target, takes.openvino_group(shape, target)[1])
    if missing := [name for name in recipe.PACKAGES if name not in recipe.versions(target)]:
        raise Unfinished(
            f"OpenVINO's exporter is not on this machine: {target.environment} lacks {', '.join(missing)}",
            where=str(out),
            fix=[
                ANOTHER
                if Path(target.environment).exists()
                else f"bash scripts/openvino_env.sh {target.environment}, two minutes and 1.4 GB; then the same command goes on from here",
                "target.environment=FOLDER names one that has them",
            ],
        )
    record = export(model, shape, target, work)
    for file in sorted((work / MADE).iterdir()):
        os.replace(file, out / file.name)
    shutil.copyfile(work / LOG, out / LOG)
    write_json(out / "export.json", record)
    ask = proof.questioner(target, out, work)
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust)
    metrics = {"unmade_pieces": proof.mend_tokenizer(tokenizer, model.path, ask, trust=trust)}
    metrics |= proof.prove_ids(tokenizer, out, ask)
    metrics |= proof.prove(model, out, tokenizer, target, ask, fidelity.dataset_of(inputs["stored"]))
    finish(out)
    return {
        **metrics,
        **{key: record[key] for key in ("versions", "weights", "peak_memory")},
        "export_seconds": record["seconds"],
        "group_size": takes.openvino_group(shape, target)[0],
        "model_bytes": (out / "openvino_model.bin").stat().st_size,
        "summary": f"{metrics['tokens_per_second']:,.0f} tokens/s on the CPU here, {metrics['prompts_near']}/{metrics['prompts']} prompts as transformers "
        f"but for near ties, {metrics['prompts_equal']} token by token",
    }
