"""The columns of the comparison table: how figures are written, which rows are best. For page and terminal alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from quant_experts.evaluation.comparison import FULL_PRECISION, Comparison, MethodRow, Score

MISSING = "-"
AVERAGE = "average"
PLAIN_ROUNDING = "rtn"

Mark = Literal["", "best", "tie"]


@dataclass(frozen=True)
class Column:
    """One measured quantity of a row."""

    title: str
    unit: str
    value: Callable[[MethodRow], Score | float | None]
    write: Callable[[float], str]
    higher_is_better: bool = False
    measure: str = ""
    """Of which paired differences tell ties (`MethodRow.behind_best`); empty: overlapping intervals tell them."""


@dataclass(frozen=True)
class Cell:
    """A figure as it is shown."""

    text: str
    interval: str = ""
    """"low–high", "-low to +high" for differences, or "" if none is known."""
    mark: Mark = ""


def row_label(row: MethodRow) -> str:
    """The name under which a row's layers, answers and events are kept: "paper W4A6"."""
    return f"{row.method} {row.scheme}".strip()


def is_full_precision(row: MethodRow) -> bool:
    """Whether the row is the reference that the others are measured against."""
    return row.method == FULL_PRECISION


def by_scheme(rows: Iterable[MethodRow]) -> dict[str, list[MethodRow]]:
    """The quantized rows under their schemes, both in order of first appearance."""
    groups: dict[str, list[MethodRow]] = {}
    for row in rows:
        if not is_full_precision(row):
            groups.setdefault(row.scheme, []).append(row)
    return groups


def ordered(comparison: Comparison) -> list[MethodRow]:
    """Full precision first, then scheme by scheme."""
    full = [row for row in comparison.rows if is_full_precision(row)]
    return full + [row for rows in by_scheme(comparison.rows).values() for row in rows]


def finite(value: float | None) -> bool:
    """Whether there is a number to show."""
    return value is not None and math.isfinite(value)


def as_score(value: Score | float | None) -> Score | None:
    """The value with its interval (NaN bounds where there is none), or None if there is no number to show."""
    score = value if isinstance(value, Score) else Score(math.nan if value is None else value, math.nan, math.nan)
    return score if finite(score.mean) else None


def overlap(one: Score, other: Score) -> bool:
    """Whether two intervals share a point; values without intervals overlap only if they are equal."""
    if not all(map(finite, (one.low, one.high, other.low, other.high))):
        return one.mean == other.mean
    return one.low <= other.high and other.low <= one.high


def accuracy_column(kind: str, title: str) -> Column:
    """Exact match on one kind of question."""
    measure = "accuracy" if kind == AVERAGE else ""
    return Column(title, "%", lambda row: row.accuracy.get(kind), percent, higher_is_better=True, measure=measure)


def kinds(comparison: Comparison) -> list[str]:
    """Kinds of question that any row has, without the average."""
    return list(dict.fromkeys(kind for row in comparison.rows for kind in row.accuracy if kind != AVERAGE))


def main_columns() -> list[Column]:
    """What a reader looks at first: accuracy, closeness to full precision, size, time."""
    return [
        accuracy_column(AVERAGE, "Exact match"),
        Column("NLL", "nats per token", lambda row: row.nll, "{:.4f}".format, measure="nll"),
        Column("KL to full precision", "nats per token", lambda row: row.kl, "{:.4f}".format, measure="kl"),
        Column("Stored bits", "per weight", lambda row: row.bits_per_weight, "{:.2f}".format),
        Column("Quantization", "time", lambda row: row.quantize_seconds, duration),
    ]


def cost_columns() -> list[Column]:
    """Layer errors, and what a token and a quantization cost."""
    return [
        Column("Layer error", "over rtn's", lambda row: row.layer_error, "{:.3f}".format),
        Column("Best routing", "layer error over rtn's", lambda row: row.oracle_layer_error, "{:.3f}".format),
        Column("Held-out error", "over calibration's", lambda row: row.overfit, "{:.2f}".format),
        Column("Operations", "a token, over full precision's", active_flops, "{:.3f}".format),
        Column("Bytes read", "a token, when decoding", lambda row: row.token_bytes, size),
        Column("Peak memory", "while quantizing", lambda row: row.peak_bytes, size),
    ]


def gain_columns() -> list[Column]:
    """By how much a row is better than plain rounding, paired by question."""
    return [
        Column("Exact match", "points over rtn", lambda row: row.over_rtn.get("accuracy"), points, True, "accuracy"),
        Column("NLL", "nats under rtn", lambda row: row.over_rtn.get("nll"), "{:+.4f}".format, True, "nll"),
        Column("KL", "nats under rtn", lambda row: row.over_rtn.get("kl"), "{:+.4f}".format, True, "kl"),
    ]


def active_flops(row: MethodRow) -> float | None:
    """Operations of a token in the quantized linears over those of full precision: 1 and the repair's part."""
    return 1 + (row.repair_flops or 0) / row.base_flops if row.base_flops else None


def cells(rows: Sequence[MethodRow], column: Column) -> list[Cell]:
    """One cell a row. Marks compare the quantized rows of one scheme, and only where there is something to compare.

    A tie is a difference, paired by question where it was taken so, that the interval does not tell from none.
    """
    scores = [as_score(column.value(row)) for row in rows]
    marks: list[Mark] = [""] * len(rows)
    for scheme in by_scheme(rows):
        found = [
            (index, score)
            for index, (row, score) in enumerate(zip(rows, scores, strict=True))
            if score is not None and row.scheme == scheme and not is_full_precision(row)
        ]
        if len(found) < 2:
            continue
        best = best_score([score for _, score in found], column.higher_is_better)
        for index, score in found:
            # What reads the same must be marked the same, whatever the digits that are not shown say.
            if column.write(score.mean) == column.write(best.mean):
                marks[index] = "best"
            elif ties(rows[index], score, best, column.measure):
                marks[index] = "tie"
    return [_cell(score, column, mark) for score, mark in zip(scores, marks, strict=True)]


def ties(row: MethodRow, score: Score, best: Score, measure: str) -> bool:
    """Whether a row's score cannot be told from the best: by the difference paired by question, if it was taken."""
    behind = row.behind_best.get(measure)
    return behind.low <= 0 if behind else overlap(score, best)


def best_score(scores: Sequence[Score], higher_is_better: bool) -> Score:
    """The first of the best means."""
    return max(scores, key=lambda score: score.mean if higher_is_better else -score.mean)


def _cell(score: Score | None, column: Column, mark: Mark) -> Cell:
    if score is None:
        return Cell(MISSING)
    bounded = finite(score.low) and finite(score.high)
    low, high = column.write(score.low), column.write(score.high)
    between = " to " if low[0] in "+-" else "–"
    return Cell(column.write(score.mean), f"{low}{between}{high}" if bounded else "", mark)


def percent(share: float) -> str:
    """0.9123 as "91.2"."""
    return f"{100 * share:.1f}"


def points(share: float) -> str:
    """0.0123 as "+1.2"."""
    return f"{100 * share:+.1f}"


def duration(seconds: float) -> str:
    """Seconds in the unit that reads best."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def size(count: float) -> str:
    """Bytes in the decimal unit that reads best."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{0 if count >= 10 * scale else 2}f} {unit}"
    return f"{count:.0f} B"


def small_number(value: float) -> str:
    """Three significant digits."""
    return f"{value:.2e}" if 0 < abs(value) < 1e-4 else f"{value:#.3g}".rstrip(".")
