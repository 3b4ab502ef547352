"""Measure a model, adapter or quantized model on the validation split: loss and perplexity over the assistant's tokens, agreement with the model it
was made from, and greedy answers to a few prompts. Without source=, every model of the run is measured in turn.

With endpoint.url= a running board or server is measured instead: the same prompts and, where it gives log-probabilities, the same figures, its speed,
and how far its answers are those of the local model it was made from (source=, a bundle too; else the run's own).

With numerics= the model is tried in the numbers that boards compute in, before anything is compiled: numerics=ax650_s8, or numerics=all target=ax650.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from src.chat import encoding
from src.chat.template import as_served_today
from src.core import stage
from src.core.artifact import Artifact
from src.core.errors import ConfigError, MissingInput
from src.core.log import say
from src.core.room import Needs
from src.models import devices, evaluation, preview
from src.models.folder import base_of, weights_of
from src.models.loading import tokenizer_of
from src.serving import measure
from src.serving.client import Client
from src.settings.verbs import EvaluateVerb
from src.sizing import host
from src.sizing.config_reader import read_shape

MEASURED = ("finetune", "merge", "quantize")
BUILT_FROM = ("merge", "finetune", "quantize")
"""what a bundle is most likely made from, in this order"""
KINDS = {"adapter", "model", "quantized"}


def each(cfg: EvaluateVerb, run: stage.Run) -> Iterator[EvaluateVerb]:
    """One evaluation for the source or endpoint given, else for every finished model of the run."""
    if cfg.source or cfg.endpoint.url or cfg.numerics:
        return iter([cfg])
    names = [name for name in MEASURED if run.has(name)]
    if not names:
        run.open(MEASURED[0])
    return (cfg.model_copy(update={"source": str(run.current(run.open(name)).path)}) for name in names)


def find(cfg: EvaluateVerb, run: stage.Run) -> dict[str, Artifact]:
    if cfg.numerics:
        return preview.find(cfg, run)
    if cfg.endpoint.url:
        return find_for_endpoint(cfg, run)
    model = run.source(cfg.source, kinds=KINDS)
    inputs = {"model": model, "dataset": stage.data_sources(run, cfg.dataset)}
    if parent := cfg.parent or parent_path(model):
        inputs["parent"] = run.source(str(parent), kinds=KINDS)
    return inputs


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
    return inputs | {"dataset": stage.data_sources(run, cfg.dataset)}


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
    return f"evaluate-{folder}" + (preview.name(cfg) if cfg.numerics else "")


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
    if cfg.numerics:
        return preview.check(cfg, inputs)
    parent = f", against {inputs['parent'].path}" if "parent" in inputs else ", no parent to compare with"
    if client := connect(cfg):
        return check_endpoint(cfg, client, inputs, parent)
    return [f"{inputs['model'].path} ({inputs['model'].kind}){parent}"]


def check_endpoint(cfg: EvaluateVerb, client: Client, inputs: dict[str, Artifact], parent: str) -> list[str]:
    """What would be asked; nothing is sent before the work begins."""
    count, at_once = len(asked(cfg, validation(cfg, inputs))), cfg.endpoint.concurrency
    return [
        f"{client.url}, {cfg.endpoint.model or 'the one model it serves'}, {client.server.with_key}{parent}",
        f"asks {count} prompts, greedily, for up to {cfg.evaluation.max_new_tokens} tokens each, {at_once} at a time; then for log-probabilities",
    ]


def connect(cfg: EvaluateVerb) -> Client | None:
    """A client of the endpoint, to which nothing is sent yet; None where models are measured here."""
    return Client(cfg.endpoint.url, timeout=cfg.endpoint.timeout) if cfg.endpoint.url else None


def evaluate(cfg: EvaluateVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes report.json and answers.jsonl."""
    if cfg.numerics:
        return preview.report(cfg, inputs, out)
    if client := connect(cfg):
        with as_served_today():
            return evaluate_endpoint(cfg, client, inputs, out)
    records = validation(cfg, inputs)
    prompts = asked(cfg, records)
    tokenizer = tokenizer_of(inputs["model"])
    encoding.ensure_chat(tokenizer)
    eos_id = encoding.turn_end(tokenizer)
    rows = evaluation.encode_all(records, tokenizer, cfg.evaluation.max_length)

    def read(role: str, tokens: int = 0) -> tuple[dict, list, list[dict]]:
        one = evaluation.Measured(inputs[role], role, tokens)
        figures, top = evaluation.measure(one.reader, rows, eos_id)
        devices.give_back_memory()
        answers = evaluation.answer(one, tokenizer, prompts, cfg.evaluation, eos_id)
        del one
        devices.give_back_memory()
        return figures, top, answers

    figures, top, mine = read("model")
    metrics: dict[str, Any] = {**figures, "rows": len(rows), "prompts": len(prompts)}
    answers = {"model": mine}
    if "parent" in inputs:
        # The parent is read with the child's tokenizer and template, so that both see the same tokens.
        figures, best, answers["parent"] = read("parent", len(tokenizer))
        metrics |= {f"parent_{k}": v for k, v in figures.items()}
        metrics["agreement"] = sum(int((a == b).sum()) for a, b in zip(top, best)) / max(metrics["tokens"], 1)
    metrics |= expected(cfg, answers)
    write(out, metrics, answers)
    show(metrics, answers, ("before", "after") if inputs["model"].stage == "finetune" else ("parent", "answer"))
    return metrics


def evaluate_endpoint(cfg: EvaluateVerb, client: Client, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes report.json and answers.jsonl. The endpoint is asked first, while this machine does nothing else, then the local model."""
    model, description = measure.choose(client, cfg.endpoint.model)
    records = validation(cfg, inputs)
    prompts, many = asked(cfg, records), cfg.endpoint.concurrency
    rows = measure.ask(client, model, prompts, out, max_tokens=cfg.evaluation.max_new_tokens, workers=many, anew=cfg.force)
    metrics: dict[str, Any] = {"served": description}
    answers = {"model": rows}
    if not (parent := inputs.get("parent")):
        metrics |= measure.speed(rows)
    else:
        tokenizer = tokenizer_of(parent)
        encoding.ensure_chat(tokenizer)
        eos_id = encoding.turn_end(tokenizer)
        encoded = evaluation.encode_all(records, tokenizer, cfg.evaluation.max_length)
        if scored := measure.score(client, model, encoded, tokenizer, eos_id, many):
            figures, top, kept = scored
            metrics |= {**figures, "rows": len(kept)}
        metrics |= measure.speed(rows, tokenizer)
        local = evaluation.Measured(parent, "parent", len(tokenizer))
        metrics |= measure.compare_prompts(rows, tokenizer, prompts)
        answers["parent"] = evaluation.answer(local, tokenizer, prompts, cfg.evaluation, eos_id)
        metrics |= measure.likeness(rows, answers["parent"], tokenizer)
        if scored:
            same = [encoded[i] for i in kept]
            own, best = evaluation.measure(local.reader, same, eos_id)
            metrics |= {f"parent_{k}": v for k, v in own.items()}
            metrics["agreement"] = measure.agreement(top, best, tokenizer)
    metrics |= expected(cfg, answers)
    write(out, metrics, answers)
    (out / measure.RECEIVED).unlink()
    show(metrics, answers, ("parent", "board"))
    return metrics


def validation(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> list[dict]:
    return [json.loads(line) for line in open(inputs["dataset"].path / "val.jsonl", encoding="utf-8")][: cfg.evaluation.rows]


def asked(cfg: EvaluateVerb, records: list[dict]) -> list[tuple[list[dict], list | None]]:
    """Prompts as (messages, tools): the ones given, else the openings of the first validation records."""
    if cfg.evaluation.prompts is not None:
        return [([{"role": "user", "content": text}], None) for text in cfg.evaluation.prompts]
    found: list[tuple[list[dict], list | None]] = []
    for record in records:
        asked = next((i for i, m in enumerate(record["messages"]) if m["role"] == "user"), len(record["messages"]))
        cut = next((i for i, m in enumerate(record["messages"]) if m["role"] == "assistant" and i > asked), 0)
        opening = (record["messages"][:cut], record.get("tools"))
        if cut and len(found) < cfg.evaluation.samples and opening not in found:
            found.append(opening)
    return found


def expected(cfg: EvaluateVerb, answers: dict[str, list[dict]]) -> dict:
    """How many answers of each role match evaluation.expect and end their turn, marked in their rows; nothing where none is expected."""
    if cfg.evaluation.expect is None:
        return {}
    for row in (row for rows in answers.values() for row in rows):
        text = f"{row['prompt']}\n{row['answer']}"
        row["as_expected"] = row["ended"] and re.fullmatch(cfg.evaluation.expect, text, re.DOTALL) is not None
    return {("" if role == "model" else "parent_") + "expected": sum(row["as_expected"] for row in rows) for role, rows in answers.items()}


def write(out: Path, metrics: dict, answers: dict) -> None:
    (out / "report.json").write_text(json.dumps(metrics, indent=1) + "\n")
    with open(out / "answers.jsonl", "w", encoding="utf-8") as file:
        for role, rows in answers.items():
            for row in rows:
                file.write(json.dumps({"by": role, **row}, ensure_ascii=False) + "\n")


def show(metrics: dict, answers: dict, labels: tuple[str, str]) -> None:
    """The figures in a line or two, then each prompt with the parent's and the model's answer under these labels."""
    if "loss" in metrics:
        line = f"evaluate: loss {metrics['loss']:.4f}, perplexity {metrics['perplexity']:.3f}, right next token {metrics['accuracy']:.1%} of {metrics['tokens']}, turn ends {metrics['turns_ended']:.0%}"
        if "agreement" in metrics:
            line += f"; parent: loss {metrics['parent_loss']:.4f}, same top token {metrics['agreement']:.1%}"
        say(line)
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


def needs(cfg: EvaluateVerb, inputs: dict[str, Artifact]) -> Needs:
    if cfg.numerics:
        return preview.needs(cfg, inputs)
    models = [read_shape(weights_of(inputs[role])) for role in ("model", "parent") if role in inputs]
    return host.evaluate(models, cfg.evaluation, host.conversations(inputs["dataset"].path / "val.jsonl"))


STAGE = stage.Stage(
    verb="evaluate",
    version=2,
    schema=EvaluateVerb,
    kind="report",
    find=find,
    name=name,
    check=check,
    needs=needs,
    run=evaluate,
    each=each,
    doc=__doc__,
    resumes=lambda partial: (file := partial / measure.RECEIVED).is_file() and file.stat().st_size > 0,
)

if __name__ == "__main__":
    stage.main(STAGE)
