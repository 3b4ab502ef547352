"""deploy target=gguf_lora: a LoRA adapter becomes a GGUF of its own, for llama.cpp or Ollama that have its base as a GGUF already.

The file holds A and B of each matrix, in the base's layout there. llama.cpp adds alpha / rank of their product to what the base computes, so what it says is held to
the adapter on its base in transformers, on a file of that base which is made for the proof and goes with it. Source: llama.cpp's src/llama-adapter.cpp (2026-10).
"""

from pathlib import Path
from typing import Any

from src.core.artifact import Artifact
from src.core.errors import Unfinished, WrongKind
from src.core.files import read_json
from src.core.log import say, size
from src.deploy import preflight
from src.deploy.embedding import find_embedding
from src.deploy.gguf import card, families, llama_cpp, metadata, ollama, proof, vocabulary, weights
from src.deploy.gguf.weights import Tensor
from src.deploy.llama2c.chat import find_chat
from src.deploy.vendor import finish, whole, work_folder
from src.models import fidelity, merging
from src.models.folder import base_of, check_tokenizer, has_tokenizer, trust_of
from src.models.generation import stop_ids
from src.models.loading import load_tokenizer
from src.models.safetensors_io import Entry
from src.settings.targets import GgufLora
from src.sizing import takes
from src.sizing.config_reader import read_shape

TAKES = {"adapter"}
MERGED = "python -m src.merge, then target=gguf, whose file holds all that was trained"
BASE, TEMPLATE = "base.gguf", "chat_template.jinja"


def wants_dataset(target: GgufLora) -> bool:
    return False


def name_of(target: GgufLora) -> str:
    return f"adapter-{target.weight_type}.gguf"


def check(inputs: dict[str, Artifact], target: GgufLora, out: Path) -> list[str]:
    """The plan. Raises WrongKind for a base that llama.cpp has no place for, and for what a LoRA of llama.cpp cannot hold; in milliseconds, without torch."""
    adapter = inputs["model"]
    base = base_of(adapter)
    shape = takes.check(read_json(base / "config.json"), target, where=str(base / "config.json"))
    check_tokenizer(base, trust_remote_code=trust_of(adapter))
    count = len(factors(adapter, base))
    return [
        f"{name_of(target)}: A and B of {count} matrices as {target.weight_type}",
        *preflight.check_room(out, shape, target),
        llama_cpp.line(target),
    ]


def factors(adapter: Artifact, base: Path) -> dict[str, tuple[Entry, Entry, float]]:
    """{name of a base weight: (A, (rank, in); B, (out, rank); what their product is multiplied by)}. Raises WrongKind for what else was trained."""
    if adapter.metrics.get("nf4"):
        raise WrongKind(
            "the adapter was trained on a base in 4 bits, and no GGUF holds that base as it was rounded",
            where=str(adapter.path),
            fix=MERGED,
        )
    _, changes = merging.plan(adapter, base)
    settings, found = read_json(adapter.path / "adapter_config.json"), {}
    for name, change in changes.items():
        if rest := sorted(change.keys() - {"base", "lora_A", "lora_B"}):
            raise WrongKind(
                f"'{name}' has {', '.join(rest)}, and a LoRA of llama.cpp holds A and B alone", where=str(adapter.path), fix=MERGED
            )
        if "lora_A" in change:
            a, b = change["lora_A"], change["lora_B"]
            found[name] = a, b, merging.scale(settings, name.removesuffix(".weight"), a.shape[0])
    return found


def plan(adapter: Artifact, base: Path, config: Any, weight_type: str) -> tuple[float, list[Tensor]]:
    """(alpha, the file's tensors). llama.cpp has one alpha for all and divides it by each rank: where scales differ beyond that, B is multiplied."""
    under = {tensor.source.name: tensor for tensor in weights.plan(base, config, weight_type) if isinstance(tensor.source, Entry)}
    made, alpha = list[Tensor](), 0.0
    for name, (a, b, scale) in factors(adapter, base).items():
        if not (tensor := under.get(name)):
            raise WrongKind(f"'{name}' is adapted, and no tensor of the base's GGUF is", where=str(adapter.path), fix=MERGED)
        alpha = alpha or scale * a.shape[0]
        made.append(Tensor(f"{tensor.name}.lora_a", weight_type, a.shape, a))
        made.append(Tensor(f"{tensor.name}.lora_b", weight_type, b.shape, b, tensor.head, times=scale * a.shape[0] / alpha))
    return alpha, made


def build(inputs: dict[str, Artifact], out: Path, target: GgufLora) -> dict:
    """Write the file, prove it on its base, and describe it. Returns the metrics.

    Raises Unfinished where llama.cpp is not there to prove it, ToolFailed for its faults, ProofFailed where it and transformers disagree.
    """
    from transformers import AutoConfig

    adapter = inputs["model"]
    base = base_of(adapter)
    own = adapter.path if has_tokenizer(adapter.path) else base
    config, tokenizer = AutoConfig.from_pretrained(base, local_files_only=True), load_tokenizer(own)
    vocab = vocabulary.of(load_tokenizer(base), base, find_embedding(base).shape[0])
    arch, work, file = families.architecture(config.model_type), work_folder(out), out / name_of(target)
    alpha, tensors = plan(adapter, base, config, target.weight_type)
    with whole(file) as partial:
        weights.write(partial, arch, lambda writer: metadata.describe_adapter(writer, adapter, vocab, alpha, target.weight_type), tensors)
    if tokenizer.chat_template:
        (out / TEMPLATE).write_text(tokenizer.chat_template, "utf-8")
    pieces, why = find_chat(tokenizer)
    stops = stop_ids(own if (own / "config.json").is_file() else base, tokenizer)
    (out / "Modelfile").write_text(
        ollama.modelfile("BASE.gguf", pieces, why, vocab, stops, base, target.context_len, adapter=file.name), "utf-8"
    )
    for note in ollama.notes(pieces, why):
        say(f"Modelfile: {note}")
    card.write_adapter(out, file.name, read_shape(base), target, metadata.named(base)[1], with_template=bool(tokenizer.chat_template))
    if not llama_cpp.is_here(target):
        raise Unfinished(
            f"the adapter is written; llama.cpp, which proves it on its base, is not in {target.environment}",
            where=str(out),
            fix=llama_cpp.ways(target),
        )
    under = work / BASE
    if not under.is_file():
        kind = weights.exact_type(base)
        with whole(under) as partial:
            weights.write(
                partial, arch, lambda writer: metadata.describe(writer, adapter, config, vocab, kind), weights.plan(base, config, kind)
            )
    ask = llama_cpp.questioner(target, work, under, file)
    metrics = proof.prove_ids(tokenizer, vocab, base, out, ask, under)
    metrics |= proof.prove(adapter, out, tokenizer, target, ask, fidelity.dataset_of(adapter), under, tensors)
    finish(out)
    return {
        **metrics,
        "tensors": len(tensors),
        "alpha": alpha,
        "proven_by": llama_cpp.versions(target),
        "model_bytes": file.stat().st_size,
        "summary": f"{size(file.stat().st_size)} in {target.weight_type} for {metadata.named(base)[1]}",
    }
