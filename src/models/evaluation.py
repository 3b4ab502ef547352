"""What is measured of a model on this machine: the loss over validation rows, token by token, and greedy answers."""

import math

from src.chat import encoding
from src.chat.rows import rows_of
from src.core.errors import BadData, MissingInput
from src.core.log import progress, warn
from src.models import generation
from src.settings.verbs import Evaluation


def compute_dtype(device: str) -> str:
    """fp32 on a CPU, where it is the fastest and exact; on a GPU the stored dtype."""
    return "auto" if device == "cuda" else "float32"


def encode_all(records: list[dict], tokenizer, max_length: int) -> list[encoding.Encoded]:
    """Validation records as token ids and labels; those that teach nothing or are longer than max_length tokens are left out, and counted.

    Raises BadData where the chat template shows none of them, MissingInput where all are longer.
    """
    found = [row for _, row in rows_of(records, tokenizer, "validation")]
    if records and not found:
        raise BadData(
            "the chat template shows no answer of the validation split", fix="fine-tune with chat_template=chatml, which shows them"
        )
    rows = [row for row in found if len(row.input_ids) <= max_length]
    if long := len(found) - len(rows):
        warn(f"left out {long} of {len(records)} validation rows longer than evaluation.max_length={max_length}")
    if not rows:
        raise MissingInput(
            "no validation row is within evaluation.max_length",
            fix=f"evaluation.max_length={min((len(row.input_ids) for row in found), default=max_length)}",
        )
    return rows


def measure(model, rows: list, batch_size: int, pad: int, eos_id: int, what: str) -> tuple[dict, list]:
    """({loss in nats, perplexity, accuracy, tokens} over trained tokens and the share of turn ends predicted, per row the top-1 token at each)."""
    import torch
    from torch.nn.functional import cross_entropy

    device = next(model.parameters()).device
    loss, hits, tokens, turns, ended = 0.0, 0, 0, 0, 0
    top: dict[int, torch.Tensor] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i].input_ids))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    for batch in progress(batches, f"measuring {what}"):
        longest = len(rows[batch[0]].input_ids)
        ids = torch.tensor([rows[i].input_ids + [pad] * (longest - len(rows[i].input_ids)) for i in batch], device=device)
        labels = torch.tensor([rows[i].labels + [encoding.IGNORE] * (longest - len(rows[i].labels)) for i in batch], device=device)[:, 1:]
        mask = torch.tensor([[1] * len(rows[i].input_ids) + [0] * (longest - len(rows[i].input_ids)) for i in batch], device=device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        for k, i in enumerate(batch):
            kept = labels[k] != encoding.IGNORE
            chosen, wanted = logits[k][kept].float(), labels[k][kept]
            loss += cross_entropy(chosen, wanted, reduction="sum").double().item()
            top[i], wanted = chosen.argmax(-1).cpu(), wanted.cpu()
            hits += int(torch.count_nonzero(top[i] == wanted))
            tokens += len(wanted)
            ends = torch.eq(wanted, eos_id)
            turns += int(torch.count_nonzero(ends))
            ended += int(torch.count_nonzero(top[i][ends] == eos_id))
    mean = loss / tokens
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700)),
        "accuracy": hits / tokens,
        "tokens": tokens,
        "turns_ended": ended / max(turns, 1),
    }, [top[i] for i in range(len(rows))]


def answer(model, tokenizer, prompts: list, evaluation: Evaluation, eos_id: int) -> list[dict]:
    """A row for each (messages, tools): prompt, greedy answer, and whether its turn was ended."""
    found = []
    for begin in range(0, len(prompts), evaluation.batch_size):
        some = prompts[begin : begin + evaluation.batch_size]
        batch, tools = [messages for messages, _ in some], [offered for _, offered in some]
        texts = generation.greedy(model, tokenizer, batch, max_new_tokens=evaluation.max_new_tokens, eos_id=eos_id, tools=tools)
        found += [{"prompt": p[-1]["content"], "answer": text, "ended": ended} for p, (text, ended) in zip(batch, texts)]
    return found
