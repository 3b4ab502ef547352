"""Texts that are nearly one: near-duplicates by MinHash, and what a text shares with evaluation sets, by word n-grams and by syntax tree.

All hashes are the same on every machine and run (Python's own hash of a string is not).
"""

import ast
import hashlib
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from rensa import RMinHash

_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]|[^\W_]+(?:['’][^\W_]+)*")


def words(text: str) -> list[str]:
    """Words in lower case, each Chinese, Japanese or Korean character one of its own; punctuation parts them and is left out."""
    return _WORD.findall(text.lower())


def ngrams(parts: Sequence[str], n: int) -> list[str]:
    """Every n words in a row; the whole where there are fewer."""
    return [" ".join(parts[i : i + n]) for i in range(max(1, len(parts) - n + 1))] if parts else []


def hashed(texts: Iterable[str]) -> np.ndarray:
    """(count,) uint64, 64 bits of BLAKE2b of each text."""
    return np.array([int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest()) for t in texts], np.uint64)


class MinHashIndex:
    """Finds earlier texts like a new one: MinHash signatures (Broder 1997) in bands (Leskovec et al., "Mining of Massive Datasets", 3.4).

    n: words in a feature. permutations: numbers in a signature, of which 8 bits each are kept (Li and König 2010, "b-Bit Minwise Hashing").
    similarity: Jaccard similarity of the features, as signatures estimate it, from which two texts count as one.
    Signatures are rensa's. The index is ours, since those of rensa and datasketch hold every text in memory (benchmarks/near_duplicates.py): here
    signatures and bands lie in a temporary file of SQLite's own, gone with the process, so memory does not grow with the texts.
    """

    def __init__(self, *, n: int, permutations: int, similarity: float):
        draw = np.random.default_rng(0)
        self._n, self._permutations, self._limit = n, permutations, similarity
        self._rows = _band_rows(permutations, similarity)
        self._bands, self._count = permutations // self._rows, 0
        # A band's key: its values weighed at random, and its place, modulo 2^64.
        self._weights, self._places = (draw.integers(0, 1 << 63, size, np.uint64) * np.uint64(2) for size in (self._rows, self._bands))
        self._base = sqlite3.connect("", isolation_level=None)
        self._base.execute("CREATE TABLE text (number INTEGER PRIMARY KEY, signature BLOB)")
        self._base.execute("CREATE TABLE band (key INTEGER, number INTEGER, PRIMARY KEY (key, number)) WITHOUT ROWID")
        for setting in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -16384"):  # the file dies with the process; 16 MiB
            self._base.execute(f"PRAGMA {setting}")
        self._base.execute("BEGIN")
        marks = ", ".join("?" * self._bands)
        self._sharing = (
            f"SELECT number, signature FROM text WHERE number IN (SELECT number FROM band WHERE key IN ({marks})) ORDER BY number"
        )

    def signature(self, text: str) -> np.ndarray:
        """(permutations,) uint8."""
        minima = RMinHash(num_perm=self._permutations, seed=0)  # the permutations are part of the method, not of a run
        minima.update(list(set(ngrams(words(text), self._n)) or {text}))
        return np.array(minima.digest(), np.uint32).astype(np.uint8)

    def estimate(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Jaccard similarity of texts by their signatures, the last axis: of unequal minima one in 256 shares its 8 bits."""
        return ((one == other).mean(axis=-1) - 1 / 256) / (1 - 1 / 256)

    def near(self, text: str) -> int | None:
        """Number (of those added, from 0) of the first earlier text like this one; else adds it and returns None."""
        signature = self.signature(text)
        bands = signature[: self._bands * self._rows].reshape(self._bands, self._rows).astype(np.uint64)
        keys = ((bands @ self._weights + self._places) >> np.uint64(1)).tolist()
        if sharing := self._base.execute(self._sharing, keys).fetchall():
            others = np.frombuffer(b"".join(other for _, other in sharing), np.uint8).reshape(len(sharing), -1)
            if (found := np.flatnonzero(self.estimate(others, signature) >= self._limit)).size:
                return sharing[found[0]][0]
        self._base.execute("INSERT INTO text VALUES (?, ?)", (self._count, signature.tobytes()))
        self._base.executemany("INSERT INTO band VALUES (?, ?)", ((key, self._count) for key in keys))
        self._count += 1
        return None


def _band_rows(permutations: int, similarity: float) -> int:
    """Numbers in a band: the most with which a pair just at the limit shares a band with a probability of 98 %."""
    return max(r for r in range(1, permutations + 1) if r == 1 or 1 - (1 - similarity**r) ** (permutations // r) >= 0.98)


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
            common: Counter[int] = Counter()
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
