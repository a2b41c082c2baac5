"""SmoothQuant (Xiao et al., ICML 2023): moves part of the activations' range into the weights, channel by channel.

The paper folds the scale into the normalisation before q, k, v and before gate, up. Ours: every input group is
smoothed, because the scale is stored with the group and divides its input whatever produced it.
"""

from __future__ import annotations

from torch import Tensor


def smoothquant_scale(absmax: Tensor, weight: Tensor, strength: float = 0.5) -> Tensor:
    """s_j = max|x_j|^a / max|W_:j|^(1 - a), a = strength (equation 4); the input is divided by it. -> (K,) float32.

    absmax (K,) over calibration tokens, weight (N, K), any float dtypes. Ours: a channel that is zero in tokens or in
    weights has nothing to move and keeps 1. NaN passes through.
    """
    columns = weight.abs().amax(dim=0).double()
    absmax = absmax.double()
    scale = absmax.pow(strength) / columns.pow(1 - strength)
    scale[(absmax == 0) | (columns == 0)] = 1
    return scale.float()
