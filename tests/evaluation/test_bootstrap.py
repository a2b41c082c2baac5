"""Intervals against a bootstrap written as loops, and against the normal approximation."""

import random
import statistics

import numpy as np
import pytest

from quant_experts.evaluation import bootstrap
from quant_experts.evaluation.bootstrap import difference_interval, mean_interval


def naive_interval(values: list[float], resamples: int) -> tuple[float, float]:
    rng = random.Random(1)
    means = sorted(statistics.fmean(rng.choices(values, k=len(values))) for _ in range(resamples))
    return means[int(0.025 * resamples)], means[int(0.975 * resamples)]


@pytest.mark.parametrize("count", [2, 7, 101])
def test_against_loops(count: int) -> None:
    values = np.random.default_rng(count).exponential(size=count).tolist()
    interval = mean_interval(values, resamples=4000)
    low, high = naive_interval(values, 4000)
    noise = 0.1 * (high - low)
    assert interval.mean == pytest.approx(statistics.fmean(values))
    assert interval.low == pytest.approx(low, abs=noise) and interval.high == pytest.approx(high, abs=noise)


def test_against_normal_approximation() -> None:
    values = np.random.default_rng(0).normal(3, 2, 2000)
    half = 1.96 * values.std() / 2000**0.5
    interval = mean_interval(values.tolist())
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.08)


def test_seed_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0]
    assert mean_interval(values, seed=3) == mean_interval(values, seed=3) != mean_interval(values, seed=4, resamples=3)
    whole = mean_interval(values, resamples=11)
    monkeypatch.setattr(bootstrap, "_BLOCK", 7)  # one row at a time draws the same numbers
    assert mean_interval(values, resamples=11) == whole


def test_constant_and_single_values() -> None:
    for values in ([0.25] * 9, [0.25]):
        assert mean_interval(values).to_json() == dict(mean=0.25, low=0.25, high=0.25)


def test_paired_difference_is_narrower_than_unpaired() -> None:
    base = np.random.default_rng(0).normal(0, 10, 300)
    noise = np.random.default_rng(1).normal(0, 0.1, 300)
    interval = difference_interval((base + 0.5 + noise).tolist(), base.tolist())
    assert interval.mean == pytest.approx(0.5 + noise.mean()) and interval.low < interval.mean < interval.high
    # Set by the differences' spread of 0.1, not by the questions' spread of 10.
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * noise.std() / 300**0.5, rel=0.15)
    assert difference_interval(base.tolist(), base.tolist()) == mean_interval([0.0] * 300)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")], [[1.0], [2.0]]])
def test_bad_values(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite scores"):
        mean_interval(values)


def test_unequal_lengths() -> None:
    with pytest.raises(ValueError, match="equal lengths"):
        difference_interval([1.0], [1.0, 2.0])
