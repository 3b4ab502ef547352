"""Quantized matrices in a folder, whatever packed them."""

from src.models import awq, bnb, gptq, safetensors_io
from src.models.matrix import Packed

METHODS = ("gptq", "bitsandbytes", "awq")


def matrices(entries: dict[str, safetensors_io.Entry]) -> dict[str, safetensors_io.Entry | Packed]:
    """{name: where it is stored} of a folder's tensors, the quantized ones under the names that their weights would have."""
    return awq.matrices(bnb.matrices(gptq.matrices(entries)))
