"""The bundle against transformers: its token ids, its chat template and its greedy answers on this machine's CPU, whatever device it is for."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.errors import ProofFailed, ToolFailed
from src.core.log import say, warn
from src.deploy import contract
from src.deploy.openvino import recipe
from src.deploy.openvino.exporter import ANOTHER, OFFLINE, READ
from src.deploy.vendor import run
from src.models import fidelity
from src.models.generation import stop_ids
from src.settings.targets import Openvino

TOKENS = 64
PROMPTS = 10
NEAR = 0.05
"""A token that is not transformers' likeliest but whose logit is this close to it, in standard deviations of that step's logits, is a near tie:
rounding the weights to 8 bits decides it either way."""
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


def prove_loss(model, ask: Callable[..., dict], rows: list[encoding.Encoded], target: Openvino) -> dict:
    """What was lost from `model` (transformers', in fp32) to the bundle as OpenVINO computes it here, on held-out rows; see fidelity."""
    if not rows:
        return {}
    before = fidelity.observe(partial(fidelity.trained_logits, model), rows, "proof")
    questions, begin = [], 0
    for row in rows:
        keep = [at for at, label in enumerate(row.labels[1:]) if label != encoding.IGNORE]
        ids = before.top_k_ids[begin : begin + len(keep)].tolist()
        questions.append({"ids": row.input_ids, "keep": keep, "targets": [row.labels[at + 1] for at in keep], "top_k_ids": ids})
        begin += len(keep)
    told = ask("observe", rows=questions)["rows"]
    losses, log_probs, likeliest = (np.concatenate([part[name] for part in told]) for name in ("losses", "log_probs", "likeliest"))
    change = fidelity.compare(before, fidelity.Seen(losses, before.top_k_ids, log_probs, likeliest), len(rows))
    ways = "target.weight_type=int8 loses less" if target.weight_type == "int4" else ""
    return fidelity.report("openvino", change, f"in {target.weight_type}", ways)


def prove_answers(model, model_dir: Path, out: Path, tokenizer, target: Openvino, ask: Callable[..., dict]) -> dict:
    """Greedy answers of up to TOKENS tokens by OpenVINO on this CPU against transformers in fp32; returns counts and speeds.

    One pass of transformers over each finished answer tells whether every token is its likeliest after the ones before, since greedy answers part at
    the first that is not. Raises ProofFailed below nine tenths of the tokens in int8 and below a half in int4, which no rounding explains, and for an
    answer that stops early or runs on.
    """
    import torch

    limit = min(target.context_len, getattr(model.config, "max_position_embeddings", None) or target.context_len)
    rows = prompts(out, tokenizer, min(target.prompt_len, limit - TOKENS))
    if not rows:
        raise ProofFailed(f"no prompt leaves room for an answer of {TOKENS} tokens in {limit}", where=str(out))
    answer = ask("answer", prompts=rows, tokens=TOKENS)
    stops = set(stop_ids(model_dir, tokenizer))
    equal = near = agreed = made = 0
    largest = 0.0
    for row, ours in zip(rows, answer["ids"], strict=True):
        if not ours or (len(ours) < TOKENS and ours[-1] not in stops) or stops & set(ours[:-1]):
            raise ProofFailed(
                f"OpenVINO's answer of {len(ours)} tokens does not end where the model's stop tokens {sorted(stops)} say: {ours[-8:]}",
                where=str(out / "generation_config.json"),
                fix="put every token that ends a turn into eos_token_id of the model's generation_config.json",
            )
        with torch.inference_mode():
            logits = model(torch.tensor([row + ours[:-1]]), use_cache=False).logits[0, len(row) - 1 :]
        best = logits.max(-1)
        gaps = (best.values - logits.gather(-1, torch.tensor(ours)[:, None])[:, 0]) / logits.std(-1)
        wrong = [gap for gap, theirs, mine in zip(gaps.tolist(), best.indices.tolist(), ours, strict=True) if theirs != mine]
        equal, near = equal + (not wrong), near + all(gap <= NEAR for gap in wrong)
        largest = max([largest, *wrong])
        agreed, made = agreed + len(ours) - len(wrong), made + len(ours)
    say(
        f"greedy answers against transformers fp32: {equal} of {len(rows)} prompts equal token by token, {near} but for near ties; "
        f"{agreed} of {made} tokens are its likeliest"
        + (f", the others at most {largest:.3f} of the logits' spread below it" if largest else "")
    )
    if agreed < (0.9 if target.weight_type == "int8" else 0.5) * made:
        raise ProofFailed(
            f"OpenVINO's greedy answers agree with transformers on {agreed} of {made} tokens only",
            where=str(out),
            fix="target.weight_type=int8" if target.weight_type == "int4" else ANOTHER,
        )
    return {
        "prompts": len(rows),
        "prompts_equal": equal,
        "prompts_near": near,
        "greedy_tokens": made,
        "greedy_agreement": round(agreed / made, 4),
        "largest_gap": round(largest, 4),
        **{key: answer[key] for key in ("tokens_per_second", "first_token_ms", "load_seconds")},
    }
