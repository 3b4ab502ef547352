"""deploy target=llama2c: a Llama, Mistral, Qwen2 or Qwen3 folder becomes the files of karpathy/llama2.c and a C program that runs them.

The bundle is model.bin, tokenizer.bin (both readable by stock llama2.c, but for version 3), runtime.cfg (what those formats cannot
say: rope base, stop ids, BPE merges, chat template), run.c, Makefile, the compiled `run` and a README.
Settings: `format`, see models/llama2c_file.py, and `group_size`, the integers that share one scale.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from src import ROOT
from src.core.artifact import Artifact
from src.core.errors import AGAIN, MissingInput, MissingTool, ProofFailed, WrongKind
from src.core.files import read_json
from src.core.log import say, size, warn
from src.deploy.llama2c import proof
from src.deploy.llama2c.chat import ChatPieces, find_chat
from src.deploy.llama2c.runtime import write_runtime
from src.deploy.llama2c.tokenizer import read_tokenizer, write_tokenizer
from src.models import fidelity
from src.models.generation import stop_ids
from src.models.llama2c_file import Form, Shape, check_tensors, form_of, read_shape, write_model
from src.models.loading import load_tokenizer

SOURCES = ROOT / "assets" / "llama2c"
TAKES = {"model", "quantized"}


def wants_dataset(settings) -> bool:
    return False


def check(inputs: dict[str, Artifact], settings, out: Path) -> list[str]:
    """Refuse in milliseconds what this target cannot carry; reads config.json, safetensors headers and tokenizer.json.

    Raises MissingTool, MissingInput, BadData or WrongKind.
    """
    _check_tools()
    model_dir = inputs["model"].path
    shape = read_shape(model_dir, settings.format)
    check_tensors(model_dir, shape)
    form_of(shape, settings.format, settings.group_size)
    path = model_dir / "tokenizer.json"
    if path.is_file():
        read_tokenizer(read_json(path), str(path))
    elif not (model_dir / "tokenizer.model").is_file():
        raise MissingInput(
            "the model folder has no tokenizer.json",
            where=str(model_dir),
            fix=f"python -m src.aux_files source=BASE_MODEL target={model_dir}",
        )
    return [f"format {settings.format}"]


def build(inputs: dict[str, Artifact], out: Path, settings) -> dict:
    """Write the bundle of a model that `check` let pass into `out`, compile its program and prove it against transformers.

    Returns the metrics for the manifest: bytes, group size, ids and tokens compared, tokens per second.
    Raises WrongKind where the tokenizer, once loaded, does not fit, ProofFailed where the program and transformers disagree.
    """
    model_dir = inputs["model"].path
    shape = read_shape(model_dir, settings.format)
    form = form_of(shape, settings.format, settings.group_size)
    hf = load_tokenizer(model_dir)
    # transformers may rebuild the pipeline by the tokenizer's class, so what it runs counts, not tokenizer.json.
    tokenizer = read_tokenizer(json.loads(hf.backend_tokenizer.to_str()), str(model_dir))
    if max(tokenizer.pieces) >= shape.vocab:
        raise WrongKind(
            f"the tokenizer has id {max(tokenizer.pieces)}, the model {shape.vocab} tokens",
            where=str(model_dir),
            fix=AGAIN,
        )
    stops = stop_ids(model_dir, hf)
    pieces, why = find_chat(hf)
    if pieces is None:
        warn(f"the bundle has no chat mode: {why}")

    if form.group and form.group != settings.group_size:
        say(f"groups of {form.group}: {settings.group_size} does not divide rows of {', '.join(map(str, dict.fromkeys(shape.widths)))}")
    write_model(model_dir, shape, form, out / "model.bin")
    write_tokenizer(tokenizer, shape.vocab, hf.bos_token_id, hf.eos_token_id, out / "tokenizer.bin")
    write_runtime(shape, form, tokenizer, hf, stops, pieces, why, out / "runtime.cfg")
    for name in ("run.c", "Makefile"):
        shutil.copyfile(SOURCES / name, out / name)
    (out / "README.md").write_text(_readme(shape, settings.format, form, pieces, why), encoding="utf-8")
    _compile(out)

    metrics = {
        "format": settings.format,
        "group_size": form.group,
        "model_bytes": (out / "model.bin").stat().st_size,
        "chat": pieces is not None,
    }
    metrics |= proof.prove_ids(out, hf, pieces)
    metrics |= proof.prove(inputs["model"], out, shape, form, hf, stops, fidelity.dataset_of(inputs["stored"]))
    metrics["summary"] = (
        f"{metrics['tokens_per_second']:,.0f} tokens/s here, {metrics['prompts_equal']}/{metrics['prompts']} prompts as transformers"
    )
    say(f"llama2c: model.bin {size(metrics['model_bytes'])}, {metrics['tokens_per_second']:.1f} tokens/s on one core here")
    return metrics


def _check_tools() -> None:
    compiler = os.environ.get("CC", "cc")  # as the Makefile takes it; it may carry options
    missing = [tool for tool in ("make", compiler) if not shutil.which(tool.partition(" ")[0])]
    if missing:
        raise MissingTool(
            f"building the llama2c program takes make and a C compiler; not found: {', '.join(missing)}",
            where=f"CC={compiler}" if "CC" in os.environ else "PATH",
            fix="apt-get install build-essential",
        )


def _compile(out: Path) -> None:
    argv = ["make", "-B", "-C", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode:
        raise ProofFailed(f"run.c does not compile here:\n{done.stderr[-1000:]}", where=" ".join(argv))


def _readme(shape: Shape, format: str, form: Form, pieces: ChatPieces | None, why: str) -> str:
    weights = f"int{form.bits} in groups of {form.group}" if form.group else "fp32"
    theirs = (
        "`tokenizer.bin` is of karpathy/llama2.c's format, `model.bin` of Boardwalk's"
        if form.version == 3
        else "`model.bin` and `tokenizer.bin` are of karpathy/llama2.c's formats"
    )
    chat = "./run model.bin -m chat                          # talk to it; -y sets a system text" if pieces else f"# no chat mode: {why}"
    return f"""# A language model and the C program that runs it

{shape.layers} layers of {shape.dim}, vocabulary {shape.vocab}, context {shape.context}; {weights} (format {format}).
{theirs}; `runtime.cfg` holds what they cannot say.

Copy this folder to the board and build there (a C compiler and make are all it takes):

    make -B         # one core; `make omp` for all (OMP_WAIT_POLICY=passive where other programs want them too)
    ./run model.bin -i "Once upon a time" -t 0 -n 100
    {chat}

`run` in this folder was built for the machine that made the bundle. To cross compile instead: `make -B CC=aarch64-linux-gnu-gcc`.
`./run --help` lists the options. The tokenizer and runtime.cfg are looked for beside model.bin.
"""
