"""Which values are best, tied or missing, and the sentence that sums them up."""

from __future__ import annotations

import math

from report import made_up

from quant_experts.evaluation.comparison import FULL_PRECISION, Comparison, MethodRow, Score
from quant_experts.report.columns import (
    cells,
    duration,
    gain_columns,
    main_columns,
    overlap,
    row_label,
    size,
    small_number,
)
from quant_experts.report.verdict import verdict

ACCURACY, NLL, _, BITS, *_ = main_columns()


def row(method: str, mean: float, half: float = 0.01, scheme: str = "W4A6", bits: float | None = None) -> MethodRow:
    accuracy = {"average": Score(mean, mean - half, mean + half)}
    return MethodRow(method, scheme, accuracy, Score(1 - mean, 1 - mean - half, 1 - mean + half), None, bits)


def marks(rows: list[MethodRow], column: object = ACCURACY) -> list[str]:
    return [cell.mark for cell in cells(rows, column)]  # type: ignore[arg-type]


def test_the_best_is_marked_and_overlap_is_a_tie() -> None:
    rows = [row(FULL_PRECISION, 0.9, scheme=""), row("a", 0.8), row("b", 0.79), row("c", 0.7)]
    assert marks(rows) == ["", "best", "tie", ""]
    assert marks(rows, NLL) == ["", "best", "tie", ""]


def test_schemes_are_compared_apart() -> None:
    rows = [row("a", 0.8), row("b", 0.7), row("a", 0.5, scheme="W3A16"), row("b", 0.6, scheme="W3A16")]
    assert marks(rows) == ["best", "", "", "best"]


def test_one_value_alone_is_not_best_of_anything() -> None:
    assert marks([row("a", 0.8), row("b", math.nan)]) == ["", ""]


def test_values_that_read_the_same_are_marked_the_same() -> None:
    rows = [row("a", 0.8, bits=4.021), row("b", 0.8, bits=4.024), row("c", 0.8, bits=4.03)]
    assert marks(rows, BITS) == ["best", "best", ""]


def test_values_without_intervals_are_tied_only_if_equal() -> None:
    known, unknown = Score(0.5, 0.4, 0.6), Score(0.55, math.nan, math.nan)
    assert not overlap(known, unknown) and overlap(known, Score(0.5, math.nan, math.nan))
    assert overlap(Score(0.5, 0.4, 0.6), Score(0.7, 0.6, 0.8))


def test_intervals_of_differences_keep_their_signs_apart() -> None:
    better = MethodRow("a", "W4A6", {}, Score(1, 1, 1), over_rtn={"accuracy": Score(0.01, -0.02, 0.04)})
    assert [cell.interval for cell in cells([better], gain_columns()[0])] == ["-2.0 to +4.0"]
    assert [cell.interval for cell in cells([row("a", 0.8)], ACCURACY)] == ["79.0–81.0"]


def test_units() -> None:
    assert [duration(3.14), duration(600), duration(9000)] == ["3.1 s", "10.0 min", "2.5 h"]
    assert [size(12), size(2_000), size(3.5e6), size(1.5e9)] == ["12 B", "2.00 kB", "3.50 MB", "1.50 GB"]
    assert [small_number(v) for v in (0.03, 123.4, 1e-5, 0.0)] == ["0.0300", "123", "1.00e-05", "0.00"]


def test_labels() -> None:
    assert [row_label(r) for r in (row("paper", 1), row(FULL_PRECISION, 1, scheme=""))] == [
        "paper W4A6",
        FULL_PRECISION,
    ]


def judged(*rows: MethodRow) -> list[str]:
    return verdict(Comparison("t", "m", "c", 1200, rows))


def test_verdict_names_the_best_its_rivals_and_the_distance() -> None:
    assert judged(row(FULL_PRECISION, 0.9, scheme=""), row("rtn", 0.7), row("a", 0.85, bits=4.5), row("b", 0.84)) == [
        "At W4A6, a does best of 3 methods (tied with b): it answers 85.0% of 1,200 questions exactly right with 4.50 "
        "stored bits per weight; full precision answers 90.0% (5.0 points more); plain rounding (rtn) 70.0%."
    ]


def test_verdict_of_a_tie_with_full_precision_and_of_many_rivals() -> None:
    close = [row(name, 0.885) for name in "bcde"]
    (sentence,) = judged(row(FULL_PRECISION, 0.88, scheme=""), row("a", 0.89), *close)
    assert "(tied with 4 others)" in sentence and "(1.0 points less, a tie)" in sentence


def test_verdict_without_rivals_reference_or_rows() -> None:
    assert judged(row("a", 0.5)) == ["At W4A6, a answers 50.0% of 1,200 questions exactly right."]
    assert judged(row("a", math.nan)) == ["At W4A6, no accuracy was measured."]
    assert judged() == ["Nothing was measured."]
    assert "no quantized model" in judged(row(FULL_PRECISION, 0.5, scheme=""))[0]
    assert len(verdict(made_up.comparison(("W4A6", "W3A16"), blocks=1))) == 2
