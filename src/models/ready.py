"""The libraries of a model's proof, imported once by the server that `core.processes.begin` has its processes forked from."""

import gc
import os

from src.core.processes import import_quietly, outlive_signals

outlive_signals()
# torchao asks at its import whether there is a GPU, and a process that has asked CUDA itself cannot be forked for one that uses it.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
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
