"""The finished bundle against transformers: its program is run, and its token ids and its text are compared."""

import re
import subprocess
from functools import partial
from pathlib import Path

from src.chat import encoding
from src.core.errors import ProofFailed
from src.deploy.llama2c.chat import ChatPieces
from src.deploy.llama2c.runtime import escape
from src.deploy.llama2c.weights import Shape, read_model
from src.models import fidelity

PROBES = (
    "",
    "Hello, world!",
    "Once upon a time, there was a little girl named Lily.",
    " leading space",
    "trailing  ",
    "two  and   three    spaces",
    "line one\nline two\n\n\nline five\r\n\tindented",
    " \n \n  x",
    "12 345 6789 10000000 3.14159 1,024",
    "It's they're I'LL we've 'quoted' don't",
    "(a+b)*c == \"d\" && e[0] != '#'; // ...!?",
    "안녕하세요, 만나서 반갑습니다. 오늘 날씨가 좋네요!",
    "你好,世界。这是一个测试。",
    "naïve café — “quotes” … № ½ ٣",
    "🙂👩‍👩‍👧 emoji 🇰🇷!",
    "a\u00a0b\u3000c\u2581d",
    "x" * 40 + " " * 17 + "y",
)
GREEDY_PROBES = ("", "Once upon a time", "The answer to 2 + 2 is", "안녕하세요")


def run(out: Path, *options: str, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run the bundle's program. Raises ProofFailed where it fails."""
    argv = [str(out / "run"), str(out / "model.bin"), *options]
    done = subprocess.run(argv, input=stdin, capture_output=True)
    if done.returncode:
        raise ProofFailed(
            f"the program failed with exit code {done.returncode}: {done.stderr[-500:].decode(errors='replace').strip()}",
            where=" ".join(argv),
        )
    return done


def ids_of(done: subprocess.CompletedProcess) -> list[int]:
    """The ids that the program printed."""
    return [int(id) for id in done.stdout.split()]


def prove_ids(out: Path, hf, pieces: ChatPieces | None) -> dict:
    """The C encoder gives the Hugging Face tokenizer's ids for PROBES, and for the conversations where there is a chat mode."""
    talks = pieces.conversations() if pieces else []
    checked = sum(_same_ids(ids_of(run(out, "--ids", "-i", text)), hf(text)["input_ids"], text) for text in PROBES)
    for messages in talks:
        theirs = hf.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
        checked += _same_ids(_chat_ids(out, messages), theirs, str(messages))
    return {"probes": len(PROBES), "conversations": len(talks), "ids_checked": checked}


def _chat_ids(out: Path, messages: list[dict]) -> list[int]:
    """The C encoder's ids of a conversation: system text and first message are options, the others are lines of stdin."""
    options, rest = ["--ids", "-m", "chat"], messages
    if messages[0]["role"] == "system":
        options, rest = [*options, "-y", messages[0]["content"]], messages[1:]
    lines = "".join(escape(m["content"]) + "\n" for m in rest[1:])
    return ids_of(run(out, *options, "-i", rest[0]["content"], stdin=lines.encode()))


def _same_ids(ours: list[int], theirs: list[int], text: str) -> int:
    if ours != theirs:
        raise ProofFailed(f"the C tokenizer gives {ours[:40]}, transformers {list(theirs)[:40]}", where=f"the text {text[:200]!r}")
    return len(ours)


def prove_loss(model, path: Path, shape: Shape, rows: list[encoding.Encoded], exact: bool) -> dict:
    """What model.bin holds, read back into `model` (transformers', in fp32), against what it was made from, on held-out rows; see fidelity.

    exact: raise ProofFailed where there is a difference. Else (int8) what was lost is a result. The model is another one afterwards.
    """
    import torch

    if not rows:
        return {}
    before = fidelity.observe(partial(fidelity.trained_logits, model), rows, "proof")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in read_model(path, shape):
            parameters[name].copy_(weight)
    after = fidelity.observe(partial(fidelity.trained_logits, model), rows, "proof", before.top_k_ids)
    change = fidelity.compare(before, after, len(rows))
    if not exact:
        return fidelity.report("llama2c", change, "in int8", "target.format=fp32_v0 loses nothing")
    fidelity.judge("llama2c", change, 1e-4, path, [], setting=None)
    return change.metrics()


def prove_text(model, out: Path, hf, stops: list[int], exact: bool, tokens: int = 64) -> dict:
    """The program's greedy text against transformers in fp32: is each token the likeliest after the ones before it?

    One pass of transformers over the finished text tells, since greedy texts part at the first token that is not.
    exact: raise ProofFailed at such a token unless transformers holds the two as good as equal. Else (int8) the agreement is
    a result, and only one below a half, which no rounding explains, raises.
    """
    import torch

    context = model.config.max_position_embeddings
    prompts = equal = agreed = made = ties = 0
    speed = 0.0
    for prompt in GREEDY_PROBES:
        ids = hf(prompt)["input_ids"]
        if not 0 < len(ids) < context:
            continue
        total = min(len(ids) + tokens, context)
        done = run(out, "-t", "0", "-n", str(total - 1), "--answer-ids", "-i", prompt)
        ours = ids_of(done)
        if not ours or (len(ids) + len(ours) < total and ours[-1] not in stops):
            raise ProofFailed(f"the program stopped after {len(ours)} tokens", where=f"the prompt {prompt!r}")
        with torch.inference_mode():
            logits = model(torch.tensor([ids + ours[:-1]])).logits[0, len(ids) - 1 :]
        theirs = logits.argmax(-1).tolist()
        wrong = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        for i in wrong if exact else ():
            if logits[i, theirs[i]] - logits[i, ours[i]] > 1e-4 * logits[i].std():
                raise ProofFailed(f"token {i} of the greedy text is {ours[i]}, transformers' {theirs[i]}", where=f"the prompt {prompt!r}")
        prompts += 1
        equal += not wrong
        ties += len(wrong) if exact else 0
        agreed += len(ours) - len(wrong)
        made += len(ours)
        speed = max(speed, float(re.findall(rb"answer: .* ([\d.]+) tok/s", done.stderr)[0]))
    if agreed < 0.5 * made:
        raise ProofFailed(f"transformers agrees with {agreed} of the program's {made} tokens", where=str(out))
    return {
        "prompts": prompts,
        "prompts_equal": equal,
        "ties": ties,
        "greedy_tokens": made,
        "greedy_agreement": round(agreed / made, 4) if made else None,
        "tokens_per_second": speed,
    }
