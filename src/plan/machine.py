"""What each stage of a road takes of this machine, by the estimates that the stages themselves are held to, and whether it has as much."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml

from src.core import room
from src.core.compose import CONFIGS
from src.core.log import size, table
from src.core.room import Needs
from src.settings.evaluations import Evaluation
from src.settings.quantizers import Calibration, GptqQuantizer
from src.settings.targets import Axera, Mobilint
from src.settings.training import FullTuner
from src.settings.verbs import PlanVerb
from src.sizing import budget, host, road
from src.sizing.shape import ModelShape
from src.training import launch


def stages(shape: ModelShape, cfg: PlanVerb) -> Iterator[tuple[str, Needs]]:
    """(stage, what it takes) from conversations to a bundle, each with its own defaults where the plan has no such setting."""
    gpus = launch.gpu_count()
    adapter = not isinstance(cfg.tuner, FullTuner) and not shape.quantization
    quantizer = GptqQuantizer(**defaults("quantizer/gptq_int4"))
    quantize = SimpleNamespace(quantizer=quantizer, calibration=Calibration(**defaults("quantize")["calibration"]))
    evaluate = SimpleNamespace(evaluation=Evaluation(**defaults("evaluate")["evaluation"]))
    names: dict[str, Any] = {"data": cfg, f"finetune, {cfg.tuner.kind}": cfg} | ({"merge": cfg} if adapter else {})
    names |= {} if shape.quantization else {"quantize": quantize}
    chats = host.Conversations(float("inf"), cfg.train.max_length)
    for name, settings in {**names, "evaluate": evaluate, f"deploy, {cfg.target.name}": cfg}.items():
        needed = road.needs(name.split(",")[0], settings, shape, chats, exact=adapter, processes=max(1, gpus), gpus=gpus)
        assert needed is not None, "each is a stage of the road"
        yield name, needed
    if isinstance(cfg.target, Axera | Mobilint):
        memory, disk, _ = budget.host_needs(shape, cfg.target)
        yield "its compiler", Needs({"estimated": memory}, disk)


def defaults(verb: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text(encoding="utf-8"))


def machine_lines(shape: ModelShape, cfg: PlanVerb) -> list[str]:
    """A table of the road's stages under a line that says what this machine has."""
    there = room.here(Path(cfg.outputs))
    rows = []
    for stage, needs in stages(shape, cfg):
        found = needs.within(there.memory)
        fits = found.memory <= there.memory and found.disk <= there.disk
        ways = "" if fits else "; ".join(needs.ways_out(there)[:1])
        rows.append([stage, size(found.memory), size(found.disk), "fits" if fits else f"does NOT fit{f'; {ways} does' if ways else ''}"])
    head = f"on this machine, which has {size(there.memory)} of memory available and {size(there.disk)} of disk free, beside the dataset:"
    return [head, *table(["stage", "memory", "disk", ""], rows, right=(1, 2)).splitlines()]
