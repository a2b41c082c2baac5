"""Which input channels matter, for how many tokens (paper, steps 1 and 2), and the scale that tames the steadiest of
them."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import GroupStatistics


def channel_counts(statistics: GroupStatistics) -> Tensor:
    """m_c: the number of tokens for which channel c is important -> (K,) int64, on the CPU."""
    return torch.bincount(statistics.important.flatten().long(), minlength=len(statistics.mean_abs))


def partition_channels(counts: Tensor, exempt: int, dependent: int) -> tuple[Tensor, Tensor]:
    """Token-independent channels C_s (the `exempt` most often important) and token-dependent ones C_r (the next
    `dependent`).

    The paper sorts by f_c = k m_c / sum m; the order is that of the counts (K,). Equal counts keep the channels' order.
    """
    order = torch.sort(counts, descending=True, stable=True).indices
    return order[:exempt], order[exempt : exempt + dependent]


def magnitude_channels(statistics: GroupStatistics, mean_abs_weight: Tensor, count: int) -> Tensor:
    """ASER's outlier channels: the `count` largest mean|x_c| * mean|W_:c|. -> (count,) int64."""
    score = statistics.mean_abs * mean_abs_weight.double().to(statistics.mean_abs.device)
    return torch.sort(score, descending=True, stable=True).indices[:count].cpu()


def smoothing_scale(mean_abs: Tensor, channels: Tensor) -> Tensor:
    """m (K,) float32: mean|x_i| / min over C_s of mean|x| for i in C_s, 1 elsewhere (paper step 3; ASER).

    Channels that are always zero keep 1, and do not count as the minimum.
    """
    scale = torch.ones_like(mean_abs)
    chosen = mean_abs[channels]
    if (chosen > 0).any():
        scale[channels] = torch.where(chosen > 0, chosen / chosen[chosen > 0].min(), torch.ones_like(chosen))
    return scale.float()
