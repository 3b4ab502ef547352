"""What is measured of a model on this machine: the loss over validation rows, token by token, and greedy answers."""

import math
from typing import Any

import numpy as np

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.artifact import Artifact
from src.core.errors import BadData, MissingInput
from src.core.log import progress, warn
from src.models import devices, generation, seen
from src.models.loading import load_any
from src.models.seen import Reader, Seen
from src.settings.verbs import Evaluation


class Measured:
    """A model being measured on this machine. On a CPU it computes in fp32: its loss a layer at a time, its answers from the dtype that is stored."""

    def __init__(self, artifact: Artifact, role: str, tokens: int = 0):
        """role: told with the progress. tokens: ids that it has to know; its vocabulary grows to as many."""
        self.artifact, self.role, self.tokens, self.device = artifact, role, tokens, devices.device()
        self._model: Any = None

    @property
    def model(self):
        """The whole model, loaded when first asked for."""
        if self._model is None:
            dtype = "held" if self.device == "cpu" else "auto"
            self._model, _ = load_any(self.artifact, dtype=dtype, device=self.device, tokens=self.tokens)
        return self._model

    @property
    def reader(self) -> Reader:
        from src.models import by_layer

        what = f"measuring {self.role}"
        walk = by_layer.load(self.artifact, tokens=self.tokens) if self.device == "cpu" and self._model is None else None
        return seen.by_layer(walk[0], what) if walk else seen.whole(self.model, what)


def encode_all(records: list[dict], tokenizer, max_length: int) -> list[encoding.Encoded]:
    """The rows of encode_named alone."""
    return [row for _, row in encode_named(records, tokenizer, max_length)]


def encode_named(records: list[dict], tokenizer, max_length: int) -> list[tuple[str, encoding.Encoded]]:
    """Validation records by their ids, as token ids and labels; those that teach nothing or are longer than max_length tokens are left out, and counted.

    Raises BadData where the chat template shows none of them, MissingInput where all are longer.
    """
    found = [(record["id"], row) for record, row in rows_of(progress(records, "tokenizing validation"), tokenizer, "validation")]
    if records and not found:
        raise BadData(
            "the chat template shows no answer of the validation split", fix="fine-tune with chat_template=chatml, which shows them"
        )
    rows = [(id, row) for id, row in found if len(row.input_ids) <= max_length]
    if long := len(found) - len(rows):
        warn(f"left out {long} of {len(records)} validation rows longer than evaluation.max_length={max_length}")
    if not rows:
        raise MissingInput(
            "no validation row is within evaluation.max_length",
            fix=f"evaluation.max_length={max(len(row.input_ids) for _, row in found)}" if found else (),
        )
    return rows


def measure(read: Reader, rows: list[encoding.Encoded], eos_id: int) -> tuple[dict, list[np.ndarray]]:
    """(figures_of, per row the top-1 token at each trained one)."""
    found = seen.observe(read, rows, top_k=0)
    return figures_of(found, rows, eos_id), np.split(found.likeliest, np.cumsum([len(seen.kept(row)) for row in rows])[:-1])


def figures_of(found: Seen, rows: list[encoding.Encoded], eos_id: int) -> dict:
    """{loss in nats, perplexity, accuracy, tokens} over trained tokens, and the share of turn ends predicted."""
    targets = seen.targets_of(rows)
    ends, mean = targets == eos_id, float(found.losses.mean())
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "accuracy": float((found.likeliest == targets).mean()),
        "tokens": len(targets),
        "turns_ended": int((found.likeliest[ends] == eos_id).sum()) / max(int(ends.sum()), 1),
    }


def answer(measured: Measured, tokenizer, prompts: list, evaluation: Evaluation, eos_id: int) -> list[dict]:
    """A row for each (messages, tools): prompt, greedy answer, and whether its turn was ended."""
    found = []
    for begin in range(0, len(prompts), evaluation.batch_size):
        some = prompts[begin : begin + evaluation.batch_size]
        batch, tools = [messages for messages, _ in some], [offered for _, offered in some]
        texts = generation.greedy(measured.model, tokenizer, batch, max_new_tokens=evaluation.max_new_tokens, eos_id=eos_id, tools=tools)
        found += [{"prompt": p[-1]["content"], "answer": text, "ended": ended} for p, (text, ended) in zip(batch, texts)]
    return found
