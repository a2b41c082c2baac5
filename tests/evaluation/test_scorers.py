"""Scorers against their definitions, written out naively."""

from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant_experts.evaluation.scorers import SCORERS, anls, exact_match, levenshtein, relaxed_accuracy

texts = st.text(alphabet="ab ü", max_size=6)


def naive_distance(first: str, second: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        substitution = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, substitution)

    return distance(len(first), len(second))


@given(texts, texts)
def test_levenshtein(first: str, second: str) -> None:
    assert levenshtein(first, second) == naive_distance(first, second)


@given(texts, st.lists(texts, min_size=1, max_size=3))
def test_anls_definition(answer: str, references: list[str]) -> None:
    best = 0.0
    for reference in references:
        a, b = answer.strip().lower(), reference.strip().lower()
        distance = naive_distance(a, b) / max(len(a), len(b)) if a or b else 0.0
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    assert anls(answer, references) == pytest.approx(best)


def test_anls_examples() -> None:
    assert anls("Hello", ["hello "]) == 1 and anls("abcd", ["abce"]) == 0.75 and anls("ab", ["ac"]) == 0
    assert anls("x", []) == 0


def test_exact_match() -> None:
    assert exact_match(" A b\n", ["x", "A b"]) == 1 and exact_match("a b", ["A b"]) == 0
    assert exact_match("a b", ["A B"], case_sensitive=False) == 1
    assert exact_match("A  b", ["A b"]) == 0 and exact_match("", []) == 0


@pytest.mark.parametrize(
    "answer, reference, expected",
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("-95", "-100", 1),
        ("95", "-100", 0),
        ("50%", "0.5", 1),
        ("50 %", "49%", 1),
        ("0", "0", 1),
        ("0.001", "0", 0),
        ("Yes ", "yes", 1),
        ("nan", "5", 0),
        ("inf", "inf", 1),
        ("five", "5", 0),
    ],
)
def test_relaxed_accuracy(answer: str, reference: str, expected: float) -> None:
    assert relaxed_accuracy(answer, [reference]) == expected
    assert relaxed_accuracy(answer, ["something else", reference]) == expected


def test_registry() -> None:
    assert set(SCORERS) == {"exact_match", "anls", "relaxed_accuracy"}
    assert all(scorer("same", ["same"]) == 1 for scorer in SCORERS.values())
