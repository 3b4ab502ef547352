"""Make a model folder complete: tokenizer files, chat template, generation config and custom code; and prove it by loading it alone."""

import shutil
from pathlib import Path

from src.chat import template
from src.core import processes
from src.core.errors import ProofFailed
from src.core.files import read_json, write_json
from src.models.loading import load_tokenizer

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.tiktoken",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
# The Qwen-1 models keep their attention kernels and tokenizer code beside the weights; without them the folder does not load.
AUXILIARY = ("generation_config.json", "preprocessor_config.json", "*.py", "*.cu", "*.cpp")
PROBES = (
    "Hello, world!",
    "  two spaces,\ttab\n\nnewlines ",
    "3.14 + 2,718 = 12345?",
    "안녕하세요, 보드에서 만나요.",
    "你好，世界！こんにちは。",
    "emoji 🚀👩‍🔬 and accents déjà vu",
    "<|im_start|>user\nhi<|im_end|>\n",
    "def f(x):\n    return x ** 2",
)


def copy(source: Path, out: Path, *, tokenizer: bool = True) -> list[str]:
    """Copy the files `out` lacks from `source`; returns their names. Files already in `out` stay as they are."""
    copied = []
    for pattern in (*(TOKENIZER if tokenizer else ()), *AUXILIARY):
        for file in sorted(source.glob(pattern)):
            target = out / file.relative_to(source)
            if file.is_file() and not file.name.startswith(".") and not target.exists():
                target.parent.mkdir(exist_ok=True)
                partial = target.with_name(target.name + ".partial")
                shutil.copyfile(file, partial)
                partial.rename(target)
                copied.append(str(file.relative_to(source)))
    return copied


def set_chat(out: Path, tokenizer) -> None:
    """Give a folder's tokenizer files the chat template and settings of `tokenizer`, where they have others; without a template, they stay as they are."""
    if not tokenizer.chat_template:
        return
    text, settings = str(tokenizer.chat_template), tokenizer.init_kwargs.get(template.SETTINGS)
    path = out / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    if text == template.text_of(out) and settings == config.get(template.SETTINGS):
        return
    kept = {name: value for name, value in config.items() if name not in ("chat_template", template.SETTINGS)}
    write_json(path, kept | ({template.SETTINGS: settings} if settings else {}))
    (out / "chat_template.json").unlink(missing_ok=True)
    (out / "chat_template.jinja").write_text(text, "utf-8")


def prove(out: Path, tokenizer, *, trust_remote_code: bool = False) -> int:
    """Load `out` alone in a fresh offline process and compare its token ids with those of `tokenizer`; returns how many ids were equal.

    Raises ProofFailed at the first text whose ids differ.
    """
    return compare(processes.fresh(token_ids, out, trust_remote_code), ids_of(tokenizer), out)


def compare(ours: list[list[int]], theirs: list[list[int]], out: Path) -> int:
    """Token ids of the probes as a fresh process read them from `out`, against those of the tokenizer it should be; see `prove`."""
    for text, found, wanted in zip(PROBES, ours, theirs):
        if found != wanted:
            raise ProofFailed(
                f"the folder's tokenizer differs from its source's on {text!r}: {found} against {wanted}",
                where=str(out),
                fix="if the source's is the right one, remove the tokenizer files there and run the same command again",
            )
    return sum(map(len, ours))


def token_ids(folder: Path, trust_remote_code: bool) -> list[list[int]]:
    return ids_of(load_tokenizer(folder, trust_remote_code=trust_remote_code))


def ids_of(tokenizer) -> list[list[int]]:
    """Token ids of the probes."""
    return [tokenizer(text).input_ids for text in PROBES]
