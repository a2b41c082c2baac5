"""Percentile bootstrap confidence intervals (Efron 1979): what a score could have been with other questions of the
same kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
_BLOCK = 4_000_000
"""Values drawn at once, which bounds memory at 32 MB whatever the number of scores."""


@dataclass(frozen=True)
class Interval:
    """A mean and the bounds between which 95% of the means of resampled scores lie."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        """{"mean", "low", "high"}."""
        return dict(mean=self.mean, low=self.low, high=self.high)


def mean_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> Interval:
    """The mean of `values` with its interval; the same seed gives the same bounds.

    Raises ValueError without values, or for one that is not finite: an interval would hide it.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not scores.size or not np.isfinite(scores).all():
        raise ValueError(f"a confidence interval needs finite scores, one number each; got shape {scores.shape}")
    rng = np.random.default_rng(seed)
    rows = max(1, _BLOCK // scores.size)
    means = np.concatenate(
        [
            scores[rng.integers(scores.size, size=(min(rows, resamples - start), scores.size))].mean(axis=1)
            for start in range(0, resamples, rows)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(scores.mean()), float(low), float(high))


def difference_interval(
    first: Sequence[float], second: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Interval:
    """The mean of first - second, question by question. A tie if the interval holds 0.

    Pairing removes what makes questions differ, so small real differences show. Raises ValueError for unequal lengths.
    """
    if len(first) != len(second):
        raise ValueError(f"paired scores need equal lengths; got {len(first)} and {len(second)}")
    pairs = zip(first, second, strict=True)
    return mean_interval([a - b for a, b in pairs], resamples=resamples, seed=seed)
