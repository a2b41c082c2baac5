"""The shared expert (paper step 3, after ASER): what every token needs.

The exempt channels C_s are taken out of the quantized base and rebuilt, together with the rounding error of the others,
by one low-rank correction that is optimal for the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from quant_experts.artifacts import GroupStatistics, LowRankExpert
from quant_experts.experts.low_rank import fit_low_rank

MOMENTS: dict[str, Callable[[GroupStatistics], Tensor]] = {
    "moment": lambda statistics: statistics.second_moment,
    "rms": lambda statistics: statistics.second_moment.diagonal().clamp_min(0),
    "mean_abs": lambda statistics: statistics.max_mean_abs.square(),
}
"""By `Recipe.shared`: the second moments of x (K, K), or their stand-in on the diagonal (K,), that a correction is
fitted to; each method's SVD of error @ S is `fit_low_rank` with S S^T.

- "moment": S = E[x x^T]^(1/2), QERA exact (Zhang et al., ICLR 2025, theorem 1) and ASER's whitening.
- "rms": S = diag(sqrt(E[x_j^2])), QERA approx (theorem 2).
- "mean_abs": S = diag(s), s_j the largest over samples of mean|x_j|, L2QER (Zhang et al., ICML 2024). Its division of s
  by sqrt(min * max) scales the objective as a whole, which changes no optimum, and is left out.
"""


def without_channels(weight: Tensor, channels: Tensor) -> Tensor:
    """A copy of weight (N, K) with the given columns set to zero: what the base quantizer sees."""
    kept = weight.clone()
    kept[:, channels.to(weight.device)] = 0
    return kept


def fit_shared_expert(error: Tensor, moment: Tensor, rank: int, *, seed: int) -> LowRankExpert:
    """Whitened SVD of error (N, K), as it acts on x. -> rank-r expert on x, float64.

    moment (K, K), or (K,) for a diagonal one (`MOMENTS`), is that of x. Where the input is smoothed or rotated, the
    caller brings the error W' - Q(W') back to x and the expert forth: the same optimum (docs/math.md) without a second
    matrix of K x K.
    """
    return fit_low_rank(error, moment, rank, seed=seed)
