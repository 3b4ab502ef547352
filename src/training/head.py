"""The loss at the output layer: only where a token is trained, a chunk of tokens at a time, so that the logits of a batch never exist at once.

The gradient of a chunk is written over its logits and taken through the layer as soon as they are there, as in Liger (Hsu et al. 2024,
arXiv:2410.10989) but through autograd, so that any output layer works: one with LoRA, with rows of its own, with a bias.

With a teacher the loss is alpha KL(teacher, student) + (1 - alpha) cross-entropy (Hinton et al. 2015, arXiv:1503.02531, at temperature 1). Of the
teacher's distribution the k likeliest tokens are known by themselves and all others together, so KL is that of k + 1 outcomes: never above the
true one, and zero where the student agrees on all of them.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import itemgetter

import torch

from src.training.rules import LOGITS, ON_CPU


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's k likeliest tokens at each trained position: top_k_ids int64, their probabilities probs fp32, both (tokens, k); alpha: its weight, 0 to 1."""

    top_k_ids: torch.Tensor
    probs: torch.Tensor
    alpha: float


@dataclass(frozen=True)
class Targets:
    """What is learnt at each trained position. tokens: int64 (tokens,). teacher: what it holds likely there; None without one. weights: of each
    token's loss, fp32 (tokens,); None where all are 1."""

    tokens: torch.Tensor
    teacher: TeacherTargets | None = None
    weights: torch.Tensor | None = None

    def split(self, size: int) -> Iterator["Targets"]:
        return (self.each(itemgetter(slice(at, at + size))) for at in range(0, max(len(self.tokens), 1), size))

    def to(self, device) -> "Targets":
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Targets":
        """The targets with every tensor changed alike."""
        teacher = self.teacher and TeacherTargets(change(self.teacher.top_k_ids), change(self.teacher.probs), self.teacher.alpha)
        return Targets(change(self.tokens), teacher, None if self.weights is None else change(self.weights))


class HeadLoss:
    """Takes the place of an output layer's forward. Within `learning(targets)` a call returns losses instead of logits:

    while gradients are recorded, their sum, shape (1, 1); else for each token its cross-entropy and whether it was the likeliest, shape
    (tokens, 2), fp32. The layer is called with hidden states of the trained positions only, shape (tokens, width).
    """

    def __init__(self, model, *, chunked: bool):
        """chunked: False where it may not be, see `may_chunk`; the loss is then that of all logits at once."""
        self.layer, self.chunked = model.get_output_embeddings(), chunked
        self.logits, self.vocabulary = self.layer.forward, model.config.get_text_config().vocab_size
        self.layer.forward = self
        self._targets: list[Targets] = []

    @contextlib.contextmanager
    def learning(self, targets: Targets) -> Iterator[None]:
        """The model's pass within the block is over exactly these targets."""
        self._targets.append(targets)
        try:
            yield
        finally:
            self._targets.pop()

    def remove(self) -> None:
        self.layer.forward = self.logits

    def __call__(self, hidden, *args, **kwargs):
        if not self._targets:
            return self.logits(hidden, *args, **kwargs)
        targets, hidden = self._targets[-1], hidden.flatten(0, -2)
        if not torch.is_grad_enabled():
            return torch.cat([token_results(self.logits(h), t.tokens) for h, t in self.chunks(hidden, targets)])
        if not self.chunked:
            return loss_sum(self.logits(hidden), targets).view(1, 1)
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        return _ChunkedLoss.apply(self, hidden, targets, *parameters).view(1, 1)

    def chunks(self, hidden, targets: Targets):
        size = max(1, (LOGITS if hidden.is_cuda else ON_CPU) // (self.vocabulary * 4)) if self.chunked else max(1, len(hidden))
        return zip(hidden.split(size), targets.split(size))


def may_chunk(model, *, zero_stage: int) -> bool:
    """Whether the output layer can be called as often as a process has chunks. Under ZeRO-3 a layer of several modules is gathered at every call,
    which all processes would have to do equally often; a plain one is whole while it is called."""
    return zero_stage != 3 or not any(True for _ in model.get_output_embeddings().children())


def share_of_step(losses: torch.Tensor, trained: float, world_size: int) -> torch.Tensor:
    """What a micro-batch adds to the mean over all trained tokens of a step, of the sum of its losses: the step's loss is a mean over tokens, not
    over conversations, forward passes or processes.

    trained: weights of the tokens of the whole step, their number where all are 1, over all processes. world_size: DDP and ZeRO average gradients over so many processes, and what they average
    has to be summed.
    """
    return losses / (trained or 1) * world_size


def token_results(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 (tokens, 2) of logits (tokens, vocabulary): cross-entropy, and 1 where the target is the likeliest token."""
    logits = logits.float()
    losses = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    return torch.stack([losses, (logits.argmax(-1) == tokens).float()], dim=1)


def loss_sum(logits: torch.Tensor, targets: Targets) -> torch.Tensor:
    """Sum of the losses, fp32, of logits (tokens, vocabulary)."""
    return _Loss.apply(logits.float(), targets)


def loss_and_gradient(logits: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the losses, its gradient), fp32; the gradient is written over the logits, fp32 (tokens, vocabulary).

    With q the student's probabilities and p the teacher's, both with the share r of all tokens that are not among the k likeliest: the gradient of
    the cross-entropy is q - one-hot; that of KL is q - p at the k, and q (1 - p_r / q_r) at the others. A token's weight multiplies both.
    """
    at, weights = targets.tokens[:, None], 1.0 if targets.weights is None else targets.weights[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    wanted = logits.gather(-1, at)
    total = logits.exp_().sum(-1, keepdim=True)
    q, hard = logits.div_(total), ((total.log() - wanted) * weights).sum()
    if (teacher := targets.teacher) is None:
        gradient = q.scatter_add_(-1, at, torch.full_like(total, -1.0))
        return hard, gradient if targets.weights is None else gradient.mul_(weights)
    alpha, p = teacher.alpha, teacher.probs
    known = q.gather(-1, teacher.top_k_ids)
    rest_p, rest_q = (1 - x.sum(-1, keepdim=True).clamp(max=1) for x in (p, known))
    rest_q = rest_q.clamp(min=1e-7)
    kl = (torch.special.xlogy(p, p / known.clamp(min=1e-30)) * weights).sum() + (
        torch.special.xlogy(rest_p, rest_p / rest_q) * weights
    ).sum()
    q.mul_(1 - alpha * rest_p / rest_q).scatter_(-1, teacher.top_k_ids, known - alpha * p)
    gradient = q.scatter_add_(-1, at, torch.full_like(total, alpha - 1.0))
    return alpha * kl + (1 - alpha) * hard, gradient if targets.weights is None else gradient.mul_(weights)


class _Loss(torch.autograd.Function):
    """Sum of the losses of logits."""

    @staticmethod
    def forward(ctx, logits, targets: Targets):
        loss, gradient = loss_and_gradient(logits.clone(), targets)
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale, None


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the losses of all chunks, with gradients for the hidden states and the layer's parameters made on the way."""

    @staticmethod
    def forward(ctx, head: HeadLoss, hidden, targets: Targets, *parameters):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        into_hidden = torch.empty_like(hidden)
        into, at = [torch.zeros_like(p) for p in parameters], 0
        for h, t in head.chunks(hidden, targets):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                logits = head.logits(h).float()
            loss, gradient = loss_and_gradient(logits.detach(), t)
            found, *rest = torch.autograd.grad(logits, [h, *parameters], gradient)
            into_hidden[at : at + len(h)] = found
            for one, other in zip(into, rest):
                one.add_(other)
            total += loss
            at += len(h)
            del logits, gradient, found, rest  # before the next chunk's are made
        ctx.save_for_backward(into_hidden, *into)
        return total

    @staticmethod
    def backward(ctx, scale):
        return None, ctx.saved_tensors[0] * scale, None, *(g * scale.to(g.dtype) for g in ctx.saved_tensors[1:])
