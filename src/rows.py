"""Token rows with a learning rate of their own while every weight is trained. Imported only by worker processes.

A full fine-tune moves weights by some 1e-5 a step: right for what the base knows, hopeless for the row of a control token it never learnt. Here
such rows are parameters beside the matrix they belong to, in front of it while training, and folded into it when the model is saved.
"""

import torch
import torch.nn.functional as F

from src.modeling import whole


class WithRows(torch.nn.Module):
    """An embedding or output layer whose rows `index` are computed from `rows` (count, width) instead of from its weight."""

    def __init__(self, base: torch.nn.Module, rows: torch.nn.Parameter, index: torch.Tensor):
        super().__init__()
        self.base, self.rows = base, rows
        self.register_buffer("index", index, persistent=False)

    @property
    def weight(self):
        return self.base.weight

    def forward(self, x):
        out = self.base(x)
        if isinstance(self.base, torch.nn.Embedding):
            hits = x.unsqueeze(-1) == self.index
            return torch.where(hits.any(-1, keepdim=True), F.embedding(hits.int().argmax(-1), self.rows).to(out.dtype), out)
        return out.index_copy(-1, self.index, F.linear(x, self.rows.to(x.dtype)).to(out.dtype))


def split_off(model, ids: list[int]) -> None:
    """Give the rows `ids` of the model's embedding and output layer parameters of their own; one for both where the two are tied."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    index = torch.tensor(ids, device=embedding.weight.device)
    rows = _rows_of(embedding, index)
    model.set_input_embeddings(WithRows(embedding, rows, index))
    if head is not None:
        model.set_output_embeddings(WithRows(head, rows if tied else _rows_of(head, index), index))


def _rows_of(layer, index) -> torch.nn.Parameter:
    with whole([layer.weight]):
        return torch.nn.Parameter(layer.weight.detach()[index].clone())


def folded(model, state: dict) -> dict:
    """A state dict of the model with its split-off rows written into their matrices, under the names the model had before."""
    state = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, WithRows):
            rows, weight = state.pop(f"{name}.rows", None), state.pop(f"{name}.base.weight", None)
            if weight is not None:
                rows = rows if rows is not None else module.rows
                state[f"{name}.weight"] = weight.index_copy(0, module.index.to(weight.device), rows.detach().to(weight))
    return state
