"""What can be measured of a model behind an endpoint: its greedy answers and their speed, how far they are those of a local model, and, where the
server gives log-probabilities of given tokens, the loss over the very tokens that a local evaluation counts.
"""

import contextlib
import json
import math
import statistics
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from src.chat.encoding import IGNORE, render
from src.chat.template import said_apart
from src.core.errors import ConfigError, NoAnswer
from src.core.log import progress, say, warn
from src.models import checks
from src.models.generation import leading
from src.models.seen import Seen
from src.serving.client import Client
from src.serving.protocol import BUSY, Refused

RECEIVED = "received.jsonl"
"""answers as they arrive; an interrupted evaluation goes on from them"""
FOR_ALL = (*range(300, 400), 401, 403, 404, *BUSY)
"""statuses that concern every request, not the one prompt they came for"""
FEW, ALL = 20, 1 << 18
"""next tokens asked for: those that hold nearly every wanted one, and more than any vocabulary has"""
NOISE = 1e-3
"""nats that two requests for one log-probability may differ by"""
DESCRIBED = 4000
"""bytes that a report keeps of the server's description of its model"""


def choose(client: Client, wanted: str | None) -> tuple[str, dict]:
    """(the model's name, the server's own description of it): the one wanted, or the only one served."""
    try:
        entries = {entry["id"]: entry for entry in client.models()}
    except Refused as error:
        if error.status not in (404, 405, 501):
            raise
        if wanted is None:
            error.fix.append("endpoint.model=NAME, for a server that does not list its models")
            raise
        return wanted, {"id": wanted}
    if wanted is None and len(entries) != 1:
        raise ConfigError(
            f"the endpoint serves {len(entries)} models: {_names(entries)}", where=client.url, fix="endpoint.model=NAME chooses one"
        )
    name = next(iter(entries)) if wanted is None else wanted
    if name not in entries:
        raise ConfigError(
            f"the endpoint does not serve '{name}', but {_names(entries)}", where=client.url, fix="endpoint.model=NAME chooses one"
        )
    entry = entries[name]
    try:
        short = len(json.dumps(entry, ensure_ascii=False, allow_nan=False).encode()) <= DESCRIBED
    except ValueError:  # NaN, infinity or half a character, which no manifest can hold
        short = False
    return name, entry if short else {"id": name}


def _names(entries: Iterable[str]) -> str:
    shown = [repr(name[:80]) for name in list(entries)[:10]]
    return ", ".join(shown) + (", ..." if len(list(entries)) > 10 else "") or "none"


def ask(client: Client, model: str, prompts: list[tuple], out: Path, *, max_tokens: int, workers: int, anew: bool) -> list[dict]:
    """A row for each (messages, tools): prompt, answer, ended, and its times in seconds and token counts; or its error, where that prompt was refused.

    Answers are kept in out/received.jsonl as they arrive, and those of an interrupted evaluation are taken from it unless `anew`; the caller
    removes it with the report written.
    Raises NoAnswer where the endpoint fails as a whole, or refuses every prompt.
    """
    journal, lock = out / RECEIVED, threading.Lock()
    kept = {} if anew else _received(journal, model)
    if kept:
        say(f"endpoint: {len(kept)} of {len(prompts)} answers kept from before the interruption")
    journal.write_text("".join(_line(model, i, row) for i, row in kept.items()), encoding="utf-8")

    def one(i: int) -> dict:
        if i in kept:
            return kept[i]
        messages, tools = prompts[i]
        row = {**checks.asked_row(messages), "answer": "", "ended": False}
        try:
            reply = client.chat(model, messages, tools, max_tokens=max_tokens)
        except Refused as error:
            if error.status in FOR_ALL:
                raise
            return row | {"error": error.what}
        row |= {
            "answer": reply.text,
            "ended": reply.ended,
            "first_token_seconds": reply.first,
            "seconds": reply.seconds,
            "pieces": reply.pieces,
        }
        row |= {
            "prompt_tokens": reply.prompt_tokens,
            "answer_tokens": reply.tokens,
            "cached_tokens": reply.cached,
            "reasoned": reply.reasoned,
        }
        with lock, open(journal, "a", encoding="utf-8") as file:
            file.write(_line(model, i, row))
        return row

    rows = list(progress(_each(one, range(len(prompts)), workers, client), "asking", len(prompts)))
    errors = [row["error"] for row in rows if "error" in row]
    if errors and len(errors) == len(rows):
        raise NoAnswer(f"each of the {len(rows)} prompts failed, the first so: {errors[0]}", where=client.url)
    if errors:
        warn(f"{len(errors)} of {len(rows)} prompts failed, the first so: {errors[0]}")
    if any(row.get("reasoned") for row in rows):
        say("endpoint: the server keeps reasoning apart; it is timed and counted, but no part of the answers")
    return rows


def _line(model: str, i: int, row: dict) -> str:
    return json.dumps({"model": model, "index": i, "row": row}) + "\n"


def _received(journal: Path, model: str) -> dict[int, dict]:
    """{prompt's index: row} of the whole lines of a journal that an interrupted evaluation of this model left."""
    rows = {}
    for line in open(journal, encoding="utf-8", errors="replace") if journal.is_file() else []:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was cut off or damaged is asked for again
            entry = json.loads(line)
            if entry["model"] == model:
                rows[int(entry["index"])] = entry["row"] | {}
    return rows


def _each(work: Callable, items: Iterable, workers: int, client: Client) -> Iterator:
    """work(item) for each, in order, so many at a time; the first failure, or Ctrl-C, ends those under way too."""
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield from pool.map(work, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            client.close()
            raise


def speed(rows: list[dict], tokenizer=None) -> dict:
    """Figures over the prompts that were answered: medians of seconds to the first token (and its 90th percentile), of tokens per second after it,
    and of seconds to the end; sums of tokens, the turn's end counted as one. What the server's replies do not allow is left out, and said.

    Tokens are the server's count, else the tokenizer's. Between the first piece of text and the last event all tokens but the first are made.
    """
    good = [row for row in rows if "error" not in row]
    found = {"prompts": len(rows), "errors": len(rows) - len(good)}
    if not good:
        return found
    found |= {
        "answers_ended": sum(row["ended"] for row in good) / len(good),
        "answer_seconds": statistics.median(r["seconds"] for r in good),
    }
    if all(row["prompt_tokens"] is not None for row in good):
        found["prompt_tokens"] = sum(row["prompt_tokens"] for row in good)
        if cached := sum(row["cached_tokens"] for row in good):
            found["cached_tokens"] = cached
            warn(
                f"the server had {cached} of {found['prompt_tokens']} prompt tokens in its cache; the first token of a new prompt comes later"
            )
    counts = [row["answer_tokens"] for row in good]
    if None in counts:
        say(
            "endpoint: it counts no tokens"
            + (", so the local tokenizer does" if tokenizer else ", and there is no local tokenizer to do so")
        )
        counts = [len(tokenizer(r["answer"], add_special_tokens=False).input_ids) + r["ended"] for r in good] if tokenizer else []
    if counts:
        found["answer_tokens"] = sum(counts)
    firsts = sorted(row["first_token_seconds"] for row in good if row["first_token_seconds"] is not None)
    in_one_piece = counts and all(row["pieces"] <= 1 for row in good) and any(n > 2 for n in counts)
    if not firsts or in_one_piece:
        why = "sends each answer in one piece" if firsts else "does not stream"
        say(f"endpoint: it {why}, so time to first token and speed after it cannot be measured")
        return found
    found |= {"first_token_seconds": statistics.median(firsts), "first_token_seconds_p90": firsts[math.ceil(0.9 * len(firsts)) - 1]}
    pairs = [(n - 1, r["seconds"] - r["first_token_seconds"]) for n, r in zip(counts, good) if r["first_token_seconds"] is not None]
    rates = [n / seconds for n, seconds in pairs if n > 0 and seconds > 0]
    return found | ({"tokens_per_second": statistics.median(rates)} if rates else {})


def likeness(rows: list[dict], local: list[dict], tokenizer) -> dict:
    """Shares over the prompts answered: of answers equal to the local model's, and, on average, of tokens up to the first that differs (of the longer).

    A server that keeps reasoning apart (llama.cpp's, of Qwen3's even where it is empty) is compared by what is said behind it.
    """
    pairs = [(a, b) for a, b in zip(rows, local) if "error" not in a]
    texts = [(a["answer"], b["answer"]) for a, b in pairs]
    apart = [(_said(theirs), _said(ours)) for theirs, ours in texts]
    if any(theirs.strip() == said[0] and ours.strip() != said[1] for (theirs, ours), said in zip(texts, apart)):
        say(
            "endpoint: its answers are without the reasoning that the local model's begin with; they are compared by what is said behind it"
        )
        texts = apart
    lengths = [leading(tokenizer, theirs, ours) for theirs, ours in texts]
    shares = [same / max(longer, 1) for same, longer in lengths]
    same = sum(theirs == ours and a["ended"] == b["ended"] for (theirs, ours), (a, b) in zip(texts, pairs))
    return {"same_answers": same / len(pairs), "same_leading_tokens": sum(shares) / len(pairs)} if pairs else {}


def _said(answer: str) -> str:
    """What an answer says behind its reasoning; all of one without."""
    return said_apart(answer)[0].strip()


def in_words(metrics: dict) -> str:
    """The figures of `speed` and `likeness` in a line."""
    parts = [
        f"{metrics['prompts'] - metrics['errors']} of {metrics['prompts']} prompts answered, {metrics['answers_ended']:.0%} with a turn's end"
    ]
    if "first_token_seconds" in metrics:
        parts.append(f"first token after {metrics['first_token_seconds']:.3f} s (p90 {metrics['first_token_seconds_p90']:.3f})")
    if "tokens_per_second" in metrics:
        parts.append(f"then {metrics['tokens_per_second']:.1f} tokens/s")
    if "same_answers" in metrics:
        parts.append(
            f"{metrics['same_answers']:.0%} of the answers as the local model's, {metrics['same_leading_tokens']:.0%} of the tokens before they part"
        )
    return ", ".join(parts)


def as_seen(told: list[list[tuple[float, str]]], local: Seen, tokenizer) -> Seen:
    """What the endpoint says at the places of a local observation, whose likeliest tokens its own are where they bear their names; -1 where they do not."""
    flat = [pair for row in told for pair in row]
    likeliest = [token if best in names(tokenizer, token) else -1 for (_, best), token in zip(flat, local.likeliest.tolist(), strict=True)]
    none = np.empty((len(flat), 0))
    return Seen(np.array([-value for value, _ in flat]), none.astype(np.int64), none, np.array(likeliest, np.int64))


def compare_prompts(rows: list[dict], tokenizer, prompts: list[tuple]) -> dict:
    """Share of prompts that the server turned into as many tokens as the local template does; less than all means another template."""
    lengths = [len(tokenizer(render(tokenizer, m, tools, prompt=True), add_special_tokens=False).input_ids) for m, tools in prompts]
    pairs = [(row["prompt_tokens"], n) for row, n in zip(rows, lengths) if row.get("prompt_tokens") is not None]
    if other := [(a, b) for a, b in pairs if a != b]:
        warn(
            f"{len(other)} of {len(pairs)} prompts have other lengths at the endpoint than by the local chat template, such as {other[0][0]} tokens for "
            f"{other[0][1]}: it renders conversations differently"
        )
    return {"prompts_same_length": 1 - len(other) / len(pairs)} if pairs else {}


def score(client: Client, model: str, rows: list, tokenizer, workers: int) -> list[list[tuple[float, str]] | None] | None:
    """For each encoded row (log-probability, name of the likeliest token) at each trained place; None for one that the server refuses, which is said.

    None alone, with the reason said, where the server gives no log-probabilities of given tokens in either way, or not of these.
    """
    way = _way(client, model, min(rows, key=lambda row: len(row.input_ids)), tokenizer)
    if way is None:
        return None
    if way is one_at_a_time:
        say(f"endpoint: it gives log-probabilities of one next token a request; {sum(len(places(row)) for row in rows)} requests follow")

    def one(row):
        try:
            return way(client, model, row, tokenizer)
        except Refused as error:
            if error.status in FOR_ALL:
                raise
            return None

    found = list(progress(_each(one, rows, workers, client), "measuring endpoint", len(rows)))
    if left := found.count(None):
        warn(f"left out {left} of {len(rows)} rows that the endpoint refused, most likely as too long for it")
    return found if left < len(rows) else None


def figures(rows: list, told: list[list[tuple[float, str]]], tokenizer, eos_id: int) -> dict:
    """The metrics of a local evaluation (loss in nats, perplexity, accuracy, tokens, turns_ended) over the trained tokens of encoded rows."""
    losses, hits, ends = [], [], []
    for row, pairs in zip(rows, told):
        for k, (value, best) in zip(places(row), pairs, strict=True):
            losses.append(-value)
            hits.append(best in names(tokenizer, row.input_ids[k]))
            if row.input_ids[k] == eos_id:
                ends.append(hits[-1])
    loss = math.fsum(losses) / len(losses)
    found = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "accuracy": sum(hits) / len(hits), "tokens": len(losses)}
    return found | {"turns_ended": sum(ends) / max(len(ends), 1)}


def _way(client: Client, model: str, row, tokenizer) -> Callable | None:
    """The first way in which the server gives this row's log-probabilities; None, with each reason said, where it has none."""
    reasons = []
    for way in (by_echo, one_at_a_time):
        try:
            way(client, model, row, tokenizer)
            return way
        except NoAnswer as error:
            reasons.append(error.what)
    reason = "; ".join(dict.fromkeys(reasons))
    say(f"endpoint: no log-probabilities of given tokens ({reason}), so no loss, perplexity, right-next-token and turn-end figures")
    return None


def places(row) -> list[int]:
    """Where an encoded row is trained and something comes before."""
    return [k for k, label in enumerate(row.labels) if k and label != IGNORE]


def by_echo(client: Client, model: str, row, tokenizer) -> list[tuple[float, str]]:
    """(log-probability, name of the likeliest token) at each trained place, all in one request (vLLM). Raises NoAnswer where they are not of this row.

    Each token of the reply must bear the name of ours; a piece of a character has no text of its own (U+FFFD), so its name proves nothing.
    """
    echo, ids = client.echo(model, row.input_ids), row.input_ids
    for k, name in enumerate(echo.names):
        text = tokenizer.decode([ids[k]])
        if name not in names(tokenizer, ids[k]) and "\ufffd" not in text:
            raise NoAnswer(f"token {k + 1} is {name!r:.40} where {text!r:.40} was given", where=client.url)
    return [_sound(echo.logprobs[k], echo.best[k], k, client) for k in places(row)]


def one_at_a_time(client: Client, model: str, row, tokenizer) -> list[tuple[float, str]]:
    """The same by a request for each place (llama.cpp): of the likeliest few next tokens, of the wanted one alone where it is not among them, or else of all."""
    found, whole = [], tokenizer("a", add_special_tokens=False).input_ids[-1]
    for k in places(row):
        token, next_tokens = row.input_ids[k], client.following(model, row.input_ids[:k], FEW, whole=whole)
        value, least = next_tokens.get(token), min(next_tokens.values())
        if value is None:
            value = client.one_following(model, row.input_ids[:k], token)
        if value is None or (token not in next_tokens and value > least + NOISE):  # not told, or with the bias in it
            next_tokens = client.following(model, row.input_ids[:k], ALL, whole=whole)
            value = next_tokens.get(token)
        best = max(next_tokens, key=next_tokens.__getitem__)
        found.append(_sound(value, f"token_id:{best}", k, client))
    return found


def _sound(value: float | None, best: str | None, k: int, client: Client) -> tuple[float, str]:
    if value is None or best is None or not math.isfinite(value) or value > 1e-4:
        raise NoAnswer(f"token {k + 1} has the log-probability {value}", where=client.url)
    return value, best


def names(tokenizer, token: int) -> set[str]:
    """What a server may call a token: vLLM's return_tokens_as_token_ids form, its text, or its entry in the vocabulary."""
    return {f"token_id:{token}", tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)}


class Served:
    """A server's model as lm-eval's tasks ask it. tokenizer: of the local model that it was made from."""

    def __init__(self, client: Client, model: str, tokenizer, workers: int):
        self.client, self.model, self.tokenizer, self.workers = client, model, tokenizer, workers

    def log_probs(self, rows: list) -> list[tuple[float, bool]]:
        """(sum of the log-probabilities of a row's trained tokens, whether each is the likeliest). Raises NoAnswer where it gives none of one."""
        told = score(self.client, self.model, rows, self.tokenizer, self.workers)
        if told is None or None in told:
            raise NoAnswer("it gives no log-probabilities of given tokens, which these tasks count", where=self.client.url)
        alike = lambda row, pairs: all(best in names(self.tokenizer, row.input_ids[k]) for k, (_, best) in zip(places(row), pairs))
        return [(math.fsum(value for value, _ in pairs or ()), alike(row, pairs)) for row, pairs in zip(rows, told)]

    def answers(self, prompts: list[str], stops: list[str], most: int) -> list[str]:
        """Each prompt as a user's turn, answered greedily."""
        ask = lambda text: self.client.chat(self.model, [{"role": "user", "content": text}], None, max_tokens=most).text
        return list(progress(_each(ask, prompts, self.workers, self.client), "asking", len(prompts)))
