"""What rounding each part of a model alone would cost: the KL to the model as it is, at the trained tokens of some conversations, to second order.

A small change of weights moves what a model says by KL = 1/2 E[(d log p(y))^2], y being answers drawn from the model itself: its Fisher information along
the change (Martens 2014, arXiv:1412.1193, section 5). d log p(y) is the gradient of the weights times their change, over the tokens of a row the sum of
(gradient of a matrix's output) . (its input times its change). So one draw for each row, one pass back, and two products for each width asked for give
the KL of every part; 64 rows tell it within a fifth.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from src.chat.encoding import Encoded
from src.core.log import progress
from src.models import gptq, held, seen
from src.models.by_layer import ByLayer, Pass
from src.models.layers import inputs_together, outputs_first
from src.sizing.budget import bits_with_scale

SEED = 0


@dataclass(frozen=True)
class Part:
    """Matrices of a layer that have one input, so that engines that fuse them find one width; or the output layer. names: in the folder, without ".weight". kl: nats a trained
    token by bits."""

    names: tuple[str, ...]
    weights: int
    kl: dict[int, float]


def measure(model: ByLayer, rows: list[Encoded], widths: tuple[int, ...], group: int, scratch: Path, *, head: bool = False) -> list[Part]:
    """Of every part inside the model's layers, rounded to the nearest in each of the widths; with `head` also of an output layer of its own, the last part.
    scratch: an empty folder, for hidden states."""
    groups = list(model.batches([row.input_ids for row in rows]))
    with model.held("embedding"):
        passes = [model.start([rows[i].input_ids for i in each]) for each in groups]
    for number in progress(range(len(model.layers)), "sensitivity, forward"):
        save_file({str(i): each.hidden.cpu() for i, each in enumerate(passes)}, _file(scratch, number))
        with model.held(number):
            model.through(number, passes)
    random = torch.Generator(model.device).manual_seed(SEED)
    tokens = sum(len(seen.kept(row)) for row in rows)
    parts: list[Part] = []
    with model.held("head"):
        moves = _Moves(model, widths, group) if head else None
        back = [_score(model, each, [rows[i] for i in some], random, moves) for each, some in zip(passes, groups)]
        if moves:
            parts = [moves.part(tokens)]
        del moves
    for number in progress(range(len(model.layers) - 1, -1, -1), "sensitivity, backward"):
        before = load_file(_file(scratch, number))
        for i, each in enumerate(passes):
            each.hidden = before[str(i)].to(model.device)
        with model.held(number):
            parts = [*_of_layer(model, number, passes, back, widths, group, tokens), *parts]
        _file(scratch, number).unlink()
    return parts


def _file(scratch: Path, number: int) -> Path:
    return scratch / f"hidden-{number:05d}.safetensors"


class _Moves:
    """What rounding the output layer, which is held, changes of log p(y)."""

    def __init__(self, model: ByLayer, widths: tuple[int, ...], group: int):
        self.model, self.head = model, model.model.get_output_embeddings()
        self.changes = {bits: _change(self.head.weight.data, bits, group) for bits in widths}
        self.row: dict[int, float] = dict.fromkeys(widths, 0.0)
        self.squares: dict[int, float] = dict.fromkeys(widths, 0.0)

    def hook(self):
        """To be removed once the logits' gradients are there."""

        def note(module, given, output):
            inputs = given[0].detach().reshape(-1, given[0].shape[-1])

            def add(gradient: torch.Tensor) -> None:
                for bits, change in self.changes.items():
                    self.row[bits] += float((held.product_t(inputs, change) * gradient.reshape(-1, len(change))).sum())

            output.register_hook(add)

        return self.head.register_forward_hook(note)

    def end_row(self) -> None:
        for bits, moved in self.row.items():
            self.squares[bits] += moved**2
        self.row = dict.fromkeys(self.row, 0.0)

    def part(self, tokens: int) -> Part:
        name = self.model.own_head
        assert name is not None
        return Part((name,), self.head.weight.numel(), {bits: square / 2 / tokens for bits, square in self.squares.items()})


def _score(model: ByLayer, each: Pass, rows: list[Encoded], random: torch.Generator, moves: _Moves | None) -> torch.Tensor:
    """Gradient of log p(y) of answers drawn from the model, for the last hidden states: fp32 (rows, longest, width)."""
    hook = moves.hook() if moves else None
    found = torch.zeros_like(each.hidden)
    for number, row in enumerate(rows):
        at = torch.tensor(seen.kept(row), device=model.device)
        for some in at.split(model.chunk):
            hidden = each.hidden[number, some].requires_grad_()
            log_probs = model.head(hidden).log_softmax(-1)
            drawn = torch.multinomial(log_probs.detach().exp(), 1, generator=random)
            log_probs.gather(1, drawn).sum().backward()
            assert hidden.grad is not None
            found[number, some] = hidden.grad
        if moves:
            moves.end_row()
    if hook:
        hook.remove()
    return found


def _of_layer(
    model: ByLayer, number: int, passes: list[Pass], back: list[torch.Tensor], widths: tuple[int, ...], group: int, tokens: int
) -> list[Part]:
    """The layer's parts; takes the gradients in `back` through it, in place."""
    names = {module: name for name, module in model.names(number)}
    groups = inputs_together(model, number, passes[0])
    part_of: dict[nn.Module, int] = {module: i for i, modules in enumerate(groups) for module in modules}
    changes: dict[nn.Module, dict[int, torch.Tensor]] = {
        module: {bits: _change(outputs_first(module), bits, group) for bits in widths} for module in part_of
    }
    squares: dict[tuple[int, int], float] = defaultdict(float)
    for i, each in enumerate(passes):
        moved: dict[tuple[int, int], Any] = defaultdict(float)

        def note(module, given, output, moved=moved, each=each):
            inputs = given[0].detach()

            def add(gradient: torch.Tensor) -> None:
                for bits, change in changes[module].items():
                    by_token = (held.product_t(inputs.reshape(-1, inputs.shape[-1]), change) * gradient.reshape(-1, len(change))).sum(1)
                    by_row = gradient.shape[:2] == each.ids.shape  # tokens sent to an expert are of any row: then the pass is one draw
                    moved[part_of[module], bits] += by_token.view(each.ids.shape).sum(1) if by_row else by_token.sum()[None]

            output.register_hook(add)

        hooks = [module.register_forward_hook(note) for module in part_of]
        each.hidden.requires_grad_()
        try:
            with torch.enable_grad():
                model.call(number, each).backward(back[i])
        finally:
            for hook in hooks:
                hook.remove()
        assert each.hidden.grad is not None
        back[i], each.hidden = each.hidden.grad, torch.empty(0)
        for key, value in moved.items():
            squares[key] += float(value.double().square().sum())
    return [
        Part(
            tuple(names[module] for module in modules),
            sum(outputs_first(module).numel() for module in modules),
            {bits: squares[at, bits] / 2 / tokens for bits in widths},
        )
        for at, modules in enumerate(groups)
    ]


def _change(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What rounding to the nearest changes, bf16 (out, in)."""
    change, how = torch.empty(weight.shape, dtype=torch.bfloat16, device=weight.device), gptq.Nearest(bits, group)
    for into, some in zip(change.split(gptq.ROWS), weight.split(gptq.ROWS)):
        into.copy_(how.round(some.float()).weight - some)
    return change


def bits_of(parts: list[Part], bits_per_weight: float, group: int) -> dict[str, int]:
    """{matrix: 4 or 8}: the parts that gain most for their size are the wider ones, as many as the size allows, scales and zero points counted."""
    weights = sum(part.weights for part in parts)
    left = (bits_per_weight - bits_with_scale(4, group)) * weights
    wide: set[int] = set()
    for at in sorted(range(len(parts)), key=lambda i: -(parts[i].kl[4] - parts[i].kl[8]) / parts[i].weights):
        cost = (bits_with_scale(8, group) - bits_with_scale(4, group)) * parts[at].weights
        if parts[at].kl[4] > parts[at].kl[8] and cost <= left:
            left -= cost
            wide.add(at)
    return {name: 8 if at in wide else 4 for at, part in enumerate(parts) for name in part.names}
