"""Scores one answer against the reference answers of its question: a number from 0 (wrong) to 1 (right).

Every scorer takes the best match over the references, as the data sets that have several prescribe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Final

ANLS_THRESHOLD = 0.5
RELATIVE_TOLERANCE = 0.05


def exact_match(answer: str, references: Sequence[str], *, case_sensitive: bool = True) -> float:
    """1 if the answer equals a reference without regard to white space at both ends (and to case, if asked), else 0."""

    def normal(text: str) -> str:
        return text.strip() if case_sensitive else text.strip().casefold()

    return float(normal(answer) in [normal(reference) for reference in references])


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one question (ST-VQA, Biten et al. 2019; used by DocVQA).

    1 - distance / length of the longer text, without regard to case or to white space at both ends; 0 unless it is
    above 0.5.
    """
    best = max(
        (_similarity(answer.strip().lower(), reference.strip().lower()) for reference in references), default=0.0
    )
    return best if best > ANLS_THRESHOLD else 0.0


def relaxed_accuracy(answer: str, references: Sequence[str]) -> float:
    """1 if a number is within 5% of a reference, or any other text equals it whatever the case, else 0.

    From ChartQA (Masry et al. 2022). A percent sign divides by 100; as in its code, a reference of zero is
    compared as text.
    """
    return float(any(_relaxed_equal(answer, reference) for reference in references))


SCORERS: Final[dict[str, Callable[[str, Sequence[str]], float]]] = {
    "exact_match": exact_match,
    "anls": anls,
    "relaxed_accuracy": relaxed_accuracy,
}


def levenshtein(first: str, second: str) -> int:
    """The least number of characters to insert, delete or replace that turns one text into the other."""
    row = list(range(len(second) + 1))
    for i, a in enumerate(first, start=1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(second, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _similarity(first: str, second: str) -> float:
    longer = max(len(first), len(second))
    return 1 - levenshtein(first, second) / longer if longer else 1.0


def _relaxed_equal(answer: str, reference: str) -> bool:
    number, expected = _number(answer), _number(reference)
    if number is None or not expected:
        return answer.strip().lower() == reference.strip().lower()
    return abs(number - expected) <= RELATIVE_TOLERANCE * abs(expected)


def _number(text: str) -> float | None:
    text = text.strip()
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if isfinite(value) else None
