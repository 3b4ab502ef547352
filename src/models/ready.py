"""The libraries of a model's proof, imported once by the server that `core.processes.fresh` has its processes forked from."""

from src.core.processes import import_quietly

import_quietly(
    "torch",
    "transformers.modeling_utils",
    "transformers.quantizers.auto",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "accelerate.hooks",
    "src.models.by_layer",
    "src.models.fidelity",
)
