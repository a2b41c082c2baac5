"""SmoothQuant's rule, AWQ's grid and MBQ's weights, against their formulas in plain floats."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from quant_experts.artifacts import Modality
from quant_experts.errors import QuantExpertsError
from quant_experts.quantizers import awq, mbq
from quant_experts.quantizers.smoothquant import smoothquant_scale


@pytest.mark.parametrize("strength", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (5, 7), (8, 33)])
def test_smoothquant_equals_its_formula(rows: int, width: int, strength: float) -> None:
    generator = torch.Generator().manual_seed(rows * width)
    absmax = torch.rand(width, generator=generator, dtype=torch.float64) * 50
    weight = torch.randn(rows, width, generator=generator)
    found = smoothquant_scale(absmax, weight, strength)
    assert found.dtype == torch.float32
    for j in range(width):
        largest = max(abs(float(weight[i, j])) for i in range(rows))
        assert float(found[j]) == pytest.approx(float(absmax[j]) ** strength / largest ** (1 - strength), rel=1e-6)


def test_smoothquant_at_one_half_makes_both_ranges_equal() -> None:
    absmax, weight = torch.tensor([16.0, 1.0]), torch.tensor([[0.25, -4.0], [1.0, 1.0]])
    scale = smoothquant_scale(absmax, weight)
    assert torch.equal(absmax / scale, (weight * scale).abs().amax(0))


def test_smoothquant_leaves_dead_channels_alone_and_passes_nan_on() -> None:
    weight = torch.tensor([[1.0, 0.0, 1.0, math.nan]])
    scale = smoothquant_scale(torch.tensor([0.0, 2.0, 4.0, 1.0]), weight)
    assert scale[:3].tolist() == [1, 1, 2] and scale[3].isnan()


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=9), st.integers(0, 19))
def test_awq_scale_equals_its_formula(values: list[float], point: int) -> None:
    scale = awq.power_scale(torch.tensor(values, dtype=torch.float64), point / 20)
    raw = [max(v ** (point / 20), 1e-4) for v in values]
    norm = math.sqrt(max(raw) * min(raw))
    assert scale.tolist() == pytest.approx([r / norm for r in raw], rel=1e-5)


def test_awq_tries_twenty_powers_and_takes_the_best() -> None:
    mean_abs = torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    tried: list[Tensor] = []

    def evaluate(scale: Tensor) -> float:
        tried.append(scale)
        return (len(tried) - 14) ** 2

    found = awq.search_scale(mean_abs, evaluate)
    assert len(tried) == 20 and torch.equal(tried[0], torch.ones(3))
    assert torch.equal(found, tried[13]) and torch.equal(found, awq.power_scale(mean_abs, 13 / 20))


def test_awq_prefers_the_smaller_power_and_never_nan() -> None:
    mean_abs = torch.tensor([1.0, 4.0])
    assert torch.equal(awq.search_scale(mean_abs, lambda _: 1.0), torch.ones(2))
    losses = iter([math.nan, math.inf, 3.0, 2.0, math.nan, *[5.0] * 15])
    assert torch.equal(awq.search_scale(mean_abs, lambda _: next(losses)), awq.power_scale(mean_abs, 3 / 20))
    with pytest.raises(QuantExpertsError, match="no finite error"):
        awq.search_scale(mean_abs, lambda _: math.nan)


def test_mbq_floors_the_ratio_at_the_median_of_its_kind() -> None:
    attention, mlp = [(1.0, 4.0), (3.0, 1.0), (1.0, 2.0)], [(5.0, 1.0), (2.0, 2.0), (0.0, 3.0)]
    layers = [
        {name: {Modality.IMAGE: i, Modality.ANSWER: a} for name, (i, a) in zip(("attn", "mlp"), pair, strict=True)}
        for pair in zip(attention, mlp, strict=True)
    ]
    found = mbq.image_weights(layers)
    for name, values in (("attn", attention), ("mlp", mlp)):
        ratios = [i / a for i, a in values]
        assert [layer[name] for layer in found] == [max(r, statistics.median(ratios)) for r in ratios]


def test_mbq_without_images_weighs_nothing_and_without_answers_refuses() -> None:
    assert mbq.image_weights([{"mlp": {Modality.ANSWER: 2.0}}]) == [{"mlp": 1.0}]
    for bad in ({}, {Modality.IMAGE: 1.0}, {Modality.IMAGE: 1.0, Modality.ANSWER: 0.0}, {Modality.ANSWER: math.nan}):
        with pytest.raises(QuantExpertsError, match="samples with answers"):
            mbq.image_weights([{"mlp": bad}])


def test_token_weights_by_modality() -> None:
    modality = torch.tensor([Modality.TEXT, Modality.IMAGE, Modality.ANSWER, Modality.IMAGE], dtype=torch.int8)
    assert mbq.token_weights(modality, 0.25).tolist() == [0, 0.25, 1, 0.25]
    assert awq.token_weights(modality).tolist() == [1, 1, 1, 1]
