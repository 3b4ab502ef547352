"""deploy target=gguf: a model folder becomes one GGUF, the file of llama.cpp, Ollama and many more, with its tokenizer and chat template inside.

The gguf package writes it, streaming from the shards; what only llama.cpp's own quantizer makes (q4_k_m and the like) it makes from such a file, by an
importance matrix from the calib split where that helps. llama.cpp, in an environment of its own (scripts/gguf_env.sh), proves the file before it is published.
"""

import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import MissingInput, Unfinished
from src.core.files import read_json, write_json
from src.core.log import say, size, warn
from src.deploy import answers, preflight
from src.deploy.embedding import find_embedding
from src.deploy.gguf import card, families, llama_cpp, metadata, ollama, proof, vocabulary, weights
from src.deploy.llama2c.chat import find_chat
from src.deploy.vendor import finish, whole, work_folder
from src.models import calibration, exact_sum, fidelity, seen
from src.models.folder import check_tokenizer, trust_of
from src.models.generation import stop_ids
from src.models.loading import load_tokenizer
from src.models.safetensors_io import Entry
from src.settings.quantizers import Calibration
from src.settings.targets import Gguf
from src.sizing import takes
from src.sizing.config_reader import read_shape

TAKES = {"model"}
SOURCE, IMPORTANCE, MADE = "source.gguf", "importance.npz", "made.json"
LONGEST = 512
"""tokens of a conversation that the importance matrix looks at, llama.cpp's own chunk"""
COMPARED = 1024
"""tokens of them that tell whether the matrix helped"""


def wants_dataset(target: Gguf) -> bool:
    return takes.by_llama_cpp(target) and target.rows > 0


def check(inputs: dict[str, Artifact], target: Gguf, out: Path) -> list[str]:
    """The plan: types, sizes, what proves it. Raises WrongKind for a model or tokenizer that llama.cpp has no place or name for, BadData for a damaged one, NoRoom;
    in milliseconds, without torch."""
    model = inputs["model"]
    where = model.path / "config.json"
    shape = takes.check(read_json(where), target, where=str(where))
    check_tokenizer(model.path, trust_remote_code=trust_of(model))
    notes = preflight.check_headers(model.path, shape, find_embedding(model.path))
    if (file := model.path / "tokenizer.json").is_file():
        notes += vocabulary.read(read_json(file), str(file)).notes
    if wants_dataset(target) and not inputs["dataset"].files["calib.jsonl"]["size"]:
        raise MissingInput(
            "the calib split is empty, and the importance matrix is made of it", where=str(inputs["dataset"].path), fix="target.rows=0"
        )
    by = "llama.cpp's quantizer" + (f", errors weighed by {target.rows} conversations" if wants_dataset(target) else "")
    return [
        *notes,
        *windows(shape),
        f"{name_of(target)}: {target.weight_type} by {by if takes.by_llama_cpp(target) else 'the gguf package'}",
        *preflight.check_room(out, exact_sum.shape(shape, inputs), target, also=exact_sum.size_to_write(inputs, out / exact_sum.FOLDER)),
        llama_cpp.line(target),
    ]


def name_of(target: Gguf) -> str:
    return f"model-{target.weight_type}.gguf"


def windows(shape: Any) -> list[str]:
    """A note where llama.cpp leaves the model's sliding window out."""
    window = min((layer.window for layer in shape.stack if layer.window), default=None)
    if shape.model_type not in families.WINDOW_LEFT_OUT or not window or window >= (shape.max_positions or window):
        return []
    return [f"llama.cpp attends to all of a text, the model to its last {window:,} tokens: beyond that many its answers differ"]


def build(inputs: dict[str, Artifact], out: Path, target: Gguf) -> dict:
    """Write the file, prove it, and describe it; a file that was quantized is not made again when something after it failed. Returns the metrics.

    Raises Unfinished where llama.cpp is not there to quantize, ToolFailed for its faults, ProofFailed where file and transformers disagree.
    """
    from transformers import AutoConfig

    model, stored = inputs["model"], inputs["stored"]
    shape, trust = read_shape(model.path), bool(trust_of(model))
    work, file = work_folder(out), out / name_of(target)
    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=trust)
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust)
    vocab = vocabulary.of(tokenizer, model.path, find_embedding(model.path).shape[0])
    notes = [*vocab.notes, *windows(shape)]
    for note in notes:
        say(f"gguf: {note}")

    by_quantizer = takes.by_llama_cpp(target)
    written_type = weights.exact_type(model.path) if by_quantizer else target.weight_type
    plan = weights.plan(model.path, config, written_type)

    def describe(writer: Any) -> None:
        metadata.describe(writer, stored, config, vocab, written_type)

    pieces, why = find_chat(tokenizer)
    stops = stop_ids(model.path, tokenizer)
    (out / "Modelfile").write_text(ollama.modelfile(file.name, pieces, why, vocab, stops, model.path, target.context_len), "utf-8")
    for note in ollama.notes(pieces, why):
        say(f"Modelfile: {note}")
    card.write(out, file.name, shape, target, target.weight_type, notes)

    made = work / MADE
    if not made.is_file():
        source = work / SOURCE if by_quantizer else file
        with whole(source) as partial:
            weights.write(partial, families.architecture(config.model_type), describe, plan)
        record: dict = {"tensors": len(plan), "peak_memory": _peak()}
        if by_quantizer:
            record |= quantize(inputs, work, file, target, config, tokenizer)
        write_json(made, record)
    record = read_json(made)
    ask = llama_cpp.questioner(target, work, file) if llama_cpp.is_here(target) else None
    metrics = proof.prove_ids(tokenizer, vocab, model.path, out, ask, file)
    metrics |= proof.prove(model, out, tokenizer, target, ask, fidelity.dataset_of(stored), file, plan)
    finish(out)
    speed = (
        f", {metrics['tokens_per_second']:,.0f} tokens/s on the CPU here" if "tokens_per_second" in metrics else ", not run by llama.cpp"
    )
    return {
        **metrics,
        **record,
        "proven_by": llama_cpp.versions(target) if ask else {"gguf": metadata.version()},
        "modelfile_template": pieces is not None,
        "model_bytes": file.stat().st_size,
        "summary": f"{size(file.stat().st_size)} in {target.weight_type}{speed}",
    }


def quantize(inputs: dict[str, Artifact], work: Path, file: Path, target: Gguf, config: Any, tokenizer: Any) -> dict:
    """The file by llama.cpp's quantizer from the one in `work`; with rows to weigh errors by, made both ways, and the one kept that is nearer to the model on
    them: a matrix does not help every model. Returns what was measured."""
    matrix, rows = work / IMPORTANCE, list[encoding.Encoded]()
    if wants_dataset(target):
        how = Calibration(rows=target.rows, max_length=LONGEST, seed=0, text=None, text_share=0.5)
        rows = calibration.read(how, inputs["dataset"].path / "calib.jsonl", None, tokenizer).chats
        weigh(inputs["model"], rows, matrix, config)
    ask, number = llama_cpp.questioner(target, work, work / SOURCE), metadata.file_type(target.weight_type)
    if not (llama_cpp.is_here(target) and ask("able")["quantizes"]):
        raise Unfinished(
            f"the model is written and its inputs are weighed; llama.cpp's quantizer, which alone makes {target.weight_type}, is not in {target.environment}",
            where=str(work),
            fix=[*llama_cpp.ways(target), "target.weight_type=q4_0 needs no llama.cpp"],
        )
    some = fidelity.within(rows, LONGEST, COMPARED)
    before = seen.observe(fidelity.reader(inputs["model"], "float32"), some) if matrix.is_file() else None
    tried = {}
    for name, given in [("plain", None), *([("weighed", matrix)] if before else [])]:
        made = work / f"{name}.gguf"
        seconds = ask("quantize", out=str(made.absolute()), type=number, importance=str(given) if given else None)["seconds"]
        kl = 0.0
        if before:
            told = llama_cpp.questioner(target, work, made)("observe", rows=answers.questions(before, some))["rows"]
            kl = fidelity.compare(before, answers.seen_of(before, told), len(some)).kl
        tried[name] = (kl, seconds)
    best = min(tried, key=lambda name: tried[name][0])
    if before:
        say(
            f"quantizer: KL {tried['plain'][0]:.4f} nats on {len(before)} calibration tokens, {tried['weighed'][0]:.4f} with errors weighed by the importance "
            f"matrix: takes the {best} one"
        )
    os.replace(work / f"{best}.gguf", file)
    return {"quantize_seconds": tried[best][1], "weighed": best == "weighed"} | {
        f"{name}_kl": kl for name, (kl, _) in tried.items() if before
    }


def weigh(model: Artifact, rows: list[encoding.Encoded], matrix: Path, config: Any) -> None:
    """The importance matrix, {llama.cpp's name of a matrix: mean square of each of its inputs}, made unless it is there."""
    if matrix.is_file():
        return
    from src.models import by_layer, importance

    if not (found := by_layer.load(replace(model, kind="model"))):
        warn("the model's layers cannot be looked at one by one, so its matrices are quantized without an importance matrix")
        return
    names = {tensor.source.name: tensor.name for tensor in weights.plan(model.path, config, "f32") if isinstance(tensor.source, Entry)}
    squares = importance.of_inputs(found[0], [row.input_ids for row in rows])
    with whole(matrix) as partial, open(partial, "wb") as stream:
        np.savez(stream, **{names[name]: values for name, values in squares.items()})  # type: ignore[arg-type]  # numpy has named arrays and flags alike


def _peak() -> int:
    """Bytes of memory that this process took at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
