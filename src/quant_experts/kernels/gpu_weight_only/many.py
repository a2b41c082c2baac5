"""Weight-only linears of many tokens: weights are written to memory in float16, slab by slab of output channels, and
multiplied by the GPU's library, where unpacking on the way is slower. `dequantize_rows` writes a slab,
`rescale` finishes its outputs. Experts are more channels of the same product: hidden values are put behind a token's
values and up factors behind a row's weights. On Hopper GPUs only weights of 3 bits go this way (`hopper_linear`).

Outputs of the product are float16, in units of their row and token in which they fit: see
`gpu_weight_only.layout.output_units`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.tokens import wait_for_previous_kernel
from quant_experts.kernels.gpu_weight_only.codes import scale_and_offset, unpack3, unpack4

PIECE = tl.constexpr(32)
"""Input channels of a word: `gpu_weight_only.layout.PIECE`."""


@triton.jit
def write_weights(
    weights_at, inside, low_ptr, high_ptr, pair_ptr, row, share, step, N, pairs_row, BITS: tl.constexpr,
    PER: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """A step of some rows, piece by piece, so that each thread writes what it has read; share (BN,) float32 is what a
    row's scales are multiplied with."""
    PIECES: tl.constexpr = 4 if BITS == 4 else 8
    column = tl.max_contiguous(tl.arange(0, PIECE), 8)[None, :]  # all that a thread reads and writes is of 8 channels
    at = (step.to(tl.int64) * N + row)[:, None] * PIECE + column
    if BITS == 4:
        codes = unpack4(tl.load(low_ptr + at), ASSEMBLY)
    else:
        codes = unpack3(tl.load(low_ptr + at), tl.load(high_ptr + at).to(tl.int16), ASSEMBLY)
    for i in tl.static_range(PIECES):
        piece = step * PIECES + i
        scale, offset = scale_and_offset(tl.load(pair_ptr + piece // PER * pairs_row + row))
        scale = (scale.to(tl.float32) * share).to(tl.float16)
        tl.store(weights_at + piece * PIECE + column, (codes[i] - offset[:, None]) * scale[:, None], mask=inside)


@triton.jit
def dequantize_rows(
    low_ptr, high_ptr, pair_ptr, scale_ptr, unit_ptr, up_ptr, weights_ptr, first, end, N, pairs_row, Kp, width,
    headroom, BITS: tl.constexpr, PER: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BN: tl.constexpr,
    ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """weights (end - first, width) float16: rows [first, end) in their units, Kp input channels and then F R ranks.

    Programs: steps of input channels (and one for the factors if F > 0) x tiles of BN rows.
    """
    wait_for_previous_kernel(PDL)
    step = tl.program_id(0)
    rows = first + tl.program_id(1) * BN + tl.arange(0, BN)
    row, inside = tl.minimum(rows, end - 1), (rows < end)[:, None]
    weights_at = weights_ptr + (rows - first).to(tl.int64)[:, None] * width
    unit = tl.load(unit_ptr + row)
    if step * (128 if BITS == 4 else 256) < Kp:
        share = tl.load(scale_ptr + row) / unit
        write_weights(
            weights_at, inside, low_ptr, high_ptr, pair_ptr, row, share, step, N, pairs_row, BITS, PER, ASSEMBLY
        )
    elif F > 0:
        rank = tl.arange(0, R)[None, :]
        for factor in range(F):
            up = tl.load(up_ptr + (factor * N + row).to(tl.int64)[:, None] * R + rank)
            up = (up.to(tl.float32) * (headroom / unit)[:, None]).to(tl.float16)
            tl.store(weights_at + Kp + factor * R + rank, up, mask=inside)


@triton.jit
def rescale(
    sums_ptr, y_ptr, token_unit_ptr, unit_ptr, bias_ptr, first, end, M, N, BIAS: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Columns [first, end) of y (M, N) from sums, float16 numbers in the same memory: each in the units of its row and
    token. Programs: tiles of tokens x tiles of columns."""
    wait_for_previous_kernel(PDL)
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    column = first + tl.program_id(1) * BN + tl.arange(0, BN)
    at = token.to(tl.int64)[:, None] * N + column[None, :]
    mask = (token < M)[:, None] & (column < end)[None, :]
    y = tl.load(sums_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = y * tl.load(unit_ptr + column, mask=column < end, other=0.0)[None, :]
    y = y * tl.load(token_unit_ptr + token, mask=token < M, other=0.0)[:, None]
    if BIAS:
        y = y + tl.load(bias_ptr + column, mask=column < end, other=0.0)[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)
