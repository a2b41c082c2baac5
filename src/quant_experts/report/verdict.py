"""The comparison in one sentence a scheme, computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence

from quant_experts.evaluation.comparison import Comparison, MethodRow, Score
from quant_experts.report.columns import (
    AVERAGE,
    PLAIN_ROUNDING,
    as_score,
    best_score,
    by_scheme,
    is_full_precision,
    overlap,
    percent,
    ties,
)


def verdict(comparison: Comparison) -> list[str]:
    """One sentence for each scheme, or one that says that there is nothing to judge."""
    full = next((score for row in comparison.rows if is_full_precision(row) and (score := _average(row))), None)
    schemes = by_scheme(comparison.rows)
    if schemes:
        return [_sentence(scheme, rows, full, comparison.questions) for scheme, rows in schemes.items()]
    if full is None:
        return ["Nothing was measured."]
    answered = f"{percent(full.mean)}% of {comparison.questions:,} questions"
    return [f"Full precision answers {answered} exactly right; no quantized model was compared with it."]


def _average(row: MethodRow) -> Score | None:
    return as_score(row.accuracy.get(AVERAGE))


def _sentence(scheme: str, rows: Sequence[MethodRow], full: Score | None, questions: int) -> str:
    measured = [(row, score) for row in rows if (score := _average(row))]
    where = f"At {scheme}, " if scheme else "Quantized, "
    if not measured:
        return f"{where}no accuracy was measured."
    best = best_score([score for _, score in measured], higher_is_better=True)
    winner = next(row for row, score in measured if score is best)
    rivals = [row.method for row, score in measured if row is not winner and ties(row, score, best, "accuracy")]
    if len(measured) == 1:
        lead = f"{where}{winner.method} answers"
    else:
        lead = f"{where}{winner.method} does best of {len(measured)} methods{_tied(rivals)}: it answers"
    sentence = f"{lead} {percent(best.mean)}% of {questions:,} questions exactly right"
    bits = as_score(winner.bits_per_weight)
    if bits:
        sentence += f" with {bits.mean:.2f} stored bits per weight"
    parts = [sentence]
    if full:
        parts.append(f"full precision answers {percent(full.mean)}%{_distance(best, full)}")
    plain = next((score for row, score in measured if row.method == PLAIN_ROUNDING and row is not winner), None)
    if plain:
        parts.append(f"plain rounding ({PLAIN_ROUNDING}) {percent(plain.mean)}%")
    return "; ".join(parts) + "."


def _tied(rivals: Sequence[str]) -> str:
    if not rivals:
        return ""
    if len(rivals) > 3:
        return f" (tied with {len(rivals)} others)"
    names = " and ".join([", ".join(rivals[:-1]), rivals[-1]] if len(rivals) > 1 else rivals)
    return f" (tied with {names})"


def _distance(best: Score, full: Score) -> str:
    points = f"{abs(100 * (full.mean - best.mean)):.1f} points {'more' if full.mean >= best.mean else 'less'}"
    return f" ({points}, a tie)" if overlap(best, full) else f" ({points})"
