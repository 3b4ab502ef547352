"""The rows a model has for tokens: how many, how they grow, and their matrices made whole where ZeRO-3 has partitioned them."""

import contextlib


def grow_vocabulary(model, rows: int) -> int:
    """Give the embedding and output layer at least `rows` rows; new ones start as the mean of the old, so every process gets the same.

    Returns how many rows were added.
    """
    import torch

    old = vocabulary_rows(model)
    if rows <= old:
        return 0
    model.resize_token_embeddings(rows, mean_resizing=False)
    layers = {
        id(layer.weight): layer.weight for layer in (model.get_input_embeddings(), model.get_output_embeddings()) if layer is not None
    }
    for weight in layers.values():
        with torch.no_grad(), whole([weight]):
            weight[old:] = mean_row(weight[:old])
    return rows - old


def mean_row(weight):
    """Mean over rows of (rows, width), computed in fp32, in the dtype of the weight."""
    return weight.float().mean(0).to(weight.dtype)


def whole(parameters: list):
    """A context in which parameters that ZeRO-3 has partitioned are whole on every rank, and changes are kept."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)


def vocabulary_rows(model) -> int:
    """Rows of the embedding, also where peft wraps it or ZeRO-3 has taken its data away."""
    weight = model.get_input_embeddings().weight
    return getattr(weight, "ds_shape", weight.shape)[0]
