"""What every backend is given and hands on. One shape of operands for all backends is what makes them interchangeable.

Letters: M tokens, K input channels, N output channels, R rank, E routed experts, G quantization groups along K.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quant_experts.config import ActivationFormat


@dataclass(frozen=True)
class Factor:
    """A matrix of an expert as it is stored; `factor[e]` is expert e's where there is a leading expert axis."""

    values: Tensor
    """(..., rows, columns) float16, or int8 codes"""
    scale: Tensor | None
    """(..., rows) float32 of int8 codes; None for float16"""

    def float(self) -> Tensor:
        """The values in float32."""
        values = self.values.float()
        return values if self.scale is None else values.mul_(self.scale[..., None])

    def __getitem__(self, expert: int) -> Factor:
        return Factor(self.values[expert], None if self.scale is None else self.scale[expert])

    def __len__(self) -> int:
        return len(self.values)

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        return self.values.shape


@dataclass(frozen=True)
class GroupOperands:
    """What depends on a group's input only."""

    activation_bits: int
    """4 to 8, or 16 when the weights alone are quantized."""
    smooth_scale: Tensor | None
    """(K,) float32"""
    rotation: int
    """Size of the blocks of channels that a Hadamard rotation mixes after smoothing; it divides K. 0 for none."""
    shared_down: Factor | None
    """(R, K)"""
    routed_down: Factor | None
    """(E, R, K)"""
    router_weight: Tensor | None
    """(E, K)"""
    router_bias: Tensor | None
    """(E,)"""
    shared_reads_codes: bool = False
    """Whether the shared expert multiplies activation codes instead of values; its factors are int8 then."""
    activation_format: ActivationFormat = "int"
    """What activation codes are where `activation_bits` is below 16; fp8 codes have 8 bits."""


@dataclass(frozen=True)
class LinearOperands:
    """What belongs to one linear of a group."""

    codes: Tensor
    """(N, K) int8"""
    scale: Tensor
    """(N, G) float32"""
    zero_point: Tensor | None
    """(N, G) int8; None when all are zero"""
    group_size: int | None
    shared_up: Factor | None
    """(N, R)"""
    routed_up: Factor | None
    """(E, N, R)"""
    bias: Tensor | None
    """(N,)"""


@dataclass(frozen=True)
class Prepared:
    """A group's input after smoothing, rotation, quantization, routing and down projection: computed once, read by each
    linear."""

    values: Tensor | None
    """(M, K) float32 smoothed and rotated input; kept for weight-only schemes, None otherwise."""
    codes: Tensor | None
    """(M, K) activation codes, int8 or float8_e4m3fn by the group's format; None for weight-only schemes."""
    token_scale: Tensor | None
    """(M, 1) float32, NaN for a token that holds a non-finite value."""
    shared_hidden: Tensor | None
    """(M, R) float32"""
    routed_hidden: Tensor | None
    """(M, R) float32, from the expert of each token"""
    expert: Tensor | None
    """(M,) int64"""
    restore: Tensor | None = None
    """(M,) int64: output row i is row restore[i] here. None when rows keep their order. Backends that sort tokens by
    expert use it; `linear` puts rows back."""
