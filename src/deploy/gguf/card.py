"""What lies beside the file in a bundle: run.sh, which serves it, and README.md."""

from pathlib import Path

from src.settings.targets import Gguf, GgufLora, LlamaCpp
from src.sizing.shape import ModelShape

RUN = """#!/bin/sh
# sh run.sh [PORT]: an OpenAI-compatible server for this model on this machine, with a page to chat in at its address.
# It takes llama.cpp's llama-server (brew install llama.cpp, or github.com/ggml-org/llama.cpp/releases).
here=$(cd "$(dirname "$0")" && pwd)
exec llama-server --model "$here/{file}" --jinja --ctx-size {context_len}{cache} --host 127.0.0.1 --port "${{1:-8080}}"
"""
README = """# A language model as GGUF

{family}, {params:,} parameters, weights as {weights}. llama.cpp, Ollama, LM Studio and other programs that read GGUF run it on any CPU or GPU.

    sh run.sh                                   # llama.cpp's server, at http://127.0.0.1:8080
    llama-cli -m {file} --jinja         # a chat in the terminal
    ollama create my_model -f Modelfile && ollama run my_model

The file holds all there is: weights, tokenizer, chat template, the tokens that end a turn. Its own limit is {longest} tokens; run.sh and the Modelfile ask
for {context_len}.
{notes}
| file | what it is |
|---|---|
| {file} | the model |
| Modelfile | the same for Ollama, whose templates are of another kind |
| contract.json | conversations and their token ids, equal in training, template and {file} |
| manifest.json | where it came from, every file's hash, what was proven |
"""

RUN_ADAPTER = """#!/bin/sh
# sh run.sh BASE.gguf [PORT]: an OpenAI-compatible server for the base with this adapter on it, with a page to chat in at its address.
# It takes llama.cpp's llama-server (brew install llama.cpp, or github.com/ggml-org/llama.cpp/releases).
here=$(cd "$(dirname "$0")" && pwd)
exec llama-server --model "$1" --lora "$here/{file}" --jinja{template} --ctx-size {context_len}{cache} --host 127.0.0.1 --port "${{2:-8080}}"
"""
README_ADAPTER = """# A LoRA adapter as GGUF

For {base} ({family}), whose own GGUF it goes beside: any that keeps the weights well, f16 best, since it was proven on the weights it was trained on.
`python -m src.deploy source=FOLDER target=gguf target.weight_type=f16` makes one from the base's folder.

    sh run.sh BASE.gguf                         # llama.cpp's server, at http://127.0.0.1:8080
    llama-cli -m BASE.gguf --lora {file} --jinja
    ollama create my_model -f Modelfile         # with BASE.gguf here, and its name in the Modelfile

| file | what it is |
|---|---|
| {file} | A and B of each matrix |
{template}| Modelfile | base and adapter for Ollama |
| contract.json | conversations and their token ids, equal in training, template and the base's GGUF |
| manifest.json | where it came from, every file's hash, what was proven |
"""
TEMPLATE = ' --chat-template-file "$here/chat_template.jinja"'
TEMPLATE_ROW = "| chat_template.jinja | the template it was trained with, which run.sh gives the server in place of the base's |\n"


def _cache(target: LlamaCpp) -> str:
    kind = target.kv_cache
    return f" --cache-type-k {kind} --cache-type-v {kind} --flash-attn on" if kind != "f16" else ""


def write_adapter(out: Path, file: str, shape: ModelShape, target: GgufLora, base: str, *, with_template: bool) -> None:
    """run.sh and README.md beside a LoRA's file. base: the name of the model it is for."""
    template = TEMPLATE * with_template
    (out / "run.sh").write_text(
        RUN_ADAPTER.format(file=file, template=template, context_len=target.context_len, cache=_cache(target)), "utf-8"
    )
    row = TEMPLATE_ROW * with_template
    (out / "README.md").write_text(README_ADAPTER.format(file=file, base=base, family=shape.model_type, template=row), "utf-8")


def write(out: Path, file: str, shape: ModelShape, target: Gguf, weights: str, notes: list[str]) -> None:
    """run.sh and README.md for a bundle in the folder `out`. notes: what a user should know, a sentence each."""
    (out / "run.sh").write_text(RUN.format(file=file, context_len=target.context_len, cache=_cache(target)), "utf-8")
    (out / "README.md").write_text(
        README.format(
            file=file,
            family=shape.model_type,
            params=shape.params,
            weights=weights,
            longest=f"{shape.max_positions:,}" if shape.max_positions else "not known in",
            context_len=target.context_len,
            notes="".join(f"\n- {note[0].upper()}{note[1:]}." for note in notes) + "\n" * bool(notes),
        ),
        "utf-8",
    )
