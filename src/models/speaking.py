"""A model on this machine that answers conversations: piece by piece for one who waits, several at once for a file of them.

Greedy answers are `evaluate`'s: the same weights in the same dtype, the same prompt, the same tokens that end them.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import MEMORY, BadData, NoMemory, UserError
from src.models import devices, generation, sampling
from src.models.generation import GREEDY, left_padded
from src.models.loading import load_any
from src.settings.answers import Decoding

ROWS = 64
"""tokens whose log-probabilities are made at a time"""
Asked = tuple[list[dict], list | None]
"""messages and the tools offered with them"""


@dataclass(frozen=True)
class Ended:
    """How an answer ended, after its last piece.

    text: all of it. finish: stop, or length where it was cut off. ended: the turn was ended by the token that ends turns, as `evaluate` counts them.
    prompt_tokens, tokens: the end of the turn included; None where a server does not count.
    """

    text: str
    finish: str
    ended: bool
    prompt_tokens: int | None
    tokens: int | None


class TooLong(BadData):
    """A conversation of `tokens` tokens, for a model that takes `room` with its answer; words: of a server that says it in its own."""

    def __init__(self, tokens: int, room: int, where: str, words: str = ""):
        self.tokens, self.room, self.words = tokens, room, words
        what = words or f"the conversation takes {tokens} tokens, and the model {room} with its answer"
        super().__init__(what, where=where, fix="begin a new one, or shorten it")

    def __reduce__(self):
        return TooLong, (self.tokens, self.room, self.where, self.words)


class ModelSpeaker:
    """An adapter on its base, a model or a quantized model, by transformers. One conversation at a time; others wait.

    Keys and values of the last conversation stay, for the turn that goes on with it; a new one is computed from its first token on, as `evaluate` does.
    raw: it has no chat template, so what is asked is text that it goes on with.
    """

    def __init__(self, artifact: Artifact, name: str, base: Path | None = None):
        self.name, self._where, self._lock = name, str(artifact.path), threading.Lock()
        device = devices.device()
        with _memory(self._where):
            self.model, self.tokenizer = load_any(artifact, dtype="held" if device == "cpu" else "auto", device=device, base=base)
        self.raw = not self.tokenizer.chat_template
        if self.raw:
            self._ends, self._stops = set[int](), sorted({*generation.stop_ids_of(self.model), *_known(self.tokenizer.eos_token_id)})
        else:
            encoding.ensure_chat(self.tokenizer)  # its padding token
            self._ends, self._stops = generation.ends_of(self.model, self.tokenizer, encoding.turn_end(self.tokenizer))
        self.room = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        self._closed = threading.Event()
        self._past: tuple[int, list[int], Any] = 0, [], None

    def close(self) -> None:
        """End what is being said, from whichever thread, and say nothing more."""
        self._closed.set()

    def reply(self, messages: list[dict], decoding: Decoding, tools: list | None = None) -> Iterator[str | Ended]:
        """The answer's pieces, then how it ended; its end is also the caller's, who closes the iterator. Raises TooLong, NoMemory."""
        ids = self.prompt(messages, tools)
        self.refuse_long(ids)
        with self._lock:
            yield from self._said(ids, decoding)

    def replies(self, asked: Sequence[Asked], decoding: Decoding) -> list[Ended | UserError]:
        """The answers to several conversations, made at once, and for one that cannot be answered why."""
        prompts = [self._tried(*one) for one in asked]
        fit = [ids for ids in prompts if isinstance(ids, list)]
        with self._lock:
            rows = iter(self._generate(fit, decoding, [self._limit(ids, decoding) for ids in fit], []) if fit else [])
        return [self._whole(ids, next(rows), decoding) if isinstance(ids, list) else ids for ids in prompts]

    def _tried(self, messages: list[dict], tools: list | None) -> list[int] | UserError:
        try:
            ids = self.prompt(messages, tools)
            self.refuse_long(ids)
            return ids
        except BadData as error:
            return error

    def prompt(self, messages: list[dict], tools: list | None) -> list[int]:
        """Token ids of a conversation up to where its answer begins."""
        if self.raw:
            if not (ids := self.tokenizer("".join(message["content"] for message in messages)).input_ids):
                raise BadData("there is nothing to go on with", where=self._where)
            return ids
        return self.tokenizer(encoding.render(self.tokenizer, messages, tools, prompt=True), add_special_tokens=False).input_ids

    def scored(self, ids: list[int], top: int) -> tuple[list[float], list[list[tuple[int, float]]]]:
        """(log-probability of each of these tokens but the first, after those before it; the likeliest `top` tokens there with theirs), in nats."""
        import torch

        self.refuse_long(ids[:-1])
        own, likeliest = list[float](), list[list[tuple[int, float]]]()
        with self._lock, torch.no_grad(), _memory(self._where):
            logits = self.model(torch.tensor([ids], device=self.model.device), use_cache=False).logits[0, :-1]
            for begin in range(0, len(logits), ROWS):
                probs = logits[begin : begin + ROWS].double().log_softmax(-1)
                targets = torch.tensor(ids[begin + 1 : begin + 1 + ROWS], device=probs.device)
                own += probs.gather(1, targets[:, None])[:, 0].tolist()
                best = probs.topk(top)
                likeliest += [list(zip(*row)) for row in zip(best.indices.tolist(), best.values.tolist())]
        return own, likeliest

    def refuse_long(self, ids: list[int]) -> None:
        """Raises TooLong where they leave no room for a further token."""
        if len(ids) >= self.room:
            raise TooLong(len(ids), self.room, self._where)

    def _limit(self, ids: list[int], decoding: Decoding) -> int:
        return min(decoding.max_tokens, self.room - len(ids))

    def _said(self, ids: list[int], decoding: Decoding) -> Iterator[str | Ended]:
        tokens: SimpleQueue[int | None] = SimpleQueue()
        text, row, over = GrowingText(self.tokenizer, decoding.stop), list[int](), threading.Event()
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(self._generate, [ids], decoding, [self._limit(ids, decoding)], [_watch(tokens, over, self._closed)])
            future.add_done_callback(lambda _: tokens.put(None))
            try:
                while (token := tokens.get()) is not None:
                    row.append(token)
                    if token in self._stops or (piece := text.add(token)) is None:
                        break
                    if piece:
                        yield piece
                else:
                    future.result()
            finally:
                over.set()
        ended = self._whole(ids, row, decoding)
        if rest := ended.text[len(text.told) :]:
            yield rest
        yield ended

    def _whole(self, ids: list[int], row: list[int], decoding: Decoding) -> Ended:
        """row: what was generated, in a batch with what fills it after its end."""
        row = row[: decoding.max_tokens]
        stop = next((k for k, token in enumerate(row) if token in self._stops), None)
        text = self.tokenizer.decode(row[:stop], skip_special_tokens=True)
        cut = min((at for at in map(text.find, decoding.stop) if at >= 0), default=None)
        finish = "length" if stop is None and cut is None else "stop"
        ended = cut is None and stop is not None and row[stop] in self._ends
        return Ended(text[:cut], finish, ended, len(ids), len(row) if stop is None else stop + 1)

    def _generate(self, rows: list[list[int]], decoding: Decoding, limits: list[int], watches: list) -> list[list[int]]:
        """The token ids that follow each row, filled up behind their end."""
        import torch
        from transformers import LogitsProcessorList

        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else [*self._stops, 0][0]
        draws = (
            [sampling.drawn([sampling.generator(decoding.seed, ids) for ids in rows], [decoding] * len(rows))]
            if decoding.temperature
            else []
        )
        past, self._past = self._goes_on(rows), (0, [], None)
        with torch.no_grad(), _memory(self._where):
            out = self.model.generate(
                **left_padded(rows, pad, self.model.device),
                **GREEDY,
                **({"past_key_values": past} if past else {}),
                max_new_tokens=max(limits),
                eos_token_id=self._stops or None,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList(draws),
                stopping_criteria=watches,
                return_dict_in_generate=True,
            )
        made = out.sequences.tolist()
        if len(rows) == 1 and _can_be_cut(past := out.past_key_values):
            self._past = len(rows[0]), made[0][: past.get_seq_length()], past
        return [row[max(map(len, rows)) :][:limit] for row, limit in zip(made, limits)]

    def _goes_on(self, rows: list[list[int]]) -> Any:
        """The keys and values of the conversation before, as far as this one is the same, where it goes on behind all that was asked there; else None."""
        asked, ids, past = self._past
        if past is None or len(rows) > 1 or len(rows[0]) <= asked or rows[0][:asked] != ids[:asked]:
            return None
        same = next((k for k, (a, b) in enumerate(zip(ids, rows[0][:-1])) if a != b), min(len(ids), len(rows[0]) - 1))
        if same < len(ids):
            past.crop(same - len(ids))  # so many from the end
        return past


class GrowingText:
    """The text of token ids that come one by one. told: what of it was given out, which is kept back where a further token may change it."""

    def __init__(self, tokenizer, stop: Sequence[str] = ()):
        self._tokenizer, self._stop, self._ids, self.told = tokenizer, stop, list[int](), ""
        self._tidied = bool(getattr(tokenizer, "clean_up_tokenization_spaces", False))

    def add(self, token: int) -> str | None:
        """What is new and stays; None once one of the texts that end the answer is there."""
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if any(end in text for end in self._stop):
            return None
        keep = len(text.rstrip("\ufffd"))  # a character in several tokens
        if self._tidied:  # a space goes where a mark follows it
            keep = min(keep, len(text) - len(text.split(" ")[-1]) - 1)
        for end in self._stop:
            keep = min([keep, *(len(text) - k for k in range(1, len(end)) if text.endswith(end[:k]))])
        new = text[len(self.told) : keep] if text.startswith(self.told) else ""
        self.told += new
        return new


def _watch(tokens: SimpleQueue, *over: threading.Event):
    """A stopping criterion of a single row that hands on each token as it is made, until one of the events."""
    import torch
    from transformers import StoppingCriteria

    class Watch(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            tokens.put(int(input_ids[0, -1]))
            return torch.full((len(input_ids),), any(event.is_set() for event in over), device=input_ids.device)

    return Watch()


@contextlib.contextmanager
def _memory(where: str) -> Iterator[None]:
    """Raises NoMemory where torch has none left, of the machine or of a GPU."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "out of memory" not in str(error).lower() and "can't allocate memory" not in str(error):
            raise
        raise NoMemory("the model and this conversation do not fit", where=where, fix=MEMORY) from error


def _can_be_cut(past) -> bool:
    """Whether keys and values are of each token by itself, so that the last of them can be let go."""
    return past is not None and {type(layer).__name__ for layer in getattr(past, "layers", [None])} == {"DynamicLayer"}


def _known(id: int | None) -> list[int]:
    return [] if id is None else [id]
