"""The folder of a quantized model as transformers, gptqmodel, vLLM and Pulsar2 read it: tensors, and the blocks that say how they are to be read."""

import re
from collections import defaultdict
from pathlib import Path

from src import __version__
from src.core.files import read_json, write_json
from src.models import safetensors_io
from src.models.safetensors_io import Entry
from src.settings.quantizers import AnyQuantizer, AwqQuantizer, BnbQuantizer, RtnQuantizer

FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}
"""what vLLM calls the matrix that it makes of this one and others of one input"""


def write(source: Path, layers: Path, out: Path) -> None:
    """The source's tensors as it stores them, in its order, with what the files in `layers` hold in place of those that were quantized."""
    from src.models import packed

    made = packed.matrices(safetensors_io.entries(layers, "layer-*.safetensors"))
    written: list[Entry] = []
    scaled: dict[str, Entry] = {}
    for name, entry in safetensors_io.entries(source).items():
        found = made.get(name)
        if isinstance(found, Entry):  # a norm or a bias that AWQ scaled
            scaled[name] = found
        written += found.parts.values() if isinstance(found, packed.Packed) else [entry]
    stored = {entry.name: entry for entry in written}

    def tensor(name: str):
        if name not in scaled:
            return stored[name]
        return safetensors_io.load(scaled[name]).to(safetensors_io.load(stored[name]).dtype)

    safetensors_io.write(out, written, tensor, safetensors_io.parse_size("5GB"))


def complete_config(q: AnyQuantizer, bits: dict[str, int] | None, source: Path, out: Path) -> None:
    """The source's config.json with the block that says how it is quantized; of GPTQ's layout quantize_config.json too, where AutoGPTQ's readers look for it."""
    if isinstance(q, BnbQuantizer):
        write_json(out / "config.json", read_json(source / "config.json") | {"quantization_config": bitsandbytes(q)})
        return
    if isinstance(q, AwqQuantizer):
        block = {"quant_method": "awq", "bits": 4, "group_size": q.group_size, "zero_point": True, "version": "gemm"}
        write_json(out / "config.json", read_json(source / "config.json") | {"quantization_config": block})
        return
    block = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": q.widths[0],
        "group_size": q.group_size,
        "desc_act": not isinstance(q, RtnQuantizer) and q.act_order,
        "sym": True,
        "lm_head": any(not safetensors_io.INSIDE.search(name) for name in bits or ()),
        **({} if isinstance(q, RtnQuantizer) else {"damp_percent": q.damp}),
        **({"dynamic": rules(bits)} if bits else {}),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"boardwalk:{__version__}"]},
    }
    write_json(out / "config.json", read_json(source / "config.json") | {"quantization_config": block})
    write_json(out / "quantize_config.json", block)


def bitsandbytes(q: BnbQuantizer) -> dict:
    """transformers' block for layers of bitsandbytes."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": q.bits == 4,
        "load_in_8bit": q.bits == 8,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": q.double_quant,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_threshold": 6.0,
    }


def rules(bits: dict[str, int]) -> dict[str, dict[str, int]]:
    """gptqmodel's and vLLM's `dynamic` block of the matrices in 8 bits: by their name, and by what vLLM calls it fused with others."""
    layers: dict[tuple[str, str], list[str]] = defaultdict(list)
    found = {}
    for name, width in bits.items():
        if width == 8 and not safetensors_io.INSIDE.search(name):  # the output layer
            found[f"+:{re.escape(name)}$"] = {"bits": 8}
        elif width == 8:
            before, number, after = re.split(r"\.(\d+)\.", name, maxsplit=1)
            layers[before, after].append(number)
    for (before, after), numbers in layers.items():
        path, _, own = after.rpartition(".")
        names = "|".join([own, *([FUSED[own]] if own in FUSED else [])])
        found[f"+:{re.escape(before)}\\.({'|'.join(numbers)})\\.{re.escape(path)}\\.({names})$"] = {"bits": 8}
    return found
