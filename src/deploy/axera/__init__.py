"""deploy target=ax650 or ax630c: a model folder becomes layers compiled by Pulsar2 and everything AXERA's runtimes read beside them.

Around the compiler this module writes what users otherwise assemble by hand: the bf16 embedding table, tokenizer.txt, axllm's config.json,
post_config.json, a run script for axllm and for the older `main`, and a README. What needs no compiler is made first; without one it is kept and gone
on with when there is one.
"""

import json
import os
import shlex
import shutil
import time
from pathlib import Path

from src.core.artifact import Artifact
from src.core.errors import Unfinished
from src.core.log import say, size, warn
from src.deploy import contract, preflight
from src.deploy.axera import chat, runtime, tokenizer_txt, toolchain
from src.deploy.axera.compile import compile_layers, container
from src.deploy.embedding import find_embedding, write_bf16
from src.deploy.vendor import COMPILED, WORK, finish, whole, work_folder
from src.models import complete, exact_sum
from src.models.folder import trust_of
from src.models.generation import stop_ids
from src.models.loading import load_tokenizer
from src.settings.targets import Axera
from src.sizing import takes
from src.sizing.config_reader import read_shape
from src.sizing.shape import ModelShape

TAKES = {"model", "quantized"}


def wants_dataset(target: Axera) -> bool:
    return False


def check(inputs: dict[str, Artifact], target: Axera, out: Path) -> list[str]:
    """The plan: what fits, what it will take, the exact argv. Raises ConfigError with every setting that does not go with this model, BadData and
    WrongKind for a model that cannot be compiled; in seconds, without torch."""
    model = inputs["model"].path
    shape, quantization, embedding = read_shape(model), preflight.gptq_block(model), find_embedding(model)
    takes.refuse(settings_against(shape, target), str(model))
    notes = preflight.check_headers(model, shape, embedding)
    tool = toolchain.find(target)
    planned, work, start = tool or toolchain.documented(), out / WORK, exact_sum.folder(inputs, out / exact_sum.FOLDER)
    command = toolchain.command_line(
        planned, target, arguments_of(planned, target, quantization, start, work), work, start, container(work)
    )
    rows, hidden = embedding.shape
    return [
        *notes,
        *preflight.check_fit(shape, target),
        *preflight.check_room(out, exact_sum.shape(shape, inputs), target, also=exact_sum.size_to_write(inputs, out / exact_sum.FOLDER)),
        f"embedding table {rows} x {hidden}, {embedding.dtype} to bf16, {size(2 * rows * hidden)}"
        + ("" if embedding.dtype == "BF16" else ", cut off, not rounded, as AXERA's own tool does"),
        f"Pulsar2 {planned.version}{f' in {planned.image}' if planned.image else ''}{'' if tool else '; none is here, so this stops before it'}",
        *(f"environment: {key}={value}" for key, value in toolchain.environment(target).items() if not planned.image),
        f"command: {shlex.join(command)}",
    ]


def settings_against(shape: ModelShape, target: Axera) -> list[str]:
    """What of the target's settings this model contradicts, each with its way out."""
    faults = takes.axera_faults(shape, target)
    known = (*chat.CHATML_TYPES, *chat.OTHER_TYPES)
    if target.tokenizer_type != "auto" and target.tokenizer_type not in known:
        faults.append(f"target.tokenizer_type={target.tokenizer_type}: axllm has {', '.join(known)}")
    return faults


def build(inputs: dict[str, Artifact], out: Path, target: Axera) -> dict:
    """Make the bundle; a compile that ended well is not repeated when something after it failed. Returns its metrics."""
    model = inputs["model"]
    shape, quantization = read_shape(model.path), preflight.gptq_block(model.path)
    work = work_folder(out)
    made = prepare(inputs["stored"], shape, target, out)
    tool = toolchain.find(target)
    if tool is None:
        raise Unfinished(
            "all that needs no compiler is made and kept; Pulsar2 is not on this machine",
            where=str(out),
            fix=[
                *toolchain.EASIER,
                "target.image=IMAGE for an image of another name; then run the same command again: it goes on from here",
            ],
        )
    record = compiled(tool, target, quantization, shape, model.path, work)
    for name in (*record["layers"], record["post"]):
        if (work / "build" / name).exists():
            os.replace(work / "build" / name, out / name)
    shutil.copyfile(work / "compile.log", out / "compile.log")
    runtime.write_json(out / "compile.json", record)
    config = runtime.axllm_config(target, model_name(inputs["stored"]), layers=record["layers"], post=record["post"], **made["axllm"])
    runtime.write_json(out / "config.json", config)
    runtime.write_json(out / "post_config.json", runtime.post_config(model.path))
    runtime.write_run_script(out, config)
    expected = preflight.check_fit(shape, target)
    (out / "README.md").write_text(runtime.readme(target, config, record["pulsar2"], expected), encoding="utf-8")
    runtime.write_sums(out)
    finish(out)
    layer_bytes = sum((out / name).stat().st_size for name in record["layers"])
    return {
        **made["metrics"],
        "pulsar2": record["pulsar2"],
        "command": record["argv"][0],
        "weight_type": record["weight_type"],
        "compile_seconds": record["seconds"],
        "layer_bytes": layer_bytes,
        "post_bytes": (out / record["post"]).stat().st_size,
        "summary": f"{len(record['layers'])} layers {record['weight_type']} for {target.chip}, {made['metrics']['ids']} token ids as in training",
    }


def model_name(model: Artifact) -> str:
    """What the board's server calls the model: the run's name, or the folder's."""
    folder = model.path.resolve()
    return folder.parent.name if model.manifest else folder.name


def prepare(model: Artifact, shape: ModelShape, target: Axera, out: Path) -> dict:
    """Everything that needs no compiler: embedding table, tokenizer file, contract, Hugging Face files. Files that are whole are kept.

    model: as it is stored, since a table in bf16 is copied, and one in fp32 would be cut off. Returns {"axllm": what config.json needs of them, "metrics"}.
    """
    embedding = find_embedding(model.path)
    rows, hidden = embedding.shape
    table = out / runtime.EMBEDDING
    if not table.is_file() or table.stat().st_size != 2 * rows * hidden:
        write_bf16(embedding, table)
        say(f"wrote {table.name}, {rows} x {hidden}, {size(table.stat().st_size)}")
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust_of(model))
    type, system_prompt = chat.choose(tokenizer, target.tokenizer_type, shape.model_type)
    file = f"{shape.model_type}_tokenizer.txt"
    tokenizer_txt.write(tokenizer, stop_ids(model.path, tokenizer), out / file)
    reader = tokenizer_txt.Reader(out / file)
    metrics = contract.prove(tokenizer, out, lambda texts: [reader.encode(text) for text in texts])
    older = [name for name, text, ids in contract.entries(out) if reader.encode(text, knows_family=False) != ids]
    if older:
        warn(f"axllm builds from before 2026 cut words with accents otherwise; on them these differ: {', '.join(older)}")
    hf = out / runtime.HF
    hf.mkdir(exist_ok=True)
    tokenizer.save_pretrained(hf)
    complete.copy(model.path, hf, tokenizer=False)
    shutil.copyfile(model.path / "config.json", hf / "config.json")
    axllm = {"tokenizer_file": file, "tokenizer_type": type, "system_prompt": system_prompt, "rows": rows, "hidden": hidden}
    return {"axllm": axllm, "metrics": {**metrics, "older_axllm_differs": len(older), "tokenizer_type": type}}


def arguments_of(tool: toolchain.Toolchain, target: Axera, quantization: dict | None, model: Path, work: Path) -> list[str]:
    """Pulsar2's arguments, with the folders as it sees them: below /data in a container."""
    folders = ("model", "build") if tool.image else (str(model.resolve()), str((work / "build").resolve()))
    return toolchain.argv(tool, target, quantization, *folders)


def compiled(tool: toolchain.Toolchain, target: Axera, quantization: dict | None, shape: ModelShape, model: Path, work: Path) -> dict:
    """The record of a compile whose files lie in work/build (or were moved from there), run now unless an earlier run of this bundle ended well."""
    done = work / COMPILED
    if done.is_file():
        say("the compile ended well in an earlier run, so it is not repeated")
        return json.loads(done.read_text())
    arguments = arguments_of(tool, target, quantization, model, work)
    begun = time.monotonic()
    layers, post = compile_layers(tool, target, arguments, model, work, shape.layers, preflight.equal_layers(shape))
    record = {
        "pulsar2": tool.version,
        "image": tool.image,
        "image_id": tool.image_id,
        "argv": arguments,
        "environment": toolchain.environment(target),
        "weight_type": f"GPTQ int{quantization['bits']}" if quantization else toolchain.weight_type(target, None),
        "seconds": round(time.monotonic() - begun, 1),
        "layers": layers,
        "post": post,
    }
    with whole(done) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    return record
