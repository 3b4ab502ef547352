"""A logistic regression over hashed words: learns from a few hundred labelled texts, then scores millions cheaply.

Features: words (or a program's tokens) and pairs of neighbours, hashed into a fixed number of columns (Weinberger et al. 2009, arXiv:0902.2206), each
1 + log of its count, a text's vector of length 1. Fitted by gradient descent with momentum on the L2-regularized mean log-loss, which is convex;
started from zero and without any draw, so equal texts and labels give equal weights.
"""

import itertools
import re
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

COLUMNS = 1 << 16
STEPS = 300
FOLDS = 5
_TOKEN = re.compile(r"\w+|[^\w\s]")


class Classifier:
    """weights: (COLUMNS + 1,) float64, the last one the intercept, which is not regularized."""

    def __init__(self, texts: Sequence[str], good: Sequence[bool], *, l2: float):
        """Raises ValueError where all labels are one."""
        labels = np.asarray(good, float)
        if labels.min() == labels.max():
            raise ValueError("all labels are one")
        rows, columns, values = _matrix(texts)
        # Rare labels weigh as much as common ones, or a sample with few good texts teaches that none is.
        weight = np.where(labels > 0, 0.5 / labels.mean(), 0.5 / (1 - labels.mean())) / len(labels)
        self.weights = np.zeros(COLUMNS + 1)
        before: np.ndarray = self.weights
        # The loss has a curvature of at most 1/4 (|x|^2 + 1) + l2, with |x| = 1.
        rate, decay = 1 / (0.5 + l2), np.append(np.full(COLUMNS, l2), 0)
        for step in range(1, STEPS + 1):
            ahead = self.weights + (step - 1) / (step + 2) * (self.weights - before)
            wrong = (_sigmoid(np.bincount(rows, ahead[columns] * values, len(labels))) - labels) * weight
            gradient = np.bincount(columns, wrong[rows] * values, COLUMNS + 1) + decay * ahead
            before, self.weights = self.weights, ahead - rate * gradient

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """(count,) float64: the probability that each text is a good one."""
        rows, columns, values = _matrix(texts)
        return _sigmoid(np.bincount(rows, self.weights[columns] * values, len(texts)))


def held_out(texts: Sequence[str], good: Sequence[bool], *, l2: float) -> tuple[float, float]:
    """(accuracy, area under the ROC curve) on texts that five classifiers did not learn from, each of four fifths.

    A text's fold is its place modulo five. Raises ValueError where a fold's training part has one label only.
    """
    folds = np.arange(len(texts)) % FOLDS
    found = np.zeros(len(texts))
    for fold in range(FOLDS):
        inside, outside = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        if len(outside):
            classifier = Classifier([texts[i] for i in inside], [good[i] for i in inside], l2=l2)
            found[outside] = classifier.probabilities([texts[i] for i in outside])
    labels = np.asarray(good, bool)
    return float(((found >= 0.5) == labels).mean()), _auc(found, labels)


def _auc(found: np.ndarray, labels: np.ndarray) -> float:
    """How often a good text is above another, ties counted half."""
    above = found[labels][:, None] - found[~labels][None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())


def _matrix(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(records, columns, values) of the non-zero features; the intercept's column is 1 in each record."""
    rows, columns, values = [], [], []
    for number, text in enumerate(texts):
        tokens = _TOKEN.findall(text.lower())
        counts = Counter(zlib.crc32(t.encode()) % COLUMNS for t in [*tokens, *(f"{a} {b}" for a, b in itertools.pairwise(tokens))])
        raw = 1 + np.log(np.fromiter(counts.values(), float, len(counts)))
        rows.append(np.full(len(counts) + 1, number))
        columns.append(np.append(np.fromiter(counts.keys(), np.int64, len(counts)), COLUMNS))
        values.append(np.append(raw / (np.sqrt(raw @ raw) if len(counts) else 1), 1.0))
    return np.concatenate(rows), np.concatenate(columns), np.concatenate(values)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -50, 50)))
