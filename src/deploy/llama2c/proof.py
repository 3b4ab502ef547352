"""The finished bundle against transformers: its program is run, and its token ids and its text are compared."""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import ProofFailed
from src.deploy.llama2c.chat import ChatPieces
from src.deploy.llama2c.runtime import escape
from src.models import fidelity, seen
from src.models.llama2c_file import Form, Shape, reader_of

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
TIE = 1e-3
"""nats between two tokens that fp32 sums in another order may take for each other"""
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


@dataclass(frozen=True)
class Text:
    """What the program said greedily. ids: of prompt and answer. begin: where the answer begins. speed: tokens/s."""

    prompt: str
    ids: list[int]
    begin: int
    speed: float

    @property
    def row(self) -> encoding.Encoded:
        """To ask transformers for: is each token of the answer the likeliest after the ones before it?"""
        return encoding.Encoded(self.ids, [encoding.IGNORE] * self.begin + self.ids[self.begin :])


def prove(start: Artifact, out: Path, shape: Shape, form: Form, hf, stops: list[int], dataset: Path | None) -> dict:
    """The program's greedy texts, and the loss that model.bin has on held-out rows, against transformers in fp32, layer by layer.

    One pass of transformers over the finished texts tells, since greedy texts part at the first token that is not its likeliest.
    """
    from src.models import by_layer

    exact = form.bits == 32
    texts = list(said(out, hf, stops, shape.context))
    held = fidelity.held_out(dataset, hf, start.path)
    rows = [*(text.row for text in texts), *held]
    model = by_layer.need(start)
    before = seen.observe(seen.by_layer(model, "proof"), rows)
    made = sum(len(text.ids) - text.begin for text in texts)
    metrics = judge_texts(texts, before[:made], out, form.bits)
    if not held:
        return metrics
    model.take(reader_of(out / "model.bin", shape, form))
    whole = before[made:]
    after = seen.observe(seen.by_layer(model, "proof of model.bin"), held, whole.top_k_ids)
    change = fidelity.compare(whole, after, len(held))
    if not exact:
        return metrics | fidelity.report("llama2c", change, f"in int{form.bits}", _less(form))
    fidelity.judge("llama2c", change, 1e-4, out / "model.bin", [], setting=None)
    return metrics | change.metrics()


def _less(form: Form) -> str:
    """The way to a bundle that loses less."""
    if form.bits == 4:
        return f"target.format=int8_v{form.version} loses less"
    return f"target.format=fp32_v{3 if form.version == 3 else 0} loses nothing"


def said(out: Path, hf, stops: list[int], context: int, tokens: int = 64) -> Iterator[Text]:
    """The program's answers to GREEDY_PROBES. Raises ProofFailed where one ends early."""
    for prompt in GREEDY_PROBES:
        ids = hf(prompt)["input_ids"]
        if not 0 < len(ids) < context:
            continue
        total = min(len(ids) + tokens, context)
        done = run(out, "-t", "0", "-n", str(total - 1), "--answer-ids", "-i", prompt)
        ours = ids_of(done)
        if not ours or (len(ids) + len(ours) < total and ours[-1] not in stops):
            raise ProofFailed(f"the program stopped after {len(ours)} tokens", where=f"the prompt {prompt!r}")
        yield Text(prompt, ids + ours, len(ids), float(re.findall(rb"answer: .* ([\d.]+) tok/s", done.stderr)[0]))


def judge_texts(texts: list[Text], told: seen.Seen, out: Path, bits: int) -> dict:
    """told: what transformers says at the answers' tokens.

    Of fp32, raises ProofFailed at a token that is not its likeliest unless it holds the two as good as equal. Of int8 and int4 the agreement is a result,
    and only one that no rounding explains raises.
    """
    exact, least = bits == 32, 0.25 if bits == 4 else 0.5
    equal = ties = begin = 0
    for text in texts:
        ours = text.ids[text.begin :]
        part = told[begin : begin + len(ours)]
        begin += len(ours)
        wrong = np.flatnonzero(part.likeliest != np.array(ours))
        for i in wrong if exact else ():
            if part.log_probs[i].max() + part.losses[i] > TIE:
                raise ProofFailed(
                    f"token {i} of the greedy text is {ours[i]}, transformers' {part.likeliest[i]}", where=f"the prompt {text.prompt!r}"
                )
        equal += not len(wrong)
        ties += len(wrong) if exact else 0
    agreed = int((told.likeliest == np.array([id for text in texts for id in text.ids[text.begin :]])).sum()) if texts else 0
    if agreed < least * begin:
        raise ProofFailed(f"transformers agrees with {agreed} of the program's {begin} tokens", where=str(out))
    return {
        "prompts": len(texts),
        "prompts_equal": equal,
        "ties": ties,
        "greedy_tokens": begin,
        "greedy_agreement": round(agreed / begin, 4) if begin else None,
        "tokens_per_second": max((text.speed for text in texts), default=0.0),
    }
