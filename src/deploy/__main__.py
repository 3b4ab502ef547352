"""Compile or convert a model for a target and make the folder it runs from: a bundle with everything in it and nothing left to do by hand.

A target is a YAML file in configs/target; its `kind` names the module here that knows how to build for it.
"""

import importlib
from pathlib import Path

from src import stage
from src.artifact import Artifact
from src.config import DeployVerb
from src.modeling import check_folder, trust_of

# kind of target -> (module that builds for it, kinds of artifact it takes). A module has
# check(model, settings), which raises early and cheaply, and build(model, out, settings) -> metrics.
BUILDERS = {"llama2c": ("src.deploy.llama2c", {"model"})}


def builder(cfg: DeployVerb):
    return importlib.import_module(BUILDERS[cfg.target.kind][0])


def find(cfg: DeployVerb, run: stage.Run) -> dict[str, Artifact]:
    return {"model": run.source(cfg.source, "merge", "finetune", kinds=BUILDERS[cfg.target.kind][1])}


def check(cfg: DeployVerb, inputs: dict[str, Artifact]) -> list[str]:
    check_folder(inputs["model"].path, trust_remote_code=trust_of(inputs["model"]))
    builder(cfg).check(inputs["model"].path, cfg.target)
    return [f"{inputs['model'].path} for {cfg.target.kind}"]


def deploy(cfg: DeployVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    return builder(cfg).build(inputs["model"].path, out, cfg.target)


STAGE = stage.Stage(
    verb="deploy",
    version=1,
    schema=DeployVerb,
    kind="bundle",
    find=find,
    name=lambda cfg, inputs: f"deploy-{cfg.target.kind}",
    check=check,
    run=deploy,
    doc=__doc__,
)

if __name__ == "__main__":
    stage.main(STAGE)
