"""Smoothing that balances the rounding errors of weights and activations, as the base will leave them. Ours."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import GroupStatistics
from quant_experts.config import Scheme
from quant_experts.kernels.reference import rotate, round_tokens, smooth
from quant_experts.quantizers.gptq import DAMPING
from quant_experts.quantizers.grids import group_grid

STRENGTHS = tuple(step / 10 for step in range(10))


def balanced_scale(statistics: GroupStatistics, weight: Tensor, scheme: Scheme, rotation: int) -> Tensor:
    """m (K,) float32 = rms(x)^a / rms(W)^(1-a), geometric mean 1, with the strength a of least expected output error.

    weight (N, K), rms over tokens and over rows. Each strength is tried without quantizing anything: see
    `expected_error`. Channels without energy or without weight count as the least that occurs. Ours, after SmoothQuant,
    which takes largest magnitudes and a fixed strength.
    """
    x = _floored(statistics.second_moment.diagonal().clamp_min(0).sqrt())
    w = _floored(weight.double().square().mean(dim=0).sqrt())
    candidates = [torch.ones_like(x)]
    for strength in STRENGTHS:
        scale = x**strength / w ** (1 - strength)
        candidates.append(scale / scale.log().mean().exp())
    losses = [expected_error(scale, statistics, weight, scheme, rotation) for scale in candidates]
    return candidates[losses.index(min(losses))].float()


def expected_error(scale: Tensor, statistics: GroupStatistics, weight: Tensor, scheme: Scheme, rotation: int) -> float:
    """Mean squared output error to expect of rounding W m and x / m on their grids, after rotation.

    Weights, with error feedback: a step s leaves s^2 / 12 in each weight, which reaches the output by the variance of
    its channel that the channels still to come cannot explain: the squared pivots of the moment's Cholesky factor.
    Activations: the rounding error of each channel of the sampled tokens, which is all but independent of the others',
    times the energy of the weights that read it.
    """
    smoothed = rotate(weight.double() * scale, rotation).float()
    moment = rotate(rotate(statistics.second_moment / (scale * scale[:, None]), rotation).T, rotation)
    moment.diagonal().add_(DAMPING * moment.diagonal().mean())
    order = torch.sort(moment.diagonal(), stable=True).indices  # the channel that is rounded last comes first
    factor, failed = torch.linalg.cholesky_ex(moment[order][:, order])
    unexplained = torch.empty_like(scale)
    unexplained[order] = factor.diagonal().square() if not failed else moment.diagonal()[order]
    loss = 0.0
    size = scheme.group_size or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        step, _ = group_grid(smoothed[:, start : start + size], scheme)
        loss += float(step.double().square().sum() / 12 * unexplained[start : start + size].sum())
    if not scheme.weight_only:
        assert statistics.fit_tokens is not None
        tokens = rotate(smooth(statistics.fit_tokens.to(scale.device), scale.float()), rotation)
        rounding = (round_tokens(tokens, scheme) - tokens).double().square().mean(dim=0)
        loss += float(rounding @ smoothed.double().square().sum(dim=0))
    return loss


def _floored(values: Tensor) -> Tensor:
    """Positive values; others become the least positive one, or 1 if there is none."""
    positive = values[values > 0]
    return values.clamp_min(positive.min()) if len(positive) else torch.ones_like(values)
