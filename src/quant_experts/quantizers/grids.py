"""The field's integer grids (thu-nics/MBQ), on which every base quantizer rounds."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import QuantizedWeight
from quant_experts.checkpoint.schema import scale_dtype
from quant_experts.config import Scheme

CLIP_STEPS = 20
"""How many narrower ranges a clip search tries, down to half of the full one."""


def group_grid(part: Tensor, scheme: Scheme, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Scale and signed zero point, each (N, 1), of the grid for part (N, G), over `share` of its range.

    Symmetric: scale = absmax / (2^(b-1) - 1). Asymmetric: scale = (max - min) / (2^b - 1), zero = clamp(round(-min /
    scale), 0, 2^b - 1). Groups of all-zero weights have scale 1. Ours: the grid of a group whose weights are all equal
    reaches to 0; and a scale has the precision in which it is stored, so that zero point and codes are chosen for it.
    """
    bits = scheme.weight_bits
    if scheme.symmetric:
        scale = _as_stored(part.abs().amax(dim=1, keepdim=True) * (share / (2 ** (bits - 1) - 1)), scheme)
        return scale, torch.zeros_like(scale)
    low, high = part.aminmax(dim=1, keepdim=True)
    # The field's grid does not need to hold 0; a constant group would then have no width, so for it alone the grid
    # does.
    constant = low == high
    low, high = torch.where(constant, low.clamp_max(0), low), torch.where(constant, high.clamp_min(0), high)
    low, high = low * share, high * share
    scale = _as_stored((high - low) / (2**bits - 1), scheme)
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero - 2 ** (bits - 1)


def _as_stored(scale: Tensor, scheme: Scheme) -> Tensor:
    """The scale, float32, rounded to what the format holds; 1 where that is 0."""
    stored = scale.to(scale_dtype(scheme.group_size)).float()
    return torch.where(stored > 0, stored, torch.ones_like(stored))


def clipped_grid(part: Tensor, energy: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """As `group_grid`, over the share of each row's range that leaves the least sum of energy * (rounding error)^2.

    energy (G,) is the mean x^2 of each input channel. Few weights reach the ends of a range, and a finer step for all
    others is worth more than they are (OMSE; OmniQuant and AWQ clip for the same reason).
    """
    best_scale, best_zero = group_grid(part, scheme)
    least = torch.full_like(best_scale, torch.inf)
    for step in range(CLIP_STEPS + 1):
        scale, zero = group_grid(part, scheme, 1 - step / (2 * CLIP_STEPS))
        error = (from_grid(round_to_grid(part, scale, zero, scheme.weight_bits), scale, zero) - part).square_()
        loss = (error @ energy.to(error))[:, None]
        better = loss < least
        least = torch.where(better, loss, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero


def round_to_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest signed codes of values (N, G) -> (N, G) int8."""
    half = 2 ** (bits - 1)
    return (torch.round(values / scale) + zero).clamp(-half, half - 1).to(torch.int8)


def from_grid(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """(codes - zero) * scale, in the scale's dtype."""
    return (codes.to(scale.dtype) - zero) * scale


def dequantize(weight: QuantizedWeight) -> Tensor:
    """(codes - zero) * scale -> (N, K) float32."""
    size = weight.group_size or weight.codes.shape[1]
    values = weight.codes.float()
    for g, start in enumerate(range(0, values.shape[1], size)):
        part = values[:, start : start + size]
        if weight.zero_point is not None:
            part -= weight.zero_point[:, g, None]
        part *= weight.scale[:, g, None]
    return values
