"""Round to nearest on the field's integer grids (thu-nics/MBQ), the base of every other method."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import QuantizedWeight
from quant_experts.config import Scheme


def quantize_rtn(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """weight (N, K), any float dtype -> its codes.

    Symmetric: scale = absmax / (2^(b-1) - 1), codes clamped to [-2^(b-1), 2^(b-1) - 1]. Asymmetric: scale = (max - min)
    / (2^b - 1), zero = clamp(round(-min / scale), 0, 2^b - 1). Groups of all-zero weights have scale 1; ours: the grid
    of a group whose weights are all equal reaches to 0.
    """
    rows, columns = weight.shape
    size = scheme.group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, columns, size):
        part = weight[:, start : start + size].float()
        scale, zero = group_grid(part, scheme)
        codes[:, start : start + size] = round_to_grid(part, scale, zero, scheme.weight_bits)
        scales.append(scale)
        zeros.append(zero)
    return QuantizedWeight(
        codes=codes,
        scale=torch.cat(scales, dim=1),
        zero_point=None if scheme.symmetric else torch.cat(zeros, dim=1).to(torch.int8),
        bits=scheme.weight_bits,
        group_size=scheme.group_size,
    )


def group_grid(part: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Scale and signed zero point, each (N, 1) float32, of the grid for part (N, G) float32."""
    bits = scheme.weight_bits
    if scheme.symmetric:
        scale = part.abs().amax(dim=1, keepdim=True) / (2 ** (bits - 1) - 1)
        return torch.where(scale > 0, scale, torch.ones_like(scale)), torch.zeros_like(scale)
    low, high = part.aminmax(dim=1, keepdim=True)
    # The field's grid does not need to hold 0; a constant group would then have no width, so for it alone the grid
    # does.
    constant = low == high
    low, high = torch.where(constant, low.clamp_max(0), low), torch.where(constant, high.clamp_min(0), high)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(0, 2**bits - 1)
    return scale, zero - 2 ** (bits - 1)


def round_to_grid(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Nearest signed codes of values (N, G) -> (N, G) int8."""
    half = 2 ** (bits - 1)
    return (torch.round(values / scale) + zero).clamp(-half, half - 1).to(torch.int8)


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
