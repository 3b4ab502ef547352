"""The file against transformers: its token ids, its greedy answers, and what its weights lost on held-out conversations.

With llama.cpp's environment all of it is llama.cpp's own doing, in a process of its own. Without it the file is read back by the gguf package: its ids by
what its metadata say, its weights dequantized and computed with by transformers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import ProofFailed
from src.core.files import read_json
from src.core.log import warn
from src.deploy import answers, contract
from src.deploy.gguf import reading, vocabulary
from src.deploy.gguf.vocabulary import Vocabulary
from src.deploy.gguf.weights import Tensor
from src.models import fidelity, seen
from src.models.folder import weights_of
from src.models.generation import stop_ids
from src.settings.targets import Gguf, GgufLora

TOKENS = 64
# KL in nats and share of likeliest tokens that a type of weights keeps to, beside what other rows would explain; fewest bits last. They are there to find
# faults: several times what SmolLM2-135M loses, which loses more than larger models do (docs/gguf.md).
LIMITS = {
    ("f16", "bf16", "f32"): (0.0005, 0.99),
    ("q8_0",): (0.02, 0.95),
    ("q6_k",): (0.05, 0.9),
    ("q5_1", "q5_0", "q5_k_m", "q5_k_s"): (0.2, 0.8),
    ("q4_1", "q4_0", "q4_k_m", "q4_k_s", "iq4_xs"): (0.6, 0.6),
    ("q3_k_m", "q3_k_s"): (2.5, 0.3),
    ("q2_k",): (5.0, 0.1),
}
Ask = Callable[..., dict]


def prove_ids(tokenizer: Any, vocab: Vocabulary, model: Path, out: Path, ask: Ask | None, file: Path) -> dict:
    """contract.json and its counts. ask: of llama.cpp; None: by the file's own metadata, read back. Raises ProofFailed where ids differ, or an id that ends
    the model's turns does not end llama.cpp's."""
    stops = stop_ids(model, tokenizer)
    if ask is None:
        read = vocabulary.tokenizer_in(vocabulary.fields_of(file))
        return contract.prove(tokenizer, out, lambda texts: [read.encode(vocab.as_given(t), add_special_tokens=False).ids for t in texts])
    ended = []

    def board(texts: list[str]) -> list[list[int]]:
        told = ask("encode", texts=[vocab.as_given(text) for text in texts], ids=stops)
        ended.extend(told["ends"])
        return told["ids"]

    counts = contract.prove(tokenizer, out, board)
    if lost := [vocab.tokens[id] for id in stops if id not in ended]:
        raise ProofFailed(f"llama.cpp would talk on behind {', '.join(map(repr, lost))}, which end the model's turns", where=str(file))
    return counts


def prove(
    start: Artifact,
    out: Path,
    tokenizer: Any,
    target: Gguf | GgufLora,
    ask: Ask | None,
    dataset: Path | None,
    file: Path,
    plan: list[Tensor],
) -> dict:
    """llama.cpp's greedy answers, and what was lost on held-out rows, against transformers in fp32, layer by layer. ask: as above; without it no answers."""
    folder = weights_of(start)
    held = fidelity.held_out(dataset, tokenizer, folder)
    if ask is None:
        return _read_back(start, held, target, file, plan)
    limit = read_json(folder / "config.json").get("max_position_embeddings") or target.context_len
    asked = answers.prompts(out, tokenizer, min(target.context_len, limit) - TOKENS)
    if not asked:
        raise ProofFailed(f"no prompt leaves room for an answer of {TOKENS} tokens in {limit}", where=str(out))
    answer = ask("answer", prompts=asked, tokens=TOKENS)
    before = seen.observe(fidelity.reader(start, "float32"), [*answers.rows_of(asked, answer["ids"]), *held])
    made = sum(map(len, answer["ids"]))
    _, agreement = limits(target.weight_type)
    metrics = answers.judge(answer["ids"], before[:made], max(0.0, agreement - 0.1), "llama.cpp", wider(target))
    metrics |= {key: answer[key] for key in ("tokens_per_second", "prompt_tokens_per_second", "load_seconds")}
    return metrics | lost(before[made:], held, ask, target)


def lost(before: seen.Seen, rows: list[encoding.Encoded], ask: Ask, target: Gguf | GgufLora) -> dict:
    """What the file, as llama.cpp computes it here, says at held-out rows, against `before`; see fidelity."""
    if not rows:
        return {}
    told = ask("observe", rows=answers.questions(before, rows))["rows"]
    return judge(fidelity.compare(before, answers.seen_of(before, told), len(rows)), target)


def _read_back(start: Artifact, rows: list[encoding.Encoded], target: Gguf | GgufLora, file: Path, plan: list[Tensor]) -> dict:
    """The same of the file's weights, dequantized by the gguf package and computed with by transformers, a layer at a time."""
    warn(
        f"llama.cpp is not in {target.environment}, so it has not run this file: ids are proven by the file's own metadata and weights as the gguf package "
        f"reads them; with it, force=true proves the rest (bash scripts/gguf_env.sh {target.environment})"
    )
    from src.models import by_layer

    found = by_layer.load(start) if rows else None
    if not found:
        reading.check(file, plan)
        return {}
    before = seen.observe(seen.by_layer(found[0], "proof"), rows)
    found[0].take(reading.tensors(file, plan))
    after = seen.observe(seen.by_layer(found[0], "proof of the file"), rows, before.top_k_ids)
    return judge(fidelity.compare(before, after, len(rows)), target)


def judge(change: fidelity.Change, target: Gguf | GgufLora) -> dict:
    """Says what was lost; returns it as metrics. Raises ProofFailed where it is more than this type of weights loses."""
    kl, agreement = limits(target.weight_type)
    waver = 2 * (change.agreement * (1 - change.agreement) / change.tokens) ** 0.5
    if not (change.kl - change.kl_waver <= kl and change.agreement + waver >= agreement):  # what is no number is over it too
        raise ProofFailed(
            f"more was lost than {target.weight_type} explains: {change.told('before', 'in the file')}",
            where=f"limits KL {kl:g} nats and {agreement:.0%} the same likeliest token",
            fix=wider(target),
        )
    return fidelity.report(
        "gguf", change, f"in {target.weight_type}", "target.weight_type=q8_0 loses less" if kl > LIMITS[("q8_0",)][0] else ""
    )


def limits(weight_type: str) -> tuple[float, float]:
    return next(found for types, found in LIMITS.items() if weight_type in types)


def wider(target: Gguf | GgufLora) -> list[str]:
    """Types of weights that lose less, the next first."""
    order = list(LIMITS)
    at = next(i for i, types in enumerate(order) if target.weight_type in types)
    return [f"target.weight_type={types[0]}" for types in order[:at][::-1]]
