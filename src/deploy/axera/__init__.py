"""deploy target=ax650 or ax630c: a model folder becomes layers compiled by Pulsar2 and everything AXERA's runtimes read beside them.

Around the compiler this module writes what users otherwise assemble by hand: the bf16 embedding table, tokenizer.txt, axllm's config.json,
post_config.json, a run script for axllm and for the older `main`, and a README. What needs no compiler is made first; without one it is kept, with a
script to compile it on another machine, and gone on with when there is one.
"""

import json
import os
import re
import shlex
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from src.chat import encoding
from src.core.artifact import Artifact
from src.core.errors import BadData, ProofFailed, ToolFailed, Unfinished, WrongKind
from src.core.log import say, size, warn
from src.deploy import contract, preflight
from src.deploy.axera import by_hand, chat, differences, runtime, tokenizer_txt, toolchain
from src.deploy.axera.compile import Weights, bring_back, compile_layers, container
from src.deploy.embedding import find_embedding, write_bf16
from src.deploy.vendor import BY_HAND, COMPILED, WORK, finish, whole, work_folder
from src.models import complete, exact_sum
from src.models.folder import trust_of
from src.models.generation import stop_ids
from src.models.loading import load_tokenizer
from src.settings.targets import Axera
from src.sizing import takes
from src.sizing.config_reader import read_shape
from src.sizing.shape import ModelShape

TAKES = {"model", "quantized"}
OLDER_MAIN = "target.runtime=auto makes a bundle for the older main, with the model's own tokenizer and template"


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


def settings_against(shape: ModelShape, target: Axera) -> list[takes.Fault]:
    """What of the target's settings this model contradicts, each with its way out."""
    faults = takes.axera_faults(shape, target)
    known = (*chat.CHATML_TYPES, *chat.OTHER_TYPES)
    if target.tokenizer_type != "auto" and target.tokenizer_type not in known:
        faults.append(
            takes.Fault(f"target.tokenizer_type={target.tokenizer_type}: axllm has {', '.join(known)}", fix="target.tokenizer_type=auto")
        )
    return faults


def build(inputs: dict[str, Artifact], out: Path, target: Axera) -> dict:
    """Make the bundle; a compile that ended well is not repeated when something after it failed. Returns its metrics.

    Raises Unfinished where there is no Pulsar2: everything else is made and kept, with a script to compile it elsewhere.
    """
    model = inputs["model"]
    shape, quantization = read_shape(model.path), preflight.gptq_block(model.path)
    work = work_folder(out)
    made = prepare(inputs["stored"], shape, target, out)

    def write_around(layers: list[str], post: str, pulsar2: str | None) -> None:
        config = runtime.axllm_config(target, model_name(inputs["stored"]), layers=layers, post=post, **made.axllm)
        if not made.why_not:
            runtime.write_json(out / "config.json", config)
        runtime.write_json(out / "post_config.json", made.post_config)
        runtime.write_run_script(out, config, made.why_not, target)
        text = runtime.readme(target, config, pulsar2, preflight.check_fit(shape, target), made.why_not, made.differs)
        (out / "README.md").write_text(text, encoding="utf-8")

    tool = toolchain.find(target)
    if tool is None and not (work / COMPILED).is_file() and not (work / BY_HAND).is_file():
        write_around(*runtime.expected_names(target.model_type or shape.model_type, target, shape.layers), None)
        raise unfinished(by_hand.write(target, quantization, work), model.path, out)
    record = compiled(tool, target, quantization, Weights.of(shape, target), model.path, work)
    for name in (*record["layers"], record["post"]):
        if (work / "build" / name).exists():
            os.replace(work / "build" / name, out / name)
    shutil.copyfile(work / "compile.log", out / "compile.log")
    runtime.write_json(out / "compile.json", record)
    write_around(record["layers"], record["post"], record["pulsar2"])
    runtime.write_sums(out)
    finish(out)
    layer_bytes = sum((out / name).stat().st_size for name in record["layers"])
    by_main = ", for the older main alone" if made.why_not else ""
    return {
        **made.metrics,
        "pulsar2": record["pulsar2"],
        "command": record["argv"][0],
        "weight_type": record["weight_type"],
        "compile_seconds": record["seconds"],
        "layer_bytes": layer_bytes,
        "post_bytes": (out / record["post"]).stat().st_size,
        "summary": f"{len(record['layers'])} layers {record['weight_type']} for {target.chip}, {made.metrics['ids']} token ids as in training{by_main}",
    }


def unfinished(script: Path, model: Path, out: Path) -> Unfinished:
    """What to do where there is no compiler."""
    return Unfinished(
        "all that needs no compiler is made and kept; Pulsar2 is not on this machine",
        where=str(out),
        fix=[
            *toolchain.EASIER,
            "target.image=IMAGE for an image of another name; then run the same command again: it goes on from here",
            f"compile where Pulsar2 is: copy {script} there, and {model} beside it as `model`; ./{script.name}; copy build/, compile.log and {BY_HAND} "
            f"back to {script.parent}, and run the same command again",
        ],
    )


def model_name(model: Artifact) -> str:
    """What the board's server calls the model: the run's name, or the folder's."""
    folder = model.path.resolve()
    return folder.parent.name if model.manifest else folder.name


@dataclass(frozen=True)
class Prepared:
    """What `prepare` made. axllm: what its config.json needs of it. why_not: why axllm is not to run it, empty where it is. differs: see differences.py."""

    axllm: dict
    metrics: dict
    post_config: dict
    why_not: str
    differs: list[str]


def prepare(model: Artifact, shape: ModelShape, target: Axera, out: Path) -> Prepared:
    """Everything that needs no compiler: embedding table, tokenizer file, contract, Hugging Face files. Files that are whole are kept.

    model: as it is stored, since a table in bf16 is copied, and one in fp32 would be cut off. Raises WrongKind or ProofFailed where neither runtime reads
    the tokenizer and the template as trained, or target.runtime insists on one that does not.
    """
    embedding = find_embedding(model.path)
    rows, hidden = embedding.shape
    table = out / runtime.EMBEDDING
    if not table.is_file() or table.stat().st_size != 2 * rows * hidden:
        write_bf16(embedding, table)
        say(f"wrote {table.name}, {rows} x {hidden}, {size(table.stat().st_size)}")
    tokenizer = load_tokenizer(model.path, trust_remote_code=trust_of(model))
    hf = out / runtime.HF
    hf.mkdir(exist_ok=True)
    tokenizer.save_pretrained(hf)
    complete.copy(model.path, hf, tokenizer=False)
    shutil.copyfile(model.path / "config.json", hf / "config.json")
    server = runtime.write_server(out)
    post_config = runtime.post_config(model.path)
    type, file, why_not = chat.board_type(target.tokenizer_type, shape.model_type), out / f"{shape.model_type}_tokenizer.txt", ""
    if target.runtime == "main":
        why_not = "target.runtime=main was asked for"
    else:
        try:
            made = _for_axllm(model, tokenizer, type, file, out, post_config, target.post_topk, {"rows": rows, "hidden": hidden})
            if fault := server_fault(server, tokenizer):
                warn(f"`./run.sh main` will not do: {fault}")
                made.differs.append(f"`./run.sh main` will not do: {fault}")
            return made
        except (WrongKind, ProofFailed) as error:
            if target.runtime == "axllm":
                error.fix.append(OLDER_MAIN)
                raise
            why_not = error.what
            warn(
                f"not for axllm: {why_not}. The bundle is for the older `main` runtime, which asks a server here for this model's own tokens"
            )
    for stale in (file, out / "config.json"):
        stale.unlink(missing_ok=True)
    if fault := server_fault(server, tokenizer):
        raise ProofFailed(
            f"the older `main` would not get the model's own tokens: {fault}",
            where=str(model.path),
            fix=[
                "fine-tune a base without chat template, which gives it ChatML: remove chat_template from tokenizer_config.json (and chat_template.jinja)",
            ],
        )
    ids = server.Tokens().ids
    metrics = contract.prove(tokenizer, out, lambda texts: [ids(text) for text in texts])
    axllm = {
        "tokenizer_file": None,
        "tokenizer_type": None,
        "system_prompt": chat.default_system(tokenizer),
        "rows": rows,
        "hidden": hidden,
    }
    return Prepared(axllm, {**metrics, "runtime": "main"}, post_config, why_not, [])


def _for_axllm(model: Artifact, tokenizer, type: str, file: Path, out: Path, post_config: dict, topk: int, sizes: dict) -> Prepared:
    type, system_prompt = chat.choose(tokenizer, type)
    tokenizer_txt.write(tokenizer, stop_ids(model.path, tokenizer), chat.prefix(tokenizer, type), file)
    reader = tokenizer_txt.Reader(file)
    begun = tokenizer.decode(reader.prefix)

    def board(texts: list[str]) -> list[list[int]]:
        """A rendered conversation that begins with the prefix's text is begun by axllm itself."""
        return [reader.begin(text.removeprefix(begun)) if begun and text.startswith(begun) else reader.encode(text) for text in texts]

    metrics = contract.prove(tokenizer, out, board)
    differs = [
        *differences.of_the_reader(tokenizer, reader, list(contract.entries(out))),
        *differences.of_history(tokenizer, type),
        *differences.of_sampling(post_config, topk),
    ]
    for line in differs:
        warn(line)
    axllm = {"tokenizer_file": file.name, "tokenizer_type": type, "system_prompt": system_prompt, **sizes}
    return Prepared(axllm, {**metrics, "runtime": "axllm", "differs": len(differs), "tokenizer_type": type}, post_config, "", differs)


def server_fault(server: ModuleType, tokenizer) -> str:
    """Why the bundle's tokenizer server does not render conversations as in training; empty where it does."""
    from jinja2 import TemplateError

    if not tokenizer.is_fast or not tokenizer.chat_template:
        return f"its tokenizer server needs a {'chat template' if tokenizer.is_fast else 'tokenizer.json'}, and the model has none"
    try:
        tokens = server.Tokens()
        for name, (messages, tools) in contract.conversations().items():
            try:
                ours = "" if tools else encoding.render(tokenizer, messages, prompt=True)
            except BadData:
                continue
            if ours and tokens.render(messages) != ours:
                return f"its tokenizer server renders '{name}' otherwise than the model's template does in training"
    except (TemplateError, ValueError, TypeError) as error:
        return f"its tokenizer server cannot use the model's template: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
    return ""


def arguments_of(tool: toolchain.Toolchain, target: Axera, quantization: dict | None, model: Path, work: Path) -> list[str]:
    """Pulsar2's arguments, with the folders as it sees them: below /data in a container."""
    folders = ("model", "build") if tool.image else (str(model.resolve()), str((work / "build").resolve()))
    return toolchain.argv(tool, target, quantization, *folders)


def compiled(tool: toolchain.Toolchain | None, target: Axera, quantization: dict | None, weights: Weights, model: Path, work: Path) -> dict:
    """The record of a compile whose files lie in work/build (or were moved from there): of an earlier run of this bundle that ended well, of one by hand
    on another machine, or of one run now. Raises ToolFailed where the files brought back are not as they must be."""
    done = work / COMPILED
    if done.is_file():
        say("the compile ended well in an earlier run, so it is not repeated")
        return json.loads(done.read_text())
    begun = time.monotonic()
    if (work / BY_HAND).is_file():
        found = bring_back(target, work, weights)
        if found is None:
            raise ToolFailed(
                f"the compile by hand is not all here: {BY_HAND} is, but not compile.log with its words of success",
                where=str(work),
                fix=[
                    f"copy build/, compile.log and {BY_HAND} back together",
                    f"remove {work / BY_HAND} to have it compiled here",
                ],
            )
        say("the compile was brought back from another machine")
        version = re.search(r"version:\s*(\S+)", (work / BY_HAND).read_text(errors="replace"))
        made = {"pulsar2": version[1] if version else "unknown", "image": None, "image_id": None, "argv": [by_hand.SCRIPT], "seconds": 0.0}
    else:
        assert tool is not None
        arguments = arguments_of(tool, target, quantization, model, work)
        found = compile_layers(tool, target, arguments, model, work, weights)
        made = {
            "pulsar2": tool.version,
            "image": tool.image,
            "image_id": tool.image_id,
            "argv": arguments,
            "seconds": round(time.monotonic() - begun, 1),
        }
    layers, post = found
    record = {
        **made,
        "environment": toolchain.environment(target),
        "weight_type": f"GPTQ int{quantization['bits']}" if quantization else toolchain.weight_type(target, None),
        "layers": layers,
        "post": post,
    }
    with whole(done) as partial:
        partial.write_text(json.dumps(record, indent=1) + "\n")
    return record
