"""What is measured of a model on this machine: the loss over validation rows, token by token, and greedy answers."""

import json
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.artifact import Artifact
from src.core.errors import BadData, MissingInput, WrongKind
from src.core.log import progress, warn
from src.models import checks, devices, generation, seen
from src.models.folder import weights_of
from src.models.loading import load_any
from src.models.seen import Reader, Seen
from src.records.conversations import Conversation
from src.settings.evaluations import Evaluation
from src.sizing.config_reader import read_shape
from src.sizing.shape import ModelShape


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


def encode_general(conversations: Iterable[Conversation], tokenizer, max_length: int) -> list[tuple[str, encoding.Encoded]]:
    """Texts and conversations of another domain by their ids. Of a text every token counts, as it stands and without a template, up to max_length of them; of a
    conversation its answers, as of encode_named.

    Raises MissingInput where nothing is left.
    """
    chats, rows = [], []
    for one in progress(conversations, "reading general"):
        if (text := encoding.text_alone(one.messages, one.tools)) is not None:
            rows.append((one.id, encoding.of_text(text, tokenizer, max_length)))
        else:
            chats.append({"id": one.id, "messages": one.messages, "tools": one.tools})
    rows += [(record["id"], row) for record, row in rows_of(chats, tokenizer, "general")]
    found = [(id, row) for id, row in rows if 1 < len(row.input_ids) <= max_length]
    if left := len(rows) - len(found):
        warn(f"left out {left} of {len(rows)} general rows longer than {max_length} tokens, or of one")
    if not found:
        raise MissingInput(
            "no row of evaluation.general can be measured", fix="evaluation.general=FILE of texts, or of chats that the template shows"
        )
    return found


def read(
    inputs: dict[str, Artifact], tokenizer, rows: dict[str, list[tuple[str, encoding.Encoded]]], prompts: list, settings: Evaluation
) -> tuple[dict[str, dict[str, Seen]], dict[str, list[dict]]]:
    """({name of some rows: {role: what that model says at them}}, {role: answers to the prompts}) of "model", and of "parent" where there is one.

    The parent goes first, for the two are compared at its likeliest tokens, and with the child's tokenizer and template, so that both see the same
    tokens. Each goes over all rows once.
    """
    said: dict[str, dict[str, Seen]] = {name: {} for name in rows}
    answers: dict[str, list[dict]] = {}
    every, eos_id, at = [row for some in rows.values() for _, row in some], encoding.turn_end(tokenizer), None
    for role in (role for role in ("parent", "model") if role in inputs):
        is_parent = role == "parent"
        one = Measured(inputs[role], role, len(tokenizer) if is_parent else 0)
        found = seen.observe(one.reader, every, at, seen.TOP_K if is_parent else 0, _vocabulary(inputs["model"], tokenizer))
        at, begin = found.top_k_ids, 0
        for name, some in rows.items():
            end = begin + sum(len(seen.kept(row)) for _, row in some)
            said[name][role], begin = found[begin:end], end
        devices.give_back_memory()
        answers[role] = answer(one.model, tokenizer, prompts, settings, eos_id) if prompts else []
        del one
        devices.give_back_memory()
    return said, {role: answers[role] for role in ("model", "parent") if role in answers}


def _shape(model: Artifact) -> ModelShape | None:
    """A model by its config.json, where that says enough."""
    try:
        return read_shape(weights_of(model))
    except (BadData, WrongKind):
        return None


def _vocabulary(model: Artifact, tokenizer) -> int | None:
    """Ids below which a model has them all, as far as is known."""
    if (shape := _shape(model)) is None:
        return None
    return max(shape.vocab, len(tokenizer)) if model.kind == "adapter" else shape.vocab


def positions(model: Artifact, most: int) -> int:
    """Tokens of a text that a model takes, `most` at most."""
    shape = _shape(model)
    return min(most, (shape and shape.max_positions) or most)


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


def validation(dataset: Artifact, settings: Evaluation) -> list[dict]:
    """The records of the validation split, as many as are used."""
    with open(dataset.path / "val.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][: settings.rows]


def answer(model: Any, tokenizer, prompts: list, evaluation: Evaluation, eos_id: int) -> list[dict]:
    """A row for each (messages, tools): what was asked, greedy answer, and whether its turn was ended."""
    found = []
    for begin in range(0, len(prompts), evaluation.batch_size):
        some = prompts[begin : begin + evaluation.batch_size]
        batch, tools = [messages for messages, _ in some], [offered for _, offered in some]
        texts = generation.greedy(model, tokenizer, batch, max_new_tokens=evaluation.max_new_tokens, eos_id=eos_id, tools=tools)
        found += [{**checks.asked_row(p), "answer": text, "ended": ended} for p, (text, ended) in zip(batch, texts)]
    return found
