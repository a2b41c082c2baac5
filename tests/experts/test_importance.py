"""Counting, sorting and scaling channels, against loops over tokens (paper, steps 1 to 3)."""

import random

import pytest
import torch

from quant_experts.artifacts import GroupStatistics, Modality
from quant_experts.experts.importance import channel_counts, magnitude_channels, partition_channels, smoothing_scale


def statistics(tokens: int, width: int, k: int, seed: int = 0) -> GroupStatistics:
    drawn = random.Random(seed)
    important = [drawn.sample(range(width), k) for _ in range(tokens)]
    modality = torch.tensor([drawn.choice(list(Modality)) for _ in range(tokens)], dtype=torch.int8)
    generator = torch.Generator().manual_seed(seed)
    mean_abs = torch.rand(width, generator=generator, dtype=torch.float64)
    empty = torch.empty(0)
    chosen = torch.tensor(important, dtype=torch.int32).reshape(tokens, k)
    return GroupStatistics(mean_abs, empty, chosen, modality, empty, empty, empty, empty)


@pytest.mark.parametrize(("tokens", "width", "k"), [(50, 11, 3), (1, 4, 4), (0, 5, 2), (9, 30, 1)])
def test_counts_equal_a_loop(tokens: int, width: int, k: int) -> None:
    found = statistics(tokens, width, k)
    expected = [0] * width
    for row in found.important.tolist():
        for channel in row:
            expected[channel] += 1
    assert channel_counts(found).tolist() == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("exempt", "dependent"), [(3, 8), (0, 5), (4, 0), (10, 90), (20, 5)])
def test_partition_equals_a_stable_sort(exempt: int, dependent: int, seed: int) -> None:
    counts = [random.Random(seed).randrange(6) for _ in range(20)]  # many ties
    order = sorted(range(20), key=lambda c: -counts[c])
    independent, others = partition_channels(torch.tensor(counts), exempt, dependent)
    assert independent.tolist() == order[:exempt]
    assert others.tolist() == order[exempt : exempt + dependent]


def test_magnitude_channels_equal_a_stable_sort() -> None:
    found, weight = statistics(5, 17, 2), torch.rand(17, generator=torch.Generator().manual_seed(3))
    found.mean_abs[[4, 9]], weight[[4, 9]] = 2.0, 2.0  # a tie at the top
    score = [x * w for x, w in zip(found.mean_abs.tolist(), weight.tolist(), strict=True)]
    order = sorted(range(17), key=lambda c: -score[c])
    assert order[:2] == [4, 9]
    for count in (0, 1, 6, 17):
        assert magnitude_channels(found, weight, count).tolist() == order[:count]


def test_smoothing_scale_is_the_mean_over_the_least_mean_of_the_exempt() -> None:
    mean_abs = torch.tensor([0.5, 8.0, 3.0, 0.0, 2.0, 100.0], dtype=torch.float64)
    scale = smoothing_scale(mean_abs, torch.tensor([2, 1, 4]))
    assert scale.dtype == torch.float32
    assert scale.tolist() == [1, 4, 1.5, 1, 1, 1]


def test_smoothing_scale_passes_over_channels_that_are_always_zero() -> None:
    mean_abs = torch.tensor([0.0, 6.0, 3.0, 0.0], dtype=torch.float64)
    assert smoothing_scale(mean_abs, torch.tensor([0, 1, 2])).tolist() == [1, 2, 1, 1]
    assert smoothing_scale(mean_abs, torch.tensor([0, 3])).tolist() == [1, 1, 1, 1]
    assert smoothing_scale(mean_abs, torch.tensor([], dtype=torch.long)).tolist() == [1, 1, 1, 1]
    assert mean_abs.tolist() == [0, 6, 3, 0]


def test_smoothing_scale_never_shrinks_a_channel() -> None:
    mean_abs = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = smoothing_scale(mean_abs, torch.arange(0, 40, 3))
    assert (scale >= 1).all() and scale[::3].min() == 1
    exempt = (mean_abs / scale)[::3]
    torch.testing.assert_close(exempt, exempt[:1].expand_as(exempt), rtol=1e-6, atol=0)
