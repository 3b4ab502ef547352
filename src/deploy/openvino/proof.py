"""The bundle against transformers: its token ids, its chat template and its greedy answers on this machine's CPU, whatever device it is for."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import ProofFailed, ToolFailed
from src.core.files import read_json
from src.core.log import say, warn
from src.deploy import contract
from src.deploy.openvino import recipe
from src.deploy.openvino.exporter import ANOTHER, OFFLINE, READ
from src.deploy.vendor import run
from src.models import fidelity, seen
from src.models.generation import stop_ids
from src.settings.targets import Openvino

TOKENS = 64
PROMPTS = 10
NEAR = 0.1
"""nats: a token that is not transformers' likeliest but this close to it is a near tie; rounding the weights to 8 bits decides it either way"""
INSIDE = Path(__file__).with_name("inside.py")
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


def questioner(target: Openvino, bundle: Path, work: Path) -> Callable[..., dict]:
    """ask(do, **what) -> the answer of inside.py, run by the environment's interpreter; it lists what can be asked."""

    def ask(do: str, **what) -> dict:
        question, answer, log = work / "question.json", work / "answer.json", work / f"{do}.log"
        answer.unlink(missing_ok=True)
        question.write_text(json.dumps({"do": do, "bundle": str(bundle.absolute()), "device": "CPU", **what}), "utf-8")
        done = run([str(recipe.python(target)), "-I", str(INSIDE), str(question), str(answer)], log, env=OFFLINE)
        if done.code or not answer.is_file():
            raise ToolFailed(
                f"OpenVINO could not {do} with the bundle (exit code {done.code}):\n{done.tail[-1500:]}", where=str(log), fix=READ
            )
        return json.loads(answer.read_text("utf-8"))

    return ask


def unmade_pieces(tokenizer) -> list[str]:
    """Pieces of a byte-level BPE vocabulary that no merge makes. Hugging Face's tokenizers never give them for a text; openvino_tokenizers 2026.4 takes
    each for an indivisible character and does. Only their encoding is in question: the model may say them, so the detokenizer keeps them."""
    if not tokenizer.is_fast:
        return []
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    model, added = spec["model"], {token["content"] for token in spec["added_tokens"]}
    if model["type"] != "BPE" or model.get("ignore_merges") or '"ByteLevel"' not in json.dumps(spec["pre_tokenizer"]):
        return []
    made = {"".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model["merges"]}
    return [piece for piece in model["vocab"] if len(piece) > 1 and piece not in made and piece not in added]


def mend_tokenizer(tokenizer, model_dir: Path, ask: Callable[..., dict], *, trust: bool) -> int:
    """Have openvino_tokenizer.xml made anew without the unmade pieces, if there are any; returns how many."""
    if pieces := unmade_pieces(tokenizer):
        say(
            f"tokenizer: {len(pieces)} pieces that no merge makes, such as {pieces[-1]!r}, are left out of OpenVINO's encoder, which would use them"
        )
        ask("convert", model=str(model_dir.absolute()), trust=trust, unmade=pieces)
    return len(pieces)


def prove_ids(tokenizer, out: Path, ask: Callable[..., dict]) -> dict:
    """contract.json and its counts: openvino_tokenizer.xml gives the model's own token ids, and the runtime renders the model's own template."""
    counts = contract.prove(tokenizer, out, lambda texts: ask("encode", texts=texts)["ids"])
    talks = json.loads((out / contract.FILE).read_text("utf-8"))["conversations"]
    rendered = ask("render", conversations=[{"messages": t["messages"], "tools": t["tools"]} for t in talks])["texts"] if talks else []
    differ = [talk for talk, text in zip(talks, rendered, strict=True) if text != talk["text"]]
    if plain := [talk["name"] for talk in differ if not talk["tools"]]:
        raise ProofFailed(
            f"OpenVINO GenAI renders the model's chat template otherwise than transformers: {', '.join(plain)}",
            where=str(out / "openvino_tokenizer.xml"),
        )
    if differ:
        warn(
            "OpenVINO GenAI renders tools otherwise than transformers; render such conversations with transformers before the bundle gets them"
        )
    return {**counts, "template_equal": len(talks) - len(differ)}


def prompts(out: Path, tokenizer, room: int) -> list[list[int]]:
    """Token ids of PROMPTS prompts of at most `room` tokens: the contract's conversations, then OPENINGS."""
    talks = json.loads((out / contract.FILE).read_text("utf-8"))["conversations"]
    rows = [talk["ids"] for talk in talks] + [tokenizer(text).input_ids for text in OPENINGS]
    return [row for row in rows if 0 < len(row) <= room][:PROMPTS]


def prove(start: Artifact, out: Path, tokenizer, target: Openvino, ask: Callable[..., dict], dataset: Path | None) -> dict:
    """OpenVINO's greedy answers, and what was lost on held-out rows, on this CPU against transformers in fp32, layer by layer.

    One pass of transformers over the finished answers tells whether every token is its likeliest after the ones before, since greedy answers part at
    the first that is not.
    """
    config = read_json(start.path / "config.json")
    limit = min(target.context_len, config.get("max_position_embeddings") or target.context_len)
    asked = prompts(out, tokenizer, min(target.prompt_len, limit - TOKENS))
    if not asked:
        raise ProofFailed(f"no prompt leaves room for an answer of {TOKENS} tokens in {limit}", where=str(out))
    answer = ask("answer", prompts=asked, tokens=TOKENS)
    check_ends(answer["ids"], set(stop_ids(start.path, tokenizer)), out)
    held = fidelity.held_out(dataset, tokenizer, start.path)
    rows = [encoding.Encoded(p + ours, [encoding.IGNORE] * len(p) + ours) for p, ours in zip(asked, answer["ids"], strict=True)]
    before = seen.observe(fidelity.reader(start, "float32"), [*rows, *held])
    made = sum(map(len, answer["ids"]))
    metrics = judge_answers(answer["ids"], before[:made], target)
    return (
        metrics
        | {key: answer[key] for key in ("tokens_per_second", "first_token_ms", "load_seconds")}
        | lost(before[made:], held, ask, target)
    )


def lost(before: seen.Seen, rows: list[encoding.Encoded], ask: Callable[..., dict], target: Openvino) -> dict:
    """What the bundle, as OpenVINO computes it here, says at held-out rows, against `before`; see fidelity."""
    if not rows:
        return {}
    questions, begin = [], 0
    for row in rows:
        keep = seen.kept(row)
        ids = before.top_k_ids[begin : begin + len(keep)].tolist()
        questions.append({"ids": row.input_ids, "keep": keep, "targets": [row.labels[at + 1] for at in keep], "top_k_ids": ids})
        begin += len(keep)
    told = ask("observe", rows=questions)["rows"]
    losses, log_probs, likeliest = (np.concatenate([part[name] for part in told]) for name in ("losses", "log_probs", "likeliest"))
    change = fidelity.compare(before, seen.Seen(losses, before.top_k_ids, log_probs, likeliest), len(rows))
    ways = "target.weight_type=int8 loses less" if target.weight_type == "int4" else ""
    return fidelity.report("openvino", change, f"in {target.weight_type}", ways)


def check_ends(answers: list[list[int]], stops: set[int], out: Path) -> None:
    """Raises ProofFailed for an answer that stops early or runs on."""
    for ours in answers:
        if not ours or (len(ours) < TOKENS and ours[-1] not in stops) or stops & set(ours[:-1]):
            raise ProofFailed(
                f"OpenVINO's answer of {len(ours)} tokens does not end where the model's stop tokens {sorted(stops)} say: {ours[-8:]}",
                where=str(out / "generation_config.json"),
                fix="put every token that ends a turn into eos_token_id of the model's generation_config.json",
            )


def judge_answers(answers: list[list[int]], told: seen.Seen, target: Openvino) -> dict:
    """told: what transformers says at the answers' tokens. Raises ProofFailed below nine tenths of them in int8 and below a half in int4, which no
    rounding explains."""
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
    if agreed < (0.9 if target.weight_type == "int8" else 0.5) * begin:
        raise ProofFailed(
            f"OpenVINO's greedy answers agree with transformers on {agreed} of {begin} tokens only",
            fix="target.weight_type=int8" if target.weight_type == "int4" else ANOTHER,
        )
    return {
        "prompts": len(answers),
        "prompts_equal": equal,
        "prompts_near": near,
        "greedy_tokens": begin,
        "greedy_agreement": round(agreed / begin, 4),
        "largest_gap": round(largest, 4),
    }
