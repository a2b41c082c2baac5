"""Round to nearest, the base of every other method."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import QuantizedWeight
from quant_experts.config import Scheme
from quant_experts.quantizers.grids import clipped_grid, group_grid, round_to_grid


def quantize_rtn(weight: Tensor, scheme: Scheme, energy: Tensor | None = None) -> QuantizedWeight:
    """weight (N, K), any float dtype -> its codes on the grids of `grids.group_grid`.

    With energy (K,), the mean x^2 of each input channel, the range of each grid is searched (`grids.clipped_grid`).
    """
    rows, columns = weight.shape
    size = scheme.group_size or columns
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    scales, zeros = [], []
    for start in range(0, columns, size):
        part = weight[:, start : start + size].float()
        if energy is None:
            scale, zero = group_grid(part, scheme)
        else:
            scale, zero = clipped_grid(part, energy[start : start + size], scheme)
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
