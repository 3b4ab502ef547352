"""What a GGUF says beside weights: what it is, where it came from, its sizes and its tokenizer."""

import importlib.metadata
from pathlib import Path
from typing import Any

from src.core import card, descent
from src.core.artifact import Artifact
from src.deploy.gguf import families, vocabulary
from src.deploy.gguf.vocabulary import PHI3, Vocabulary

UNUSUAL = {"f32": "ALL_F32", "q6_k": "MOSTLY_Q6_K", "q2_k": "MOSTLY_Q2_K"}
KEY, BASE = "boardwalk.model_key", "boardwalk.base_key"
"""keys of ours: of the artifact that the file was made from, and of the base under it, as their manifests have them"""


def version() -> str:
    return importlib.metadata.version("gguf")


def file_type(weight_type: str) -> int:
    """llama.cpp's number (llama_ftype) of a file whose matrices are mostly of this type."""
    import gguf

    return int(gguf.LlamaFileType[UNUSUAL.get(weight_type, f"MOSTLY_{weight_type.upper()}")])


def describe(writer: Any, stored: Artifact, config: Any, vocab: Vocabulary, weight_type: str) -> None:
    """Put it all into a gguf.GGUFWriter. stored: the model as its manifest has it; config: transformers'; weight_type: of the file that is written."""
    import gguf

    writer.add_type(gguf.GGUFType.MODEL)
    _came_from(writer, stored, vocab, weight_type)
    families.describe(writer, config, len(vocab.tokens))
    vocabulary.describe(vocab, writer)


def describe_adapter(writer: Any, adapter: Artifact, vocab: Vocabulary, alpha: float, weight_type: str) -> None:
    """The same of a LoRA's file, which has neither sizes nor a tokenizer. alpha: what llama.cpp divides by each rank."""
    import gguf

    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    _came_from(writer, adapter, vocab, weight_type)


def _came_from(writer: Any, stored: Artifact, vocab: Vocabulary, weight_type: str) -> None:
    import gguf

    base = base_of(stored)
    writer.add_name(title(base or stored.path, vocab))
    if stored.manifest:
        writer.add_string(KEY, stored.key)
    if base:
        owner, name = named(base)
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, name)
        if owner:
            writer.add_base_model_organization(0, owner)
            writer.add_base_model_repo_url(0, f"https://huggingface.co/{owner}/{name}")
    if licence := card.licence_of(base or stored.path).get("license"):
        writer.add_license(licence)
    writer.add_quantized_by("Boardwalk")
    writer.add_file_type(file_type(weight_type))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def base_of(stored: Artifact) -> Path | None:
    """Where the base of a fine-tune or its merge was; None for a model from elsewhere."""
    record = stored.parent("model")
    return stored.path_of(record) if record else None


def named(folder: Path) -> tuple[str, str]:
    """(owner, name) of a model's folder; the owner is known where the hub's cache holds it."""
    owner, _, name = descent.name_of(folder).rpartition("/")
    return owner, name


def title(folder: Path, vocab: Vocabulary) -> str:
    """A name for the model. llama.cpp treats one that is called Phi-3 in its own way, so that the name has to say so, or not, by the tokenizer."""
    name = named(folder)[1]
    phi = any(word in name.lower() for word in (PHI3, "phi3"))
    if vocab.strips:
        return name if phi else f"{name} {PHI3}"
    return name.replace("-", " ").replace("hi3", "hi 3") if phi else name
