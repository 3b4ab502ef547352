"""Compile or convert a model for a target and make the folder it runs from: a bundle with everything in it and nothing left to do by hand.

A target is a YAML file in configs/target; its `kind` names the module here that knows how to build for it.
"""

import importlib
import shutil
from pathlib import Path
from typing import Any, Protocol, cast

from src.chat.template import as_served_today
from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError
from src.core.room import Needs
from src.deploy.vendor import BY_HAND, COMPILED, WORK
from src.models import exact_sum, fidelity, gates, preview
from src.models.folder import check_folder, trust_of, weights_of
from src.settings.verbs import DeployVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

BUILDERS = {
    "llama2c": "src.deploy.llama2c",
    "axera": "src.deploy.axera",
    "mobilint": "src.deploy.mobilint",
    "openvino": "src.deploy.openvino",
    "gguf": "src.deploy.gguf",
    "gguf_lora": "src.deploy.gguf.lora",
}
"""kind of target -> the module that builds for it"""
MADE_IN_NO_TIME = ("llama2c", "gguf", "gguf_lora")
"""kinds of target that a preview in their numbers would take longer than: they are made, and then measured"""


class Builder(Protocol):
    """What a module here has that builds for a kind of target; see docs/adding-a-target.md."""

    TAKES: set[str]
    """kinds of artifact it can build from"""

    def wants_dataset(self, target: Any, /) -> bool:
        """Whether it calibrates on the run's dataset."""

    def check(self, inputs: dict[str, Artifact], target: Any, out: Path, /) -> list[str]:
        """The plan in lines; raises early and cheaply, before torch, where a model, a rule or the room for `out` stands in the way."""

    def build(self, inputs: dict[str, Artifact], out: Path, target: Any, /) -> dict:
        """Makes the bundle in the folder `out` and returns its metrics, `summary` (one line) among them.

        Of a merge that was rounded to 16 bits it gets the exact sum in fp32 as "model" and the merge itself as "stored"; for any other model both are one.
        """


def builder(cfg: DeployVerb) -> Builder:
    return cast(Builder, importlib.import_module(BUILDERS[cfg.target.kind]))


def find(cfg: DeployVerb, run: stage.Run) -> dict[str, Artifact]:
    vendor = builder(cfg)
    whole = ("merge", "finetune", "cpt", "pretrain")
    inputs = {"model": run.source(cfg.source, *(whole if "model" in vendor.TAKES else ("finetune", "cpt")), kinds=vendor.TAKES)}
    if vendor.wants_dataset(cfg.target):
        inputs["dataset"] = stage.data_sources(run, cfg.dataset)
    # Where the board takes bf16, the merge is on its grid already, and the compiler would round the exact sum to the nearest.
    rounds = getattr(cfg.target, "weight_type", None) != "bf16"
    inputs |= exact_sum.parents(inputs["model"], cfg.weights, run.cache) if rounds else {}
    if texts := getattr(cfg.target, "texts", None):
        inputs["texts"] = artifact.outside(Path(texts), "file", run.cache)
    return inputs


def name(cfg: DeployVerb, inputs: dict[str, Artifact]) -> str:
    """deploy-ax650 for a plain model, deploy-ax650-quantize for a quantized one, so that both can be had."""
    return f"deploy-{cfg.target.name}" + ("-quantize" if inputs["model"].kind == "quantized" else "")


def check(cfg: DeployVerb, inputs: dict[str, Artifact]) -> list[str]:
    refuse_unmeasured(cfg)
    check_folder(weights_of(inputs["model"]), trust_remote_code=trust_of(inputs["model"]))
    out = Path(cfg.outputs) / cfg.run / f"{name(cfg, inputs)}.partial"
    return [
        f"{inputs['model'].path} for {cfg.target.name}",
        *exact_sum.cost(inputs, out / exact_sum.FOLDER),
        *builder(cfg).check(inputs, cfg.target, out),
    ]


def refuse_unmeasured(cfg: DeployVerb) -> None:
    """Raises ConfigError for a gate on what is not measured before a compile."""
    limits = gates.limits(cfg.gate)
    if limits and cfg.target.kind in MADE_IN_NO_TIME:
        raise ConfigError(
            f"gate limits what is lost in a vendor's numbers, and {cfg.target.name}'s bundle has no compiler and is held to its own",
            fix=["gate=none", "python -m src.evaluate gate=strict holds a model to them"],
        )
    if limits and not cfg.preview:
        raise ConfigError("gate limits what preview=0 leaves out", fix=["preview=8 tries the model in the target's numbers", "gate=none"])
    for name in limits:
        if gates.FIGURES[name].name not in preview.GATED:
            raise ConfigError(f"gate.{name} limits what is not measured before a compile", fix=f"gate.{name}=null")


def judge(cfg: DeployVerb, made: Artifact) -> None:
    """A finished bundle held to limits that were set since."""
    preview.judge(cfg.gate, made.metrics, str(made.path))


def needs(cfg: DeployVerb, inputs: dict[str, Artifact]) -> Needs:
    return host.deploy(read_shape(weights_of(inputs["model"])), cfg.target, exact=exact_sum.ROLES["adapter"] in inputs)


def deploy(cfg: DeployVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Builds from the exact weights; their folder stays in an unfinished bundle, for the compile that goes on from there."""
    start = exact_sum.write(inputs, out / exact_sum.FOLDER)
    with as_served_today():
        tried = {}
        if cfg.target.kind not in MADE_IN_NO_TIME and (gates.limits(cfg.gate) or not (out / WORK / COMPILED).is_file()):
            dataset = inputs["dataset"].path if "dataset" in inputs else fidelity.dataset_of(inputs["model"])
            tried = preview.before_compile(start, cfg.target, dataset, cfg.preview, cfg.gate)
        metrics = tried | builder(cfg).build({**inputs, "model": start, "stored": inputs["model"]}, out, cfg.target)
    if start is not inputs["model"]:
        shutil.rmtree(start.path)
    return metrics


STAGE = stage.Stage(
    verb="deploy",
    version=3,
    schema=DeployVerb,
    kind="bundle",
    find=find,
    name=name,
    check=check,
    needs=needs,
    run=deploy,
    judge=judge,
    doc=__doc__,
    resumes=lambda partial: (partial / WORK).is_dir(),
    guards=lambda partial: any((partial / WORK / name).is_file() for name in (COMPILED, BY_HAND)),
)

if __name__ == "__main__":
    stage.main(STAGE)
