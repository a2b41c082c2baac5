"""Balanced smoothing: the expected error foretells the measured one, and the chosen scale is a good one."""

import pytest
import torch
from torch import Tensor

from quant_experts.artifacts import GroupStatistics
from quant_experts.config import Scheme
from quant_experts.kernels.reference import rotate, round_tokens
from quant_experts.quantizers.balanced import balanced_scale, expected_error
from quant_experts.quantizers.gptq import quantize_gptq
from quant_experts.quantizers.grids import dequantize


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def statistics(x: Tensor) -> GroupStatistics:
    empty = torch.empty(0)
    moment = x.double().T @ x.double() / len(x)
    mean, largest = x.abs().double().mean(0), x.abs().double().amax(0)
    return GroupStatistics(mean, moment, empty, empty, empty, empty, largest, mean, x)


def outlier_tokens(tokens: int, columns: int) -> Tensor:
    x = normal(tokens, columns) @ (torch.eye(columns) + 0.1 * normal(columns, columns, seed=1))
    x[:, ::16] *= 30
    return x


def measured(scale: Tensor, x: Tensor, weight: Tensor, scheme: Scheme, rotation: int) -> float:
    smoothed = rotate(weight * scale, rotation)
    z = rotate(x / scale, rotation)
    base, _ = quantize_gptq(smoothed, z.double().T @ z.double() / len(z), scheme, act_order=True)
    return float((round_tokens(z, scheme) @ dequantize(base).T - x @ weight.T).square().sum(dim=1).mean())


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("text", ["W4A6", "W4A8", "W4Afp8", "W3A16g32"])
def test_the_expected_error_foretells_the_measured_one(text: str, rotation: int) -> None:
    x, weight, scheme = outlier_tokens(800, 64), normal(96, 64, seed=2), Scheme.parse(text)
    for strength in (0.0, 0.3, 0.6):
        scale = x.square().mean(0).sqrt() ** strength
        expected = expected_error(scale.double(), statistics(x), weight, scheme, rotation)
        assert expected == pytest.approx(measured(scale, x, weight, scheme, rotation), rel=0.5)


@pytest.mark.parametrize("rotation", [0, 16])
@pytest.mark.parametrize("text", ["W4A6", "W4A4", "W4Afp8", "W3A16g32"])
def test_the_chosen_scale_is_near_the_best_and_better_than_none(text: str, rotation: int) -> None:
    x, weight, scheme = outlier_tokens(800, 64), normal(96, 64, seed=2), Scheme.parse(text)
    chosen = balanced_scale(statistics(x), weight, scheme, rotation)
    assert chosen.dtype == torch.float32 and chosen.shape == (64,) and (chosen > 0).all()
    found = measured(chosen, x, weight, scheme, rotation)
    tried = [x.square().mean(0).sqrt() ** a / weight.square().mean(0).sqrt() ** (1 - a) for a in (0.0, 0.3, 0.5, 0.8)]
    assert found <= 1.15 * min(measured(scale, x, weight, scheme, rotation) for scale in tried)
    assert found < measured(torch.ones(64), x, weight, scheme, rotation)


def test_dead_channels_and_dead_weights_have_a_finite_scale() -> None:
    x, weight = normal(50, 12), normal(5, 12, seed=1)
    x[:, 3], weight[:, 7] = 0, 0
    for tokens, rows in ((x, weight), (torch.zeros(4, 12), weight), (x, torch.zeros(5, 12))):
        scale = balanced_scale(statistics(tokens), rows, Scheme.parse("W4A6"), 4)
        assert scale.isfinite().all() and (scale > 0).all()
