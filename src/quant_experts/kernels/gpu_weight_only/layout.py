"""How operands of weight-only schemes lie in GPU memory: made once after loading, from what files hold.

Weights. Codes take 3 or 4 bits, as few as hold those of the whole group. A step of the kernel is 32 words of 16 bits
a row: 128 input channels of 4 bits, or 256 of 3 bits, whose low two bits are in the words and whose third bits are in a
second tensor of 32 bytes. Word (or byte) j of a step holds channels j, 32 + j, 64 + j, ..., least significant first, so
that words unpack into matrices of 32 neighbouring channels without moving values between threads. Steps are outermost,
(Kp / step, N, 32): a tile of consecutive rows is one contiguous piece of memory. Channels are padded to a multiple of
256 with activations of zero.

Scales. One 32-bit word a group and row: in float16 the group's scale over the row's, a power of two that makes it at
most one, and the code that stands for zero plus 1024. Stored group scales are bfloat16, whose 8 bits float16 holds,
down to 2^-14 of the row's largest; smaller ones are off by at most 2^-25 of that.

Experts. The shared expert, if any, and the routed ones are stacked into F factors of one rank R, padded with zeros to a
power of two, at least 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.kernels.gpu.factors import ROTATIONS, headroom_of, stack_factors
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared
from quant_experts.kernels.reference import hadamard

PIECE = 32
"""Input channels of one matrix product."""
BLOCK = 256
"""Input channels are padded to a multiple of this."""
MIN_EXPERTS = 16
"""Least columns of a matrix product."""
PAIRS_ALIGNED = 4
"""Rows of scales begin at multiples of 16 bytes, for the bulk copy engine."""
EXPONENT = 1024
"""Float16 numbers from here to 2047 are this plus their low bits."""


@dataclass(frozen=True)
class GroupLayout:
    """`GroupOperands` on the GPU."""

    inverse: Tensor | None
    """(K,) float32: 1 / m"""
    rotation: int
    signs: Tensor | None
    """(rotation, rotation) float16, the Hadamard matrix; None where the kernel does not rotate"""
    down: Tensor | None
    """(F R, Kp) float16"""
    router_weight: Tensor | None
    """(EP, Kp) float16, EP = E padded"""
    router_bias: Tensor | None
    """(E,) float32"""
    factors: int
    """F, the shared and the routed experts together"""
    experts: int
    """E, the routed ones"""
    headroom: float
    """A power of two: |down z| <= headroom * 2^15 for any z of a token below 4, rotated or not, so that hidden values
    fit float16."""


@dataclass(frozen=True)
class LinearLayout:
    """`LinearOperands` on the GPU, of one linear or of all linears of a group stacked."""

    low: Tensor
    """(Kp / step, N, 32) int16: four codes of 4 bits, or the low two bits of eight codes of 3"""
    high: Tensor | None
    """(Kp / 256, N, 32) int8: third bits of eight codes; None for 4 bits"""
    pairs: Tensor
    """(G, N, padded to a multiple of 4) int32: scale / row scale (low half) and 1024 + code of zero (high half), both
    float16"""
    pieces: int
    """Pieces of 32 input channels that share a scale"""
    scale: Tensor
    """(N,) float32, the row scales"""
    unit: Tensor
    """(N,) float32 powers of two: outputs in these units, times the token's, fit float16"""
    up: Tensor | None
    """(F, N, R) float16"""
    bias: Tensor | None
    """(N,) float32"""

    @property
    def bits(self) -> int:
        return 4 if self.high is None else 3

    @property
    def out_features(self) -> int:
        return len(self.scale)


@dataclass(frozen=True)
class Tokens(Prepared):
    """`Prepared` on the GPU; `values` are (M, Kp + F R) float16: the input in units of each token and, behind it, its
    hidden values of all factors in those units times the layout's headroom."""

    unit: Tensor | None = None
    """(M,) float32 powers of two, NaN for a token that is not finite"""
    padded: int = 0
    """Kp"""
    headroom: float = 1.0
    experts: int = 0
    dtype: torch.dtype = torch.float32
    """Of the input, and so of the output."""


def fits_groups(group_size: int | None) -> bool:
    """Whether a scale serves whole pieces, and a step whole groups or the other way round."""
    return group_size is None or (group_size % PIECE == 0 and (group_size % BLOCK == 0 or BLOCK % group_size == 0))


def pack_codes(codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """codes (N, K) int8 in [-8, 7] -> low and high of `LinearLayout`; 3 bits if all are in [-4, 3]."""
    rows, columns = codes.shape
    narrow = not codes.numel() or (int(codes.min()) >= -4 and int(codes.max()) < 4)
    bits, count = (3, 8) if narrow else (4, 4)
    padded = functional.pad(codes, (0, max(1, -(-columns // BLOCK)) * BLOCK - columns))
    values = padded.int().add_(1 << (bits - 1)).view(rows, -1, count, PIECE).transpose(0, 1)  # (steps, N, count, 32)
    place = torch.arange(count, dtype=torch.int32, device=codes.device)[:, None]
    if not narrow:
        return (values << 4 * place).sum(2, dtype=torch.int32).to(torch.int16), None
    low = ((values & 3) << 2 * place).sum(2, dtype=torch.int32).to(torch.int16)
    return low, ((values >> 2) << place).sum(2, dtype=torch.int32).to(torch.int8)


def unpack_codes(low: Tensor, high: Tensor | None, columns: int) -> Tensor:
    """The inverse of `pack_codes`: -> (N, K) int8."""
    bits, count = (4, 4) if high is None else (3, 8)
    place = torch.arange(count, dtype=torch.int32, device=low.device)[:, None]
    words = low.int()[:, :, None]
    values = (words >> 4 * place) & 15
    if high is not None:
        values = ((words >> 2 * place) & 3) | (((high.int()[:, :, None] >> place) & 1) << 2)
    values = (values - (1 << (bits - 1))).to(torch.int8)
    return values.transpose(0, 1).reshape(low.shape[1], -1)[:, :columns].contiguous()


def pack_scales(scale: Tensor, zero_point: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """scale (N, G) float32, zero_point (N, G) int8 -> pairs (G, N) int32, row scales (N,) float32."""
    if scale.shape[1] == 1:  # exact in any case
        row, relative = scale[:, 0], torch.ones_like(scale)
    else:
        largest = scale.abs().amax(dim=1)
        row = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent)
        relative = scale / row[:, None]
    offset = torch.full_like(scale, EXPONENT + (1 << (bits - 1)))
    if zero_point is not None:
        offset += zero_point
    pairs = torch.stack([relative.half(), offset.half()], dim=-1).transpose(0, 1).contiguous()
    return pairs.view(torch.int32)[..., 0], row.contiguous()


def pack_group(group: GroupOperands, columns: int, device: torch.device) -> GroupLayout:
    """Pad and stack a group's tensors; columns: K. Reads values on the host: call it once, after loading."""
    missing = max(1, -(-columns // BLOCK)) * BLOCK - columns
    down, router = stack_factors(group.shared_down, group.routed_down, 1), group.router_weight
    factors, headroom = 0 if down is None else len(down), 1.0
    if down is not None:
        largest = 4 * max(1, group.rotation) ** 0.5 * float(down.abs().sum(dim=2).max()) if down.numel() else 0.0
        headroom = headroom_of(largest)
        down = functional.pad(down.half(), (0, missing)).flatten(0, 1).contiguous()
    if router is not None:
        padded = max(MIN_EXPERTS, 1 << (len(router) - 1).bit_length())
        router = functional.pad(router.half(), (0, missing, 0, padded - len(router))).contiguous()
    signs = None
    if group.rotation in ROTATIONS and router is None:  # a router reads rotated values in float32
        signs = (hadamard(group.rotation, device) * group.rotation**0.5).round().half()
    return GroupLayout(
        inverse=None if group.smooth_scale is None else group.smooth_scale.float().reciprocal().contiguous(),
        rotation=group.rotation,
        signs=signs,
        down=down,
        router_weight=router,
        router_bias=None if group.router_bias is None else group.router_bias.float().contiguous(),
        factors=factors,
        experts=0 if group.router_weight is None else len(group.router_weight),
        headroom=headroom,
    )


def output_units(scale: Tensor, up: Tensor | None, columns: int, headroom: float) -> Tensor:
    """Row scales (N,), up factors (F, N, R), K -> (N,) powers of two above 2^-15 of any output of the row.

    A token in its unit is below 2 sqrt(K) in the Euclidean norm, rotated or not, a row of weights at most 15 scale
    sqrt(K): zero points reach from one end of the codes to the other. A token uses two factors at most.
    """
    largest = 30 * columns * scale.abs()
    if up is not None:
        largest = largest + up.float().abs().sum(dim=2).amax(dim=0) * (min(2, len(up)) * headroom * 2**15)
    return torch.ldexp(torch.ones_like(largest), torch.frexp(largest / 2**15).exponent)


def pack_linear(linears: list[LinearOperands], headroom: float) -> LinearLayout:
    """Stack the linears of one group along their output channels; headroom: the group's. Reads codes on the host."""
    codes = torch.cat([linear.codes for linear in linears])
    low, high = pack_codes(codes)
    scale = torch.cat([linear.scale.float() for linear in linears])
    zeros = [linear.zero_point for linear in linears if linear.zero_point is not None]
    zero_point = torch.cat(zeros) if zeros else None  # a scheme's: all of them or none
    pairs, row_scale = pack_scales(scale, zero_point, 4 if high is None else 3)
    ups = [f for linear in linears if (f := stack_factors(linear.shared_up, linear.routed_up, 2)) is not None]
    up = torch.cat(ups, dim=1).half().contiguous() if ups else None
    biases = [linear.scale.new_zeros(len(linear.codes)) if linear.bias is None else linear.bias for linear in linears]
    one_scale = len(pairs) == 1
    size = 1 << 30 if one_scale else linears[0].group_size
    assert size is not None, "several scales a row are those of groups"
    channels = -(-codes.shape[1] // BLOCK) * BLOCK
    groups_of_padding = 0 if one_scale else max(0, -(-channels // size) - len(pairs))
    pairs = functional.pad(pairs, (0, -pairs.shape[1] % PAIRS_ALIGNED, 0, groups_of_padding))
    return LinearLayout(
        low=low,
        high=high,
        pairs=pairs,
        pieces=size // PIECE,
        scale=row_scale,
        unit=output_units(row_scale, up, codes.shape[1], headroom),
        up=up,
        bias=None if all(linear.bias is None for linear in linears) else torch.cat(biases).detach().float(),
    )
