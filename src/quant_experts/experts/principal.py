"""SVDQuant's low-rank branch (Li et al., ICLR 2025): takes the weight's principal part out before rounding.

What is left has a smaller range than the weight, so its grid is finer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from quant_experts.artifacts import LowRankExpert
from quant_experts.experts.low_rank import fit_low_rank

ROUNDS = 8
"""Most times that the branch is fitted; the error seldom falls beyond the third."""


def fit_principal_expert(
    weight: Tensor,
    moment: Tensor,
    smooth_scale: Tensor | None,
    rank: int,
    requantize: Callable[[Tensor], Tensor],
    *,
    seed: int,
) -> LowRankExpert:
    """L = SVD_r(W), then L = SVD_r(W - Q(W - L)) as long as the output error falls. -> rank-r expert on x/m, float64.

    weight (N, K) is the smoothed W diag(m); moment (K, K) that of x, before smoothing; requantize rounds a weight
    (N, K) float32 and gives its values back. The output error is the mean of |(W - Q(W - L) - L) x/m|^2 (section 4.2;
    ours: without the rounding of activations). The caller quantizes W - L. Raises `QuantExpertsError` if the rank is
    larger than the layer.
    """
    target = weight.double()
    flat = torch.ones(weight.shape[1], dtype=torch.float64, device=weight.device)
    best, least = None, torch.inf
    for _ in range(ROUNDS):
        expert = fit_low_rank(target, flat, rank, seed=seed)
        correction = expert.up @ expert.down
        target = weight.double() - requantize((weight - correction).float()).double()
        error = _output_error(target - correction, moment, smooth_scale)
        if best is not None and not error < least:
            break
        best, least = expert, error
    assert best is not None
    return best


def _output_error(error: Tensor, moment: Tensor, smooth_scale: Tensor | None) -> float:
    """The mean of |error @ x/m|^2 over tokens x with second moment `moment`."""
    if smooth_scale is not None:
        error = error / smooth_scale
    return float(((error @ moment) * error).sum())
