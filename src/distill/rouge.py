"""ROUGE-L F1 (Lin 2004, aclanthology.org/W04-1013) between word lists, and a pool that finds texts too near to a new one among many.

The longest common subsequence is rapidfuzz's, with one bit per word (Hyyrö 2004, "Bit-parallel LCS-length computation revisited"). The pool is ours,
since it need not compare with every text: no common subsequence is longer than the words two texts share, counted with their repetitions, nor than
the shorter text. Only texts whose bound reaches the limit are compared, so the answer is exact.
"""

from array import array
from collections.abc import Hashable, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq


def lcs(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of the longest common subsequence."""
    return LCSseq.similarity(a, b)


def rouge_l(a: Sequence[str], b: Sequence[str]) -> float:
    """F1 of the longest common subsequence, 0 to 1; 0 where a text has no words."""
    return 2 * lcs(a, b) / (len(a) + len(b)) if a and b else 0.0


class Pool:
    """Word lists a new one is compared with. Memory: the words themselves, and 4 bytes for each in an index."""

    def __init__(self):
        self._texts: list[tuple[str, ...]] = []
        self._lengths = array("I")
        self._holders: dict[tuple[str, int], array] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, words: Sequence[str]) -> None:
        for key in _counted(words):
            self._holders.setdefault(key, array("I")).append(len(self._texts))
        self._texts.append(tuple(words))
        self._lengths.append(len(words))

    def near(self, words: Sequence[str], limit: float) -> int | None:
        """Number (in order of `add`, from 0) of the first text whose ROUGE-L with `words` is `limit` or more; None where there is none."""
        holders = [np.frombuffer(self._holders[key], np.uint32) for key in _counted(words) if key in self._holders]
        if not holders:
            return None
        shared = np.bincount(np.concatenate(holders), minlength=len(self._texts))
        bound = 2 * shared / (len(words) + np.frombuffer(self._lengths, np.uint32))
        return next((int(i) for i in np.flatnonzero(bound >= limit) if rouge_l(words, self._texts[i]) >= limit), None)


def _counted(words: Sequence[str]) -> list[tuple[str, int]]:
    """Each word with how often it came before, so that repetitions are told apart."""
    seen: dict[str, int] = {}
    keys = []
    for word in words:
        seen[word] = seen.get(word, -1) + 1
        keys.append((word, seen[word]))
    return keys
