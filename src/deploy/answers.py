"""What a bundle answers, as another program than transformers computes it, against transformers: greedy answers, and what was lost on held-out rows."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.errors import ProofFailed, ToolFailed
from src.core.log import say
from src.deploy import contract
from src.deploy.vendor import run
from src.models import seen

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
PROMPTS = 10
NEAR = 0.1
"""nats: a token that is not transformers' likeliest but this close to it is a near tie; rounding the weights to 8 bits decides it either way"""
# Openings beside the contract's conversations, for models without a template or whose template refuses some of those.
OPENINGS = (
    "Once upon a time",
    "The answer to 2 + 2 is",
    "Dear Ann,",
    "In the morning the sun",
    "def add(a, b):",
    "Water boils at",
    "One day, a little girl",
    "The most important thing is",
    "My favourite food is",
    "The dog ran to the",
)


def questioner(python: Path, inside: Path, work: Path, program: str, fix: str, **always) -> Callable[..., dict]:
    """ask(do, **what) -> the answer of the script `inside`, run by an environment's interpreter in a process of its own; it lists what can be asked.

    always: what each question holds. program, fix: named where it fails.
    """

    def ask(do: str, **what) -> dict:
        question, answer, log = work / "question.json", work / "answer.json", work / f"{do}.log"
        answer.unlink(missing_ok=True)
        question.write_text(json.dumps({"do": do, **always, **what}), "utf-8")
        done = run([str(python), "-I", str(inside), str(question), str(answer)], log, env=OFFLINE)
        if done.code or not answer.is_file():
            raise ToolFailed(
                f"{program} could not {do} with the bundle (exit code {done.code}):\n{done.tail[-1500:]}", where=str(log), fix=fix
            )
        return json.loads(answer.read_text("utf-8"))

    return ask


def prompts(out: Path, tokenizer, room: int) -> list[list[int]]:
    """Token ids of PROMPTS prompts of at most `room` tokens: the contract's conversations, then OPENINGS."""
    talks = json.loads((out / contract.FILE).read_text("utf-8"))["conversations"]
    rows = [talk["ids"] for talk in talks] + [tokenizer(text).input_ids for text in OPENINGS]
    return [row for row in rows if 0 < len(row) <= room][:PROMPTS]


def rows_of(prompts: list[list[int]], answers: list[list[int]]) -> list[encoding.Encoded]:
    """Rows whose answers alone are looked at. One pass of transformers over them tells whether every token is its likeliest after the ones before, since
    greedy answers part at the first that is not."""
    return [encoding.Encoded(p + ours, [encoding.IGNORE] * len(p) + ours) for p, ours in zip(prompts, answers, strict=True)]


def questions(before: seen.Seen, rows: list[encoding.Encoded]) -> list[dict]:
    """[{"ids", "keep", "targets", "top_k_ids"}] that ask another program what it says at the rows' trained tokens. before: what transformers says there."""
    asked, begin = [], 0
    for row in rows:
        keep = seen.kept(row)
        ids = before.top_k_ids[begin : begin + len(keep)].tolist()
        asked.append({"ids": row.input_ids, "keep": keep, "targets": [row.labels[at + 1] for at in keep], "top_k_ids": ids})
        begin += len(keep)
    return asked


def seen_of(before: seen.Seen, told: list[dict]) -> seen.Seen:
    """What it says, by its answers [{"losses", "log_probs", "likeliest"}] to `questions`."""
    losses, log_probs, likeliest = (np.concatenate([part[name] for part in told]) for name in ("losses", "log_probs", "likeliest"))
    return seen.Seen(losses, before.top_k_ids, log_probs, likeliest)


def judge(answers: list[list[int]], told: seen.Seen, least: float, program: str, fix: str | list[str]) -> dict:
    """told: what transformers says at the answers' tokens. Raises ProofFailed where fewer than `least` of them are its likeliest, which no rounding explains."""
    equal = near = begin = 0
    flat = np.array([id for ours in answers for id in ours])
    gaps = np.where(told.likeliest == flat, 0.0, told.log_probs.max(1) + told.losses)
    for ours in answers:
        part = gaps[begin : begin + len(ours)]
        equal, near, begin = equal + (not part.any()), near + bool((part <= NEAR).all()), begin + len(ours)
    agreed, largest = int((gaps == 0).sum()), float(gaps.max())
    say(
        f"greedy answers against transformers fp32: {equal} of {len(answers)} prompts equal token by token, {near} but for near ties; "
        f"{agreed} of {begin} tokens are its likeliest" + (f", the others at most {largest:.3f} nats below it" if largest else "")
    )
    if agreed < least * begin:
        raise ProofFailed(f"{program}'s greedy answers agree with transformers on {agreed} of {begin} tokens only", fix=fix)
    return {
        "prompts": len(answers),
        "prompts_equal": equal,
        "prompts_near": near,
        "greedy_tokens": begin,
        "greedy_agreement": round(agreed / begin, 4),
        "largest_gap": round(largest, 4),
    }
