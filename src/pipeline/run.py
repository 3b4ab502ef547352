"""What is ahead on a road, told before anything is begun; and its stages, each run in a process of its own."""

import contextlib
import os
import runpy
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.core import artifact, room, stage
from src.core.errors import BadData, GateFailed, Moved, Unfinished, UserError, WrongKind
from src.core.files import read_json
from src.core.log import duration, out, say, size, table
from src.core.processes import Interrupted, begin
from src.core.room import Needs
from src.models.folder import locate_config
from src.pipeline import recipe
from src.pipeline.recipe import Step
from src.settings.training import FullTuner
from src.settings.verbs import PipelineVerb
from src.sizing import host, road, takes
from src.sizing.config_reader import read_config, shape_of
from src.sizing.shape import ModelShape
from src.training import launch


@dataclass(frozen=True)
class Leg:
    """One stage of a road as it stands. words: as typed after `python -m src.`. done: all that it makes is there. why: that, or what it waits for.

    again: it was made otherwise, and is made anew. needs: its own estimate; None where there is none. before: how long its last result took, anywhere.
    """

    verb: str
    argv: tuple[str, ...]
    done: bool
    why: str
    again: bool
    needs: Needs | None
    before: str

    @property
    def words(self) -> str:
        return shlex.join([self.verb, *self.argv])


def plan(cfg: PipelineVerb, steps: Sequence[Step], faults: Sequence[str] = ()) -> list[Leg]:
    """How each stage of a road stands. faults: of settings that belong to no stage. Raises what stands in the way of any: faults of settings first, all together; then inputs, and room.

    Moved, which a stage raises for what was made otherwise, is an answer where `force` is given.
    """
    shared = [*named(cfg), *([f"room={cfg.room}"] if cfg.room != "check" else [])]
    settings = recipe.composed(steps, shared, faults)
    where = stage.Run(Path(cfg.outputs) / cfg.run, dry=cfg.dry_run)
    start = start_of(settings, dry=cfg.dry_run)
    found: list[Leg] = []
    waits = ""
    for step, own in zip(steps, settings, strict=True):
        with named_as(step.verb):
            state = look(step.verb, own, where, waits, force=cfg.force)
            if start and not state.done and step.verb == "deploy":
                takes.check(start.config, own.target, where=start.where)
        needed = state.needs or (estimate(step.verb, own, start) if start and not state.done else None)
        argv = (*step.overrides, *shared, *(["force=true"] if state.again and not own.force else []))
        found.append(
            Leg(step.verb, argv, state.done, state.why, state.again, needed, "" if state.done else before(Path(cfg.outputs), step.verb))
        )
        if not state.done and step.verb not in NOTHING_FOLLOWS:
            waits = step.verb
    check_room(cfg, found)
    return found


NOTHING_FOLLOWS = ("evaluate",)
"""stages that no other begins with"""


@dataclass(frozen=True)
class Standing:
    done: bool
    why: str
    again: bool = False
    needs: Needs | None = None


def look(verb: str, own: Any, where: stage.Run, waits: str, *, force: bool) -> Standing:
    """How one stage stands. waits: a stage before it that is not done, whose result it may begin with; '' for none."""
    what = recipe.stage_of(verb)
    if waits:
        if what.early:
            stage.plan_of(what, own, what.early(own, where), where.folder)
        there = any(artifact.is_finished(path) for path in where.folder.glob(f"{verb}*"))
        return Standing(False, f"after {waits}", again=there and force)
    try:
        ones = [(each, stage.ahead(what, each, where)) for each in (what.each(own, where) if what.each else [own])]
    except Moved as moved:
        if not force:
            moved.fix = [
                "force=true makes it, and what follows from it, again in place",
                "run=OTHER_NAME keeps both",
                "go back to the old settings",
            ]
            raise
        return Standing(False, f"made otherwise, so made again: {' '.join(moved.what.split())}", again=True)
    new = [(each, one) for each, one in ones if not one.done]
    try:
        for each, one in ones:
            if what.judge and one.done:
                what.judge(each, one.done)
    except GateFailed as failed:
        return Standing(False, failed.what)
    if not new:
        return Standing(True, f"up to date: {', '.join(one.path.name for _, one in ones)}")
    lines = [line for each, one in new for line in (what.check(each, one.inputs) if what.check else [])[:1]]
    return Standing(False, "; ".join(lines) or ", ".join(one.path.name for _, one in new), needs=together(what, new))


def together(what: stage.Stage[Any], new: Sequence[tuple[Any, stage.Ahead]]) -> Needs | None:
    """What several artifacts of a stage take, made one after the other; None where it is not estimated, which the stage says itself."""
    try:
        each = [what.needs(own, one.inputs) for own, one in new] if what.needs else []
    except (BadData, WrongKind):
        each = []
    return replace(max(each, key=lambda n: n.memory), disk=sum(n.disk for n in each)) if each else None


@dataclass(frozen=True)
class Start:
    """The model that a road begins with: its config.json, where that is, its shape; and the road's tuner."""

    config: dict[str, Any]
    where: str
    shape: ModelShape
    tuner: Any


def start_of(settings: Sequence[Any], *, dry: bool) -> Start | None:
    """What the road begins with; None where the settings do not tell, or it cannot be read."""
    for own in settings:
        if model := getattr(own, "model", None):
            try:
                config, file = read_config(locate_config(model.path, model.revision, download=not dry))
                return Start(config, str(file), shape_of(config, str(file)), getattr(own, "tuner", None))
            except (BadData, WrongKind):
                break
    return None


def estimate(verb: str, own: Any, start: Start) -> Needs | None:
    """What a stage takes whose inputs are not there yet."""
    exact = start.tuner is not None and not isinstance(start.tuner, FullTuner) and not start.shape.quantization
    processes, gpus = launch.per_node(own.launch) if hasattr(own, "launch") else 1, launch.gpu_count()
    return road.needs(verb, own, start.shape, host.Conversations(float("inf"), LENGTH), exact=exact, processes=processes, gpus=gpus)


LENGTH = 512
"""tokens of a conversation, where nothing of the data is known yet"""


def before(outputs: Path, verb: str) -> str:
    """How long the newest result of a stage took, in any run; '' where there is none."""
    there = [path for path in outputs.glob(f"*/{verb}*") if artifact.is_finished(path)]
    for path in sorted(there, key=lambda path: (path / artifact.MANIFEST).stat().st_mtime, reverse=True)[:1]:
        with contextlib.suppress(BadData, KeyError):  # of another run, which says so itself
            return f"{duration(read_json(path / artifact.MANIFEST)['seconds'])} in {path.parent.name}"
    return ""


def check_room(cfg: PipelineVerb, found: Sequence[Leg]) -> None:
    """Raises NoMemory for the first stage that does not fit, NoRoom where all of them together do not, which room=ignore makes warnings."""
    there = room.here(Path(cfg.outputs) / cfg.run)
    left = {step.verb: step.needs for step in found if step.needs and not step.done}
    for verb, needs in left.items():
        with named_as(verb):
            room.check(needs, there, ignore=cfg.room == "ignore")
    room.check(Needs({}, sum(needs.disk for needs in left.values())), there, ignore=cfg.room == "ignore")


@contextlib.contextmanager
def named_as(verb: str) -> Iterator[None]:
    """What stands in the way of a stage is told with its name."""
    try:
        yield
    except UserError as error:
        error.what = f"{verb}: {error.what}"
        raise


def show(found: Sequence[Leg]) -> None:
    """The plan as a table."""
    rows = []
    for number, step in enumerate(found, 1):
        there = step.needs.within(room.here(Path()).memory) if step.needs else None
        takes = [size(there.memory), size(there.disk)] if there else ["", ""]
        rows.append([str(number), step.verb, "skipped" if step.done else "again" if step.again else "runs", *takes, step.before, step.why])
    out(table(["", "stage", "", "memory", "disk", "took before", ""], rows, right=(0, 3, 4)))


# ---- its stages


def named(cfg: PipelineVerb) -> list[str]:
    """The settings that name the run."""
    return [f"run={cfg.run}", f"outputs={cfg.outputs}"]


def walk(ahead: Sequence[Leg]) -> int:
    """Run what is not done in turn; exit code of the stage that ended the road, or 0."""
    for number, step in enumerate(ahead, 1):
        if step.done:
            continue
        say(f"pipeline: {number} of {len(ahead)}: python -m src.{step.words}")
        if code := start(step.verb, step.argv):
            return ended(step.verb, code)
    return 0


def start(verb: str, argv: Sequence[str]) -> int:
    """Exit code of a verb, run in a process that ends with this one, however this one ends. Without GPUs, all but the data are made by processes that
    begin with torch imported; CUDA's are new interpreters, for it does not survive a fork."""
    process = begin(as_typed, verb, list(argv), waits=verb != "data", forks=not launch.gpu_count(), name=verb)
    try:
        process.join()
    except KeyboardInterrupt as stop:
        # A terminal's Ctrl-C has gone to the stage too; another signal has not. Both let it write its checkpoint.
        if isinstance(stop, Interrupted) and process.is_alive() and process.pid:
            os.kill(process.pid, stop.number)
        process.join()
        raise
    return -signal.SIGKILL if process.exitcode == SERVER_KILLED else process.exitcode or 0


SERVER_KILLED = 255
"""multiprocessing's code of a process whose server has ended, and it with that"""


def as_typed(verb: str, argv: list[str]) -> None:
    """`python -m src.VERB ARGV`, in this process."""
    sys.argv = [verb, *argv]
    if verb in NO_STAGE:
        runpy.run_module(f"src.{verb}", run_name="__main__", alter_sys=True)
    stage.main(recipe.stage_of(verb))  # not by runpy, whose module its own processes could not import


NO_STAGE = ("pipeline", "summary", "report")
"""verbs that this one begins beside the stages"""


def ended(verb: str, code: int) -> int:
    """Say where the road ended, and how it goes on."""
    if code == GateFailed.exit_code:
        say(f"pipeline: ended at {verb}: a gate was not kept to. Look at the report it names; gate=none goes on regardless")
    elif code == Unfinished.exit_code:
        say(f"pipeline: ended at {verb}: all that can be made here is made; the same command goes on once its tool is there")
    else:
        say(f"pipeline: ended at {verb} with exit code {code}; the same command goes on from there")
    return 128 - code if code < 0 else code
