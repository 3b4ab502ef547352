"""What a model says in a board's numbers, before anything is compiled: loss, KL and likeliest tokens on held-out conversations against the model as it is,
how far each layer is off, and beside them what it takes of the board and how fast that is expected to be."""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.chat import encoding
from src.core import stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, UserError, WrongKind
from src.core.files import write_json
from src.core.log import out as print_out
from src.core.log import say, size, table
from src.core.room import Needs
from src.models import checks, comparison, evaluation, fidelity, gates, seen
from src.models.loading import tokenizer_of
from src.settings.evaluations import Gate
from src.settings.targets import Target
from src.settings.verbs import EvaluateVerb
from src.sizing import budget, chart, host, numerics, speed, takes
from src.sizing.config_reader import read_config, read_shape
from src.sizing.numerics import Numerics
from src.sizing.shape import ModelShape

KINDS = {"model", "quantized"}
GATED = ("kl", "agreement", "perplexity_ratio")
"""what gates can limit of one kind of numbers"""
Ask = Callable[[Any], list[dict]]
"""what gives a model's answers"""
UNKEPT = "Keys and values are not rounded: this family's attention hands them to no cache."


@dataclass(frozen=True)
class Preview:
    """change: from the model as it is. layers: see on_board.layers. kept: whether keys and values were rounded. answers: see evaluation.answer."""

    how: Numerics
    change: fidelity.Change
    layers: list[dict[str, float]]
    kept: bool
    answers: list[dict]

    @property
    def assumed(self) -> tuple[str, ...]:
        return self.how.assumed + (() if self.kept or self.how.kv == numerics.FP32 else (UNKEPT,))

    @property
    def worst(self) -> int:
        """The layer whose own numbers move its output most."""
        return max(range(len(self.layers)), key=lambda number: self.layers[number]["error"])


def previews(
    model: Artifact, kinds: list[Numerics], rows: list[encoding.Encoded], *, layers: bool = True, ask: Ask | None = None
) -> tuple[list[Preview], list[dict]]:
    """(the model in each of the kinds, its answers as it is). Memory is that of a layer in fp32, and of all of them where there is something to `ask`. Raises
    WrongKind for a model that cannot be taken so.

    layers: False saves two of the three times that each layer is read for a kind of numbers.
    """
    from src.models import by_layer, on_board

    if not (loaded := by_layer.load(model)):
        raise WrongKind(
            "this model cannot be taken layer by layer, which a board's numbers are tried in",
            where=str(model.path),
        )
    walk, _ = loaded
    before, plain = seen.observe(seen.by_layer(walk, "as it is"), rows), _answers(walk, ask, model.path)
    found: list[Preview] = []
    for how in kinds:
        same = next((one for one in found if one.how.words() == how.words()), None)
        if same:
            found.append(replace(same, how=how, answers=[dict(row) for row in same.answers]))
            continue
        with on_board.computing(walk, how) as keeps:
            after = seen.observe(seen.by_layer(walk, how.name), rows, before.top_k_ids)
            answers = _answers(walk, ask, model.path)
        off = on_board.layers(walk, how, [row.input_ids for row in rows]) if layers else []
        found.append(Preview(how, fidelity.compare(before, after, len(rows)), off, keeps.used, answers))
    return found, plain


def _answers(walk, ask: Ask | None, folder: Path) -> list[dict]:
    """What is answered with all of the weights in memory."""
    if not ask:
        return []
    from transformers import GenerationConfig

    with walk.whole() as model:
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return ask(model)


def before_compile(model: Artifact, target: Target, dataset: Path | None, count: int, gate: Gate) -> dict[str, float]:
    """Tries the model in the target's numbers on `count` held-out conversations, and says what they lose; returns it as metrics, empty where it was not
    tried, which is said too. Raises what `judge` does."""
    tried = _tried(model, target, dataset, count)
    judge(gate, tried, str(model.path))
    return tried


def judge(gate: Gate, tried: dict[str, float], where: str) -> None:
    """Raises GateFailed where the model loses more in a board's numbers than the limits allow, ConfigError where that is not known."""
    if not gates.limits(gate):
        return
    if not tried.keys() >= {f"preview_{name}" for name in GATED}:
        raise ConfigError(
            "gate limits what the model loses in the target's numbers, and it was not tried in them", where=where, fix="gate=none"
        )
    gates.judge(gate, {name: tried[f"preview_{name}"] for name in GATED} | {"intervals": dict.fromkeys(GATED)}, where, "deploy")


def _tried(model: Artifact, target: Target, dataset: Path | None, count: int) -> dict[str, float]:
    if not count or dataset is None:
        say(f"not tried in the numbers of {target.name}: {'preview=0' if not count else 'no dataset is known'}")
        return {}
    try:
        how = numerics.of(read_shape(model.path), target)
        if not (rows := fidelity.held_out(dataset, tokenizer_of(model), model.path)[:count]):
            return {}
        change = previews(model, [how], rows, layers=False)[0][0].change
    except UserError as error:
        say(f"not tried in the numbers of {target.name}: {error.what}")
        return {}
    say(f"{how.name}, before the compile: {change.told('as it is', 'in its numbers')}")
    return {f"preview_{name}": value for name, value in _gated(change).items()}


def _gated(change: fidelity.Change) -> dict[str, float]:
    """The figures of GATED."""
    return dict(zip(GATED, (change.kl, change.agreement, math.exp(min(change.loss, 700)))))


def figures(one: Preview, shape: ModelShape) -> dict[str, Any]:
    """A preview's row of the table: bytes of the weights and of all that the board holds, expected tokens/s (None: not known), and what was lost."""
    target = one.how.target
    form, fit = budget.format_of(shape, target), budget.board_fit(shape, target)
    rates = speed.rates_of(budget.board_of(target))
    weights = budget.layer_bytes(shape, form) + budget.head_bytes(shape, form)
    return {
        "name": one.how.name,
        "weights": weights + (0 if form.apart else budget.embedding_bytes(shape, form)),
        "on_board": fit.needed,
        "fits": fit.fits,
        "tokens_per_second": round(1000 / speed.decode_ms(shape, form, rates, form.context), 2) if rates else None,
        "loss": one.change.after,
        "loss_waver": one.change.loss_waver,
        "kl": one.change.kl,
        "kl_waver": one.change.kl_waver,
        "agreement": one.change.agreement,
    }


def fitted(target: Target, shape: ModelShape) -> Target:
    """The target with lengths within the model's own limit."""
    limit = shape.max_positions
    if not limit or getattr(target, "context_len", 0) <= limit:
        return target
    lengths = {"context_len": limit, "prompt_len": limit // 2}
    return target.model_copy(update={name: value for name, value in lengths.items() if name in type(target).model_fields})


# ---- python -m src.evaluate numerics=NAME


def find(cfg: EvaluateVerb, run: stage.Run) -> dict[str, Artifact]:
    """The model that `deploy` would take, and the dataset. Raises ConfigError for a name that is none."""
    asked(cfg)
    model = run.source(cfg.source, "merge", "finetune", "quantize", "cpt", "pretrain", kinds=KINDS)
    return {"model": model, "dataset": stage.data_sources(run, cfg.dataset)}


def name(cfg: EvaluateVerb) -> str:
    """What follows the report's own name: -ax650_s8, or -numerics for several."""
    return f"-{cfg.numerics}" if isinstance(cfg.numerics, str) and cfg.numerics != numerics.ALL else "-numerics"


def asked(cfg: EvaluateVerb) -> dict[str, Target]:
    listed = lambda value: [value] if isinstance(value, str) else list(value or [])
    return numerics.chosen(listed(cfg.numerics), listed(cfg.target))


def kinds_of(cfg: EvaluateVerb, model: Path) -> tuple[list[Numerics], list[str]]:
    """(what is asked for, why others of `all` are left out). Raises WrongKind for one that does not take this model."""
    config, where = read_config(model)
    shape = read_shape(model)
    found, left = [], []
    for each, target in asked(cfg).items():
        target = fitted(target, shape)
        try:
            with contextlib.suppress(ConfigError):  # of settings that the compiler is given, not of the model
                takes.check(config, target, where=str(where))
            found.append(numerics.of(shape, target))
        except WrongKind as error:
            if numerics.ALL not in (cfg.numerics or ()):
                raise
            left.append(f"{each} is left out: {error.what}")
    return found, left


def check(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> list[str]:
    kinds, left = kinds_of(cfg, inputs["model"].path)
    records = evaluation.validation(inputs["dataset"], cfg.evaluation)
    checked, _ = checks.to_check(cfg.evaluation, inputs, records)
    gates.refuse_unmeasured(cfg.gate, () if len(kinds) > 1 else (*GATED, "task_difference") if checked else GATED)
    asks = f"asks {len(checks.asked(cfg.evaluation, records))} prompts in each" + (f", and checks {checked.words}" if checked else "")
    return [f"{inputs['model'].path} in the numbers of {', '.join(how.name for how in kinds)}", asks, *left]


def needs(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> Needs:
    return host.preview(read_shape(inputs["model"].path), cfg.evaluation, host.conversations(inputs["dataset"].path / "val.jsonl"))


def report(cfg: EvaluateVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes report.json and, of several, size_kl.png; prints the table."""
    model = inputs["model"]
    shape, (kinds, _) = read_shape(model.path), kinds_of(cfg, model.path)
    tokenizer = tokenizer_of(model)
    encoding.ensure_chat(tokenizer)
    records = evaluation.validation(inputs["dataset"], cfg.evaluation)
    rows = evaluation.encode_all(records, tokenizer, cfg.evaluation.max_length)
    prompts, eos_id = checks.asked(cfg.evaluation, records), encoding.turn_end(tokenizer)
    ask = lambda one: evaluation.answer(one, tokenizer, prompts, cfg.evaluation, eos_id)
    found, plain = previews(model, kinds, rows, ask=ask if prompts else None)
    found.sort(key=lambda one: one.change.kl)
    told = [figures(one, shape) | of_answers(cfg, inputs, records, one.answers, plain, tokenizer) for one in found]
    whole = found[0].change
    metrics: dict[str, Any] = {"loss": whole.before, "rows": whole.rows, "tokens": whole.tokens}
    if len(found) == 1:
        metrics |= told[0]["answers"] | _gated(whole)
        metrics["intervals"] = metrics.get("intervals", {}) | dict.fromkeys(GATED)
    details = [
        {**row, "formats": one.how.words(), "assumed": one.assumed, "layers": one.layers, "worst_layer": one.worst}
        for row, one in zip(told, found)
    ]
    write_json(out / "report.json", {**metrics, "numerics": details})
    if plain:
        by = {"as it is": plain} | {one.how.name: one.answers for one in found}
        lines = (json.dumps({"by": name, **row}, ensure_ascii=False) + "\n" for name, some in by.items() for row in some)
        (out / "answers.jsonl").write_text("".join(lines), encoding="utf-8")
    if len(found) > 1:
        chart.draw_choices(
            [(row["name"], row["weights"], row["kl"]) for row in told], f"{model.path.name}: size and loss", out / "size_kl.png"
        )
    print_out(show(told))
    if plain:
        say(_of_plain(told[0]["answers"]) + "; answers.jsonl has the answers of each")
    for one in found:
        layer = one.layers[one.worst]
        say(
            f"{one.how.name}: layer {one.worst} is off most by itself, by {layer['error']:.1%} of its output (cosine {layer['cosine']:.5f})"
        )
    for sentence in dict.fromkeys(sentence for one in found for sentence in one.assumed):
        say(f"assumed: {sentence}")
    return {**metrics, "numerics": {row.pop("name"): row for row in told}}


def of_answers(cfg: EvaluateVerb, inputs: dict[str, Artifact], records: list[dict], mine: list[dict], plain: list[dict], tokenizer) -> dict:
    """{"answers": figures of the answers in a kind of numbers against those of the model as it is}."""
    if not plain:
        return {"answers": {}}
    answers = {"model": mine, "parent": plain}
    check, references = checks.to_check(cfg.evaluation, inputs, records)
    checked, right = checks.score(check, references, answers, tokenizer) if check else ({}, {"model": []})
    parts = [("", comparison.of_answers(mine, plain, tokenizer)), *([("", comparison.of_task(right))] if right["model"] else [])]
    return {
        "answers": {
            "prompts": len(mine),
            **(checked if right["model"] else {}),
            **checks.expected(cfg.evaluation, answers),
            **comparison.report(parts),
        }
    }


def _of_plain(answers: dict) -> str:
    """How well the model as it is answers."""
    told = [f"{answers['parent_task']:.0%} of {answers['task_prompts']} answers right"] if "task" in answers else []
    told += [f"{answers['parent_expected']} of {answers['prompts']} as expected"] if "expected" in answers else []
    return "as it is: " + (", ".join(told) or f"{answers['prompts']} answers, not checked")


def show(told: list[dict[str, Any]]) -> str:
    """The table, ordered by KL."""
    known: Callable[[Any, str], str] = lambda value, form: "?" if value is None else format(value, form)
    columns: dict[str, tuple[str, Callable[[dict], str]]] = {
        "task": ("answers right", lambda one: f"{one['task']:.0%}"),
        "expected": ("as expected", lambda one: f"{one['expected']} of {one['prompts']}"),
        "same_answers": ("same answers", lambda one: f"{one['same_answers']:.0%}"),
    }
    of_answers = dict(column for name, column in columns.items() if name in told[0]["answers"])
    rows = [
        [
            row["name"],
            size(row["weights"]),
            size(row["on_board"]) + (" does NOT fit" if row["fits"] is False else ""),
            known(row["tokens_per_second"], ",.1f"),
            f"{row['kl']:.5f} ± {row['kl_waver']:.5f}",
            f"{row['agreement']:.1%}",
            f"{row['loss']:.4f}",
            *(form(row["answers"]) for form in of_answers.values()),
        ]
        for row in told
    ]
    head = ["numerics", "weights", "on board", "tokens/s", "KL", "same likeliest", "loss", *of_answers]
    return table(head, rows, right=range(1, len(head)))
