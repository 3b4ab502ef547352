"""The loss at the output layer: only where a token is trained, a chunk of tokens at a time, so that the logits of a batch never exist at once.

The gradient of a chunk is taken as soon as its logits are there and the logits are let go, as in Liger (Hsu et al. 2024, arXiv:2410.10989) but
through autograd itself, so that any output layer works: one with LoRA, with rows of its own, with a bias.
"""

import torch
from torch.nn.functional import cross_entropy

LOGITS = 256 << 20
"""bytes of fp32 logits a chunk may have"""


class HeadLoss:
    """Takes the place of an output layer's forward. With `targets` set, the next call returns losses instead of logits:

    while gradients are recorded, their sum, shape (1, 1); else for each token its loss and whether it was the likeliest, shape (tokens, 2), fp32.
    The layer is called with hidden states of the trained positions only, shape (tokens, width).
    """

    targets: torch.Tensor | None = None

    def __init__(self, model, *, chunked: bool):
        """chunked: False where parts of the layer are gathered when called (ZeRO-3 and a layer of several modules), which every process has to do
        as often as the others, or where gradients have to be scaled before they reach 16 bits (fp16)."""
        self.layer, self.chunked = model.get_output_embeddings(), chunked
        self.logits, self.vocabulary = self.layer.forward, model.config.get_text_config().vocab_size
        self.layer.forward = self

    def remove(self) -> None:
        self.layer.forward = self.logits

    def __call__(self, hidden, *args, **kwargs):
        if self.targets is None:
            return self.logits(hidden, *args, **kwargs)
        targets, self.targets = self.targets, None
        if not torch.is_grad_enabled():
            parts = [token_results(self.logits(h), t) for h, t in self._chunks(hidden.flatten(0, -2), targets)]
            return torch.cat(parts)
        if not self.chunked:
            return cross_entropy(self.logits(hidden).float().flatten(0, -2), targets, reduction="sum").view(1, 1)
        parameters = [p for p in self.layer.parameters() if p.requires_grad]
        return _ChunkedLoss.apply(self, hidden.flatten(0, -2), targets, *parameters).view(1, 1)

    def _chunks(self, hidden, targets):
        size = max(1, LOGITS // (self.vocabulary * 4)) if self.chunked else max(1, len(targets))
        return zip(hidden.split(size), targets.split(size))


def token_results(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """fp32 (tokens, 2) of logits (tokens, vocabulary): loss, and 1 where the target is the likeliest token."""
    logits = logits.float().flatten(0, -2)
    return torch.stack([cross_entropy(logits, targets, reduction="none"), (logits.argmax(-1) == targets).float()], dim=1)


def loss_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the cross-entropies, their gradient softmax - one-hot), fp32; the gradient is written over the logits (tokens, vocabulary)."""
    at = targets[:, None]
    logits.sub_(logits.amax(-1, keepdim=True))
    wanted = logits.gather(-1, at)
    total = logits.exp_().sum(-1, keepdim=True)
    gradient = logits.div_(total).scatter_add_(-1, at, torch.full_like(total, -1.0))
    return (total.log() - wanted).sum(), gradient


class _ChunkedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of all chunks, with gradients for the hidden states and the layer's parameters made on the way."""

    @staticmethod
    def forward(ctx, head: HeadLoss, hidden, targets, *parameters):
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        into_hidden = torch.empty_like(hidden)
        into, at = None, 0
        for h, t in head._chunks(hidden, targets):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                logits = head.logits(h).float()
            loss, gradient = loss_and_gradient(logits.detach(), t)
            found, *rest = torch.autograd.grad(logits, [h, *parameters], gradient)
            into_hidden[at : at + len(t)] = found
            if into is None:
                into = rest
            else:
                torch._foreach_add_(into, rest)
            total += loss
            at += len(t)
        ctx.save_for_backward(into_hidden, *into)
        return total

    @staticmethod
    def backward(ctx, scale):
        return None, ctx.saved_tensors[0] * scale, None, *(g * scale.to(g.dtype) for g in ctx.saved_tensors[1:])
