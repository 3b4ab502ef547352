"""What a person reads of a distilled dataset: README.md, its card, and samples.html, a page of records drawn at random with their scores."""

import hashlib
import html
import json
import random
from pathlib import Path

from src.core.artifact import Artifact
from src.core.files import canonical
from src.core.log import shown
from src.distill.journal import Total
from src.distill.pipeline import Record, Work
from src.settings.teachers import EndpointTeacher, LocalTeacher
from src.settings.verbs import DistillVerb

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
article {{ border: 1px solid #8886; border-radius: 8px; margin: 1.5rem 0; padding: .5rem 1rem; }}
h2 {{ font-size: 1rem; overflow-wrap: anywhere; }}
.turn {{ white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; border-left: 4px solid #8886; padding: .25rem .75rem; margin: .5rem 0; }}
.turn b {{ display: block; font-size: .8rem; opacity: .7; }}
.assistant {{ border-color: #2a7; }} .rejected {{ border-color: #c44; }} .user {{ border-color: #47c; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; font-size: .85rem; }}
dt {{ opacity: .7; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
</style></head><body><h1>{title}</h1>
<p>{lead}</p>
{records}
</body></html>
"""


class Samples:
    """Records drawn with equal chance from a stream whose length is not known (Vitter 1985, algorithm R)."""

    def __init__(self, count: int, draw: random.Random):
        self._count, self._draw, self._seen = count, draw, 0
        self.records: list[Record] = []

    def offer(self, record: Record) -> None:
        self._seen += 1
        if len(self.records) < self._count:
            self.records.append(record)
        elif self._count and (place := self._draw.randrange(self._seen)) < self._count:
            self.records[place] = record

    def write(self, path: Path, title: str) -> None:
        lead = f"{len(self.records)} of {self._seen:,} records, drawn at random. Read them before you train on them."
        records = "\n".join(_article(record) for record in self.records)
        path.write_text(shown(PAGE.format(title=html.escape(title), lead=lead, records=records)), encoding="utf-8", errors="replace")


def _article(record: Record) -> str:
    """A record that went through `keep`: its turns, and what is known of it."""
    turns = [_turn(m["role"], m.get("reasoning_content"), m["content"] or json.dumps(m.get("tool_calls"))) for m in record.messages]
    if "rejected" in record.data:
        turns.append(_turn("rejected", None, record.data["rejected"]))
    known = {name: value for name, value in record.data["distill"].items() if name != "prompt"}
    known["requests"] = len(known["requests"])
    facts = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(_shown(value))}</dd>" for name, value in known.items())
    return f"<article><h2>{html.escape(record.id)} ({record.data['split']})</h2>\n{''.join(turns)}\n<dl>{facts}</dl></article>"


def _turn(role: str, reasoning: str | None, text: str) -> str:
    thought = f"<i>{html.escape(reasoning)}</i>\n\n" if reasoning else ""
    return f'<div class="turn {html.escape(role)}" dir="auto"><b>{html.escape(role)}</b>{thought}{html.escape(text)}</div>\n'


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def write(
    path: Path,
    cfg: DistillVerb,
    inputs: dict[str, Artifact],
    work: Work,
    steps: list[str],
    records: dict[str, int],
    totals: dict[str, Total],
) -> None:
    """The card's text: recipe, teachers with their licence and terms, counts by step, cost, seeds and hashes."""
    lines = [
        f"# Distilled by the recipe `{cfg.recipe.name}`",
        "",
        "Made by Boardwalk (`python -m src.distill`). Its answers were written by a model, not by people; `samples.html` shows some of them.",
        "",
        "## Records",
        "",
        *(f"- `{split}.jsonl`: {count:,}" for split, count in records.items() if count or split != "preference"),
        "- `set_aside.jsonl`: records that did not get there, each with its step and reason",
        "",
        "Each record holds `id`, `messages`, `tools`, and under `distill` its teachers, the sha256 of its prompt, its requests, their tokens and USD"
        ", and, where there are some, parents and scores.",
        "",
        "## Teachers",
        "",
        *_teachers(cfg, totals),
        "",
        "## Steps",
        "",
        "| step | came | made | set aside | went on |",
        "|---|---|---|---|---|",
        *(f"| {s} | {f.came:,} | {f.made:,} | {f.aside.total():,} | {f.went:,} |" for s, f in _flows(work, steps)),
        "",
        *_reasons(work, steps),
        *_figures(work, steps),
        "## Made from",
        "",
        *(f"- {role}: `{a.path.name}`, sha256 `{a.key}`" for role, a in inputs.items()),
        f"- recipe: sha256 `{hashlib.sha256(canonical(cfg.recipe.model_dump(mode='json'))).hexdigest()}` over its settings, all prompts included",
        f"- seeds: {cfg.seed} for every draw, {cfg.holdout.split_seed} for the splits",
        f"- answers that were cut off: {'taken' if cfg.allow_cut_off else 'set aside'}",
        "",
        "## The recipe",
        "",
        "```json",
        json.dumps(cfg.recipe.model_dump(mode="json"), indent=1, ensure_ascii=False).replace("```", "` ` `"),
        "```",
        "",
    ]
    path.write_text(shown("\n".join(lines)), encoding="utf-8", errors="replace")


def _flows(work: Work, steps: list[str]):
    return [(step, work.flows[step]) for step in steps if step in work.flows]


def _teachers(cfg: DistillVerb, totals: dict[str, Total]) -> list[str]:
    lines = []
    for role, teacher in (("teacher", cfg.teacher), ("judge", cfg.judge)):
        if not isinstance(teacher, EndpointTeacher | LocalTeacher):
            continue
        name = teacher.model if isinstance(teacher, EndpointTeacher) else Path(teacher.path).name
        revision = f", revision {teacher.revision}" if isinstance(teacher, EndpointTeacher) and teacher.revision else ""
        lines.append(f"- {role}: `{name}`{revision}")
        lines.append(f"    - licence: {teacher.licence or 'not given'}")
        lines.append(f"    - terms: {teacher.terms or 'not given'}")
    for name, total in totals.items():
        lost = f", {total.lost:,} of them lost by kills and counted in full" if total.lost else ""
        lines.append(f"- spent on `{name}`: {total.requests:,} requests, {total.tokens:,} tokens, ${total.money:,.4f}{lost}")
    return lines


def _reasons(work: Work, steps: list[str]) -> list[str]:
    found = [(step, reason, count) for step, flow in _flows(work, steps) for reason, count in flow.aside.most_common()]
    if not found:
        return []
    lines = [f"| {step} | {_cell(reason)} | {count:,} |" for step, reason, count in found]
    return ["| step | set aside because | records |", "|---|---|---|", *lines, ""]


def _figures(work: Work, steps: list[str]) -> list[str]:
    found = [(step, name, f"{value:,}") for step in steps for name, value in work.counts.get(step, {}).items()]
    found += [(step, name, f"{value:.4g}") for step in steps for name, value in work.measures.get(step, {}).items()]
    if not found:
        return []
    return ["| step | figure | value |", "|---|---|---|", *(f"| {step} | {_cell(name)} | {value} |" for step, name, value in found), ""]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
