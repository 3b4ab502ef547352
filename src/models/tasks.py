"""Tasks of lm-eval (EleutherAI's lm-evaluation-harness), by their names. It makes the requests and counts what is right; what a model says at them is read
as everywhere here: a layer at a time on a CPU, whatever holds the weights, and only where it is asked.
"""

import importlib
import importlib.util
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from src.chat.encoding import IGNORE, Encoded
from src.core.errors import BadData, ConfigError, MissingTool, using
from src.core.log import table
from src.core.processes import import_quietly
from src.models import comparison, generation, seen
from src.models.evaluation import Measured

NAMED = re.compile(r"^task:\s*[\"']?([^\"'\s#]+)", re.MULTILINE)
LONGEST = 256
"""tokens of an answer where a task does not say"""


class Asked(Protocol):
    """Who is asked."""

    def log_probs(self, rows: list[Encoded]) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of a row's trained tokens, whether each is the likeliest)."""

    def answers(self, prompts: list[str], stops: list[str], most: int) -> list[str]:
        """Greedy continuations up to the first of the stops, of `most` tokens."""


class Local:
    """A model on this machine. batch_size: prompts answered together."""

    def __init__(self, measured: Measured, tokenizer, batch_size: int):
        self.measured, self.tokenizer, self.batch_size = measured, tokenizer, batch_size

    def log_probs(self, rows: list[Encoded]) -> list[tuple[float, bool]]:
        found = seen.observe(self.measured.reader, rows, top_k=0)
        hits = found.likeliest == seen.targets_of(rows)
        at = np.cumsum([len(seen.kept(row)) for row in rows])[:-1]
        return [(-float(losses.sum()), bool(hit.all())) for losses, hit in zip(np.split(found.losses, at), np.split(hits, at))]

    def answers(self, prompts: list[str], stops: list[str], most: int) -> list[str]:
        model, found = self.measured.model, []
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        for begin in range(0, len(prompts), self.batch_size):
            ids = [self.tokenizer(text).input_ids for text in prompts[begin : begin + self.batch_size]]
            given = generation.left_padded(ids, pad, next(model.parameters()).device)
            stop = {"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}
            made = model.generate(**given, **generation.GREEDY, max_new_tokens=most, pad_token_id=pad, **stop)
            found += [self.tokenizer.decode(row, skip_special_tokens=True) for row in made[:, given["input_ids"].shape[1] :]]
        return found


def check(names: list[str]) -> None:
    """Raises MissingTool where lm-eval is not here, ConfigError for a task that it does not know."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingTool(
            "evaluation.tasks are lm-eval's, which is not here",
            fix=["pip install lm-eval==0.4.13", "evaluation.tasks=null leaves them out"],
        )
    manager, tasks = _manager(names)
    if unknown := [name for name in tasks if not manager.match_tasks([name])]:
        raise ConfigError(
            f"lm-eval knows no task '{unknown[0]}'", fix=["evaluation.tasks=[FILE.yaml] for one of your own", "lm-eval ls tasks lists them"]
        )


def files(names: Iterable[str]) -> list[Path]:
    """Those of the tasks that are YAML files of the user's."""
    return [Path(name) for name in names if name.endswith((".yaml", ".yml"))]


def _manager(names: list[str]) -> tuple[Any, list[str]]:
    """(lm-eval's tasks, and the user's beside their files; what they are called)."""
    import_quietly("lm_eval.tasks")
    own = {str(path): path for path in files(names)}
    called = []
    for name in names:
        if name in own and not (found := NAMED.search(own[name].read_text(encoding="utf-8"))):
            raise BadData("the file names no task", where=name, fix="a line task: NAME in it")
        called.append(found[1] if name in own and found else name)
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_path=sorted({str(path.parent) for path in own.values()}) or None)
    return manager, called


def run(
    names: list[str], asked: Asked, tokenizer, longest: int, limit: int | None, cache: Path | None
) -> dict[str, list[tuple[str, float]]]:
    """{task,metric: (document, figure) of each}. longest: tokens of a row at most, those of its end. limit: documents of each task. cache: an SQLite
    file, which keeps what was said."""
    manager, called = _manager(names)
    evaluator = importlib.import_module("lm_eval.evaluator")
    if cache:
        cache.parent.mkdir(parents=True, exist_ok=True)
    with using("lm-eval", ", ".join(called), fix="evaluation.tasks=null leaves it out"):
        found = evaluator.simple_evaluate(
            model=_as_lm(asked, tokenizer, longest),
            tasks=called,
            task_manager=manager,
            limit=limit,
            use_cache=cache and str(cache),
            bootstrap_iters=0,
        )
    figures: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                if isinstance(value := sample[metric], int | float):
                    figures[f"{task},{metric}"].append((str(sample["doc_id"]), float(value)))
    if not figures:
        raise BadData("these tasks give no figure of each document", where=", ".join(called), fix="evaluation.tasks=null leaves them out")
    return dict(figures)


def _as_lm(asked: Asked, tokenizer, longest: int) -> Any:
    """What lm-eval asks."""
    utils = importlib.import_module("lm_eval.utils")

    template: Any = importlib.import_module("lm_eval.api.model").TemplateLM

    class Model(template):
        @property
        def eot_token_id(self) -> int:
            return tokenizer.eos_token_id

        @property
        def prefix_token_id(self) -> int:
            return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
            return tokenizer(string, **({} if add_special_tokens is None else {"add_special_tokens": add_special_tokens})).input_ids

        def _loglikelihood_tokens(self, requests, **kwargs) -> list[tuple[float, bool]]:
            rows = [_row(context, continuation, longest) for _, context, continuation in requests]
            said = asked.log_probs(rows) if rows else []
            for (key, *_), answer in zip(requests, said):
                self.cache_hook.add_partial("loglikelihood", key, answer)
            return said

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            windows = [
                [
                    utils.make_disjoint_window(pair)
                    for pair in utils.get_rolling_token_windows(self.tok_encode(r.args[0]), self.prefix_token_id, longest - 1, 1)
                ]
                for r in requests
            ]
            said = iter(asked.log_probs([_row(before, counted, longest) for pairs in windows for before, counted in pairs]))
            return [sum(next(said)[0] for _ in pairs) for pairs in windows]

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            groups: dict[tuple, list[int]] = defaultdict(list)
            for i, request in enumerate(requests):
                how = request.args[1]
                stops = [how["until"]] if isinstance(how.get("until"), str) else how.get("until") or []
                groups[(*stops, int(how.get("max_gen_toks") or LONGEST))].append(i)
            found: dict[int, str] = {}
            for (*stops, most), at in groups.items():
                for i, text in zip(at, asked.answers([requests[i].args[0] for i in at], stops, most)):
                    found[i] = min((text.split(stop)[0] for stop in stops if stop), key=len, default=text)
            return [found[i] for i in range(len(requests))]

    return Model()


def _row(context: list[int], continuation: list[int], longest: int) -> Encoded:
    """The end of what is given, and of which the continuation counts."""
    ids, labels = context + continuation, [IGNORE] * len(context) + continuation
    return Encoded(ids[-longest:], labels[-longest:])


def compare(by_role: dict[str, dict[str, list[tuple[str, float]]]]) -> tuple[dict[str, Any], list[tuple[str, comparison.Figures]]]:
    """({"tasks": documents of each figure}, figures by the prefix of their names): each task's mean, the parent's, and the difference, document by document."""
    parts, counts = [], {}
    for name, own in by_role["model"].items():
        values = {role: np.array([value for _, value in each[name]]) for role, each in by_role.items()}
        counts[name] = len(own)
        parts.append((f"{name}_", comparison.of_task(values)))
    return {"tasks": counts}, parts


def in_words(metrics: dict) -> list[str]:
    """A table of the tasks."""
    rows = []
    for name, count in metrics["tasks"].items():
        own = lambda what, form: comparison.shown(metrics, f"{name}_{what}", form) if f"{name}_{what}" in metrics else ""
        evidence = metrics["evidence"].get(f"{name}_task_difference", "")
        rows.append(
            (
                *name.rsplit(",", 1),
                str(count),
                own("parent_task", "{:.4f}"),
                own("task", "{:.4f}"),
                own("task_difference", "{:+.4f}"),
                evidence,
            )
        )
    head = ("task", "metric", "documents", "parent", "model", "difference", "evidence")
    return table(head, rows, right=(2,)).splitlines()
