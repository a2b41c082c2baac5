"""How operands lie in GPU memory: made once after loading, from what files hold.

Weights. Two 4-bit codes to a byte. Input channels are padded with zeros to a multiple of 128; of each block of 128,
byte j holds channel j in its low half and channel 64 + j in its high half, so that both halves unpack without moving
values between threads. Blocks are outermost, (K / 128, N, 64): a tile of consecutive rows is one contiguous piece of
memory.

Experts. The shared expert, if any, and the routed ones are stacked into F factors of one rank R, padded with zeros to
a power of two, at least 32. `hidden` (M, F R) holds zeros for the experts that a token does not use, so that a product
over the columns of any factor is right for every token of a tile, whatever their experts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands, Prepared

BLOCK = 128
"""Input channels are padded to a multiple of this."""
RANK_MULTIPLE = 32
"""The least rank of a stacked factor: one step of the linear kernel."""
MAX_FACTORS = 31
"""The factors that serve a block of tokens are bits of an int32."""
MASK_TOKENS = 16
"""Tokens per such int32."""


@dataclass(frozen=True)
class GroupLayout:
    """`GroupOperands` on the GPU."""

    activation_bits: int
    rotation: int
    smooth_scale: Tensor | None
    """(2, K) float32: m and 1 / m"""
    down: Tensor | None
    """(F, R, Kp) float16; of a shared expert that reads codes (1, R, Kp) int8"""
    router_weight: Tensor | None
    """(EP, Kp) float16, EP = E padded"""
    router_bias: Tensor | None
    """(E,) float32"""
    factors: int
    """F, the shared and the routed experts together"""
    experts: int
    """E, the routed ones"""
    headroom: float
    """A power of two: |down x| <= headroom * max|x| * 2^15 for any x, so that hidden values fit float16; max|x| is the
    token's scale where the expert reads codes."""
    code_scale: Tensor | None = None
    """(R,) float32, the scales of int8 down factors over the headroom; None unless codes are read."""


@dataclass(frozen=True)
class LinearLayout:
    """`LinearOperands` on the GPU, of one linear or of all linears of a group stacked."""

    weight: Tensor
    """(Kp / 128, N, 64) int8, two codes to a byte"""
    scale: Tensor
    """(N,) float32"""
    up: Tensor | None
    """(F, N, R) float16"""
    bias: Tensor | None
    """(N,) float32"""

    @property
    def out_features(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class Tokens(Prepared):
    """`Prepared` on the GPU. Rows are sorted by expert where `order` is given: row i is token order[i]."""

    hidden: Tensor | None = None
    """(M, F R) float16, in units of each token's hidden scale, zero for experts that the token does not use"""
    scales: Tensor | None = None
    """(2, M) float32: token scale / hidden scale, hidden scale"""
    present: Tensor | None = None
    """(ceil(M / 16),) int32: bit f is set where factor f serves one of those tokens"""
    order: Tensor | None = None
    """(M,) int32"""
    pending: int = 0
    """How many programs of a kernel that may still run have yet to write `hidden` and `present`: see `apply` of the
    backend. 0 when all is written."""
    dtype: torch.dtype = torch.float32
    """Of the input, and so of the output."""


def pack_codes(codes: Tensor) -> Tensor:
    """codes (N, K) int8 in [-8, 7] -> (Kp / 128, N, 64) int8."""
    rows, columns = codes.shape
    blocks = max(1, -(-columns // BLOCK))
    padded = functional.pad(codes, (0, blocks * BLOCK - columns)).view(rows, blocks, 2, BLOCK // 2)
    low, high = padded[:, :, 0].transpose(0, 1), padded[:, :, 1].transpose(0, 1)
    return ((high << 4) | (low & 15)).contiguous()


def unpack_codes(weight: Tensor, columns: int) -> Tensor:
    """The inverse of `pack_codes`: -> (N, K) int8."""
    halves = torch.stack(((weight << 4) >> 4, weight >> 4), dim=2)  # (blocks, N, 2, 64)
    return halves.transpose(0, 1).reshape(weight.shape[1], -1)[:, :columns].contiguous()


def _stack(shared: Factor | None, routed: Factor | None, rank_dim: int) -> Tensor | None:
    """Shared (...) and routed (E, ...) factors -> (F, ...) float32, rank padded with zeros."""
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


def padded_experts(experts: int) -> int:
    """Experts as the router's matrix product counts them: a power of two, at least 16."""
    return 1 << max(15, experts - 1).bit_length()


def _pad_router(weight: Tensor) -> Tensor:
    """(E, K) -> (EP, Kp) float16."""
    empty = padded_experts(len(weight)) - len(weight)
    return functional.pad(weight.half(), (0, -weight.shape[1] % BLOCK, 0, empty)).contiguous()


def pack_group(group: GroupOperands) -> GroupLayout:
    """Pad and stack a group's tensors. Reads values on the host: call it once, after loading."""
    down = _stack(group.shared_down, group.routed_down, 1)
    router, bias = group.router_weight, group.router_bias
    headroom, code_scale = 1.0, None
    if down is not None:
        missing = -down.shape[2] % BLOCK
        largest_sum = float(down.abs().sum(dim=2).max()) if down.numel() else 0.0
        if group.shared_reads_codes:
            assert group.shared_down is not None and group.shared_down.scale is not None
            largest_sum *= 2 ** (group.activation_bits - 1)
            codes, scale = group.shared_down.values, group.shared_down.scale.float()
            rank = down.shape[1] - len(codes)
            down = functional.pad(codes, (0, 0, 0, rank))[None]
            code_scale = functional.pad(scale, (0, rank))
        headroom = 2.0 ** (math.ceil(math.log2(max(largest_sum, 1e-20))) - 15)
        down = functional.pad(down if code_scale is not None else down.half(), (0, missing)).contiguous()
        code_scale = None if code_scale is None else code_scale / headroom
    m = None if group.smooth_scale is None else group.smooth_scale.float()
    return GroupLayout(
        activation_bits=group.activation_bits,
        rotation=group.rotation,
        smooth_scale=None if m is None else torch.stack([m, torch.ones_like(m) / m]),
        down=down,
        router_weight=None if router is None else _pad_router(router),
        router_bias=None if bias is None else bias.float().contiguous(),
        factors=0 if down is None else len(down),
        experts=0 if router is None else len(router),
        headroom=headroom,
        code_scale=code_scale,
    )


def pack_linear(linears: list[LinearOperands]) -> LinearLayout:
    """Stack the linears of one group along their output channels."""

    def column(values: list[Tensor | None], sizes: list[int]) -> Tensor | None:
        if all(v is None for v in values):
            return None
        device = linears[0].codes.device
        pairs = zip(values, sizes, strict=True)
        return torch.cat([torch.zeros(n, device=device) if v is None else v.detach().float() for v, n in pairs])

    sizes = [len(linear.codes) for linear in linears]
    ups = [_stack(linear.shared_up, linear.routed_up, 2) for linear in linears]
    up = (
        None if any(u is None for u in ups) else torch.cat([u for u in ups if u is not None], dim=1).half().contiguous()
    )
    scale = torch.cat([linear.scale[:, 0].float() for linear in linears]).contiguous()
    weight = pack_codes(torch.cat([linear.codes for linear in linears]))
    return LinearLayout(weight, scale, up, column([linear.bias for linear in linears], sizes))
