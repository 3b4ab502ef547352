"""Whether transformers makes of a text the token ids that a folder's tokenizer.json makes of it.

transformers builds some tokenizers anew, by the class that a model_type or tokenizer_class names, from the vocabulary and merges of tokenizer.json alone; how
that file has texts cut up is then lost. A model that learnt the file's ids is given others, and what reads the file itself, as boards' runtimes do, as well.
"""

import json
from pathlib import Path
from typing import Any

from src.core.errors import BadData

TEXTS = (
    "The quick brown fox didn't jump over 13 lazy dogs; it cost $1,234.56 (really!).",
    "  two spaces,   three, a\ttab\n\nand new lines \n  at the end ",
    "다람쥐 헌 쳇바퀴에 타고파. 2026년 11월 26일, 보드에서 만나요!",
    "我能吞下玻璃而不伤身体。いろはにほへと、ちりぬるを。",
    "Съешь же ещё этих мягких французских булок, да выпей чаю. Ξεσκεπάζω τὴν ψυχοφθόρα βδελυγμία.",
    "نص حكيم له سر قاطع وذو شأن عظيم. दीवारबंद जयपुर ऐसी दुनिया है।",
    "emoji 🚀👩‍🔬 and accents: déjà vu, naïve, Zürich, smörgåsbord, e\u0301",
    "def f(x, *args):\n    return {k: v ** 2 for k, v in x.items()}  # CamelCase snake_case\n",
)
STEPS, FLAGS = ("normalizer", "pre_tokenizer"), ("fuse_unk", "byte_fallback", "ignore_merges")
AT_THE_FRONT = 3
"""ids at the front of a text that may differ, as by a space that is put before it"""


def check(tokenizer: Any, folder: Path) -> None:
    """Raises BadData where transformers' tokenizer of a folder makes of most TEXTS other ids than its tokenizer.json, whatever stands around them."""
    file = folder / "tokenizer.json"
    if not file.is_file() or not hasattr(tokenizer, "backend_tokenizer") or type(tokenizer).__name__ == "TokenizersBackend":
        return
    if _parts_of(file) == _parts(tokenizer.backend_tokenizer):
        return
    from tokenizers import Tokenizer

    own = Tokenizer.from_file(str(file))
    own.no_truncation()
    own.no_padding()
    pairs = [(text, own.encode(text, add_special_tokens=False).ids, tokenizer.encode(text, add_special_tokens=False)) for text in TEXTS]
    other = [pair for pair in pairs if _differ(*pair[1:])]
    if len(other) <= len(TEXTS) // 2:
        return
    text, wanted, found = other[0]
    name = type(tokenizer).__name__
    raise BadData(
        f"transformers makes a {name} of this folder's tokenizer.json, with other token ids than the file's own: of {text[:20]!r}... {found[:6]}, not {wanted[:6]}",
        where=str(file),
        fix=_ways_out(folder, name),
    )


def _ways_out(folder: Path, name: str) -> list[str]:
    from transformers.models.auto.tokenization_auto import MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS as FORCED

    config = folder / "config.json"
    if config.is_file() and json.loads(config.read_text("utf-8")).get("model_type") in FORCED:
        return [
            f"put the tokenizer files there that the model was trained with, of a {name}",
            f"if it was trained on transformers' ids: python -c \"from transformers import AutoTokenizer as A; A.from_pretrained('{folder}').save_pretrained('{folder}')\" "
            "writes a tokenizer.json that gives them",
        ]
    return [f'"tokenizer_class": "PreTrainedTokenizerFast" in {folder / "tokenizer_config.json"} has the file read as it is']


def _differ(ours: list[int], theirs: list[int]) -> bool:
    """Whether ids differ beyond the front of a text."""
    tail = 0
    while tail < min(len(ours), len(theirs)) and ours[-1 - tail] == theirs[-1 - tail]:
        tail += 1
    return max(len(ours), len(theirs)) - tail > AT_THE_FRONT


def _parts(backend: Any) -> dict:
    """What decides a text's ids besides vocabulary and merges."""
    steps = {name: getattr(backend, name) for name in STEPS}
    read = {name: json.loads(step.__getstate__()) if step else None for name, step in steps.items()}
    return {"type": type(backend.model).__name__, **read, **{name: getattr(backend.model, name, None) for name in FLAGS}}


def _parts_of(file: Path) -> dict | None:
    """The same of a file as the tokenizers library writes it, without its vocabulary, which takes long to read; None where it is laid out otherwise."""
    head, _, _ = file.read_text("utf-8").partition('"vocab"')
    try:
        found = json.loads(head.rstrip().rstrip(",") + "}}")
        model = found["model"]
    except (ValueError, KeyError):
        return None
    return {"type": model.get("type"), **{name: found.get(name) for name in STEPS}, **{name: model.get(name) for name in FLAGS}}
