"""What each stage of a road takes of this machine, by the estimates that the stages themselves are held to, and whether it has as much."""

from collections.abc import Iterator
from pathlib import Path

import yaml

from src.core import room
from src.core.compose import CONFIGS
from src.core.log import size, table
from src.core.room import Needs
from src.settings.quantizers import Calibration
from src.settings.targets import Axera, Mobilint
from src.settings.verbs import Evaluation, FullTuner, PlanVerb
from src.sizing import budget, host
from src.sizing.shape import ModelShape
from src.training import launch


def road(shape: ModelShape, cfg: PlanVerb) -> Iterator[tuple[str, Needs]]:
    """(stage, what it takes) from conversations to a bundle, each with its own defaults where the plan has no such setting."""
    gpus = launch.gpu_count()
    adapter = not isinstance(cfg.tuner, FullTuner)
    calibration, evaluation = Calibration(**defaults("quantize")["calibration"]), Evaluation(**defaults("evaluate")["evaluation"])
    chats = host.Conversations(float("inf"), cfg.train.max_length)
    yield "data", host.data(0)
    yield f"finetune, {cfg.tuner.kind}", host.finetune(shape, cfg.tuner, cfg.deepspeed, cfg.train, processes=max(1, gpus), gpus=gpus)
    if adapter and not shape.quantization:
        yield "merge", host.merge(shape)
    if not shape.quantization:
        yield "quantize", host.quantize(shape, calibration, chats, exact=adapter)
    yield "evaluate", host.evaluate([shape], evaluation, chats)
    yield f"deploy, {cfg.target.name}", host.deploy(shape, cfg.target, exact=adapter)
    if isinstance(cfg.target, Axera | Mobilint):
        memory, disk, _ = budget.host_needs(shape, cfg.target)
        yield "its compiler", Needs({"estimated": memory}, disk)


def defaults(verb: str) -> dict:
    return yaml.safe_load((CONFIGS / f"{verb}.yaml").read_text(encoding="utf-8"))


def machine_lines(shape: ModelShape, cfg: PlanVerb) -> list[str]:
    """A table of the road's stages under a line that says what this machine has."""
    there = room.here(Path(cfg.outputs))
    rows = []
    for stage, needs in road(shape, cfg):
        found = needs.within(there.memory)
        fits = found.memory <= there.memory and found.disk <= there.disk
        ways = "" if fits else "; ".join(needs.ways_out(there)[:1])
        rows.append([stage, size(found.memory), size(found.disk), "fits" if fits else f"does NOT fit{f'; {ways} does' if ways else ''}"])
    head = f"on this machine, which has {size(there.memory)} of memory available and {size(there.disk)} of disk free, beside the dataset:"
    return [head, *table(["stage", "memory", "disk", ""], rows, right=(1, 2)).splitlines()]
