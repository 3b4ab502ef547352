"""From a command line to one validated settings object, with every fault reported at once."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import itertools
import re
import typing
from collections.abc import Iterable, Iterator, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, JsonValue, ValidationError

from src import ROOT
from src.core.errors import ConfigError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

M = TypeVar("M", bound=BaseModel)
CONFIGS = ROOT / "configs"

# What other trainers call our settings; only used to suggest the right name.
ELSEWHERE_CALLED = {
    "lr": "learning_rate",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "model_max_length": "max_length",
    "cutoff_len": "max_length",
    "per_device_train_batch_size": "micro_batch_size",
    "batch_size": "global_batch_size",
    "gradient_accumulation_steps": "global_batch_size",
    "warmup_ratio": "warmup",
    "report_to": "tracker",
    "data_path": "data.path",
    "dataset": "data.path",
    "train_file": "data.path",
    "validation_file": "data.val",
    "val_size": "val",
    "val_set_size": "val",
    "split_dataset_ratio": "val",
    "dataset_weights": "weights",
    "interleave_probs": "weights",
    "model_name_or_path": "path",
    "output_dir": "run",
    "desc_act": "act_order",
    "damp_percent": "damp",
}


def compose(verb: str, overrides: list[str], schema: type[M]) -> M:
    """The settings of `verb`: configs/<verb>.yaml with the overrides on top, validated.

    Unknown keys are named as typed with the nearest valid one; the others are still validated, so that one run shows every fault.
    Raises ConfigError.
    """
    parsed, faults = _parse(overrides)
    groups = groups_of(verb)
    chosen: list[Override] = []
    keyed: list[Override] = []
    for override in parsed:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or override.is_delete() or override.package:
            faults.append(f"{override.input_line}: settings can be changed, not added or removed; write {key}=VALUE")
        else:
            (chosen if key in groups else keyed).append(override)
    for override in list(chosen):
        value, options = override.value(), groups[override.key_or_group]
        names = [str(name) for name in (value if isinstance(value, list) else [value])]
        if isinstance(value, list) and not _takes_several(schema, override.key_or_group):
            faults.append(
                f"{override.input_line}: one {override.key_or_group} at a time; write {override.key_or_group}={names[0] if names else 'NAME'}"
            )
            chosen.remove(override)
            continue
        for name in names:
            if name not in options:
                faults.append(
                    f"{override.input_line}: no such {override.key_or_group}{nearest(name, options)}; there is {', '.join(sorted(options))}"
                )
        if any(name not in options for name in names):
            chosen.remove(override)
    composed = _hydra(verb, [str(o.input_line) for o in chosen])
    tree = _plain(composed)
    known = leaves(tree)
    valid = []
    for override in keyed:
        key = override.key_or_group
        if key in known or _inside(tree, key) or key.rpartition(".")[0] in _open(schema):
            valid.append(override)
        else:
            faults.append(f"{override.input_line}: unknown setting '{key}'{_elsewhere(verb, key, groups) or nearest(key, known)}")
    found: list[M] = []
    try:
        tree = _plain(composed, valid, _open(schema))
        faults += [f"{key}: must be given, as {key}=VALUE" for key, value in leaves(tree).items() if value == "???"]
        found.append(schema.model_validate(tree))
    except ValidationError as error:
        by_key: dict[str, list[str]] = {}  # a setting that may be of several kinds has a fault for each
        for one in error.errors():
            if one["input"] != "???":
                key, message = _fault(one, tree)
                by_key.setdefault(key, []).append(message)
        faults += [f"{key}{' or '.join(messages)}" for key, messages in by_key.items()]
    except _hydra_error() as error:
        faults.append(str(error).splitlines()[0])
    if faults:
        what = faults[0] if len(faults) == 1 else f"{len(faults)} faults\n" + "\n".join(f"  - {fault}" for fault in faults)
        raise ConfigError(what, fix=f"python -m src.{verb} --help lists every setting")
    return found[0]


def sweeps(overrides: Iterable[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """([(key, values as typed)] of those that Hydra sweeps over, such as train.epochs=1,2, and the others as they are)."""
    swept, others = [], []
    for text in overrides:
        parsed, _ = _parse([text], sweeping=True)
        if parsed and parsed[0].is_sweep_override():
            swept.append((parsed[0].key_or_group, text.partition("=")[2]))
        else:
            others.append(text)
    return swept, others


def values(override: str) -> list[str]:
    """Each value of a sweep over a list, as typed; none of one over a range that only a sweeper can draw from."""
    parsed, _ = _parse([override], sweeping=True)
    return [str(value) for value in parsed[0].sweep_string_iterator()] if parsed and parsed[0].is_discrete_sweep() else []


def with_path(argv: list[str], setting: str) -> list[str]:
    """The overrides of a command line that may have a path in front, or anywhere among them, in place of `setting`=PATH. Raises ConfigError for two."""
    paths = [text for text in argv if not text.startswith("-") and ("=" not in text or Path(text).exists())]
    if len(paths) > 1:
        raise ConfigError(f"one PATH at a time, not {' and '.join(paths)}", fix="name one")
    quoted = [f"{setting}='" + path.replace("'", "\\'") + "'" for path in paths]
    return quoted + [text for text in argv if text not in paths]


def each(overrides: list[str], *names: str) -> list[list[str]]:
    """The overrides once for each combination of what is given as a list, as in target=[ax650,ax630c], to one of `names`, in the order of `names`."""
    lists: dict[str, list[str]] = {}
    for override in _parse(overrides)[0]:
        key, value = override.key_or_group, override.value()
        if key in names and isinstance(value, list):
            lists[key] = [f"{key}={one}" for one in value]
    rest = [text for text in overrides if text.partition("=")[0] not in lists]
    return [[*rest, *chosen] for chosen in itertools.product(*(lists[name] for name in names if name in lists))]


def _takes_several(schema: type[BaseModel], group: str) -> bool:
    """Whether several options of a group go together, each under a name of its own, as trackers do."""
    field = schema.model_fields.get(group)
    return field is not None and typing.get_origin(field.annotation) is dict


def _hydra_error() -> tuple[type[Exception], type[Exception]]:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return (HydraException, OmegaConfBaseException)


def _hydra(verb: str, options: list[str]) -> DictConfig:
    """configs/<verb>.yaml with these options of its groups, as OmegaConf holds it."""
    return copy.deepcopy(_read(CONFIGS, verb, tuple(options)))


@functools.cache
def _read(configs: Path, verb: str, options: tuple[str, ...]) -> DictConfig:
    import hydra

    with hydra.initialize_config_dir(str(configs), version_base="1.3"):
        return hydra.compose(verb, list(options))


def _open(schema: type[BaseModel], prefix: str = "") -> set[str]:
    """Dotted keys of the settings that hold any keys of the user's, such as template."""
    found = set()
    for name, field in schema.model_fields.items():
        if typing.get_origin(field.annotation) is dict and typing.get_args(field.annotation)[1] is JsonValue:
            found.add(prefix + name)
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= _open(field.annotation, f"{prefix}{name}.")
    return found


def _plain(tree: DictConfig, changes: Iterable[Override] = (), opened: Set[str] = frozenset()) -> dict[str, Any]:
    """The tree as plain containers, with single settings changed; required values that were not given stay as the string '???'.

    Hydra itself would take a setting that is called as a folder of configs/ for a choice of that group.
    """
    from omegaconf import OmegaConf

    for change in changes:
        value, old = change.value(), OmegaConf.select(tree, change.key_or_group, throw_on_missing=False)
        own = change.key_or_group.rpartition(".")[0] in opened
        if isinstance(value, int | float) and not isinstance(value, bool) and (old is None or isinstance(old, str)) and not own:
            value = str(change.input_line).partition("=")[2].strip()  # text that looks like a number: run=2024_01_05 is not 20240105
        # An empty group, such as teacher.extra, has no keys to merge into and takes any.
        OmegaConf.update(tree, change.key_or_group, value, merge=old != {}, force_add=own)
    return _container(tree)


def _container(tree: object) -> dict[str, Any]:
    """An OmegaConf tree whose keys are names as plain containers, references resolved."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict), "every file in configs/ is a mapping"
    return {str(key): value for key, value in plain.items()}


def _parse(overrides: list[str], *, sweeping: bool = False) -> tuple[list[Override], list[str]]:
    """Hydra's parsed overrides, and a fault for each that is not of the form key=value, or of several values unless `sweeping`."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser, parsed, faults = OverridesParser.create(), [], []
    for text in overrides:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            faults.append(f"'{text}': not UTF-8 text, which a manifest could not name; give the file another name, or a link to it")
            continue
        try:
            override = _override(parser, text)
        except _hydra_error():
            if text.startswith("-"):
                faults.append(f"'{text}': flags belong to the launchers in finetune/; settings are key=value, such as model.path=FOLDER")
                continue
            faults.append(f"'{text}': not of the form key=value (a value with special characters needs quotes: \"key='a, b'\")")
            continue
        if override.is_sweep_override() and not sweeping:
            faults.append(f"'{text}': a list of values to sweep over; run the command once for each, or write a list as [a,b]")
        else:
            parsed.append(override)
    return parsed, faults


_PARTS = re.compile(r"(?:^|(?<=[\[{,:]))[^\[\]{}()',:]*[^\x00-\x7f][^\[\]{}()',:]*")
"""what holds other letters than those of ASCII in a list or mapping, without quotes"""


def _override(parser: OverridesParser, text: str) -> Override:
    """Hydra's reading of a setting. Its grammar knows no letters but those of ASCII outside of quotes: what has others is quoted for it."""
    try:
        return parser.parse_override(text)
    except _hydra_error():
        key, _, value = text.partition("=")
        if value.isascii() or "'" in value or '"' in value:
            raise
        whole = not value.startswith(("[", "{")) and "," not in value
        quoted = f"'{value}'" if whole else _PARTS.sub(lambda part: f"'{part[0].strip()}'", value)
        return dataclasses.replace(parser.parse_override(f"{key}={quoted}"), input_line=text)


def verbs() -> list[str]:
    """Those that are configured."""
    return sorted(file.stem for file in CONFIGS.glob("*.yaml") if file.stem != "base")


def groups_of(verb: str) -> dict[str, set[str]]:
    """{group: its options} for the config groups this verb composes from."""
    from omegaconf import DictConfig, OmegaConf

    whole = OmegaConf.load(CONFIGS / f"{verb}.yaml")
    assert isinstance(whole, DictConfig), "every file in configs/ is a mapping"
    defaults = whole.get("defaults", [])  # alone: the rest may refer to what the options of groups bring
    names = [str(next(iter(d))) for d in defaults if not isinstance(d, str)]
    return {name: {p.stem for p in (CONFIGS / name).glob("*.yaml")} for name in names}


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: value} of every single setting."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _inside(tree: dict[str, Any], key: str) -> bool:
    for part in key.split("."):
        if not isinstance(tree, dict) or part not in tree:
            return False
        tree = tree[part]
    return True


def _elsewhere(verb: str, key: str, groups: dict[str, set[str]]) -> str:
    """A hint where the key belongs to another option of a group: rank under tuner=lora while tuner=full."""
    group, _, rest = key.partition(".")
    if group not in groups or not rest:
        return ""
    owners = sorted(option for option in groups[group] if rest in leaves(_option(group, option)))
    return f"; it belongs to {group}={' or '.join(owners)}" if owners else ""


def defaults(verb: str, options: Iterable[str]) -> dict[str, Any]:
    """The settings of a verb as they are without anything but these options of its groups, such as tuner=full."""
    return _plain(_hydra(verb, list(options)))


def options(group: str) -> dict[str, dict[str, Any]]:
    """{name: what its file says} of every option of a group."""
    return {file.stem: _option(group, file.stem) for file in sorted((CONFIGS / group).glob("*.yaml"))}


def _option(group: str, option: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return _container(OmegaConf.load(CONFIGS / group / f"{option}.yaml"))


def nearest(word: str, options: Iterable[str]) -> str:
    """`; did you mean 'x'?` by spelling, the last part of a dotted key counting as much as the whole."""
    options = sorted(options)
    tails = {o.rsplit(".", 1)[-1]: o for o in reversed(options)}
    tail = ELSEWHERE_CALLED.get(word.rsplit(".", 1)[-1])
    near = (
        [tails.get(tail, tail)]
        if tail in tails or tail in options
        else difflib.get_close_matches(word, options, 1, 0.6)
        or [tails[t] for t in difflib.get_close_matches(word.rsplit(".", 1)[-1], tails, 1, 0.6)]
    )
    return f"; did you mean '{near[0]}'?" if near else ""


def _fault(error: Mapping[str, Any], tree: dict[str, Any]) -> tuple[str, str]:
    """(setting as typed, what is wrong with it): one pydantic error in the words of a command line."""
    key = _typed(error["loc"], tree)
    if key == "run" and error["type"] == "string_pattern_mismatch":
        return f"run={error['input']}: ", "a run's name is a to z, A to Z, digits, '.', '_' and '-', and begins with a letter or digit"
    if error["type"] == "extra_forbidden":
        return "", f"unknown setting '{key}'"
    message = re.sub(
        r"^(Value error|Input should be|String should) ",
        lambda m: "" if m[1] == "Value error" else m[0][0].lower() + m[0][1:],
        error["msg"].replace("Value error, ", ""),
    ).strip()
    shown = "" if isinstance(error["input"], dict) else f"={error['input']}"
    return f"{key}{shown}: ", message


def _typed(place: tuple[int | str, ...], tree: Any) -> str:
    """A pydantic location as the dotted key a user types: without the `kind` that a union of settings classes puts into it."""
    parts = []
    for part in place:
        inside = isinstance(tree, dict) and part in tree
        if inside or not (isinstance(tree, dict) and tree.get("kind") == part):
            parts.append(str(part))
        if inside:
            tree = tree[part]
            if not isinstance(tree, dict | list):
                break  # what follows names a kind that the value might have been of
    return ".".join(parts)


def help_text(verb: str, doc: str | None, schema: type[BaseModel]) -> str:
    """Every setting of a verb with its default and meaning, and the options of its groups."""
    tree, groups = _plain(_hydra(verb, [])), groups_of(verb)
    lines = [(doc or "").strip(), "", f"usage: python -m src.{verb} [key=value ...]", ""]
    for group, options in groups.items():
        lines.append(f"  {group}={'|'.join(sorted(options))}")
    if groups:
        lines.append("")
    settings = list(with_meaning(tree, schema))
    width = min(max(len(left) for left, _ in settings), 44)
    lines += [f"  {left:<{width}}  {meaning}".rstrip() for left, meaning in settings]
    return "\n".join(lines)


def with_meaning(tree: dict[str, Any], schema: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(setting=default, its meaning) of every single setting."""
    for name, field in schema.model_fields.items():
        value, inner = tree.get(name), _model_of(field.annotation, tree.get(name))
        if isinstance(value, dict) and (named := _named_models(field.annotation, value)):
            for key, model in named.items():
                yield from with_meaning(value[key], model, f"{prefix}{name}.{key}.")
        elif inner and isinstance(value, dict):
            yield from with_meaning(value, inner, f"{prefix}{name}.")
        else:
            shown = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
            yield f"{prefix}{name}={shown}", field.description or ""


def _named_models(annotation: Any, value: Any) -> dict[str, type[BaseModel]]:
    """{key: its settings class} of a field that holds settings by name, such as a recipe's steps; empty for any other."""
    origin: Any = typing.get_origin(annotation)
    if origin is not dict or not isinstance(value, dict):
        return {}
    of_one = typing.get_args(annotation)[1]
    union = typing.get_args(of_one)[0] if typing.get_origin(of_one) is typing.Annotated else of_one
    return {key: model for key, one in value.items() if (model := _model_of(union, one))}


def _model_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """The settings class behind a field: itself, or the member of a union whose `kind` the value names."""
    for option in (annotation, *typing.get_args(annotation)):
        if isinstance(option, type) and issubclass(option, BaseModel):
            kind = option.model_fields.get("kind")
            if not (isinstance(value, dict) and kind and value.get("kind") not in typing.get_args(kind.annotation)):
                return option
    return None
