"""tokenizer.txt, the file that AXERA's axllm reads a tokenizer from, and its reader in Python to prove it by.

The format is MNN-LLM's. Line 1: `430 TYPE`. Line 2: counts of special, stop and prefix ids. Line 3: these ids, each followed by a space. TYPE 3 (the one
written here) goes on with `pieces merges family`, the pieces in id order and the merge rules, one a line. axllm of 2026 takes from `family` how the
model's tokenizer cuts words; older ones do not read so far and cut words by an expression that knows ASCII only
(AXERA's tokenizer repository: convert_tokenizer.py, tokenizer_optimized.cpp; MNN: transformers/llm/engine/src/tokenizer.cpp).

TYPE 1, a list of pieces without merge rules, is read greedily, longest piece first, which is not what a BPE model was trained on; so it is never written.
"""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from src.core.errors import WrongKind
from src.deploy.byte_level import SPLITS, steps_of, symbol_bytes
from src.deploy.vendor import whole

MAGIC, HUGGINGFACE = 430, 3
SYMBOL_BYTES = symbol_bytes()
BYTE_SYMBOLS = {byte: symbol for symbol, byte in SYMBOL_BYTES.items()}
NUMBERS = {"qwen3_5": 1, "qwen2": 2, "llama3": 3}
FAMILIES = {pattern: NUMBERS[name] for pattern, name in SPLITS.items() if name in NUMBERS}
"""how a tokenizer.json cuts words -> axllm's number for it; for any other it has none, and cuts words as older ones do"""


def pieces_and_merges(spec: dict, where: str) -> tuple[list[str], list[tuple[str, str]], int]:
    """(pieces in id order, merge rules, family) of a tokenizer.json. Raises WrongKind where it is not the byte-level BPE that this format can hold."""
    model, steps = spec["model"], steps_of(spec.get("pre_tokenizer"), "pretokenizers")
    if model.get("type") != "BPE" or not any(step["type"] == "ByteLevel" for step in steps):
        raise WrongKind(
            f"the tokenizer is {model.get('type')} without byte-level pieces, which axllm reads otherwise than transformers: without the space mark in front",
            where=where,
        )
    by_id = {id: piece for piece, id in model["vocab"].items()} | {token["id"]: token["content"] for token in spec["added_tokens"]}
    # Ids between the last piece and an added token are never produced; axllm's own converter calls them <unk>.
    pieces = [by_id.get(id, "<unk>") for id in range(max(by_id) + 1)]
    merges = [(left, right) for left, right in (rule.split(" ", 1) if isinstance(rule, str) else rule for rule in model["merges"])]
    if odd := [text for text in (*pieces, *(part for rule in merges for part in rule)) if not text or re.search(r"[\r\n]", text)]:
        raise WrongKind(f"the tokenizer has the piece {odd[0]!r}, which a line of text cannot hold", where=where)
    patterns = [step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split"]
    return pieces, merges, FAMILIES.get(patterns[0], 0) if len(patterns) == 1 else 0


def spec_of(tokenizer) -> dict:
    """tokenizer.json of a fast Hugging Face tokenizer as it runs: transformers may rebuild the pipeline by the tokenizer's class, whatever the file says."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def write(tokenizer, stops: list[int], prefix: list[int], path: Path) -> int:
    """Write the file of a fast Hugging Face tokenizer; returns how many pieces it holds. stops: ids that end an answer. prefix: ids that axllm puts
    before every text. Raises WrongKind where the format cannot hold the tokenizer."""
    pieces, merges, family = pieces_and_merges(spec_of(tokenizer), str(tokenizer.name_or_path))
    special = sorted(tokenizer.added_tokens_decoder)
    with whole(path) as partial, open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.write(f"{MAGIC} {HUGGINGFACE}\n{len(special)} {len(stops)} {len(prefix)}\n")
        file.write("".join(f"{id} " for id in (*special, *stops, *prefix)) + "\n")
        file.write(f"{len(pieces)} {len(merges)} {family}\n")
        file.writelines(f"{piece}\n" for piece in pieces)
        file.writelines(f"{left} {right}\n" for left, right in merges)
    return len(pieces)


class Reader:
    """The file as axllm reads it. Raises ValueError where the runtime would not start on it."""

    def __init__(self, path: Path):
        lines = iter(path.read_text(encoding="utf-8").split("\n"))
        if next(lines).split() != [str(MAGIC), str(HUGGINGFACE)]:
            raise ValueError("the first line is not '430 3'")
        counts = [int(n) for n in next(lines).split()]
        ids = [int(n) for n in next(lines).split()]
        if len(ids) != sum(counts):
            raise ValueError(f"{len(ids)} ids where {sum(counts)} were announced")
        self.special, self.stops, self.prefix = ids[: counts[0]], ids[counts[0] : counts[0] + counts[1]], ids[counts[0] + counts[1] :]
        size, rules, *family = (int(n) for n in next(lines).split())
        self.family = family[0] if family else 0
        self.pieces = [next(lines) for _ in range(size)]
        self.ids: dict[str, int] = {}
        for id, piece in enumerate(self.pieces):
            self.ids.setdefault(piece, id)
        self.ranks: dict[tuple[str, str], int] = {}
        for rank in range(rules):
            left, space, right = next(lines).partition(" ")
            if not space:
                raise ValueError(f"merge rule {rank} has no space")
            self.ranks.setdefault((left, right), rank)
        self.texts = {id: _text_of(self.pieces[id]) for id in self.special}
        self._known: dict[str, list[int]] = {}

    def begin(self, text: str, *, knows_family: bool = True) -> list[int]:
        """Token ids of a text as axllm encodes it: prefix ids first, whatever the text begins with."""
        return [*self.prefix, *self.encode(text, knows_family=knows_family)]

    def encode(self, text: str, *, knows_family: bool = True) -> list[int]:
        """Token ids without prefix. knows_family: as axllm of 2026; False: as older ones, which cut all words by an ASCII expression and drop "_"."""
        found, start, at = [], 0, 0
        while at < len(text):
            id = next((id for id, content in self.texts.items() if content and text.startswith(content, at)), None)
            if id is None:
                at += 1
                continue
            found += [*self._plain(text[start:at], knows_family), id]
            at = start = at + len(self.texts[id])
        return found + self._plain(text[start:], knows_family)

    def _plain(self, text: str, knows_family: bool) -> list[int]:
        words = (_split(text, self.family) if self.family else _found(_NO_FAMILY, text)) if knows_family else _found(_OLD, text)
        return [id for word in words for id in self._word(word)]

    def split_pieces(self, vocab: dict[str, int]) -> tuple[list[str], int]:
        """(words that are a piece whole, and that the merge rules make otherwise; how many pieces are whole text): what `ignore_merges` takes whole.
        vocab: of the tokenizer.json."""
        texts = {id: word for piece, id in vocab.items() if id not in self.texts and (word := _whole_text(piece))}
        return [word for id, word in texts.items() if self._word(word.encode()) != [id]], len(texts)

    def _word(self, word: bytes) -> list[int]:
        symbols = "".join(BYTE_SYMBOLS[byte] for byte in word)
        if symbols not in self._known:
            parts = list(symbols)
            while len(parts) > 1:
                rank, at = min((self.ranks.get(pair, len(self.ranks)), k) for k, pair in enumerate(pairwise(parts)))
                if rank == len(self.ranks):
                    break
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            self._known[symbols] = [self.ids.get(part, -1) for part in parts]  # the runtime has no id for a piece that is not there
        return self._known[symbols]


def _split(text: str, family: int) -> Iterator[bytes]:
    """Words as axllm of 2026 cuts them: the expressions of Qwen and Llama 3, by `tokenizers`' own engine, which knows Unicode's categories."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    pattern = next(pattern for pattern, number in FAMILIES.items() if number == family)
    return (word.encode() for word, _ in Split(Regex(pattern), "isolated").pre_tokenize_str(text))


# std::regex over bytes in the C locale: no byte above 0x7f is a letter, a digit or white space; "_" is none of the four kinds, so it falls away.
_OLD = re.compile(rb"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\s\w]+|\s+")


# What axllm of 2026 does where the file names no family.
_NO_FAMILY = re.compile(rb"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\s\w]+|\s+|_[^\s\w]*")


def _found(expression: re.Pattern, text: str) -> Iterator[bytes]:
    return (match[0] for match in expression.finditer(text.encode()))


def _whole_text(piece: str) -> str:
    """The text of a piece of byte symbols; empty where its bytes are no whole UTF-8."""
    try:
        return bytes(SYMBOL_BYTES[symbol] for symbol in piece).decode()
    except (KeyError, UnicodeDecodeError):
        return ""


def _text_of(piece: str) -> str:
    """What the runtime matches for a special token: its piece through the byte table; characters that are not in it fall away."""
    return bytes(SYMBOL_BYTES[c] for c in piece if c in SYMBOL_BYTES).decode(errors="replace")
