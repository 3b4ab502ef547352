"""Make a model folder complete: tokenizer files, chat template, generation config and custom code; and prove it by loading it alone.

As a verb it serves folders made elsewhere: `python -m src.aux_files source=BASE_MODEL target=FOLDER`.
"""

import shutil
from pathlib import Path

from src import modeling, stage
from src.artifact import is_finished
from src.config import AuxFilesVerb
from src.errors import MissingInput, ProofFailed, WrongKind
from src.log import say
from src.modeling import load_tokenizer

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


def prove(out: Path, tokenizer, *, trust_remote_code: bool = False) -> int:
    """Load `out` alone in a fresh offline process and compare its token ids with those of `tokenizer`; returns how many ids were equal.

    Raises ProofFailed at the first text whose ids differ.
    """
    return compare(modeling.fresh(token_ids, out, trust_remote_code), tokenizer, out)


def compare(ours: list[list[int]], tokenizer, out: Path) -> int:
    """Token ids of the probes as a fresh process read them from `out`, against `tokenizer`; see `prove`."""
    for text, found in zip(PROBES, ours):
        if found != (wanted := tokenizer(text).input_ids):
            raise ProofFailed(
                f"the folder's tokenizer differs from its source's on {text!r}: {found} against {wanted}",
                where=str(out),
                fix="if the source's is the right one, remove the tokenizer files there and run it again",
            )
    return sum(map(len, ours))


def token_ids(folder: Path, trust_remote_code: bool) -> list[list[int]]:
    tokenizer = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    return [tokenizer(text).input_ids for text in PROBES]


def main_aux_files(cfg: AuxFilesVerb) -> int:
    """The verb: works in place on a folder of the user's own, which this project's artifacts never are."""
    source, target = Path(cfg.source), Path(cfg.target)
    for folder in (source, target):
        if not folder.is_dir():
            raise MissingInput("no such folder", where=str(folder), fix="source= and target= name folders on this machine")
    if not (target / "config.json").is_file():
        raise WrongKind(
            "the target is not a model folder: it has no config.json",
            where=str(target),
            fix="target= names the folder of weights and config.json to complete",
        )
    if is_finished(target):
        raise WrongKind(
            "the target is an artifact of this project: it is complete and sealed",
            where=str(target),
            fix="use it, or give a copy without its manifest.json",
        )
    if cfg.dry_run:
        wanted = [f.name for p in (*TOKENIZER, *AUXILIARY) for f in sorted(source.glob(p)) if not (target / f.relative_to(source)).exists()]
        say(f"aux_files: would copy {', '.join(wanted) or 'nothing'} into {target}")
        return 0
    tokenizer = load_tokenizer(source)
    copied = copy(source, target)
    say(f"aux_files: copied {', '.join(copied) or 'nothing: all were there'}")
    say(f"aux_files: {prove(target, tokenizer)} token ids equal to the source's, loaded alone and offline")
    return 0


if __name__ == "__main__":
    stage.main_plain("aux_files", __doc__, AuxFilesVerb, main_aux_files)
