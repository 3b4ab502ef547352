"""Answer a file of prompts: by any model here, bundle or server, several at a time, every setting of how kept with the answers.

A prompt is a line of a .txt, or a record of JSON in any layout, of which what comes up to its last user turn is asked. An interrupted run goes on after the
answers it has, to the same bytes. Each line of answers.jsonl is a conversation that data.path= takes.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from src.core import artifact, stage
from src.core.artifact import Artifact
from src.core.errors import BadData, MissingInput, ProofFailed, UserError
from src.core.log import say, ticks
from src.core.room import Needs
from src.models.speaking import Ended
from src.records import prompts
from src.records.conversations import FAULTS_LISTED
from src.records.formats import as_object
from src.records.json_stream import Malformed
from src.serving import opening
from src.serving.client import Client
from src.serving.speakers import ServerSpeaker
from src.settings.verbs import AnswerVerb

ANSWERS, DROPPED = "answers.jsonl", "dropped.jsonl"


class Row(NamedTuple):
    """A prompt of the file."""

    id: str
    messages: list[dict]
    tools: list | None


def find(cfg: AnswerVerb, run: stage.Run) -> dict[str, Artifact]:
    path = Path(cfg.prompts.path or "")
    if not path.is_file():
        raise MissingInput("no such file", where=str(path), fix="prompts.path=FILE names one that is there")
    inputs = {"prompts": artifact.outside(path, "file", run.cache)}
    if cfg.endpoint.url is None:
        inputs["model"] = opening.find(run, cfg.source)
        if cfg.base:
            inputs["base"] = run.source(cfg.base, kinds={"model", "quantized"})
    return inputs


def name(cfg: AnswerVerb, inputs: dict[str, Artifact]) -> str:
    """answer-merge-questions: who answers, and the file's name."""
    parts = urlsplit(cfg.endpoint.url or "")
    who = inputs["model"].path.resolve().stem if "model" in inputs else f"{parts.hostname}-{parts.port or parts.scheme}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", f"answer-{who}-{inputs['prompts'].path.stem}")


def check(cfg: AnswerVerb, inputs: dict[str, Artifact]) -> list[str]:
    rows, faults = read(cfg, inputs["prompts"].path)
    if faults and cfg.prompts.on_fault == "error":
        listed = [
            f"{len(faults)} of {len(faults) + len(rows)} records cannot be asked",
            *(f"  {place}: {why}" for place, why in faults[:FAULTS_LISTED]),
        ]
        raise BadData(
            "\n".join(listed + [f"  and {len(faults) - FAULTS_LISTED} more"] * (len(faults) > FAULTS_LISTED)),
            where=str(inputs["prompts"].path),
            fix=["mend the lines that are named", "prompts.on_fault=drop leaves them out, and counts them"],
        )
    if not rows:
        raise BadData("there is nothing to ask", where=str(inputs["prompts"].path), fix="prompts.path=FILE names a file of prompts")
    if cfg.endpoint.url:
        who, at_once = f"{Client(cfg.endpoint.url, timeout=cfg.endpoint.timeout).url}", cfg.endpoint.concurrency
    else:
        who, at_once = opening.check(inputs["model"]), cfg.batch_size
    drawn = (
        f"temperature {cfg.decoding.temperature:g}, top-p {cfg.decoding.top_p:g}, seed {cfg.decoding.seed}"
        if cfg.decoding.temperature
        else "greedily"
    )
    return [f"{who} answers {len(rows):,} prompts, {drawn}, in up to {cfg.decoding.max_tokens} tokens each, {at_once} at a time"]


def needs(cfg: AnswerVerb, inputs: dict[str, Artifact]) -> Needs:
    return opening.needs([inputs["model"]] if "model" in inputs else [], cfg.batch_size)


def read(cfg: AnswerVerb, path: Path) -> tuple[list[Row], list[tuple[str, Malformed]]]:
    """(the prompts of a file, its records that are none: where, and why)."""
    faults: list[tuple[str, Malformed]] = []
    return list(islice(_rows(path, cfg.system, faults), cfg.prompts.count)), faults


def _rows(path: Path, system: str | None, faults: list[tuple[str, Malformed]]) -> Iterator[Row]:
    for number, raw in enumerate(prompts.raw_records(path)):
        try:
            record = as_object(raw.value)
            messages, data = prompts.messages_of(record)
            messages = [dict(message) for message in prompts.asked(messages)]
            if system and messages[0]["role"] != "system":
                messages.insert(0, {"role": "system", "content": system})
            row = Row(prompts.id_of(record, number), messages, data.get("tools"))
            prompts.check_sound(row)
        except Malformed as fault:
            faults.append((f"{path.name} line {raw.line}", fault))
        else:
            yield row


def answer(cfg: AnswerVerb, inputs: dict[str, Artifact], out: Path) -> dict:
    """Writes answers.jsonl, a batch at a time, and dropped.jsonl where records were left out."""
    rows, faults = read(cfg, inputs["prompts"].path)
    at_once = cfg.endpoint.concurrency if cfg.endpoint.url else cfg.batch_size
    done, served = kept(out / ANSWERS, at_once, len(rows)), {}
    if done:
        say(f"answer: {done:,} of {len(rows):,} answers kept from before the interruption")
    if done < len(rows):
        speaker = (
            opening.of_endpoint(cfg.endpoint) if cfg.endpoint.url else opening.open_speaker(inputs["model"], cfg.base, cfg.environment)
        )
        with open(out / ANSWERS, "a", encoding="utf-8") as file, ticks(len(rows), "answering", done=done) as tick:
            for begin in range(done, len(rows), at_once):
                some = rows[begin : begin + at_once]
                told = speaker.replies([(row.messages, row.tools) for row in some], cfg.decoding)
                file.write("".join(json.dumps(line_of(row, one), ensure_ascii=False) + "\n" for row, one in zip(some, told, strict=True)))
                file.flush()
                os.fsync(file.fileno())
                tick(len(some))
        served = {"served": speaker.served} if isinstance(speaker, ServerSpeaker) else {}
        speaker.close()
    if faults:
        lines = ({"at": place, "reason": fault.reason, "detail": str(fault)} for place, fault in faults)
        (out / DROPPED).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return served | figures([json.loads(line) for line in open(out / ANSWERS, encoding="utf-8")], len(rows), len(faults))


def kept(file: Path, at_once: int, most: int) -> int:
    """How many answers an interrupted run left that can stay: whole batches, so that the others are made in the batches they would have been. What follows
    them in the file is cut off."""
    if not file.is_file():
        return 0
    with open(file, "rb+") as opened:
        ends = [0]
        for line in opened:
            if not line.endswith(b"\n"):
                break
            ends.append(ends[-1] + len(line))
        count = len(ends) - 1
        count = count if count == most else count // at_once * at_once
        opened.truncate(ends[count])
    return count


def line_of(row: Row, told: Ended | UserError) -> dict:
    """A line of answers.jsonl."""
    tools = {"tools": row.tools} if row.tools else {}
    if isinstance(told, UserError):
        return {"id": row.id, "messages": row.messages, **tools, "error": told.what}
    text = told.text.encode("utf-8", "replace").decode()  # half a character of a server's
    return {
        "id": row.id,
        "messages": [*row.messages, {"role": "assistant", "content": text}],
        **tools,
        "finish": told.finish,
        "ended": told.ended,
        "prompt_tokens": told.prompt_tokens,
        "tokens": told.tokens,
    }


def figures(lines: list[dict], wanted: int, dropped: int) -> dict:
    """The manifest's metrics. Raises ProofFailed where there are not as many answers as prompts."""
    if len(lines) != wanted:
        raise ProofFailed(f"{wanted} prompts have {len(lines)} answers")
    good = [line for line in lines if "error" not in line]
    found: dict = {
        "prompts": wanted,
        "answered": len(good),
        "dropped": dropped,
        "answers_ended": sum(line["ended"] for line in good) / max(1, len(good)),
    }
    found["finish"] = dict(Counter(line["finish"] for line in good))
    found["tokens"] = sum(line["tokens"] or 0 for line in good)
    say(f"answer: {len(good):,} of {wanted:,} prompts answered, {found['answers_ended']:.0%} with a turn's end, {found['tokens']:,} tokens")
    for reason, count in Counter(line["error"] for line in lines if "error" in line).most_common(10):
        say(f"answer: {count:,} not answered: {reason}")
    if dropped:
        say(f"answer: left out {dropped:,} records that are no prompt, each named in {DROPPED}")
    return found


STAGE = stage.Stage(
    verb="answer",
    version=1,
    schema=AnswerVerb,
    kind="answers",
    find=find,
    name=name,
    check=check,
    needs=needs,
    run=answer,
    doc=__doc__,
    private=("prompts.private", lambda cfg: cfg.prompts.private),
    resumes=lambda partial: (file := partial / ANSWERS).is_file() and file.stat().st_size > 0,
)

if __name__ == "__main__":
    stage.main(STAGE)
