"""A Modelfile for Ollama, whose templates are Go's: the chat template as the fixed pieces of text it puts around what is said.

Source: Ollama's docs/modelfile.md and docs/template.md (2026-10). Ollama joins neighbours of one role, and puts the BOS token before a prompt itself.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.core.files import read_json
from src.deploy.gguf.vocabulary import Vocabulary
from src.deploy.llama2c.chat import ChatPieces

SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "repetition_penalty": "repeat_penalty"}
"""generation_config.json's name -> Ollama's"""


def template(pieces: ChatPieces, bos: str) -> str:
    """The Go template that renders a conversation as the pieces do, less the BOS token `bos` at its beginning ("" for none)."""
    opened, system_open = (_literal((text or "").removeprefix(bos)) for text in (pieces.open, pieces.system_open))
    system = ""
    if pieces.system_open is not None:
        system = '{{ if eq .Role "system" }}' + system_open + "{{ .Content }}" + _literal(pieces.system_close or "") + "{{ end }}"
    return (
        '{{ $before := "" }}{{ range .Messages }}'
        + system
        + '{{ if eq .Role "user" }}{{ if eq $before "" }}'
        + opened
        + '{{ end }}{{ if eq $before "assistant" }}'
        + _literal(pieces.next)
        + '{{ end }}{{ .Content }}{{ end }}{{ if eq .Role "assistant" }}'
        + _literal(pieces.answer)
        + "{{ .Content }}{{ end }}{{ $before = .Role }}{{ end }}"
        + _literal(pieces.generate)
    )


def _literal(text: str) -> str:
    """A text that stands for itself in a Go template."""
    return text.replace("{{", '{{ "{{" }}')


def modelfile(
    file: str, pieces: ChatPieces | None, why: str, vocab: Vocabulary, stops: Iterable[int], model: Path, context: int, adapter: str = ""
) -> str:
    """The Modelfile. adapter: a LoRA's file beside the model's. pieces: of the chat template; None: it has none, and `why`. stops: ids that end an answer."""
    bos = vocab.tokens[vocab.special["bos"]] if vocab.add_bos else ""
    made = template(pieces, bos) if pieces else ""
    if '"""' in made:
        made, why = "", "it holds three quotation marks in a row"
    lines = [f"FROM ./{file}", *[f"ADAPTER ./{adapter}"] * bool(adapter), *(f"# {line}" for line in notes(pieces, why if not made else ""))]
    if made:
        lines.append(f'TEMPLATE """{made}"""')
    lines.append(f"PARAMETER num_ctx {context}")
    lines += [f'PARAMETER stop "{vocab.tokens[id]}"' for id in stops]
    said = model / "generation_config.json"
    config: dict[str, Any] = read_json(said) if said.is_file() else {}
    lines += [f"PARAMETER {name} {config[key]}" for key, name in SAMPLING.items() if isinstance(config.get(key), int | float)]
    return "\n".join(lines) + "\n"


def notes(pieces: ChatPieces | None, why: str) -> list[str]:
    """What the template does not do, a sentence each."""
    if why or pieces is None:
        return [f"no template: {why}; Ollama takes the nearest of its own to the one in the file, which may be another"]
    found = ["tools are not in this template; the one in the file, which llama.cpp takes, has them where the model does"]
    if pieces.trim:
        found.append(f"white space around texts of {' and '.join(sorted(pieces.trim))} stays, which the model's own template takes off")
    if pieces.system_open is None:
        found.append("the model's own template takes no system text, so it is left out here")
    return found
