"""The integer linear for few tokens (decode): memory-bound, so all that counts is bytes in flight and short waits.

A program owns BN rows of the weight over all input channels. Its WAYS warps take every WAYS-th block of 128 channels
each (the first axis of the products), so one tile's sums meet in shared memory, not in device memory. Before the
previous kernel has ended each program asks for its first weights: they are on their way to the L2 cache meanwhile.
The sums are int32, exact in any order. Experts are chosen here, from the sums that `triton_prepare` left.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_linear import unpack
from quant_experts.kernels.triton_tokens import (
    ROUTER_PARTS,
    allow_next_kernel,
    bitwise_or,
    choose,
    prefetch,
    wait_for_previous_kernel,
)


@triton.jit
def ask_for_rows(weight_ptr, first_row, N, blocks, BN: tl.constexpr, WAYS: tl.constexpr, PDL: tl.constexpr):
    """Prefetch rows of the first blocks. A block's rows are one run of bytes."""
    LINES: tl.constexpr = BN * 64 // 128
    line = tl.minimum(first_row * 64 + tl.arange(0, LINES) * 128, (N - 1) * 64)
    for start in range(0, blocks, 2 * WAYS):
        block = tl.minimum(start + tl.arange(0, 2 * WAYS), blocks - 1)
        prefetch(weight_ptr + block.to(tl.int64)[:, None] * N * 64 + line[None, :], PDL)


@triton.jit
def code_sums(
    weight_ptr, codes_ptr, row, token, M, N, Kp, BN: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr,
    STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """16 * sum of code products: (BN, BM) int32."""
    steps = Kp // 128
    way = tl.arange(0, WAYS)
    byte = tl.arange(0, 64)
    total = tl.zeros((WAYS, BN, BM), tl.int32)
    weight_at = weight_ptr + row[None, :, None] * 64 + byte[None, None, :]
    codes_at = codes_ptr + token[None, None, :] * Kp + byte[None, :, None]
    for start in tl.range(0, steps, WAYS, num_stages=STAGES):
        block = (start + way)[:, None, None]
        there = block < steps
        packed = tl.load(weight_at + block.to(tl.int64) * N * 64, mask=there, other=0)
        x_low = tl.load(codes_at + block * 128, mask=there & (token < M)[None, None, :], other=0)
        x_high = tl.load(codes_at + block * 128 + 64, mask=there & (token < M)[None, None, :], other=0)
        low, high = unpack(packed, ASSEMBLY)
        total = tl.dot(low, x_low, total, out_dtype=tl.int32)
        total = tl.dot(high, x_high, total, out_dtype=tl.int32)
    return tl.sum(total, axis=0)


@triton.jit
def hidden_values(sums_ptr, token, M, first, unit, TOTAL: tl.constexpr, R: tl.constexpr, SLICES: tl.constexpr):
    """(BM, R) float32: what all slices add up to from each token's rank `first` (BM,) on, times unit (BM,)."""
    at = sums_ptr + (token * TOTAL + first)[:, None] + tl.arange(0, R)[None, :]
    used = (token < M)[:, None]
    total = tl.load(at, mask=used, other=0)
    for piece in tl.static_range(1, SLICES):  # unrolled: all loads are under way at once
        total += tl.load(at + piece * M * TOTAL, mask=used, other=0)
    return total.to(tl.float32) * unit[:, None]


@triton.jit
def chosen(sums_ptr, bias_ptr, token, M, F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr,
           SLICES: tl.constexpr):  # fmt: skip
    """(BM,) the expert of each token."""
    WIDTH: tl.constexpr = ROUTER_PARTS * EP
    TOTAL: tl.constexpr = F * R + WIDTH
    at = sums_ptr + token[:, None] * TOTAL + F * R + tl.arange(0, WIDTH)[None, :]
    scores = tl.load(at, mask=(token < M)[:, None], other=0.0)
    for piece in tl.static_range(1, SLICES):
        scores += tl.load(at + piece * M * TOTAL, mask=(token < M)[:, None], other=0.0)
    return choose(scores, bias_ptr, E, EP)


@triton.jit
def linear_few(
    weight_ptr, codes_ptr, up_ptr, sums_ptr, router_bias_ptr, code_scale_ptr, y_ptr, scale_ptr, token_scale_ptr,
    bias_ptr, M, N, Kp, ahead, headroom, inverse_headroom, BN: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr,
    F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, CODES: tl.constexpr, SLICES: tl.constexpr,
    BIAS: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, from tokens (M, Kp) and weight (Kp / 128, N, 64). Programs: row tiles. WAYS warps.
    ahead: how many blocks of its weights a program asks for before it waits."""
    allow_next_kernel(PDL)
    TOTAL: tl.constexpr = F * R + (ROUTER_PARTS * EP if E > 0 else 0)
    first_row = tl.program_id(0) * BN
    rows = first_row + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    token = tl.arange(0, BM)
    rank = tl.arange(0, R)
    ask_for_rows(weight_ptr, first_row, N, ahead, BN, WAYS, PDL)
    row_scale = tl.load(scale_ptr + row) * 0.0625
    if F > E:
        shared_up = tl.load(up_ptr + row[:, None] * R + rank[None, :])
    wait_for_previous_kernel(PDL)
    scale = tl.load(token_scale_ptr + token, mask=token < M, other=1.0)
    unit = tl.zeros((BM,), tl.float32) + inverse_headroom
    if not CODES:
        unit = unit / tl.where(scale == scale, scale, 1.0)
    # What experts need is asked for before the main loop and used after it.
    if E > 0:
        expert = chosen(sums_ptr, router_bias_ptr, token, M, F, E, EP, R, SLICES)
        present = tl.reduce(tl.where(token < M, 1 << expert, 0), 0, bitwise_or)
        factor = tl.arange(0, EP)[:, None, None]
        at = up_ptr + ((F - E + factor).to(tl.int64) * N + row[None, :, None]) * R + rank[None, None, :]
        routed_up = tl.load(at, mask=((present >> factor) & 1) != 0, other=0.0)
        own = hidden_values(sums_ptr, token, M, (F - E + expert) * R, unit, TOTAL, R, SLICES)
    if F > E:
        shared = hidden_values(sums_ptr, token, M, token * 0, unit, TOTAL, R, SLICES)
        if CODES:
            shared = shared * tl.load(code_scale_ptr + rank)[None, :]
    total = code_sums(weight_ptr, codes_ptr, row, token, M, N, Kp, BN, BM, WAYS, STAGES, ASSEMBLY)
    y = total.to(tl.float32) * row_scale[:, None] * inverse_headroom
    if F > E:
        y = tl.dot(shared_up, tl.trans(shared.to(tl.float16)), y)
    if E > 0:
        hidden = tl.where(expert[None, None, :] == factor, tl.trans(own)[None, :, :], 0.0)
        y += tl.sum(tl.dot(routed_up, hidden.to(tl.float16)), axis=0)
    y = y * (scale * headroom)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row)[:, None]
    mask = (rows < N)[:, None] & (token < M)[None, :]
    tl.store(y_ptr + token[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)
