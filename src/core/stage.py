"""The one door every verb goes through: compose -> validate -> open inputs -> check -> room -> run -> seal. Sole owner of Hydra.

A stage is a function `run(cfg, inputs, out) -> metrics`. It does not parse, choose folders, write manifests or know who runs next.
"""

import errno
import json
import os
import re
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from src.core import artifact, card, compose, private, room, tracking
from src.core.artifact import Artifact
from src.core.errors import NO_SPACE, BadData, ConfigError, GateFailed, MissingInput, Moved, NoRoom, UserError, WrongKind
from src.core.files import HashCache, flatten
from src.core.log import duration, rank, say, size, tell, warn
from src.core.processes import Interrupted, end_with_parent, interrupted_by_signals
from src.core.watch import watched
from src.settings.verbs import Verb

ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}


@dataclass(frozen=True)
class Run:
    """The folder <outputs>/<run> and what is finished in it. dry: nothing is written, caches included."""

    folder: Path
    dry: bool = False

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def cache(self) -> HashCache:
        """Hashes of outside inputs, shared by all runs; a dry run adds none."""
        return HashCache(self.folder.parent / ".cache" / "hashes.json", keeps=not self.dry)

    def has(self, name: str) -> bool:
        return artifact.is_finished(self.folder / name)

    def open(self, name: str) -> Artifact:
        """A finished artifact of this run by its name."""
        if self.has(name):
            return artifact.open_artifact(self.folder / name)
        verb = name.split("-")[0]
        others = (
            sorted(p.name for p in self.folder.parent.glob("*") if artifact.is_finished(p / name)) if self.folder.parent.is_dir() else []
        )
        make = f"python -m src.data {self.overrides} data.path=YOURS" if verb == "data" else f"python -m src.{verb} {self.overrides}"
        raise MissingInput(
            f"run '{self.name}' has no finished '{name}'",
            where=str(self.folder / name),
            fix=[make, *(f"run={other} has one" for other in others[:3])],
        )

    @property
    def overrides(self) -> str:
        """The settings that name this run."""
        folder = self.folder.parent
        return f"run={self.name}" + (f" outputs={folder}" if folder != Path("outputs") else "")

    def current(self, found: Artifact) -> Artifact:
        """The artifact, unless something it was made from was made anew since: building on it would mix two runs."""
        if outdated := artifact.replaced_since(found):
            raise Moved(
                outdated,
                where=str(found.path),
                fix=[
                    f"python -m src.{found.stage} {self.overrides} force=true brings it up to date",
                    f"source={found.path} takes it as it is",
                ],
            )
        return found

    def source(self, path: str | None, *names: str, kinds: set[str]) -> Artifact:
        """The artifact or folder at `path`, or the first finished of this run's `names`; it must be of one of `kinds`."""
        if path is not None:
            found = artifact.open_any(Path(path), self.cache)
        else:
            found = self.open(next((n for n in names if self.has(n)), names[0]))
        if path is None:
            self.current(found)
        elif outdated := artifact.replaced_since(found):
            warn(outdated)
        if found.kind not in kinds:
            raise WrongKind(
                f"this stage takes {' or '.join(sorted(kinds))}, not {found.kind}" + (f" ({found.stage})" if found.manifest else ""),
                where=str(found.path),
                fix=_instead(found, kinds),
            )
        return found


def _instead(found: Artifact, kinds: set[str]) -> list[str]:
    """How to come from an artifact to one of `kinds`: what makes one of it, what it was made from, or what makes one at all."""
    if found.kind == "adapter" and "model" in kinds:
        return [f"python -m src.merge source={found.path} makes a model of it"]
    for parent in found.manifest["parents"] if found.manifest else []:
        if parent["kind"] in kinds:
            return [f"give {found.path_of(parent)}, which it was made from"]
    if "dataset" in kinds:
        return ["python -m src.data data.path=FILE makes a dataset"]
    return ["python -m src.finetune makes an adapter"] if kinds == {"adapter"} else ["give a folder of weights with their config.json"]


def made_again(made: Artifact, setting: str) -> str:
    """The way out where an artifact has to be made with another setting."""
    return f"run the command that made {made.path} again with {setting} force=true"


def data_sources(run: Run, given: str | None) -> Artifact:
    """The dataset a stage trains, measures or calibrates on: the one given, or the run's own."""
    if given is None and run.has("data") and run.has("distill"):
        say(f"the run has two datasets; takes {run.folder / 'data'}, not {run.folder / 'distill'}")
    return run.source(given, "data", "distill", kinds={"dataset"})


V = TypeVar("V", bound=Verb)
Inputs = dict[str, Artifact]
"""{role: what a stage works from}"""


@dataclass(frozen=True)
class Stage(Generic[V]):
    """One verb.

    find(cfg, run) -> {role: Artifact}: opens the inputs and checks their kinds; cheap.
    run(cfg, inputs, out) -> metrics: the work; writes into the folder `out`, returns JSON-able numbers.
    kind: what it produces, or a function of (cfg, inputs).
    name(cfg, inputs) -> folder name of the result inside the run; the verb itself unless given.
    check(cfg, inputs) -> lines of the plan; raises where a tool, device or rule stands in the way. Before torch is imported.
    needs(cfg, inputs) -> memory and disk that the work takes, estimated; the door compares them with what is there.
    each(cfg, run) -> configurations to run in turn, where one call may mean several artifacts.
    instead(cfg, run) -> exit code, where the settings ask for a look and no artifact; None: they do not.
    around(cfg, overrides) -> exit code, where the work runs in processes of its own; None: in this one.
    resumes(partial) -> whether a partial folder holds work worth keeping when the stage fails. A stage with it goes on in a partial folder of the
        same key; without it partial folders are cleared.
    guards(partial) -> whether that work is so costly that one of another key is not cleared unless forced; as `resumes` unless given.
    judge(cfg, made): raises where a finished artifact does not keep to what the settings demand of it. It is kept, and judged again by each call.
    private: the setting that marks what it reads as private, which push then refuses to share, with all that is made from it: its name, and what reads it:
        true, false (which takes a mark away) or None (as it is).
    early(cfg, run) -> the inputs that no other stage makes, checked before those are there; for launchers (--settings-only).
    """

    verb: str
    version: int
    schema: type[V]
    kind: str | Callable[[V, Inputs], str]
    find: Callable[[V, Run], Inputs]
    run: Callable[[V, Inputs, Path], dict[str, Any]]
    doc: str | None
    name: Callable[[V, Inputs], str] | None = None
    check: Callable[[V, Inputs], list[str]] | None = None
    needs: Callable[[V, Inputs], room.Needs] | None = None
    each: Callable[[V, Run], Iterable[V]] | None = None
    instead: Callable[[V, Run], int | None] | None = None
    around: Callable[[V, list[str]], int | None] | None = None
    resumes: Callable[[Path], bool] | None = None
    guards: Callable[[Path], bool] | None = None
    judge: Callable[[V, Artifact], None] | None = None
    private: tuple[str, Callable[[V], bool | None]] | None = None
    early: Callable[[V, Run], Inputs] | None = None


def main(stage: Stage[V]) -> None:
    """Run a verb from the command line and exit: 0 done or up to date, a UserError's own code, 130 interrupted; bugs keep their traceback."""
    sys.exit(guarded(lambda: _main(stage, sys.argv[1:])))


def main_plain(verb: str, doc: str | None, schema: type[V], work: Callable[[V], int]) -> None:
    """Run a verb that makes no artifact: `work(cfg)` returns the exit code."""
    main_uncomposed(verb, doc, schema, lambda overrides: work(compose.compose(verb, overrides, schema)))


def main_uncomposed(verb: str, doc: str | None, schema: type[V], work: Callable[[list[str]], int]) -> None:
    """Run a verb that makes no artifact and composes its settings itself: `work(overrides)` returns the exit code."""

    def run() -> int:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(compose.help_text(verb, doc, schema))
            return 0
        return work(sys.argv[1:])

    sys.exit(guarded(run))


def guarded(work: Callable[[], int]) -> int:
    """Exit code of `work`, with errors a user can mend printed instead of raised. A worker process ends with the one that started it."""
    if launcher := os.environ.get("BOARDWALK_WORKER"):
        end_with_parent(int(launcher))
    try:
        with interrupted_by_signals():
            check_environment()
            code = work()
            sys.stdout.flush()
            tell("")  # what libraries said
            return code
    except KeyboardInterrupt as stop:
        if "BOARDWALK_WORKER" not in os.environ:  # else the process that started the workers says it
            say("interrupted; the same command goes on, from the last checkpoint where there is one")
        return 128 + (stop.number if isinstance(stop, Interrupted) else signal.SIGINT)
    except UserError as error:
        return _report(error)
    except Exception as error:
        if launcher and _lost_a_peer(error):
            return 1  # the process that started the workers says which one was lost
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        fault = _of_the_disk(error)
        if fault is None:
            raise
        return _report(fault)


def check_environment() -> None:
    """Raises ConfigError for a rank or a number of processes that is no number; torchrun sets them."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not (value := os.environ.get(name, "0")).isdecimal():
            raise ConfigError(f"{name}={value} in the environment is no number", fix=f"unset {name}")


def _nobody_reads() -> bool:
    """Whether what reads our stdout has ended, as `| head` does. What is left to print then goes nowhere."""
    watch = select.poll()
    watch.register(1, 0)
    gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return gone


def _report(error: UserError) -> int:
    """Print the error and return its exit code. Of a machine's worker processes, which often fail together, the first one speaks."""
    if status := os.environ.get("BOARDWALK_STATUS"):
        try:
            with open(status, "x") as file:
                file.write(str(error.exit_code))
        except FileExistsError:
            return error.exit_code
    tell(f"{error}\n")
    return error.exit_code


def _lost_a_peer(error: Exception) -> bool:
    """Whether another worker's end is all that went wrong, as gloo and NCCL say it."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("connection closed by peer" in text or "connection reset by peer" in text)


def _of_the_disk(error: Exception) -> UserError | None:
    """Disk-full, permission and file-in-the-way faults, also where a library wraps them in words of its own."""
    if isinstance(error, OSError) and error.errno in ROOM:
        name, what = str(error.filename or ""), error.strerror or str(error)
        there = next((place for place in (Path(name), *Path(name).parents) if os.path.lexists(place)), None)
        if name and there and not os.access(there, os.R_OK | (os.X_OK if there.is_dir() else 0)):
            return MissingInput(f"it cannot be read: {what}", where=name, fix=f"chmod u+rX {shlex.quote(str(there))}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return NoRoom(what, where=name, fix=NO_SPACE)
        if error.errno == errno.ENAMETOOLONG:
            return NoRoom(what, where=name, fix="give it a shorter name")
        return NoRoom(
            what, where=name, fix=["give yourself the right to write there, or move away what is in its place", "outputs=FOLDER_ELSEWHERE"]
        )
    if isinstance(error, OSError) and error.errno is None and "requested and" in str(error):  # numpy's, of a write that was cut short
        return NoRoom(f"the disk is full: {error}", fix=NO_SPACE)
    if type(error).__name__ == "SafetensorError" and "os error" in str(error).lower():
        return NoRoom(str(error), fix=NO_SPACE)
    return None


def _main(stage: Stage[V], argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(compose.help_text(stage.verb, stage.doc, stage.schema))
        return 0
    cfg = compose.compose(stage.verb, [a for a in argv if a != "--settings-only"], stage.schema)
    run = Run(Path(cfg.outputs) / cfg.run, dry=cfg.dry_run)
    if "--settings-only" in argv:
        if stage.early:
            plan_of(stage, cfg, stage.early(cfg, run), run.folder)
        return 0
    if stage.instead and not cfg.dry_run and (code := stage.instead(cfg, run)) is not None:
        return code
    configs = list(stage.each(cfg, run)) if stage.each else [cfg]
    return max(_one(stage, c, run, argv) for c in configs)


@dataclass(frozen=True)
class Ahead:
    """One artifact that a call means. path: where it is or will be. done: it, where it is up to date; else None."""

    inputs: Inputs
    path: Path
    settings: dict[str, Any]
    key: str
    done: Artifact | None


def ahead(stage: Stage[V], cfg: V, run: Run) -> Ahead:
    """What a call has before it. Raises Moved where something made or begun otherwise, or nothing of ours, is in its place and `force` is not given."""
    inputs = stage.find(cfg, run)
    name = stage.name(cfg, inputs) if stage.name else stage.verb
    path = run.folder / name
    settings = cfg.model_dump(mode="json")
    refuse_secrets(settings)
    key = artifact.key_of(stage.verb, stage.version, settings, {role: a.key for role, a in inputs.items()})
    if cfg.force:
        return Ahead(inputs, path, settings, key, None)
    if artifact.is_finished(path):
        old = artifact.open_artifact(path)
        if old.key == key:
            return Ahead(inputs, path, settings, key, old)
        raise Moved(
            f"'{path}' is finished, but was made otherwise:\n" + "\n".join(f"  {line}" for line in moved(old, stage, settings, inputs)),
            fix=["force=true makes it again in place", f"{_other_run(stage, inputs)} keeps both", "go back to the old settings"],
        )
    for foreign in artifact.in_the_way(path):
        raise Moved(
            f"'{foreign}' is in the way, and Boardwalk neither finished nor began it: {artifact.described(foreign)}",
            fix=[*artifact.NOT_OURS, f"{_other_run(stage, inputs)} leaves it alone"],
        )
    begun = artifact.unfinished(path)
    guards = stage.guards or stage.resumes
    if begun and guards and begun.key != key and guards(begun.path):
        raise Moved(
            f"'{begun.path}' is an unfinished run that can go on, but it was begun otherwise:\n"
            + "\n".join(f"  {line}" for line in moved(begun, stage, settings, inputs)),
            fix=[
                "go back to the old settings: it goes on",
                f"{_other_run(stage, inputs)} keeps both",
                "force=true clears it and starts anew",
            ],
        )
    return Ahead(inputs, path, settings, key, None)


def _one(stage: Stage[V], cfg: V, run: Run, argv: list[str]) -> int:
    found = ahead(stage, cfg, run)
    inputs, path, settings, key, name = found.inputs, found.path, found.settings, found.key, found.path.name
    if found.done:
        say(f"{name}: up to date, skipped (same settings, same parents; key {key[:12]})")
        if stage.private:
            setting, asked = stage.private
            private.settle(found.done, setting, asked(cfg), run.folder.parent, dry=run.dry)
        return _judged(stage, cfg, found.done)
    plan = plan_of(stage, cfg, inputs, path)
    if cfg.dry_run:
        say(f"{stage.verb}: would make {path}")
        for role, a in inputs.items():
            say(f"  from {role}: {a.path} ({a.kind}, {a.stage}, key {a.key[:12]})")
        for line in plan:
            say(f"  {line}")
        return 0
    if stage.around and "BOARDWALK_WORKER" not in os.environ and (code := stage.around(cfg, argv)) is not None:
        return code
    for line in plan:
        say(f"{name}: {line}")
    if rank() != 0:
        stage.run(cfg, inputs, path.with_name(f"{name}.partial"))
        return 0
    setting, asked = stage.private or ("", lambda _: None)
    marked = private.is_to_be(path, inputs.values(), setting, asked(cfg))
    draft = {"version": stage.version, "settings": settings, "parents": artifact.parent_records(inputs, path.parent)}
    with artifact.building(path, key, resumes=stage.resumes, draft=draft, force=cfg.force) as out:
        start = time.monotonic()
        with watched(name):
            metrics = stage.run(cfg, inputs, out)
        seconds = time.monotonic() - start
        kind = stage.kind(cfg, inputs) if callable(stage.kind) else stage.kind
        card.write(out, stage.verb, kind, key, settings, inputs, metrics)
        artifact.seal(
            out,
            stage=stage.verb,
            kind=kind,
            version=stage.version,
            settings=settings,
            inputs=inputs,
            metrics=metrics,
            seconds=seconds,
            private=marked,
        )
    done = artifact.open_artifact(path)
    tracking.finished(getattr(cfg, "tracker", {}), done, cfg.run, settings)
    say(f"{name}: done in {duration(seconds)}, {size(sum(f['size'] for f in done.files.values()))} in {path}")
    return _judged(stage, cfg, done)


def _judged(stage: Stage[V], cfg: V, made: Artifact) -> int:
    """Exit code of the verdict on a finished artifact, said here so that of several all are made and judged."""
    try:
        if stage.judge:
            stage.judge(cfg, made)
    except GateFailed as failed:
        return _report(failed)
    return 0


def plan_of(stage: Stage[V], cfg: V, inputs: Inputs, path: Path) -> list[str]:
    """The lines of the plan: what the stage's own check says, and what it takes of this machine's room. Raises what stands in the way of either.

    A process that a launcher has started leaves the room to the launcher, which has looked at what all of them take together.
    """
    tracking.check(getattr(cfg, "tracker", {}))
    plan = stage.check(cfg, inputs) if stage.check else []
    if stage.needs is None or "WORLD_SIZE" in os.environ:
        return plan
    try:
        needs = stage.needs(cfg, inputs)
    except (BadData, WrongKind) as error:
        return [*plan, f"what it takes of memory and disk is not estimated: {error.what}"]
    return [*plan, room.check(needs, room.here(path), ignore=cfg.room == "ignore")]


SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|CREDENTIALS?)$", re.IGNORECASE)
"""names of environment variables that hold what nobody else is to see"""
SHORTEST_SECRET = 8
"""characters: shorter ones (EMPTY, none) are what servers without a key are given"""


def refuse_secrets(settings: dict[str, Any], variables: Iterable[str] = ()) -> None:
    """Raises ConfigError where a setting holds what one of these environment variables, or one with the name of a secret, does: manifests keep settings."""
    named = {*variables, *(name for name in os.environ if SECRET.search(name))}
    secrets = {name: value for name in sorted(named) if len(value := os.environ.get(name, "")) >= SHORTEST_SECRET}
    for setting, value in flatten(settings).items():
        for name, secret in secrets.items():
            if secret in f"{setting} {value}" or json.dumps(secret)[1:-1] in f"{value}":
                shown = setting.replace(secret, "***")
                raise ConfigError(
                    f"{shown} holds what {name} does in the environment, and the manifest would keep it",
                    fix=f"leave it out of {shown}; a server is sent the key in the variable that its key_env names",
                )


def _other_run(stage: Stage[V], inputs: Inputs) -> str:
    """The overrides that do the same work under another name."""
    first = next(iter(inputs.values()), None)
    if first is None:
        return "run=OTHER_NAME"
    setting = "dataset" if first.kind == "dataset" and "dataset" in stage.schema.model_fields else "source"
    return "run=OTHER_NAME" + (f" {setting}={first.path}" if setting in stage.schema.model_fields and first.manifest else "")


def moved(old: Artifact, stage: Stage[V], settings: dict[str, Any], inputs: Inputs) -> list[str]:
    """One line for each setting, parent or stage version that differs: `tuner.rank 8 -> 16`."""
    before, after = flatten(old.settings), flatten(settings)
    lines = [
        f"{k} {before.get(k, '(not set)')} -> {after.get(k, '(not set)')}"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k)
    ]
    manifest = old.manifest
    assert manifest is not None, "what was begun or finished here has one"
    parents = {p["role"]: p for p in manifest["parents"]}
    for role in sorted(parents.keys() | inputs.keys()):
        was, now = parents.get(role), inputs.get(role)
        if not was or not now or was["key"] != now.key:
            before_words = _name(was["path"], was["key"]) if was else "(none)"
            lines.append(f"parent {role}: {before_words} -> {_name(now.path, now.key) if now else '(none)'}")
    if manifest["version"] != stage.version:
        lines.append(f"stage version {manifest['version']} -> {stage.version}")
    return lines


def _name(path: object, key: str) -> str:
    return f"{path} ({key[:12]})"
