"""What makes a text unfit to train on: each test gives a reason in a few words, the same for every such record so that reasons can be counted, or None."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from src.records.near_duplicates import ngrams, words

SCRIPTS = {
    "ko": re.compile(r"[\uac00-\ud7af\u1100-\u11ff\u3130-\u318f]"),
    "zh": re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "ja": re.compile(r"[\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"),
    "en": re.compile(r"[A-Za-z]"),
}
"""characters each language is written in"""
_KANA = re.compile(r"[\u3040-\u30ff\u31f0-\u31ff]")
_LETTER = re.compile(r"[^\W\d_]")
# What has letters of no language: code, addresses, markup, formulas.
_NOT_TEXT = re.compile(r"```.*?```|`[^`\n]*`|https?://\S+|\S+@\S+\.\S+|<[^<>\n]{1,200}>|\$[^$\n]*\$", re.DOTALL)
# The commonest English words that are not words of Spanish, French, German, Italian, Portuguese or Dutch too.
_ENGLISH = frozenset(
    [
        "the",
        "of",
        "and",
        "to",
        "that",
        "it",
        "for",
        "with",
        "you",
        "this",
        "from",
        "they",
        "have",
        "had",
        "what",
        "when",
        "your",
        "which",
        "she",
        "there",
        "their",
        "about",
        "would",
        "these",
        "some",
        "could",
        "than",
        "its",
        "been",
        "because",
        "into",
        "other",
        "how",
        "are",
        "were",
        "then",
        "them",
        "only",
        "our",
        "through",
        "should",
        "where",
        "why",
        "does",
        "did",
        "please",
        "my",
        "his",
        "her",
    ]
)
JUDGED_BY_WORDS = 12
"""words from which on English is told from other languages in Latin letters; shorter texts pass by their script"""
ENGLISH_SHARE = 0.08
KANA_SHARE = 0.05
"""least share of kana in Japanese of some length: text in Chinese characters alone is Chinese"""


def length(text: str, unit: str, low: int, high: int) -> str | None:
    """unit: words or characters (turns are counted by the step, which has them)."""
    count = len(words(text)) if unit == "words" else len(text)
    return bounded(count, unit, low, high)


def bounded(count: int, unit: str, low: int, high: int) -> str | None:
    return f"under {low} {unit}" if count < low else f"over {high} {unit}" if count > high else None


def language(text: str, languages: Sequence[str], share: float) -> str | None:
    """None if the text is in one of the languages (ko, zh, ja, en), or has no letters to tell by.

    Korean, Chinese and Japanese are told by script, Japanese by its kana; English from other Latin languages by its commonest words, in texts of
    twelve words or more. Code, addresses and formulas are left out of account.
    """
    text = _NOT_TEXT.sub(" ", text)
    letters = len(_LETTER.findall(text))
    if not letters or any(_is(text, letters, one, share) for one in languages):
        return None
    return f"not in {' or '.join(languages)}"


def _is(text: str, letters: int, language: str, share: float) -> bool:
    if len(SCRIPTS[language].findall(text)) < share * letters:
        return False
    kana = len(_KANA.findall(text)) / letters
    if language == "ja":
        return kana >= KANA_SHARE
    if language == "zh":
        return kana < KANA_SHARE
    said = words(text)
    return language != "en" or len(said) < JUDGED_BY_WORDS or sum(word in _ENGLISH for word in said) >= ENGLISH_SHARE * len(said)


def refusal(text: str, phrases: list[str], within: int) -> str | None:
    """phrases: regular expressions, looked for without case in the first `within` characters, typographic apostrophes read as plain ones."""
    start = text[:within].replace("’", "'")
    return "the answer declines" if any(re.search(phrase, start, re.IGNORECASE) for phrase in phrases) else None


def repetition(text: str, n: int, share: float, run: int) -> str | None:
    """share: largest share of word n-grams that occurred before (Rae et al. 2021, arXiv:2112.11446, cut pages by such shares); run: most times one line may stand."""
    lines = Counter(line.strip() for line in text.splitlines() if line.strip(" \t-=*#|`_{}()[];"))
    if lines and max(lines.values()) > run:
        return f"a line stands more than {run} times"
    parts = words(text)
    grams = ngrams(parts, n) if len(parts) >= n else []
    if grams and 1 - len(set(grams)) / len(grams) > share:
        return f"over {share:g} of its {n}-grams are repeated"
    return None


def task(text: str, *, low: int, high: int, keywords: list[str], ascii_start: bool) -> str | None:
    """Why a new task is left out, but for its likeness to others: the filters of Self-Instruct (Wang et al. 2022, arXiv:2212.10560, 3.1 and its code).

    low, high: words.
    """
    if reason := length(text, "words", low, high):
        return reason
    if any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in keywords):
        return "needs more than text"
    if text.lower().startswith("write a program"):  # models fall into this opening until little else is left
        return "asks for a program"
    if unicodedata.category(text[0])[0] in "PS":
        return "starts with punctuation"
    return "starts with a non-ASCII character" if ascii_start and not text[0].isascii() else None
