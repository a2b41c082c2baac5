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
"""Most times that the branch is fitted."""


def fit_principal_expert(
    weight: Tensor,
    moment: Tensor,
    rank: int,
    requantize: Callable[[Tensor], Tensor],
    *,
    seed: int,
) -> LowRankExpert:
    """L = SVD_r(W), then L = SVD_r(W - Q(W - L)) as long as the output error falls. -> rank-r expert, float64.

    weight (N, K) and moment (K, K) are those of the input as the expert reads it, smoothed; requantize rounds a weight
    (N, K) float32 and gives its values back. The output error is the mean of |(W - Q(W - L) - L) x|^2 (section 4.2;
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
        rest = target - correction
        error = float(((rest @ moment) * rest).sum())
        if best is not None and not error < least:
            break
        best, least = expert, error
    assert best is not None
    return best
