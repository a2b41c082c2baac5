"""How weights of weight-only schemes lie in GPU memory: made once after loading, from what files hold. Tokens and
experts: `gpu_tokens.layout`.

Weights. Codes take 3 or 4 bits, as few as hold those of the whole group. A step of the kernel is 32 words of 16 bits
a row: 128 input channels of 4 bits, or 256 of 3 bits, whose low two bits are in the words and whose third bits are in a
second tensor of 32 bytes. Word (or byte) j of a step holds channels j, 32 + j, 64 + j, ..., least significant first, so
that words unpack into matrices of 32 neighbouring channels without moving values between threads. Steps are outermost,
(Kp / step, N, 32): a tile of consecutive rows is one contiguous piece of memory. Channels are padded to a multiple of
256 with activations of zero.

Scales. One 32-bit word a group and row: in float16 the group's scale over the row's, a power of two that makes it at
most one, and the code that stands for zero plus 1024. Stored group scales are bfloat16, whose 8 bits float16 holds,
down to 2^-14 of the row's largest; smaller ones are off by at most 2^-25 of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from quant_experts.kernels.gpu.factors import stack_factors
from quant_experts.kernels.gpu_tokens.layout import VALUE_BLOCK
from quant_experts.kernels.operands import LinearOperands

PIECE = 32
"""Input channels of one matrix product."""
PAIRS_ALIGNED = 4
"""Rows of scales begin at multiples of 16 bytes, for the bulk copy engine."""
EXPONENT = 1024
"""Float16 numbers from here to 2047 are this plus their low bits."""


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


def fits_groups(group_size: int | None) -> bool:
    """Whether a scale serves whole pieces, and a step whole groups or the other way round."""
    if group_size is None:
        return True
    return group_size % PIECE == 0 and 0 in (group_size % VALUE_BLOCK, VALUE_BLOCK % group_size)


def pack_codes(codes: Tensor) -> tuple[Tensor, Tensor | None]:
    """codes (N, K) int8 in [-8, 7] -> low and high of `LinearLayout`; 3 bits if all are in [-4, 3]."""
    rows, columns = codes.shape
    narrow = not codes.numel() or (int(codes.min()) >= -4 and int(codes.max()) < 4)
    bits, count = (3, 8) if narrow else (4, 4)
    padded = functional.pad(codes, (0, max(1, -(-columns // VALUE_BLOCK)) * VALUE_BLOCK - columns))
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


def output_units(scale: Tensor, up: Tensor | None, columns: int, headroom: float) -> Tensor:
    """Row scales (N,), up factors (F, N, R), K -> (N,) powers of two above 2^-15 of any output of the row.

    A token in its unit is below 2 sqrt(K) in the Euclidean norm, a row of weights at most 15 scale
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
    channels = -(-codes.shape[1] // VALUE_BLOCK) * VALUE_BLOCK
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
