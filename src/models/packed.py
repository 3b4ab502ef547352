"""Quantized matrices in a folder, whatever packed them."""

from src.models import bnb, gptq, safetensors_io

Stored = gptq.Stored | bnb.Stored
METHODS = ("gptq", "bitsandbytes")


def matrices(entries: dict[str, safetensors_io.Entry]) -> dict[str, safetensors_io.Entry | Stored]:
    """{name: where it is stored} of a folder's tensors, the quantized ones under the names that their weights would have."""
    return bnb.matrices(gptq.matrices(entries))
