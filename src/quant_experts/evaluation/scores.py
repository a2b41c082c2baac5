"""The result of an evaluation: scores by kind of question and on average, each with its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.bootstrap import Interval, mean_interval
from quant_experts.evaluation.questions_file import EvaluationItem
from quant_experts.evaluation.scorers import SCORERS


@dataclass(frozen=True)
class KindScore:
    """One row of the table."""

    count: int
    score: Interval
    """By each question's own scorer, exact match unless it says otherwise; 0 to 1."""
    nll: Interval | None = None
    """-log p of the reference answer per token, in nats."""
    kl: Interval | None = None
    """KL divergence from full precision per answer token, in nats."""

    def to_json(self) -> dict[str, Any]:
        """Plain values; measures that were not taken are None."""
        measures = dict(score=self.score, nll=self.nll, kl=self.kl)
        return dict(count=self.count, **{name: value and value.to_json() for name, value in measures.items()})


@dataclass(frozen=True)
class Scores:
    """What one model scored, and each question's numbers for paired comparisons."""

    kinds: dict[str, KindScore]
    average: KindScore
    """Over all questions."""
    per_question: list[float] = field(repr=False)
    nll_per_question: list[float] | None = field(default=None, repr=False)
    kl_per_question: list[float] | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for a report's JSON."""
        return dict(
            kinds={kind: row.to_json() for kind, row in self.kinds.items()},
            average=self.average.to_json(),
            per_question=self.per_question,
            nll_per_question=self.nll_per_question,
            kl_per_question=self.kl_per_question,
        )


def score_answers(
    items: Sequence[EvaluationItem],
    answers: Sequence[str],
    *,
    nll: Sequence[float] | None = None,
    kl: Sequence[float] | None = None,
    seed: int = 0,
) -> Scores:
    """Compare answers with their items; `nll` and `kl` hold one number per item, from `fidelity`.

    Raises `QuantExpertsError` without items, ValueError for lists of unequal lengths.
    """
    if not items:
        raise QuantExpertsError("There are no questions to score: give at least one.")
    points = [SCORERS[item.scorer](answer, item.answers) for item, answer in zip(items, answers, strict=True)]
    nlls, kls = _as_floats(nll, len(items)), _as_floats(kl, len(items))

    def row(indices: Sequence[int]) -> KindScore:
        def interval(column: list[float]) -> Interval:
            return mean_interval([column[index] for index in indices], seed=seed)

        return KindScore(
            len(indices), interval(points), interval(nlls) if nlls else None, interval(kls) if kls else None
        )

    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(index)
    rows = {kind: row(indices) for kind, indices in kinds.items()}
    return Scores(rows, row(range(len(items))), points, nlls, kls)


def _as_floats(column: Sequence[float] | None, count: int) -> list[float] | None:
    if column is not None and len(column) != count:
        raise ValueError(f"{count} questions need as many numbers; got {len(column)}")
    return None if column is None else [float(value) for value in column]
