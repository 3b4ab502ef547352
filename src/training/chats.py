"""Conversations as a run's lesson: rows through the chat template, a teacher's probabilities, prompts to answer."""

import itertools
import json
from pathlib import Path

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import MissingInput
from src.models import fidelity, generation
from src.settings.verbs import FinetuneVerb
from src.training.examples import Examples, examples_of
from src.training.lesson import Lesson
from src.training.teacher import teacher_probs


def lesson(cfg: FinetuneVerb, inputs: dict[str, Artifact], tokenizer, added: list[str], cache: Path) -> Lesson:
    """On every process. cache: where token rows are kept. Raises BadData where a template refuses a conversation, MissingInput where no row is short enough,
    WrongKind for a teacher of other tokens."""
    records, base = inputs["dataset"].path, inputs["model"].path
    train, val = (examples_of(cfg, inputs["dataset"], inputs["model"], split, cache) for split in ("train", "val"))
    if not len(train):
        raise MissingInput("no training row is within train.max_length", where=str(records), fix="a higher train.max_length")
    eos_id, least = encoding.turn_end(tokenizer), fidelity.FEWEST_EXACT
    of_val = (encoding.Encoded(example.input_ids.tolist(), example.labels.tolist()) for example in val)
    learnt_from = teacher_probs(cfg, inputs["teacher"], train, tokenizer, cache) if "teacher" in inputs else None
    return Lesson(
        chat=True,
        train=train,
        val=val,
        held=fidelity.within(of_val, most=fidelity.enough(base, least)) or fidelity.held_out(records, tokenizer, base, least),
        eos_id=eos_id,
        source=records / "train.jsonl",
        named=lambda row: id_of(records / "train.jsonl", train, row),
        metrics={"rows": {name: count for name, count in vars(train.counts).items() if isinstance(count, int)}},
        prompts=prompts(records / "val.jsonl", tokenizer, cfg.train.samples),
        control=control(tokenizer, eos_id),
        learns_control=cfg.train_new_tokens == "auto",
        added=added,
        teacher_probs=learnt_from,
        alpha=cfg.teacher.weight,
    )


def control(tokenizer, eos_id: int) -> list[int]:
    """Ids of the tokens that open and end turns."""
    marks = tokenizer.convert_tokens_to_ids([encoding.START, encoding.END])
    known = [i for i in marks if i is not None and i != tokenizer.unk_token_id]
    return sorted({eos_id, *generation.turn_ends(tokenizer), *known})


def id_of(file: Path, examples: Examples, row: int) -> str:
    """The id of a row's record."""
    with open(file, encoding="utf-8") as lines:
        line = next(itertools.islice(lines, int(examples.lines[row]) - 1, None))
    return str(json.loads(line)["id"])


def prompts(path: Path, tokenizer, count: int) -> list[tuple[str, list[int]]]:
    """The first `count` conversations of a split up to their first answer: (what was said last, token ids)."""
    found: list[tuple[str, list[int]]] = []
    with open(path, encoding="utf-8") as file:
        for line in itertools.islice(file, count * 4):
            messages = json.loads(line)["messages"]
            cut = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), 0)
            if cut and len(found) < count:
                text = encoding.render(tokenizer, messages[:cut], prompt=True)
                found.append((messages[cut - 1]["content"], tokenizer(text, add_special_tokens=False).input_ids))
    return found
