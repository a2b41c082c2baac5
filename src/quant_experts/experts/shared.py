"""The shared expert (paper step 3, after ASER): what every token needs.

The exempt channels C_s are taken out of the quantized base and rebuilt, together with the rounding error of the others,
by one low-rank correction that is optimal for the calibration tokens.
"""

from __future__ import annotations

from torch import Tensor

from quant_experts.artifacts import LowRankExpert
from quant_experts.experts.low_rank import fit_low_rank


def without_channels(weight: Tensor, channels: Tensor) -> Tensor:
    """A copy of weight (N, K) with the given columns set to zero: what the base quantizer sees."""
    kept = weight.clone()
    kept[:, channels.to(weight.device)] = 0
    return kept


def fit_shared_expert(
    error: Tensor, moment: Tensor, smooth_scale: Tensor | None, rank: int, *, seed: int
) -> LowRankExpert:
    """Whitened SVD of error = W_scaled - Q(W_s) (N, K) for inputs x/m. -> rank-r expert on x/m, float64.

    moment (K, K) is that of x, before smoothing. The error is brought to x instead of the moment to x/m, which is the
    same (docs/math.md) and needs no second matrix of K x K.
    """
    if smooth_scale is None:
        return fit_low_rank(error, moment, rank, seed=seed)
    expert = fit_low_rank(error / smooth_scale, moment, rank, seed=seed)
    return LowRankExpert(expert.up, expert.down * smooth_scale)
