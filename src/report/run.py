"""What a finished run tells of itself: its artifacts as they are on disk, read once, in the words and order in which the page shows them."""

import functools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from src.chat import encoding
from src.chat.rows import parts
from src.core import artifact, compose
from src.core.artifact import Artifact
from src.core.errors import BadData
from src.core.log import duration, size

TRAINED = ("finetune", "cpt", "pretrain")
FORMS = ("finetune", "merge", "quantize")
"""what evaluations are of, in the order of the road"""


@dataclass(frozen=True)
class Finished:
    """What of a run is finished. artifacts: the finished, in the order of the road, by name."""

    folder: Path
    artifacts: dict[str, Artifact]

    @property
    def name(self) -> str:
        return self.folder.name

    def of(self, stage: str) -> list[Artifact]:
        return [a for a in self.artifacts.values() if a.stage == stage]

    def first(self, stage: str) -> Artifact | None:
        return next(iter(self.of(stage)), None)

    @property
    def trained(self) -> Artifact | None:
        """What was trained on conversations, or else on plain text."""
        return next((found for stage in TRAINED if (found := self.first(stage))), None)

    @property
    def dataset(self) -> Artifact | None:
        """The run's own, or the one its training names, where that is still there."""
        own = next((a for a in self.artifacts.values() if a.kind == "dataset"), None)
        tuned = self.first("finetune")
        record = tuned.parent("dataset") if tuned else None
        if own or not tuned or not record:
            return own
        path = tuned.path_of(record)
        return artifact.open_artifact(path) if artifact.is_finished(path) else None


def read(folder: Path) -> Finished:
    return Finished(folder, artifact.of_run(folder))


# ---- the road


def road(run: Finished) -> list[dict[str, Any]]:
    """Each artifact as a station: its name, kind, key, size, time, and what it was made from."""
    return [
        {
            "name": name,
            "kind": a.kind,
            "key": a.key[:12],
            "size": size(sum(file["size"] for file in a.files.values())),
            "time": duration(a.manifest["seconds"]) if a.manifest else "",
            "parents": [{"role": p["role"], "name": Path(p["path"]).name, "key": p["key"][:12]} for p in (a.manifest or {})["parents"]],
            "old": artifact.replaced_since(a),
        }
        for name, a in run.artifacts.items()
    ]


# ---- the data


def records(dataset: Artifact, split: str, most: int | None = None) -> list[dict]:
    """The first conversations of a split."""
    file = dataset.path / f"{split}.jsonl"
    if not file.is_file():
        return []
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for _, line in zip(range(most or 1 << 62), lines, strict=False)]


@functools.cache
def tokenizer_of(model: Path) -> Any:
    from src.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    encoding.ensure_chat(tokenizer)
    return tokenizer


@dataclass(frozen=True)
class SeenRow:
    """A row as the model sees it: its tokens, those that are trained, and its text in (text, whether it is trained) parts."""

    tokens: int
    trained: int
    parts: list[tuple[str, bool]]


def encoded(rows: Sequence[dict], model: Path, shown: int = 3) -> Iterator[SeenRow]:
    """The rows through the model's template; parts of the first `shown` alone. What teaches nothing, or what its template refuses, is left out."""
    tokenizer = tokenizer_of(model)
    for number, row in enumerate(rows):
        try:
            found = encoding.encode(tokenizer, row["messages"], row.get("tools"))
        except BadData:
            continue
        yield SeenRow(len(found.input_ids), found.trained, parts(found.input_ids, found.labels, tokenizer) if number < shown else [])


# ---- evaluations


def evaluations(run: Finished) -> list[tuple[str, Artifact]]:
    """(what was measured, the report) in the order of the road."""
    found = [(name.removeprefix("evaluate-"), a) for name, a in run.artifacts.items() if a.stage == "evaluate"]
    place = {form: i for i, form in enumerate(FORMS)}
    return sorted(found, key=lambda one: (place.get(one[0], len(place)), one[0]))


def rows_of(report: Artifact) -> list[dict]:
    file = report.path / "rows.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []


def answers(run: Finished) -> tuple[list[str], list[dict[str, Any]]]:
    """(names of the models, what each answered to each prompt, with the messages that stood before it). The first model's parent stands before it."""
    names: list[str] = []
    by_prompt: dict[str, dict[str, str]] = {}
    for number, (form, report) in enumerate(evaluations(run)):
        file = report.path / "answers.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            one = json.loads(line)
            if one.get("by") == "parent" and number:
                continue
            name = "before" if one.get("by") == "parent" else form
            if name not in names:
                names.append(name)
            before = (f"{message.get('role')}: {message.get('content')}" for message in one.get("before", ()))
            by_prompt.setdefault("\n".join((*before, str(one["prompt"]))), {})[name] = str(one.get("answer", ""))
    names.sort(key=lambda name: name != "before")
    return names, [{"prompt": prompt, "by": by} for prompt, by in by_prompt.items()]


# ---- how it is made again


def commands(run: Finished) -> list[str]:
    """The command of each artifact, as one would type it: what its settings differ in from the defaults, and its outside inputs."""
    made = []
    for name, a in run.artifacts.items():
        words = [f"python -m src.{a.stage} run={run.name}", *chosen(a), *outside(a, run)]
        if run.folder.parent != Path("outputs"):
            words.append(f"outputs={run.folder.parent}")
        if a.stage == "evaluate" and not any(word.startswith("source=") for word in words):
            words.append(f"source={run.folder / name.removeprefix('evaluate-')}")
        made.append(" ".join(words))
    return made


def chosen(a: Artifact) -> list[str]:
    """Overrides that lead from the defaults to an artifact's settings."""
    groups = {}
    for group in compose.groups_of(a.stage):
        if isinstance(own := a.settings.get(group), dict):
            differing = {name: len(different(tree, own)) for name, tree in compose.options(group).items()}
            groups[group] = min(differing, key=lambda name: (differing[name], name))
    options = [f"{group}={name}" for group, name in groups.items()]
    usual = compose.defaults(a.stage, options)
    plain = compose.defaults(a.stage, [])
    named = [f"{group}={name}" for group, name in groups.items() if usual.get(group) != plain.get(group)]
    return [*named, *(f"{key}={spelled(value)}" for key, value in different(usual, a.settings).items())]


def different(tree: dict[str, Any], own: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{dotted key: the artifact's value} of what is not as in the tree; keys that only one has are outside an artifact's key, or of another option."""
    found: dict[str, Any] = {}
    for key, value in own.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            found |= different(tree[key], value, f"{prefix}{key}.")
        elif key not in tree or not same(tree[key], value):
            found[f"{prefix}{key}"] = value
    return found


def same(one: Any, other: Any) -> bool:
    try:
        return one == other or float(one) == float(other)
    except (TypeError, ValueError):
        return str(one) == str(other)


def spelled(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else "null" if value is None else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return f"'{text}'" if any(c in text for c in ' "{}[]$&;|<>()*?') and "'" not in text else text


OUTSIDE = {
    "prompts": "prompts.path",
    "chat_template": "chat_template",
    "deepspeed": "deepspeed.config",
    "val": "data.val",
    "text": "text",
    "tokenizer": "tokenizer",
}
"""role of an outside input -> the setting that names it"""


def outside(a: Artifact, run: Finished) -> list[str]:
    """Settings that name the inputs that are not of this run."""
    words, files = [], []
    for parent in (a.manifest or {})["parents"]:
        path = a.path_of(parent)
        if path.parent.absolute() == run.folder.absolute():
            continue
        if parent["role"].startswith("conversations"):
            files.append(str(path))
        elif parent["role"] == "model":
            words.append(f"{'model.path' if a.stage in TRAINED else 'base' if a.stage == 'merge' else 'source'}={path}")
        elif parent["role"] == "dataset":
            words.append(f"{'source' if a.stage == 'finetune' else 'dataset'}={path}")
        elif setting := OUTSIDE.get(parent["role"]):
            words.append(f"{setting}={path}")
    if files:
        words.append(f"data.path={files[0] if len(files) == 1 else json.dumps(files)}")
    return [shlex.quote(word) for word in words]
