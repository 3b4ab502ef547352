"""A model folder as teacher, run by transformers on this machine; its tokens are drawn as models/sampling.py says."""

import asyncio
from dataclasses import dataclass
from typing import Self

from src.chat import encoding, template
from src.core.artifact import Artifact
from src.core.errors import BadData
from src.distill.endpoint import Failed, TeacherReply, digest
from src.distill.pipeline import Request
from src.models import devices, generation, sampling
from src.models.folder import base_of
from src.models.generation import GREEDY, left_padded
from src.models.loading import load_any, tokenizer_of
from src.serving.protocol import plain
from src.settings.teachers import LocalTeacher, TeacherLimits


def limits_of(settings: LocalTeacher) -> TeacherLimits:
    """Of a model of our own: as much at once as it takes, with the next batch ready while one is under way."""
    return TeacherLimits(
        concurrency=2 * settings.batch_size,
        requests_per_minute=None,
        tokens_per_minute=None,
        timeout=1.0,
        tries=3,
        back_off=0.1,
        breaker=20,
    )


@dataclass(frozen=True)
class Waiting:
    """A request on its way into a batch."""

    request: Request
    seed: int
    ids: list[int]
    future: asyncio.Future


class LocalModel:
    """model: an adapter, model or quantized artifact, or a folder made elsewhere. It is known by its content, wherever it lies."""

    def __init__(self, settings: LocalTeacher, model: Artifact):
        self.settings, self._artifact, self.name = settings, model, f"local@{model.key[:16]}"
        self._waiting: list[Waiting] = []
        self._worker: asyncio.Task | None = None

    async def __aenter__(self) -> Self:
        device = devices.device()
        self._model, self._tokenizer = load_any(
            self._artifact, dtype="held" if device == "cpu" else "auto", device=device, tokens=len(tokenizer_of(self._artifact))
        )
        encoding.ensure_chat(self._tokenizer)
        self._stops = sorted({encoding.turn_end(self._tokenizer), *generation.stop_ids(self._folder(), self._tokenizer)})
        self._room = getattr(self._model.config, "max_position_embeddings", None) or 1 << 30
        return self

    async def __aexit__(self, *_) -> None:
        if self._worker:
            await asyncio.gather(self._worker, return_exceptions=True)

    def _folder(self):
        return base_of(self._artifact) if self._artifact.kind == "adapter" else self._artifact.path

    def key_of(self, request: Request) -> str:
        return digest(self.name, {}, request)

    def most(self, request: Request) -> tuple[int, int]:
        """(prompt tokens, tokens) that a request may take at most."""
        texts = [request.prefix] if request.prefix is not None else [m["content"] for m in request.messages]
        return sum(len(text.encode("utf-8", "surrogatepass")) for text in texts) + 1024, request.max_tokens

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        return 0.0

    def plain(self, text: str) -> str:
        return plain(text)

    def learn(self, most: int, prompt_tokens: int) -> bool:
        return False

    async def send(self, request: Request, seed: int) -> TeacherReply:
        """Raises Failed where the prompt does not fit or the answer is empty."""
        ids = self._ids(request)
        if len(ids) >= self._room:
            raise Failed("prompt too long", f"{len(ids)} tokens, and the model takes {self._room}", again=False)
        waiting = Waiting(request, seed, ids, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        reply = await waiting.future
        if not reply.text.strip() and reply.finish == "stop":
            raise Failed("empty answer", fault=True, paid=reply.paid)
        return reply

    def _ids(self, request: Request) -> list[int]:
        try:
            text = request.prefix if request.prefix is not None else encoding.render(self._tokenizer, request.messages, prompt=True)
        except BadData as error:
            raise Failed("the chat template refuses it", error.what, again=False) from None
        return self._tokenizer(text, add_special_tokens=False).input_ids

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[: self.settings.batch_size], self._waiting[self.settings.batch_size :]
            try:
                replies = await asyncio.to_thread(self._generate, batch)
            except BaseException as error:
                for waiting in batch:
                    waiting.future.set_exception(error)
                raise
            for waiting, reply in zip(batch, replies):
                waiting.future.set_result(reply)

    def _generate(self, batch: list[Waiting]) -> list[TeacherReply]:
        import torch
        from transformers import LogitsProcessorList

        tokenizer = self._tokenizer
        longest = max(len(w.ids) for w in batch)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self._stops[0]
        with torch.no_grad():
            out = self._model.generate(
                **left_padded([w.ids for w in batch], pad, next(self._model.parameters()).device),
                **GREEDY,
                max_new_tokens=max(self._limit(w) for w in batch),
                eos_token_id=self._stops,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList(
                    [sampling.drawn([sampling.generator(w.seed, w.ids) for w in batch], [w.request for w in batch])]
                ),
            )
        return [self._reply(waiting, row) for waiting, row in zip(batch, out[:, longest:].tolist())]

    def _limit(self, waiting: Waiting) -> int:
        return min(waiting.request.max_tokens, self._room - len(waiting.ids))

    def _reply(self, waiting: Waiting, row: list[int]) -> TeacherReply:
        row = row[: self._limit(waiting)]
        stop = next((k for k, token in enumerate(row) if token in self._stops), None)
        chat = template.of(self._tokenizer)
        text, thought = template.said_apart(self._tokenizer.decode(row[:stop], skip_special_tokens=False), (chat.thinking,))
        text, thought = chat.without_markers(text), chat.without_markers(thought)
        cut = min((at for at in map(text.find, waiting.request.stop) if at >= 0), default=None)
        finish = "length" if stop is None and cut is None else "stop"
        return TeacherReply(text[:cut], thought, finish, len(waiting.ids), len(row) if stop is None else stop + 1)
