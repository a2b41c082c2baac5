"""How experts' factors are stacked in GPU memory, for integer and for weight-only kernels alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.kernels.operands import Factor

RANK_MULTIPLE = 32
"""The least rank of a stacked factor: one step of the linear kernel."""
ROTATIONS = (16, 32, 64, 128)
"""Sizes of rotated blocks that the kernels rotate."""


def stack_factors(shared: Factor | None, routed: Factor | None, rank_dim: int) -> Tensor | None:
    """Shared (...) and routed (E, ...) factors -> (F, ...) float32, rank padded with zeros to a power of two."""
    parts = [factor.float() for factor in (shared, routed) if factor is not None]
    if not parts:
        return None
    parts = [part[None] if part.dim() == 2 else part for part in parts]
    rank = max(part.shape[rank_dim] for part in parts)
    rank = 1 << max(RANK_MULTIPLE - 1, rank - 1).bit_length()

    def pad(part: Tensor) -> Tensor:
        missing = rank - part.shape[rank_dim]
        return functional.pad(part, (0, missing) if rank_dim == 2 else (0, 0, 0, missing))

    return torch.cat([pad(part) for part in parts])


def headroom_of(largest: float) -> float:
    """The power of two in units of which hidden values of at most `largest` fit float16; 1 if there are none."""
    return 2.0 ** (math.ceil(math.log2(largest)) - 15) if largest > 0 else 1.0
