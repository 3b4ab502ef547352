"""Measure a model, adapter or quantized model on the validation split: loss and perplexity over the assistant's tokens, how far what it says is from what
the model it was made from says, and greedy answers to a few prompts. Without source=, every model of the run is measured in turn.

With endpoint.url= a running board or server is measured instead: the same prompts and, where it gives log-probabilities, the same figures, its speed,
and how far its answers are those of the local model it was made from (source=, a bundle too; else the run's own).

With numerics= the model is tried in the numbers that boards compute in, before anything is compiled: numerics=ax650_s8, or numerics=all target=ax650.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from src.chat import encoding
from src.chat.template import as_served_today
from src.core import stage
from src.core.artifact import Artifact, outside
from src.core.errors import ConfigError, MissingInput, UserError, WrongKind
from src.core.log import say
from src.core.room import Needs
from src.models import checks, comparison, devices, evaluation, gates, numerics_report, seen, tasks
from src.models.folder import base_of, weights_of
from src.models.loading import tokenizer_of
from src.records import conversations
from src.records.conversations import Conversation, Tally
from src.records.sources import kinds, opened
from src.records.sources.found import found
from src.serving import measure
from src.serving.client import Client
from src.settings.verbs import EvaluateVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

MEASURED, TEXT = ("finetune", "merge", "quantize"), ("cpt", "pretrain")
"""what a run has of conversations; and where it has none of that, of plain text"""
HERE = ["source=FOLDER without endpoint.url measures the model here"]
BUILT_FROM = ("merge", "finetune", "quantize", "cpt", "pretrain")
"""what a bundle is most likely made from, in this order"""
KINDS = {"adapter", "model", "quantized"}


def each(cfg: EvaluateVerb, run: stage.Run) -> Iterator[EvaluateVerb]:
    """One evaluation for the source or endpoint given, else for every finished model of the run."""
    if cfg.source or cfg.endpoint.url or cfg.numerics:
        return iter([cfg])
    names = [name for name in MEASURED if run.has(name)] or [name for name in TEXT if run.has(name)][:1]
    if not names:
        run.open(MEASURED[0])
    return (cfg.model_copy(update={"source": str(run.current(run.open(name)).path)}) for name in names)


def find(cfg: EvaluateVerb, run: stage.Run) -> dict[str, Artifact]:
    if cfg.numerics:
        return numerics_report.find(cfg, run) | beside(cfg, run)
    if cfg.endpoint.url:
        return find_for_endpoint(cfg, run)
    model = run.source(cfg.source, kinds=KINDS)
    inputs = {"model": model, "dataset": stage.data_sources(run, cfg.dataset)}
    if parent := cfg.parent or parent_path(model):
        inputs["parent"] = run.source(str(parent), kinds=KINDS)
    return inputs | beside(cfg, run)


def beside(cfg: EvaluateVerb, run: stage.Run) -> dict[str, Artifact]:
    """The schema and the general rows, where they are given."""
    inputs = {}
    if cfg.evaluation.json_schema:
        inputs["json_schema"] = files("json_schema", cfg.evaluation.json_schema, run)
        if not inputs["json_schema"].path.is_file():
            raise WrongKind("evaluation.json_schema is one file", where=cfg.evaluation.json_schema)
    if cfg.evaluation.general:
        inputs["general"] = files("general", cfg.evaluation.general, run)
        for file in inputs["general"].files:
            if not opened.table(path := inputs["general"].path / file if inputs["general"].path.is_dir() else inputs["general"].path):
                opened.begins(path)
    for own in tasks.files(cfg.evaluation.tasks or ()):
        inputs[f"task {own.name}"] = outside(existing(own), "file", run.cache)
    return inputs


def existing(task: Path) -> Path:
    if not task.is_file():
        raise MissingInput("evaluation.tasks names a file that is not there", where=str(task), fix="evaluation.tasks=null leaves it out")
    return task


def files(setting: str, path: str, run: stage.Run) -> Artifact:
    """What a setting of evaluation names as data.path does, by content."""
    try:
        there = found(path, subset=None, split="train", revision=None, download=not run.dry)
    except UserError as error:
        error.fix = [way.replace("data.path=", f"evaluation.{setting}=") for way in error.fix]
        raise
    return outside(there.root, "file", run.cache, there.files)


def find_for_endpoint(cfg: EvaluateVerb, run: stage.Run) -> dict[str, Artifact]:
    """The dataset and, as parent, the local model that the endpoint's was made from, where there is one."""
    if cfg.source and cfg.parent:
        raise ConfigError("of a running endpoint, source and parent both name the local model to compare with", fix="leave parent out")
    given, inputs = cfg.parent or cfg.source, {}
    if given or any(run.has(name) for name in BUILT_FROM):
        found = run.source(given, *BUILT_FROM, kinds=KINDS | {"bundle"})
        if found.kind == "bundle" and (record := found.parent("model")):
            found = run.source(str(found.path_of(record)), kinds=KINDS)
        inputs["parent"] = found
    return inputs | {"dataset": stage.data_sources(run, cfg.dataset)} | beside(cfg, run)


def parent_path(model: Artifact) -> Path | None:
    """The model this one was made from, by its manifest: the base of an adapter or a full fine-tune, the adapter of a merge, the model of a
    quantization; None for a folder made elsewhere."""
    if model.kind == "adapter":
        return base_of(model)
    record = model.parent("adapter") or model.parent("model")
    path = model.path_of(record) if record else None
    return path if path and path.is_dir() else None


def name(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> str:
    """evaluate-merge for the run's merge; evaluate-<folder> for a model made elsewhere; evaluate-<host>-<port> for an endpoint."""
    if cfg.endpoint.url:
        parts = urlsplit(cfg.endpoint.url)
        host = re.sub(r"[^A-Za-z0-9._-]+", "-", parts.hostname or "")
        return f"evaluate-{host}-{parts.port or (443 if parts.scheme == 'https' else 80)}"
    folder = re.sub(r"[^A-Za-z0-9._-]+", "-", inputs["model"].path.resolve().name)
    return f"evaluate-{folder}" + (numerics_report.name(cfg) if cfg.numerics else "")


def check(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> list[str]:
    if cfg.evaluation.expect is not None:
        try:
            re.compile(cfg.evaluation.expect)
        except re.error as error:
            raise ConfigError(
                f"evaluation.expect is not a regular expression: {error}",
                where=cfg.evaluation.expect,
                fix="put a backslash before each plain ( [ . * + ?",
            ) from None
    if not inputs["dataset"].files["val.jsonl"]["size"]:
        raise MissingInput(
            "the validation split is empty",
            where=str(inputs["dataset"].path),
            fix=stage.made_again(inputs["dataset"], "data.val=0.1"),
        )
    if cfg.evaluation.tasks:
        if cfg.numerics:
            raise ConfigError("a model is not asked lm-eval's tasks in a board's numbers", fix="evaluation.tasks=null")
        tasks.check(cfg.evaluation.tasks)
    if cfg.numerics:
        for setting, value in (("evaluation.general", cfg.evaluation.general), ("parent", cfg.parent)):
            if value is not None:
                raise ConfigError(
                    f"in a board's numbers a model is held to itself as it is, on conversations: {setting} is of no use",
                    fix=f"{setting}=null",
                )
        return numerics_report.check(cfg, inputs)
    refuse_unmeasured(cfg, inputs)
    parent = f", against {inputs['parent'].path}" if "parent" in inputs else ", no parent to compare with"
    if client := connect(cfg):
        return check_endpoint(cfg, client, inputs, parent)
    return [f"{inputs['model'].path} ({inputs['model'].kind}){parent}", what_is_checked(cfg, inputs)]


def refuse_unmeasured(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> None:
    """Raises ConfigError for what is asked and cannot be told of this model."""
    e = cfg.evaluation
    limits = gates.limits(cfg.gate)
    if cfg.endpoint.url and "kl" in limits:
        raise ConfigError(
            "gate.kl limits what an endpoint does not give: the whole distribution of a next token",
            fix=["gate.kl=null; gate.top1 and gate.perplexity_ratio limit what it may give", *HERE],
        )
    if cfg.endpoint.url and e.tasks and "parent" not in inputs:
        raise ConfigError(
            "lm-eval's requests are tokens of the local model that an endpoint's was made from, and none is known", fix=gates.PARENT
        )
    if e.general and "parent" not in inputs:
        raise ConfigError("what a model forgot is told by the one it was made from, and none is known", fix=gates.PARENT)
    measured = {"kl", "agreement", "perplexity_ratio"} if "parent" in inputs else set()
    measured |= {"general_loss_difference"} if e.general else set()
    measured |= (
        {"task_difference"}
        if measured and "task_drop" in limits and checks.to_check(cfg.evaluation, inputs, validation(cfg, inputs))[0]
        else set()
    )
    gates.refuse_unmeasured(cfg.gate, measured)


def what_is_checked(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> str:
    """What of the answers will be checked, in a line."""
    check, references = checks.to_check(cfg.evaluation, inputs, validation(cfg, inputs))
    if check:
        return f"checks {check.words}, which {sum(map(check.fits, references))} of {len(references)} prompts have in the data's own answer"
    wanted = cfg.evaluation.check
    if wanted not in ("auto", "none"):
        raise ConfigError(
            f"none of the {len(references)} prompts has an answer in the data to check by evaluation.check={wanted}",
            fix=[
                "evaluation.check=auto takes what there is",
                *(["evaluation.prompts=null asks the data's own"] * bool(cfg.evaluation.prompts)),
            ],
        )
    few = f"fewer than half of {len(references)} prompts have an answer in the data that can be (a number, a choice, JSON, a call)"
    return "does not score answers" + (f": {few}" if wanted == "auto" and references else "")


def check_endpoint(cfg: EvaluateVerb, client: Client, inputs: dict[str, Artifact], parent: str) -> list[str]:
    """What would be asked; nothing is sent before the work begins."""
    count, at_once = len(checks.asked(cfg.evaluation, validation(cfg, inputs))), cfg.endpoint.concurrency
    return [
        f"{client.url}, {cfg.endpoint.model or 'the one model it serves'}, {client.server.with_key}{parent}",
        f"asks {count} prompts, greedily, for up to {cfg.evaluation.max_new_tokens} tokens each, {at_once} at a time; then for log-probabilities",
        what_is_checked(cfg, inputs),
    ]


def connect(cfg: EvaluateVerb) -> Client | None:
    """A client of the endpoint, to which nothing is sent yet; None where models are measured here."""
    return Client(cfg.endpoint.url, timeout=cfg.endpoint.timeout) if cfg.endpoint.url else None


def evaluate(cfg: EvaluateVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes report.json, rows.jsonl and answers.jsonl."""
    if cfg.numerics:
        return numerics_report.report(cfg, inputs, out)
    if client := connect(cfg):
        with as_served_today():
            return evaluate_endpoint(cfg, client, inputs, out)
    records = validation(cfg, inputs)
    prompts = checks.asked(cfg.evaluation, records)
    tokenizer = tokenizer_of(inputs["model"])
    encoding.ensure_chat(tokenizer)
    rows = {"": evaluation.encode_named(records, tokenizer, cfg.evaluation.max_length)}
    if "general" in inputs:
        longest = evaluation.positions(inputs["model"], cfg.evaluation.max_length)
        rows["general_"] = evaluation.encode_general(general(cfg, inputs), tokenizer, longest)
    said, answers = evaluation.read(inputs, tokenizer, rows, prompts, cfg.evaluation)
    metrics: dict[str, Any] = {f"{prefix}rows": len(some) for prefix, some in rows.items()} | {"prompts": len(prompts)}
    for role, one in said[""].items():
        own = evaluation.figures_of(one, [row for _, row in rows[""]], encoding.turn_end(tokenizer))
        metrics |= {("" if role == "model" else "parent_") + name: value for name, value in own.items()}
    compared = {prefix: comparison.Rows(prefix, rows[prefix], **by_role) for prefix, by_role in said.items()}
    parts = [(prefix, comparison.over_rows(some.figures, len(some.ids))) for prefix, some in compared.items()]
    if "parent" in inputs:
        metrics["worst"] = {prefix + name: worst for prefix, some in compared.items() for name, worst in some.worst().items()}
    checked, of_answers = check_answers(cfg, inputs, records, answers, tokenizer)
    measured = {role: evaluation.Measured(inputs[role], role, len(tokenizer) if role == "parent" else 0) for role in answers}
    asked_of: dict[str, tuple[tasks.Asked, str | None]] = {
        role: (tasks.Local(one, tokenizer, cfg.evaluation.batch_size), inputs[role].key) for role, one in measured.items()
    }
    told, of_tasks = ask_tasks(cfg, inputs["model"], tokenizer, asked_of)
    metrics |= checked | told | comparison.report([*parts, *of_answers, *of_tasks]) | checks.expected(cfg.evaluation, answers)
    write(out, metrics, answers, (line for some in compared.values() for line in some.lines()))
    show(metrics, answers, ("before", "after") if inputs["model"].stage == "finetune" else ("parent", "answer"))
    return metrics


def evaluate_endpoint(cfg: EvaluateVerb, client: Client, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes report.json, answers.jsonl and, where the server gives log-probabilities, rows.jsonl. The endpoint is asked first, while this machine does
    nothing else, then the local model."""
    model, description = measure.choose(client, cfg.endpoint.model)
    records = validation(cfg, inputs)
    prompts, many = checks.asked(cfg.evaluation, records), cfg.endpoint.concurrency
    rows = measure.ask(client, model, prompts, out, max_tokens=cfg.evaluation.max_new_tokens, workers=many, anew=cfg.force)
    metrics: dict[str, Any] = {"served": description}
    answers, told, tokenizer = {"model": rows}, Told(), None
    if not (parent := inputs.get("parent")):
        metrics |= measure.speed(rows)
    else:
        tokenizer = tokenizer_of(parent)
        metrics |= measure.speed(rows, tokenizer) | measure.compare_prompts(rows, tokenizer, prompts)
        local = evaluation.Measured(parent, "parent", len(tokenizer))
        told = score_endpoint(cfg, client, model, inputs, records, tokenizer, local)
        answers["parent"] = evaluation.answer(local.model, tokenizer, prompts, cfg.evaluation, encoding.turn_end(tokenizer))
        metrics |= measure.likeness(rows, answers["parent"], tokenizer) | told.metrics
    check, references = checks.to_check(cfg.evaluation, inputs, records)
    checked, right = checks.score(check, references, answers, tokenizer) if check else ({}, {"model": []})
    of_answers = [("", comparison.of_task(right))] if right["model"] else []
    of_tasks: list[tuple[str, comparison.Figures]] = []
    if parent:
        served = measure.Served(client, model, tokenizer, many)
        both: dict[str, tuple[tasks.Asked, str | None]] = {
            "model": (served, None),
            "parent": (tasks.Local(local, tokenizer, cfg.evaluation.batch_size), parent.key),
        }
        of_documents, of_tasks = ask_tasks(cfg, parent, tokenizer, both)
        metrics |= of_documents
    metrics |= (
        (checked if of_answers else {})
        | comparison.report([*told.parts, *of_answers, *of_tasks])
        | checks.expected(cfg.evaluation, answers)
    )
    write(out, metrics, answers, told.lines)
    (out / measure.RECEIVED).unlink()
    show(metrics, answers, ("parent", "board"))
    return metrics


@dataclass(frozen=True)
class Told:
    """What an endpoint's log-probabilities say: metrics, figures by the prefix of their names, and lines of rows.jsonl."""

    metrics: dict[str, Any] = field(default_factory=dict)
    parts: list[tuple[str, comparison.Figures]] = field(default_factory=list)
    lines: list[dict] = field(default_factory=list)


def score_endpoint(
    cfg: EvaluateVerb, client: Client, model: str, inputs: dict[str, Artifact], records: list[dict], tokenizer, local: evaluation.Measured
) -> Told:
    """The same tokens, of validation and general rows, at the endpoint and by the local model; nothing where the server gives no log-probabilities of them."""
    encoding.ensure_chat(tokenizer)
    by_part = {"": evaluation.encode_named(records, tokenizer, cfg.evaluation.max_length)}
    if "general" in inputs:
        longest = evaluation.positions(inputs["parent"], cfg.evaluation.max_length)
        by_part["general_"] = evaluation.encode_general(general(cfg, inputs), tokenizer, longest)
    named = [(prefix, one) for prefix, some in by_part.items() for one in some]
    told = measure.score(client, model, [row for _, (_, row) in named], tokenizer, cfg.endpoint.concurrency)
    metrics: dict[str, Any] = {"worst": {}}
    parts: list[tuple[str, comparison.Figures]] = []
    lines: list[dict] = []
    for prefix in by_part if told else ():
        kept = [(one, pairs) for (of, one), pairs in zip(named, told or ()) if of == prefix and pairs is not None]
        if not kept:
            continue
        rows, pairs = [one for one, _ in kept], [pairs for _, pairs in kept]
        own = seen.observe(local.reader, encoded := [row for _, row in rows], top_k=0)
        eos_id = encoding.turn_end(tokenizer)
        if not prefix:
            metrics |= measure.figures(encoded, pairs, tokenizer, eos_id)
            metrics |= {f"parent_{name}": value for name, value in evaluation.figures_of(own, encoded, eos_id).items()}
        compared = comparison.Rows(prefix, rows, measure.as_seen(pairs, own, tokenizer), own)
        metrics[f"{prefix}rows"] = len(rows)
        metrics["worst"] |= {prefix + name: worst for name, worst in compared.worst().items()}
        parts.append((prefix, comparison.over_rows(compared.figures, len(rows))))
        lines += compared.lines()
    return Told(metrics if parts else {}, parts, lines)


def validation(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> list[dict]:
    return evaluation.validation(inputs["dataset"], cfg.evaluation)


def general(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> Iterator[Conversation]:
    """Texts and conversations of another domain; those that cannot be read are left out, and counted."""
    tally, source = Tally(), inputs["general"]
    yield from islice(
        conversations.read(kinds.files(source.path, source.files), format="auto", on_fault="drop", tally=tally), cfg.evaluation.rows
    )
    for reason, count in tally.ordered("dropped"):
        say(f"general: left out {count}: {reason}")


def check_answers(
    cfg: EvaluateVerb, inputs: dict[str, Artifact], records: list[dict], answers: dict[str, list[dict]], tokenizer
) -> tuple[dict, list[tuple[str, comparison.Figures]]]:
    """(what was checked of the answers, marked in their rows, figures of it and of where model and parent part)."""
    figures = []
    if answers.get("parent"):
        figures.append(("", comparison.of_answers(answers["model"], answers["parent"], tokenizer)))
    check, references = checks.to_check(cfg.evaluation, inputs, records)
    checked, right = checks.score(check, references, answers, tokenizer) if check else ({}, {"model": []})
    if not right["model"]:
        return {}, figures
    return checked, [*figures, ("", comparison.of_task(right))]


def ask_tasks(
    cfg: EvaluateVerb, shape: Artifact, tokenizer, asked_of: dict[str, tuple[tasks.Asked, str | None]]
) -> tuple[dict[str, Any], list[tuple[str, comparison.Figures]]]:
    """lm-eval's tasks, if any, of {role: (who is asked, its key)}; what they said is kept in the runs' cache by that key, but of an endpoint, which has
    none. shape: the model whose positions bound
    a row."""
    e = cfg.evaluation
    if not e.tasks:
        return {}, []
    longest = evaluation.positions(shape, e.max_length)
    kept = Path(cfg.outputs) / ".cache" / "lm-eval"
    by_role = {}
    for role, (asked_one, key) in asked_of.items():
        cache = kept / f"{key[:16]}-{longest}" if key else None
        by_role[role] = tasks.run(e.tasks, asked_one, tokenizer, longest, e.rows, cache)
        devices.give_back_memory()
    return tasks.compare(by_role)


def write(out: Path, metrics: dict, answers: dict, rows: Iterable[dict] = ()) -> None:
    (out / "report.json").write_text(json.dumps(metrics, indent=1) + "\n")
    in_files = {"answers.jsonl": [{"by": role, **row} for role, each in answers.items() for row in each], "rows.jsonl": list(rows)}
    for name, lines in in_files.items():
        if lines or name == "answers.jsonl":
            (out / name).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def show(metrics: dict, answers: dict, labels: tuple[str, str]) -> None:
    """The figures in a line or two, then each prompt with the parent's and the model's answer under these labels."""
    if "loss" in metrics:
        line = f"evaluate: loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.3f}, right next token {metrics['accuracy']:.1%} of {metrics['tokens']}, turn ends {metrics['turns_ended']:.0%}"
        if "agreement" in metrics and "loss_difference" not in metrics:
            line += f"; parent: loss {metrics['parent_loss']:.4f}, same top token {metrics['agreement']:.1%}"
        say(line)
    for line in [*comparison.in_words(metrics), *(tasks.in_words(metrics) if "tasks" in metrics else ())]:
        say(f"evaluate: {line}")
    if "answers_ended" in metrics:
        say(f"evaluate: {measure.in_words(metrics)}")
    if "expected" in metrics:
        say(
            f"evaluate: {metrics['expected']} of {metrics['prompts']} answers as expected"
            + (f", parent {metrics['parent_expected']}" if "parent_expected" in metrics else "")
        )
    for i, row in enumerate(answers["model"]):
        say(f"  > {row['prompt']}")
        if "parent" in answers:
            say(f"    {labels[0] + ':':<8}{_short(answers['parent'][i])}")
        say(f"    {labels[1] + ':':<8}{_short(row)}")


def _short(row: dict) -> str:
    if "error" in row:
        return f"[{row['error']}]"
    text = "".join(c if c.isprintable() else "�" for c in row["answer"].replace("\n", "⏎"))
    return (text if len(text) <= 160 else f"{text[:100]} … {text[-50:]}") + ("" if row["ended"] else " [turn not ended]")


def judge(cfg: EvaluateVerb, made: Artifact) -> None:
    report = made.path / "report.json"
    gates.judge(cfg.gate, made.metrics, f"{report}, which is kept; rows.jsonl and answers.jsonl beside it have every row")


def needs(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> Needs:
    if cfg.numerics:
        return numerics_report.needs(cfg, inputs)
    models = [read_shape(weights_of(inputs[role])) for role in ("model", "parent") if role in inputs]
    other = sum(file["size"] for file in inputs["general"].files.values()) if "general" in inputs else 0
    return host.evaluate(models, cfg.evaluation, host.conversations(inputs["dataset"].path / "val.jsonl"), other)


STAGE = stage.Stage(
    verb="evaluate",
    version=5,
    schema=EvaluateVerb,
    kind="report",
    find=find,
    name=name,
    check=check,
    needs=needs,
    run=evaluate,
    each=each,
    judge=judge,
    doc=__doc__,
    resumes=lambda partial: (file := partial / measure.RECEIVED).is_file() and file.stat().st_size > 0,
)

if __name__ == "__main__":
    stage.main(STAGE)
