"""runtime.cfg: what llama2.c's formats cannot say of a model and its tokenizer, for run.c to read beside model.bin."""

from pathlib import Path

from src.core.errors import WrongKind
from src.deploy.llama2c.chat import ChatPieces
from src.deploy.llama2c.tokenizer import Tokenizer, canonical, unicode_ranges
from src.models.llama2c_file import Form, Shape


def write_runtime(
    shape: Shape, form: Form, tokenizer: Tokenizer, hf, stops: list[int], pieces: ChatPieces | None, why: str, path: Path
) -> None:
    r"""The line "llama2c-runtime 1", then "key value" lines, then "end".

    Text runs to the end of its line with \n \t \r \\ and \xHH as escapes. `special id hidden text` and
    `merge left right merged` repeat, best merge first.
    """
    lines = ["llama2c-runtime 1"]
    if form.version < 3:
        lines += [f"rope_theta {shape.theta:.9g}", f"norm_eps {shape.eps:.9g}"]
    lines += [f"begin {' '.join(map(str, _begin_ids(hf)))}", f"stop {' '.join(map(str, stops))}"]
    if tokenizer.unk is not None:
        lines.append(f"unk {tokenizer.unk}")
    for key in ("byte_level", "fuse_unk", "whole_words", "prefix_unless_space"):
        lines.append(f"{key} {int(getattr(tokenizer, key))}")
    lines += [f"split {tokenizer.split}", f"prefix {tokenizer.prefix}", f"strip_space {int(_strips_space(tokenizer, hf))}"]
    if tokenizer.byte_level:
        lines += [f"letters {unicode_ranges('L')}", f"numbers {unicode_ranges('N')}"]
    if tokenizer.nfc:
        lines += [f"{key} {table}" for key, table in zip(("canonical", "marks"), canonical())]
    lines += [f"special {token['id']} {int(token['special'])} {escape(token['content'])}" for token in tokenizer.added]
    lines += [f"chat_unavailable {escape(why)}"] if pieces is None else _chat(pieces)
    lines.append(f"merges {len(tokenizer.merges)}")
    lines += [f"merge {left} {right} {merged}" for left, right, merged in tokenizer.merges]
    path.write_text("\n".join([*lines, "end"]) + "\n", encoding="utf-8", newline="\n")


def escape(text: str) -> str:
    """Text on one line, as runtime.cfg and `run --ids -m chat` read it."""
    known = {"\n": "\\n", "\t": "\\t", "\r": "\\r", "\\": "\\\\"}
    return "".join(known.get(c) or (f"\\x{ord(c):02x}" if ord(c) < 32 else c) for c in text)


def _chat(pieces: ChatPieces) -> list[str]:
    lines = [f"chat_system {int(pieces.system_open is not None)}"]
    for name, role in (("system", "system"), ("user", "user"), ("answer", "assistant")):
        lines.append(f"chat_trim_{name} {int(role in pieces.trim)}")
    for key in ("system_open", "system_close", "open", "answer", "generate", "next"):
        lines.append(f"chat_{key} {escape(getattr(pieces, key) or '')}")
    return lines


def _begin_ids(hf) -> list[int]:
    """Ids that the tokenizer puts before a raw text. Raises WrongKind where it puts any after it."""
    plain, full = hf("x", add_special_tokens=False)["input_ids"], hf("x")["input_ids"]
    begin = full[: len(full) - len(plain)]
    if full != begin + plain:
        raise WrongKind("the tokenizer adds tokens after the text", fix="set add_eos_token to false in tokenizer_config.json")
    return begin


def _strips_space(tokenizer: Tokenizer, hf) -> bool:
    """Whether decoding drops the space in front of a text's first word."""
    if tokenizer.byte_level:
        return False
    spaced = next((id for id, piece in tokenizer.pieces.items() if piece.startswith("▁") and piece.strip("▁")), None)
    return spaced is not None and not hf.decode([spaced]).startswith(" ")
