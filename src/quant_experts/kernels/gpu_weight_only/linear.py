"""Weight-only linears in Triton: 3- and 4-bit weights times activations in half precision. Runs on any GPU with matrix
units for float16, and in the interpreter.

Weights are the left operand, dequantized in registers, so few tokens are few columns. See `layout` for what
lies where.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.shares import add_shares, share_of
from quant_experts.kernels.gpu.tokens import bitwise_or, wait_for_previous_kernel
from quant_experts.kernels.gpu_tokens import layout
from quant_experts.kernels.gpu_weight_only.codes import dequantize, in_order

PIECE = tl.constexpr(32)
"""Input channels of one matrix product: `gpu_weight_only.layout.PIECE`."""
MASK_TOKENS = tl.constexpr(layout.MASK_TOKENS)
"""Tokens of a mask of factors that are present."""


@triton.jit
def weight_sums(
    low_ptr, high_ptr, pair_ptr, values_ptr, row, token, N, pairs_row, Kp, first, last,
    BITS: tl.constexpr, PER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Dequantized weights times values over steps [first, last): (BN, BM) float32.

    A step is 128 input channels of 4 bits or 256 of 3 bits, in pieces of 32; PER pieces share a scale.
    """
    PIECES: tl.constexpr = 4 if BITS == 4 else 8
    GROUPS: tl.constexpr = max(1, PIECES // PER)
    column = tl.arange(0, PIECE)
    at = (first.to(tl.int64) * N + row)[:, None] * PIECE + column[None, :]
    channel = first * (PIECES * PIECE) + tl.arange(0, PIECES * PIECE)
    values_at = values_ptr + token.to(tl.int64)[None, :] * Kp + channel[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        words = tl.load(low_ptr + at)
        high = words
        if BITS == 3:
            high = tl.load(high_ptr + at).to(tl.int16)
        group = step * PIECES // PER + tl.arange(0, GROUPS)
        pairs = tl.load(pair_ptr + group[None, :] * pairs_row + row[:, None])
        weight = dequantize(in_order(words, high, BITS, ASSEMBLY), pairs, ASSEMBLY)
        total = tl.dot(weight, tl.load(values_at), total)
        at += tl.cast(N, tl.int64) * PIECE
        values_at += PIECES * PIECE
    return total


@triton.jit
def add_factor(y, factor, row, token, up_ptr, hidden_ptr, N, F: tl.constexpr, R: tl.constexpr):
    """y (BN, BM) + up (BN, R) times the hidden values of a factor, zero for tokens that do not use it."""
    rank = tl.arange(0, R)
    up = tl.load(up_ptr + (factor * N + row).to(tl.int64)[:, None] * R + rank[None, :])
    hidden = tl.load(hidden_ptr + token.to(tl.int64)[None, :] * (F * R) + factor * R + rank[:, None])
    return tl.dot(up, hidden, y)


@triton.jit
def finish(
    total, rows, tokens, up_ptr, hidden_ptr, present_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, headroom,
    F: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Scales, experts, bias; write (tokens, rows) of y. Unless DENSE, a factor that no token of the tile uses is not
    read."""
    row = tl.minimum(rows, N - 1)
    token = tl.minimum(tokens, M - 1)
    unit = tl.load(unit_ptr + token)
    y = total * tl.load(scale_ptr + row)[:, None]
    if F > 0:
        y = y / headroom
        if DENSE:
            for factor in tl.range(F, num_stages=3):
                y = add_factor(y, factor, row, token, up_ptr, hidden_ptr, N, F, R)
        else:
            present = tl.reduce(tl.load(present_ptr + token // MASK_TOKENS), 0, bitwise_or)
            for factor in range(F):
                if (present >> factor) & 1 != 0:
                    y = add_factor(y, factor, row, token, up_ptr, hidden_ptr, N, F, R)
        y = y * headroom
    y = y * unit[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row)[:, None]
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    tl.store(y_ptr + tokens.to(tl.int64)[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear(
    low_ptr, high_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr,
    sums_ptr, done_ptr, M, N, pairs_row, Kp, SHARES, headroom,
    BITS: tl.constexpr, PER: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr, DENSE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N). Programs: tiles x SHARES; tokens run fastest inside bands of BAND token tiles, whose values stay in the
    cache while the weights pass by once."""
    tile, share = tl.program_id(0), tl.program_id(1)
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = tile // (BAND * tiles_n)
    across = tl.minimum(tiles_m - band * BAND, BAND)
    inner = tile - band * BAND * tiles_n
    rows = inner // across * BN + tl.arange(0, BN)
    tokens = (band * BAND + inner % across) * BM + tl.arange(0, BM)
    row, token = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    steps = Kp // (128 if BITS == 4 else 256)
    first, last = share_of(steps, share, SHARES)
    wait_for_previous_kernel(PDL)
    total = weight_sums(
        low_ptr, high_ptr, pair_ptr, values_ptr, row, token, N, pairs_row, Kp, first, last, BITS, PER, BN, BM,
        STAGES, ASSEMBLY,
    )  # fmt: skip
    sums_ptr += tile.to(tl.int64) * SHARES * (BN * BM)
    total, done = add_shares(total, sums_ptr, done_ptr + tile, share, SHARES, SPLIT)
    if done:
        finish(
            total, rows, tokens, up_ptr, hidden_ptr, present_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, headroom,
            F, R, BIAS, DENSE,
        )  # fmt: skip
