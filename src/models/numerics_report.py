"""`python -m src.evaluate numerics=NAME`: a model tried in the numbers of boards, in a table of what each costs and gains, with the answers that it gives in each."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.chat import encoding
from src.core import stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, WrongKind
from src.core.files import write_json
from src.core.log import out as print_out
from src.core.log import say, size, table
from src.core.room import Needs
from src.models import checks, comparison, evaluation, gates
from src.models.loading import tokenizer_of
from src.models.preview import GATED, Preview, gated, previews
from src.settings.targets import Target
from src.settings.verbs import EvaluateVerb
from src.sizing import budget, chart, host, numerics, speed, takes
from src.sizing.config_reader import read_config, read_shape
from src.sizing.numerics import Numerics
from src.sizing.shape import ModelShape

KINDS = {"model", "quantized"}


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
    """Writes report.json, answers.jsonl and, of several kinds of numbers, size_kl.png; prints the table."""
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
    told = [figures(one, shape) | {"answers": of_answers(cfg, inputs, records, one.answers, plain, tokenizer)} for one in found]
    whole = found[0].change
    metrics: dict[str, Any] = {"loss": whole.before, "rows": whole.rows, "tokens": whole.tokens}
    if len(found) == 1:
        metrics |= told[0]["answers"] | gated(whole)
        metrics["intervals"] = metrics.get("intervals", {}) | dict.fromkeys(GATED)
    write(out, metrics, found, told, plain)
    if len(found) > 1:
        choices = [(row["name"], row["weights"], row["kl"]) for row in told]
        chart.draw_choices(choices, f"{model.path.name}: size and loss", out / "size_kl.png")
    tell(found, told)
    return {**metrics, "numerics": {row.pop("name"): row for row in told}}


def write(out: Path, metrics: dict, found: list[Preview], told: list[dict], plain: list[dict]) -> None:
    details = [
        {**row, "formats": one.how.words(), "assumed": one.assumed, "layers": one.layers, "worst_layer": one.worst}
        for row, one in zip(told, found)
    ]
    write_json(out / "report.json", {**metrics, "numerics": details})
    if plain:
        by = {"as it is": plain} | {one.how.name: one.answers for one in found}
        lines = (json.dumps({"by": name, **row}, ensure_ascii=False) + "\n" for name, some in by.items() for row in some)
        (out / "answers.jsonl").write_text("".join(lines), encoding="utf-8")


def tell(found: list[Preview], told: list[dict]) -> None:
    """The table, and what does not fit into it."""
    print_out(show(told))
    if answers := told[0]["answers"]:
        say(_of_plain(answers) + "; answers.jsonl has the answers of each")
    for one in found:
        layer = one.layers[one.worst]
        off = f"by {layer['error']:.1%} of its output (cosine {layer['cosine']:.5f})"
        say(f"{one.how.name}: layer {one.worst} is off most by itself, {off}")
    for sentence in dict.fromkeys(sentence for one in found for sentence in one.assumed):
        say(f"assumed: {sentence}")


def of_answers(cfg: EvaluateVerb, inputs: dict[str, Artifact], records: list[dict], mine: list[dict], plain: list[dict], tokenizer) -> dict:
    """Figures of the answers in a kind of numbers against those of the model as it is; none where nothing was asked."""
    if not plain:
        return {}
    answers = {"model": mine, "parent": plain}
    check, references = checks.to_check(cfg.evaluation, inputs, records)
    checked, right = checks.score(check, references, answers, tokenizer) if check else ({}, {"model": []})
    parts = [("", comparison.of_answers(mine, plain, tokenizer)), *([("", comparison.of_task(right))] if right["model"] else [])]
    return {
        "prompts": len(mine),
        **(checked if right["model"] else {}),
        **checks.expected(cfg.evaluation, answers),
        **comparison.report(parts),
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
