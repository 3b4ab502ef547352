"""A recipe: the stages of a road in their order, each as one would type it after `python -m src.`; and whose each setting of a command line is."""

import functools
import importlib
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from src import ROOT
from src.core import artifact, compose
from src.core.errors import ConfigError, MissingInput
from src.core.stage import Stage

FOLDER = compose.CONFIGS / "pipeline"


@dataclass(frozen=True)
class Step:
    """One stage of a road. overrides: its settings as typed. typed: {one of them: what the user typed for it, where that differs}."""

    verb: str
    overrides: tuple[str, ...]
    typed: tuple[tuple[str, str], ...] = ()

    @property
    def words(self) -> str:
        return shlex.join([self.verb, *self.overrides])

    def having(self, override: str, typed: str) -> "Step":
        """With one more setting, in place of what the recipe says for it."""
        key = override.partition("=")[0]
        kept = [o for o in self.overrides if o.partition("=")[0] != key]
        return replace(self, overrides=(*kept, override), typed=(*self.typed, (override, typed)))


def stage_of(verb: str) -> Stage[Any]:
    module = f"src.{verb}.__main__" if (ROOT / "src" / verb).is_dir() else f"src.{verb}"
    found: Stage[Any] = importlib.import_module(module).STAGE
    return found


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read(name: str) -> list[Step]:
    """The steps of a recipe by its name in configs/pipeline, or of a YAML file of the user's. Raises ConfigError, MissingInput."""
    own = name.endswith((".yaml", ".yml"))
    file = Path(name) if own else FOLDER / f"{name}.yaml"
    if own and not file.is_file():
        raise MissingInput("no such recipe file", where=name, fix=f"recipe=NAME takes one that is there: {', '.join(names())}")
    if not own and name not in names():
        raise ConfigError(
            f"recipe={name}: no such recipe{compose.nearest(name, names())}; there is {', '.join(names())}",
            fix="recipe=YOURS.yaml takes one of your own",
        )
    try:
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        steps = [Step(words[0], tuple(words[1:])) for words in map(shlex.split, tree.pop("stages"))]
        fault = f"it has '{next(iter(tree))}' beside its stages" if tree else "it has no stages" if not steps else ""
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError, ValueError, IndexError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
    for step in [] if fault else steps:
        if step.verb not in artifact.ROAD:
            fault = f"'{step.verb}' is no stage of a road{compose.nearest(step.verb, artifact.ROAD)}; there is {', '.join(artifact.ROAD)}"
    if fault:
        raise ConfigError(f"this is no recipe: {fault}", where=str(file), fix=LINES)
    return steps


LINES = "write it as those in configs/pipeline are: `stages:`, then a line `- VERB key=value ...` for each"


def assigned(steps: Sequence[Step], overrides: Iterable[str]) -> tuple[list[Step], list[str]]:
    """(the steps, with each of the user's settings where it belongs, a fault for each that belongs to none).

    STAGE.key=value belongs to that stage, key=value to every stage that has such a setting.
    """
    found, faults = list(steps), []
    for text in overrides:
        key, _, value = text.partition("=")
        first, _, rest = key.partition(".")
        takes, given = [i for i, step in enumerate(found) if knows(step.verb, key)], text
        if not takes and rest:
            takes, given = [i for i, step in enumerate(found) if step.verb == first], f"{rest}={value}"
        if not takes:
            verbs = [step.verb for step in found]
            known = {*verbs, *(top for verb in verbs for top in stage_of(verb).schema.model_fields)}
            faults.append(f"{text}: no stage of this recipe has '{first}'{compose.nearest(first, known)}")
        for i in takes:
            found[i] = found[i].having(given, text)
    return found, faults


def knows(verb: str, key: str) -> bool:
    """Whether a setting is one of a verb's, by the groups it is in: of the verb `data`, data.path is, and path is not."""
    schema: Any = stage_of(verb).schema
    first, _, rest = key.partition(".")
    if first not in schema.model_fields:
        return False
    inner = schema.model_fields[first].annotation
    if not rest or first != verb:
        return True
    return rest.partition(".")[0] in getattr(inner, "model_fields", {})


def composed(steps: Sequence[Step], shared: Sequence[str], faults: Sequence[str] = ()) -> list[Any]:
    """The validated settings of each step. Raises ConfigError with the faults of all of them, each as the user typed it, after those given."""
    settings, found = [], list(faults)
    for step in steps:
        try:
            settings.append(compose.compose(step.verb, [*step.overrides, *shared], stage_of(step.verb).schema))
        except ConfigError as error:
            what = functools.reduce(lambda text, pair: text.replace(*pair), step.typed, error.what)
            found += [f"{step.verb}: {line.removeprefix('  - ')}" for line in what.splitlines() if not FAULTS.fullmatch(line)]
    if found:
        what = found[0] if len(found) == 1 else f"{len(found)} faults\n" + "\n".join(f"  - {fault}" for fault in found)
        raise ConfigError(what, fix=HELP)
    return settings


FAULTS = re.compile(r"\d+ faults")
HELP = "write STAGE.key=value, with a setting as python -m src.STAGE --help lists it"
