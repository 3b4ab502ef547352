"""The libraries of a model's proof, imported once by the server that `core.processes.begin` has its processes forked from."""

import gc

from src.core.processes import import_quietly, outlive_signals

outlive_signals()
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

# What has been imported is no garbage: each look at it would take a third of a second, and copy its pages from the server's.
gc.freeze()
