"""The files around the compiled layers: axllm's config.json, post_config.json, the run script, checksums and a README.

Sources: ax-llm docs/configuration.md, src/main.cpp (the old runtime's flags), src/runner/LLMPostprocess.hpp (post_config.json).
"""

import importlib.util
import json
import shlex
import shutil
import sys
from pathlib import Path
from types import ModuleType

from src import ROOT
from src.core import card
from src.core.files import hash_files, read_json
from src.deploy.axera.compile import LAYER
from src.deploy.vendor import whole
from src.settings.targets import Axera

ASSETS = ROOT / "assets" / "axera"
EMBEDDING = "model.embed_tokens.weight.bfloat16.bin"
SUMS = "SHA256SUMS"
SERVER = "tokenizer_server.py"
HF = "hf"
"""Folder in the bundle with the Hugging Face files. Apart from axllm's, whose config.json has the same name and which would read theirs."""


def axllm_config(
    target: Axera,
    model_name: str,
    tokenizer_file: str | None,
    tokenizer_type: str | None,
    system_prompt: str | None,
    layers: list[str],
    post: str,
    rows: int,
    hidden: int,
) -> dict:
    """config.json as axllm reads it. tokenizer_file, tokenizer_type: None where axllm is not to run it. layers: file names by index; rows, hidden: of the
    embedding table."""
    config = {
        "model_name": model_name,
        "tokenizer_type": tokenizer_type,
        "url_tokenizer_model": tokenizer_file,
        "template_filename_axmodel": LAYER.sub(r"\g<prefix>_p\g<chunk>_l%d_together.axmodel", layers[0]),
        "axmodel_num": len(layers),
        "filename_post_axmodel": post,
        "filename_tokens_embed": EMBEDDING,
        "tokens_embed_num": rows,
        "tokens_embed_size": hidden,
        "post_config_path": "post_config.json",
        "use_mmap_load_embed": True,
        "devices": list(range(max(1, target.tensor_parallel_size))),
    }
    if target.chip == "AX650":
        config["use_mmap_load_layer"] = True
    if system_prompt is not None:
        config["system_prompt"] = system_prompt
    return config


def post_config(model_dir: Path) -> dict:
    """post_config.json: greedy, unless generation_config.json asks for sampling. Every key must be there; axllm crashes on a missing one."""
    file = model_dir / "generation_config.json"
    generation = read_json(file) if file.is_file() else {}
    samples = bool(generation.get("do_sample"))
    temperature, top_p, top_k = (generation.get(key) for key in ("temperature", "top_p", "top_k"))
    penalty = generation.get("repetition_penalty") or 1.0
    return {
        "enable_temperature": samples and temperature is not None,
        "temperature": temperature or 1.0,
        "enable_repetition_penalty": penalty != 1.0,
        "repetition_penalty": penalty,
        "penalty_window": 20,
        "enable_top_p_sampling": samples and top_p is not None and top_p < 1,
        "top_p": top_p or 1.0,
        "enable_top_k_sampling": samples and bool(top_k),
        "top_k": top_k or 1,
    }


def write_json(path: Path, value: dict) -> None:
    with whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_run_script(out: Path, config: dict, why_not: str, target: Axera) -> None:
    """run.sh, which starts axllm or the old `main`. why_not: why axllm cannot run it, empty where it can."""
    text = (ASSETS / "run.sh").read_text()
    values = {
        "LAYERS": config["template_filename_axmodel"],
        "COUNT": config["axmodel_num"],
        "POST": config["filename_post_axmodel"],
        "EMBEDDING": config["filename_tokens_embed"],
        "ROWS": config["tokens_embed_num"],
        "WIDTH": config["tokens_embed_size"],
        "SYSTEM": config.get("system_prompt", ""),
        "WHY_NOT": why_not,
        "TOPK": int(target.post_topk > 0),
        "DEVICES": ",".join(map(str, config["devices"])),
    }
    for key, value in values.items():
        text = text.replace(f"@{key}@", shlex.quote(str(value)))
    with whole(out / "run.sh") as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o755)


def write_server(out: Path) -> ModuleType:
    """tokenizer_server.py, which the old `main` asks for token ids, beside the folder HF; returns it as a module, to prove it by."""
    shutil.copyfile(ASSETS / SERVER, out / SERVER)
    spec = importlib.util.spec_from_file_location("boardwalk_tokenizer_server", out / SERVER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


def write_sums(out: Path) -> None:
    """SHA256SUMS, for a board without Python: sha256sum -c SHA256SUMS. README.md is not in it: it gets its head when the bundle is sealed."""
    with whole(out / SUMS) as partial:
        sums = {name: entry["sha256"] for name, entry in hash_files(out).items() if name not in (partial.name, card.NAME)}
        partial.write_text("".join(f"{sum}  {name}\n" for name, sum in sums.items()))


def expected_names(family: str, target: Axera, layers: int) -> tuple[list[str], str]:
    """(layer files, post file) as Pulsar2 will call them, for what is written before a compile."""
    return [f"{family}_p{target.prefill_chunk}_l{index}_together.axmodel" for index in range(layers)], f"{family}_post.axmodel"


def readme(target: Axera, config: dict, tool: str | None, fit: list[str], why_not: str, differs: list[str]) -> str:
    """README.md. tool: Pulsar2's version, None before the compile. why_not: as for `write_run_script`. differs: see differences.py."""
    sdk = "AX650 SDK 3.6.2" if target.chip == "AX650" else "AX630C SDK 3.0.0"
    estimate = "\n".join(f"    {line}" for line in fit)
    axllm = f"""    ./run.sh run            # talk to it in the terminal
    ./run.sh serve          # an OpenAI-compatible server on port 8000; it asks for no key, so keep the board in a network you trust

`run.sh` needs axllm on the board (branch axllm of AXERA-TECH/ax-llm, {sdk} or newer). For an image that has only the older `main` runtime beside it:
"""
    main = f"""
Not for axllm: {why_not}. The older `main` runtime (`main`, `main_prefill`, `main_ax650`; on PCIe `main_axcl_aarch64`, `main_axcl_x86`) runs it with this
model's own tokenizer and template:
"""
    compiled = (
        f"{config['axmodel_num']} layers compiled by Pulsar2 ({tool}) for {target.chip}"
        if tool
        else f"**Not compiled yet**: its {config['axmodel_num']} layers for {target.chip} are missing. The deploy said how to go on; the files here are ready for them"
    )
    reading = (
        f"""| {config["url_tokenizer_model"]} | tokenizer, as axllm reads it (type {config["tokenizer_type"]}) |
| config.json, post_config.json | settings of axllm; sampling |"""
        if not why_not
        else "| post_config.json | sampling |"
    )
    said = "".join(f"- {line}\n" for line in differs)
    return f"""# {config["model_name"]} for {target.name}

{compiled}: prompts of up to {target.prompt_len} tokens, taken {target.prefill_chunk} at a time,
{target.context_len} tokens of prompt and answer together.

## Copy and start

    rsync -a --info=progress2 . root@BOARD:{target.name}/
    ssh root@BOARD
    cd {target.name} && sha256sum -c --quiet {SUMS}
{main if why_not else axllm}
    python3 -m pip install tokenizers jinja2       # its tokenizer is a small server, on loopback
    ./run.sh main "What is the capital of Sweden?"

## What is in here

| file | what |
|---|---|
| {config["template_filename_axmodel"].replace("%d", "0")} ... | decoder layers, one file each |
| {config["filename_post_axmodel"]} | final norm and output layer |
| {EMBEDDING} | embedding table, bf16, {config["tokens_embed_num"]} x {config["tokens_embed_size"]} |
{reading}
| run.sh, {SERVER} | start it; the tokenizer of `main` |
| contract.json | conversations with the token ids they must have here |
| hf/ | the Hugging Face config and tokenizer, apart, since axllm's config.json has the same name |
| compile.json, compile.log | how it was compiled |
| manifest.json | the chain from your conversations to this folder: `python -m src.lineage FOLDER --verify` |
{f"{chr(10)}## Where it differs from the model as trained{chr(10)}{chr(10)}{said}" if said else ""}
## What to expect

{estimate}

{"" if why_not else "Measure it from the project: `python -m src.evaluate run=RUN endpoint.url=http://BOARD:8000`"}
"""
