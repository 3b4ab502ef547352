"""Token rows with a learning rate of their own while every weight is trained. Imported only by worker processes.

A full fine-tune moves weights by some 1e-5 a step: right for what the base knows, hopeless for the row of a control token it never learnt. Here
such rows are parameters beside the matrix they belong to, in front of it while training, and folded into it when the model is saved.
"""

import torch
import torch.nn.functional as F

from src.models.held import HeldLinear
from src.models.vocabulary import whole
from src.settings.training import Optimizer


class WithRows(torch.nn.Module):
    """An embedding or output layer whose rows `index` are computed from `rows` (count, width) instead of from its weight."""

    index: torch.Tensor

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
        return replaced(out, x, self.index, self.rows, self.base)


def replaced(out: torch.Tensor, x: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """Logits `out` (..., vocabulary) that an output layer made of x (..., width), as if its weight had `rows` (count, width) at the tokens `index`.

    Beside a frozen matrix in fp32 what the rows change is added: a sum hands its gradient on as it is, where a copy takes two more of the size of
    the logits.
    """
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias: torch.Tensor | None = getattr(layer, "bias", None)
    beside = type(layer) in (torch.nn.Linear, HeldLinear) and not weight.requires_grad and not hasattr(weight, "ds_id")
    if beside and out.dtype == x.dtype == torch.float32:
        return out.index_add_(-1, index, F.linear(x, rows.float() - weight[index].float()))
    return out.index_copy_(-1, index, F.linear(x, rows.to(x.dtype), None if bias is None else bias[index].to(x.dtype)).to(out.dtype))


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


def vocabulary_layers(model) -> list[str]:
    """Names, by their last part, of the layers with a row per token: the embedding, and the output layer unless it is the same weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or model.config.tie_word_embeddings else [embedding, head]
    return [name.rsplit(".", 1)[-1] for layer in layers for name, module in model.named_modules() if module is layer]


def untrained(model, ids: list[int], used: int) -> list[int]:
    """Those of the token ids whose embedding or output row shows no training.

    used: rows the tokenizer can produce; rows behind them are padding that was surely never trained, and a row as close to their centre as they
    are themselves is like them (Land & Bartolo 2024, arXiv:2405.05417). A zero row, or one equal to the mean of all, was only initialised.
    """
    found = set()
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        if layer is None:
            continue
        with torch.no_grad(), whole([layer.weight]):
            weight = layer.weight.detach()
            sample = sample_rows(weight, used)
            centres = [(torch.zeros_like(sample[0]), 0.0), (sample.mean(0), 0.0)]
            if len(weight) > used:
                unused = weight[used:].float()
                centres.append((unused.mean(0), (unused - unused.mean(0)).norm(dim=1).max().item()))
            typical = sample.norm(dim=1).median().item()
            for token in ids:
                row = weight[token].float()
                if any((row - centre).norm().item() <= 1.5 * radius + 0.02 * typical for centre, radius in centres):
                    found.add(token)
    return sorted(found)


def row_rates(model, tuner: Optimizer, used: int) -> dict[str, float]:
    """{name of a trained-rows parameter: its peak learning rate}.

    The rows start from nothing while the matrix they join has a scale of its own, small in wide models and large in narrow ones. Adam moves an
    entry by about its rate each step, so a rate of 1 % of a typical entry brings a row there in some hundred steps in either.
    """
    rates = {}
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        layer = None
        if ".trainable_tokens_delta." in name:
            layer = model.get_submodule(name.split(".trainable_tokens_delta")[0]).base_layer
        elif last == "rows":
            layer = model.get_submodule(owner).base
        if layer is not None:
            with whole([layer.weight]):
                typical = sample_rows(layer.weight, used).square().mean(1).median().sqrt().item()
            rates[name] = max(tuner.learning_rate, 0.01 * typical) if tuner.row_learning_rate == "auto" else tuner.row_learning_rate
    return rates


def sample_rows(weight, used: int):
    """Up to 4,096 rows spread over the `used` first of a (vocabulary, width) matrix, fp32."""
    return weight.detach()[torch.linspace(0, used - 1, min(used, 4096)).long()].float()


def rows_beside_their_matrix() -> None:
    """Have peft's trained token rows computed beside the matrix they belong to, which is used as it is: held in 16 bits, on disk, or partitioned by ZeRO-3.

    peft 0.21 writes the rows into a copy of the whole matrix in every forward, outside the layer that ZeRO-3 gathers, and takes the first ones through
    `torch.cuda` alone. Here the layer runs and the rows' part of its output is replaced.
    """
    from peft.tuners.trainable_tokens.layer import TrainableTokensLayer

    def first_rows(self, weight, rows, embed_dim):
        with whole([weight]):
            return weight[rows].detach().clone()

    def forward(self, x, active_adapters, *args, **kwargs):
        if self.disable_adapters or not active_adapters or self.merged:
            return stock_forward(self, x, active_adapters, *args, **kwargs)
        out = self.base_layer(x, *args, **kwargs)
        for adapter in active_adapters:
            index = torch.as_tensor(self.token_indices[adapter], device=out.device)
            rows = self.trainable_tokens_delta[adapter].to(out.dtype)
            if isinstance(self.base_layer, torch.nn.Embedding):
                hits = x.unsqueeze(-1) == index
                new = F.embedding(hits.int().argmax(-1), rows)
                scale = self._get_embed_scale()
                out = torch.where(hits.any(-1, keepdim=True), new if scale is None else new * scale.to(new.dtype), out)
            else:
                out = replaced(out, x, index, rows, self.base_layer)
        return out

    if TrainableTokensLayer.forward_adapters.__module__ != __name__:
        stock_forward = TrainableTokensLayer.forward_adapters
        for name, ours in (("forward_adapters", forward), ("_collect_token_weights", first_rows)):
            setattr(TrainableTokensLayer, name, ours)
