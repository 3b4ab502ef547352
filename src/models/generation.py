"""What a model says: greedy answers, logits of given tokens, and the tokens that end a turn, in a tokenizer's files and a model's configuration."""

import json
from pathlib import Path

from src.chat import template
from src.chat.encoding import render
from src.core.files import read_json
from src.models.vocabulary import vocabulary_rows

GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "temperature": None,
    "top_p": None,
    "top_k": None,
    "repetition_penalty": 1.0,
    "max_length": None,
}
"""what generate() is told so that nothing in a generation_config.json changes the likeliest answer"""


def left_padded(rows: list[list[int]], pad: int, device) -> dict:
    """input_ids and attention_mask, int64 (rows, longest), of prompts padded on the left, so that all end where their answers begin."""
    import torch

    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device),
        "attention_mask": torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device),
    }


def greedy(
    model,
    tokenizer,
    prompts: list[list[dict]],
    *,
    max_new_tokens: int,
    eos_id: int,
    tools: list[list | None] | None = None,
    seconds: float | None = None,
) -> list[tuple[str, bool]]:
    """Greedy answers to conversations, batched: (text, whether the turn was ended by the stop token); a model of plain text, which has no template, goes on with
    a first turn as it stands. tools: of each conversation, if any.

    seconds: after which they are cut off; None: never."""
    offered = tools or [None] * len(prompts)
    ids = [prompt_of(tokenizer, messages, t) for messages, t in zip(prompts, offered)]
    return greedy_after(model, tokenizer, ids, max_new_tokens=max_new_tokens, eos_id=eos_id, seconds=seconds)


def prompt_of(tokenizer, messages: list[dict], tools: list | None) -> list[int]:
    """Token ids that an answer goes on from."""
    if hasattr(tokenizer, "of_plain_text") and [message["role"] for message in messages] == ["user"] and not tools:
        return tokenizer(messages[0]["content"]).input_ids
    return tokenizer(render(tokenizer, messages, tools, prompt=True), add_special_tokens=False).input_ids


def greedy_after(
    model, tokenizer, ids: list[list[int]], *, max_new_tokens: int, eos_id: int, seconds: float | None = None
) -> list[tuple[str, bool]]:
    """As `greedy`, of token ids to go on from."""
    import torch

    ends, stops = ends_of(model, tokenizer, eos_id)
    longest = max(map(len, ids))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_id
    pad = pad if pad < vocabulary_rows(model) else 0  # of a template that the model was given just now; it is masked
    room = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    with torch.no_grad():
        out = model.generate(
            **left_padded(ids, pad, next(model.parameters()).device),
            **GREEDY,
            max_new_tokens=max(1, min(max_new_tokens, room - longest)),
            eos_token_id=stops,
            pad_token_id=pad,
            max_time=seconds,
        )
    answers = []
    for row in out[:, longest:].tolist():
        stop = next((k for k, token in enumerate(row) if token in stops), None)
        answers.append((tokenizer.decode(row[:stop], skip_special_tokens=True), stop is not None and row[stop] in ends))
    return answers


def ends_of(model, tokenizer, eos_id: int) -> tuple[set[int], list[int]]:
    """(ids that end a turn, ids that end an answer: these, and the generation_config.json's)."""
    ends = {eos_id, *turn_ends(tokenizer)}
    return ends, sorted({*ends, *stop_ids_of(model)})


def stop_ids_of(model) -> list[int]:
    """Ids that end an answer by a loaded model's generation_config.json."""
    return _as_list(model.generation_config.eos_token_id)


def leading(tokenizer, one: str, other: str) -> tuple[int, int]:
    """(tokens that two answers both begin with, tokens of the longer)."""
    a, b = (tokenizer(text, add_special_tokens=False).input_ids for text in (one, other))
    return next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))), max(len(a), len(b))


def logits(model, rows: list[list[int]] | None = None):
    """fp32 logits, numpy (tokens, vocabulary), of the given token ids row by row; without any, of the vocabulary's last rows (where added
    tokens live) and a fixed random draw."""
    import torch

    if rows is None:
        size = vocabulary_rows(model)
        rows = torch.randint(0, size, (2, 32), generator=torch.Generator().manual_seed(0)).tolist()
        rows.append([i % size for i in range(size - 32, size)])
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu() for row in rows]).numpy()


def turn_ends(tokenizer) -> list[int]:
    """Ids that end a turn in the tokenizer's chat template; none without one."""
    return tokenizer.convert_tokens_to_ids(template.of(tokenizer).stops) if tokenizer.chat_template else []


def stop_ids(folder: Path, tokenizer) -> list[int]:
    """Ids that end an answer: generation_config.json's (config.json's without one) and the tokenizer's eos."""
    path = folder / "generation_config.json"
    stop = _as_list(read_json(path if path.is_file() else folder / "config.json").get("eos_token_id"))
    return sorted({*stop, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def write_generation_config(out: Path, source: Path, tokenizer, eos_id: int) -> None:
    """generation_config.json of the source model, with the turn's stop token first among its stop ids, then that of a turn that calls."""
    path = source / "generation_config.json"
    config = read_json(path) if path.is_file() else {}
    config["eos_token_id"] = list(dict.fromkeys([eos_id, *turn_ends(tokenizer), *_as_list(config.get("eos_token_id"))]))
    if tokenizer.pad_token_id is not None:
        config["pad_token_id"] = tokenizer.pad_token_id
    (out / "generation_config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_stop_token(config_file: Path, eos_id: int) -> None:
    """Make the turn's stop token the eos of a config.json; board runtimes read it there."""
    config = read_json(config_file)
    if config.get("eos_token_id") != eos_id:
        config["eos_token_id"] = eos_id
        config_file.write_text(json.dumps(config, indent=2) + "\n")


def _as_list(value) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
