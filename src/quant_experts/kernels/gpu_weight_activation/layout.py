"""How weights lie in GPU memory: made once after loading, from what files hold. Tokens and experts:
`gpu_tokens.layout`.

Weights. Two 4-bit codes to a byte. Input channels are padded with zeros to a multiple of 128; of each block of 128,
byte j holds channel j in its low half and channel 64 + j in its high half, so that both halves unpack without moving
values between threads. Blocks are outermost, (K / 128, N, 64): a tile of consecutive rows is one contiguous piece of
memory. Beside fp8 tokens a code c is its zigzag number, 2 c or -2 c - 1, from which the bits of an e4m3 number are few
steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.config import ActivationFormat
from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.gpu.caching import CopiedByFields
from quant_experts.kernels.gpu.factors import stack_factors
from quant_experts.kernels.gpu_tokens.layout import BLOCK
from quant_experts.kernels.operands import LinearOperands

MAX_CHANNELS = (2**31 - 1) // (16 * 8 * 127)
"""Input channels whose products, 16 times those of codes, an int32 sum holds whatever the codes."""


@dataclass(frozen=True)
class LinearLayout(CopiedByFields):
    """`LinearOperands` on the GPU, of one linear or of all linears of a group stacked."""

    weight: Tensor
    """(Kp / 128, N, 64) int8, two codes to a byte; zigzag numbers for fp8 tokens"""
    scale: Tensor
    """(N,) float32"""
    up: Tensor | None
    """(F, N, R) float16"""
    bias: Tensor | None
    """(N,) float32"""

    @cached_property
    def out_features(self) -> int:
        return self.weight.shape[1]

    @cached_property
    def descriptors(self) -> dict[Any, Any]:
        """Views of weights for the copy engine, kept by who launches: making one takes as long as a launch."""
        return {}


def pack_codes(codes: Tensor) -> Tensor:
    """codes (N, K) int8, of which the lowest four bits count -> (Kp / 128, N, 64) int8."""
    rows, columns = codes.shape
    blocks = max(1, -(-columns // BLOCK))
    padded = functional.pad(codes, (0, blocks * BLOCK - columns)).view(rows, blocks, 2, BLOCK // 2)
    low, high = padded[:, :, 0].transpose(0, 1), padded[:, :, 1].transpose(0, 1)
    return ((high << 4) | (low & 15)).contiguous()


def zigzag(codes: Tensor) -> Tensor:
    """int8 codes in [-8, 7] -> 0 to 15: the sign becomes the lowest bit, the other bits of a negative code are
    inverted."""
    return (codes << 1) ^ (codes >> 7)


def unzigzag(codes: Tensor) -> Tensor:
    """The inverse of `zigzag`, of the lowest four bits."""
    return ((codes & 15) >> 1) ^ -(codes & 1)


def unpack_codes(weight: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_codes`: -> (N, K) int8 in [-8, 7]."""
    halves = torch.stack(((weight << 4) >> 4, weight >> 4), dim=2)  # (blocks, N, 2, 64)
    return halves.transpose(0, 1).reshape(weight.shape[1], -1)[:, :columns].contiguous()


def pack_linear(linears: list[LinearOperands], activation_format: ActivationFormat = "int") -> LinearLayout:
    """Stack the linears of one group along their output channels, for tokens of a format.

    Raises `QuantExpertsError` for more input channels than integer sums hold.
    """
    columns = linears[0].codes.shape[1]
    if columns > MAX_CHANNELS:
        raise QuantExpertsError(
            f"The GPU kernels take up to {MAX_CHANNELS} input channels, whose sums fit 32 bits, and here are "
            f"{columns}: load the model with backend='reference'."
        )

    def column(values: list[Tensor | None], sizes: list[int]) -> Tensor | None:
        if all(v is None for v in values):
            return None
        device = linears[0].codes.device
        pairs = zip(values, sizes, strict=True)
        return torch.cat([torch.zeros(n, device=device) if v is None else v.detach().float() for v, n in pairs])

    sizes = [len(linear.codes) for linear in linears]
    ups = [stack_factors(linear.shared_up, linear.routed_up, 2) for linear in linears]
    up = (
        None if any(u is None for u in ups) else torch.cat([u for u in ups if u is not None], dim=1).half().contiguous()
    )
    scale = torch.cat([linear.scale[:, 0].float() for linear in linears]).contiguous()
    codes = torch.cat([linear.codes for linear in linears])
    weight = pack_codes(zigzag(codes) if activation_format == "fp8" else codes)
    return LinearLayout(weight, scale, up, column([linear.bias for linear in linears], sizes))
