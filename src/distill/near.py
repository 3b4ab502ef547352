"""Texts that are nearly one: near-duplicates by MinHash, and what a text shares with evaluation sets, by word n-grams and by syntax tree.

All hashes are the same on every machine and run (Python's own hash of a string is not).
"""

import ast
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from src.distill.texts import words

PRIME = (1 << 61) - 1


def ngrams(parts: Sequence[str], n: int) -> list[str]:
    """Every n words in a row; the whole where there are fewer."""
    return [" ".join(parts[i : i + n]) for i in range(max(1, len(parts) - n + 1))] if parts else []


def hashed(texts: Iterable[str]) -> np.ndarray:
    """(count,) uint64, 32 bits of BLAKE2b of each text."""
    return np.array([int.from_bytes(hashlib.blake2b(t.encode(), digest_size=4).digest()) for t in texts], np.uint64)


class NearDuplicates:
    """Finds earlier texts like a new one: MinHash signatures (Broder 1997) in bands (Leskovec et al., "Mining of Massive Datasets", 3.4).

    n: words in a feature. permutations: numbers in a signature, 4 bytes each, which is what is kept of a text.
    similarity: share of equal numbers, an estimate of the Jaccard similarity of the features, from which two texts count as one.
    """

    def __init__(self, *, n: int, permutations: int, similarity: float):
        draw = np.random.default_rng(0)  # the permutations are part of the method, not of a run
        self._n, self._limit = n, similarity
        self._a = draw.integers(1, 1 << 28, permutations, np.uint64)[:, None]
        self._b = draw.integers(0, 1 << 60, permutations, np.uint64)[:, None]
        self._rows = _band_rows(permutations, similarity)
        self._bands: list[dict[bytes, list[int]]] = [defaultdict(list) for _ in range(permutations // self._rows)]
        self._signatures: list[np.ndarray] = []

    def signature(self, text: str) -> np.ndarray:
        """(permutations,) uint32."""
        features = hashed(set(ngrams(words(text), self._n)) or {text})
        # a < 2^28 and a feature < 2^32, so nothing overflows 64 bits before the remainder.
        return (((self._a * features + self._b) % np.uint64(PRIME)) & np.uint64(0xFFFFFFFF)).min(axis=1).astype(np.uint32)

    def near(self, text: str) -> int | None:
        """Number (of those added, from 0) of the first earlier text like this one; else adds it and returns None."""
        signature = self.signature(text)
        keys = [signature[i * self._rows : (i + 1) * self._rows].tobytes() for i in range(len(self._bands))]
        for other in sorted({number for key, band in zip(keys, self._bands) for number in band.get(key, ())}):
            if (self._signatures[other] == signature).mean() >= self._limit:
                return other
        for key, band in zip(keys, self._bands):
            band[key].append(len(self._signatures))
        self._signatures.append(signature)
        return None


def _band_rows(permutations: int, similarity: float) -> int:
    """Numbers in a band: the most with which a pair just at the limit shares a band with a probability of 99 %."""
    return max(r for r in range(1, permutations + 1) if r == 1 or 1 - (1 - similarity**r) ** (permutations // r) >= 0.99)


class NgramOverlap:
    """Word n-grams of evaluation texts. One with fewer than n words is kept whole, if it has `shortest`."""

    def __init__(self, texts: Iterable[str], *, n: int, shortest: int):
        self._grams: dict[int, set[int]] = defaultdict(set)
        for text in texts:
            parts = words(text)
            if len(parts) >= min(n, shortest):
                self._grams[min(n, len(parts))].update(hashed(ngrams(parts, n)).tolist())

    def shared(self, text: str) -> str | None:
        """The first words in a row that an evaluation text has too; None where there are none."""
        parts = words(text)
        for n, known in self._grams.items():
            grams = ngrams(parts, n) if len(parts) >= n else []
            if found := next((gram for gram, key in zip(grams, hashed(grams).tolist()) if key in known), None):
                return found
        return None


class CodeOverlap:
    """Python functions of evaluation texts, by the subtrees of their syntax trees with names, constants, docstrings and annotations left out.

    nodes: smallest function that is compared. match: share of a function's subtrees in a text from which the text holds that function.
    """

    def __init__(self, texts: Iterable[str], *, nodes: int, match: float):
        self._match = match
        self._functions = [(name, trees) for text in texts for name, trees in functions(text) if trees.total() >= nodes]
        self._holders: dict[int, list[int]] = defaultdict(list)
        for number, (_, trees) in enumerate(self._functions):
            for key in trees:
                self._holders[key].append(number)

    def shared(self, text: str) -> str | None:
        """Name of the first evaluation function that the text holds; None where there is none."""
        for _, mine in functions(text):
            common = Counter()
            for key, count in mine.items():
                for number in self._holders.get(key, ()):
                    common[number] += min(count, self._functions[number][1][key])
            for number in sorted(common):
                name, theirs = self._functions[number]
                if common[number] >= self._match * theirs.total():
                    return name
        return None


def functions(text: str) -> list[tuple[str, Counter[int]]]:
    """(name, {hash of a subtree: times}) of every Python function in a text; none where no part of it is Python."""
    found = []
    for source in python_in(text):
        try:
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    trees: Counter[int] = Counter()
                    _subtrees(node, trees)
                    found.append((node.name, trees))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue  # not Python, or nested beyond what Python itself reads
    return found


def python_in(text: str) -> list[str]:
    """The parts of a text that may be Python: fenced blocks, else the text itself."""
    return re.findall(r"^```(?:python|py)?[ \t]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE) or [text]


def _subtrees(node: ast.AST, into: Counter[int]) -> str:
    """Shape of a node: its type and its children's shapes. Counts the hash of every subtree below it, itself included."""
    children = [child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)]
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        documented = ast.get_docstring(node) is not None
        children = [node.args, *node.body[documented:]]
    if isinstance(node, ast.arg):
        children = []  # its annotation
    shape = hashlib.blake2b(
        f"{type(node).__name__}({','.join(_subtrees(child, into) for child in children)})".encode(), digest_size=8
    ).hexdigest()
    into[int(shape, 16)] += 1
    return shape
