"""The linear for up to eight tokens (decode): memory-bound, so all that counts is bytes in flight.

A program owns BN weight rows over all input channels. Its WAYS warps take every WAYS-th block of 128 channels each (the
first axis of the products), so one tile's sums meet in shared memory, not in device memory: nothing is cut into shares
and nothing waits. The sums are int32, exact in any order; with fp8 tokens float32 sums of exact products.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.tokens import add_product, wait_for_previous_kernel
from quant_experts.kernels.gpu_weight_activation.linear import unpack


@triton.jit
def code_sums(
    weight_ptr, codes_ptr, row, token, M, N, Kp, BN: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr,
    STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """16 * sum of code products: (BN, BM) int32; of fp8 tokens 1 / 256 of it, float32."""
    FP8: tl.constexpr = codes_ptr.dtype.element_ty == tl.float8e4nv
    steps = Kp // 128
    way = tl.arange(0, WAYS)
    byte = tl.arange(0, 64)
    total = tl.zeros((WAYS, BN, BM), tl.float32 if FP8 else tl.int32)
    weight_at = weight_ptr + row[None, :, None] * 64 + byte[None, None, :]
    codes_at = codes_ptr + token[None, None, :] * Kp + byte[None, :, None]
    for start in tl.range(0, steps, WAYS, num_stages=STAGES):
        block = (start + way)[:, None, None]
        there = block < steps
        packed = tl.load(weight_at + block.to(tl.int64) * N * 64, mask=there, other=0)
        x_at, x_there = codes_at + block * 128, there & (token < M)[None, None, :]
        x_low = tl.load(x_at, mask=x_there, other=0.0, cache_modifier=".cg")
        x_high = tl.load(x_at + 64, mask=x_there, other=0.0, cache_modifier=".cg")
        low, high = unpack(packed, FP8, ASSEMBLY)
        total = add_product(total, low, x_low)
        total = add_product(total, high, x_high)
    return tl.sum(total, axis=0)


@triton.jit
def up_rows(up_ptr, factor, row, N, R: tl.constexpr):
    """(BN, R) of an up factor; row is int64."""
    return tl.load(up_ptr + (row + N * factor)[:, None] * R + tl.arange(0, R)[None, :])


@triton.jit
def hidden_columns(hidden_ptr, factor, token, M, F: tl.constexpr, R: tl.constexpr):
    """(R, BM) hidden values of a factor, zero for tokens that do not use it."""
    at = hidden_ptr + token[None, :] * (F * R) + factor * R + tl.arange(0, R)[:, None]
    return tl.load(at, mask=(token < M)[None, :], other=0.0)


@triton.jit
def linear_few(
    weight_ptr, codes_ptr, up_ptr, hidden_ptr, present_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr, M, N, Kp,
    headroom, inverse_headroom, BN: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, STAGES: tl.constexpr, LATER: tl.constexpr,
    ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, from tokens (M, Kp) and weight (Kp / 128, N, 64). Programs of WAYS warps: tiles of BN rows."""
    token = tl.arange(0, BM)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    row = tl.minimum(rows, N - 1).to(tl.int64)
    UNIT: tl.constexpr = 256.0 if codes_ptr.dtype.element_ty == tl.float8e4nv else 0.0625
    row_scale = tl.load(scale_ptr + row) * (UNIT * inverse_headroom)
    if not LATER:
        wait_for_previous_kernel(PDL)
    scale = tl.load(token_scale_ptr + token, mask=token < M, other=0.0, cache_modifier=".cg") * headroom
    if F > E:  # asked for before the main loop and used after it
        shared_up = up_rows(up_ptr, 0, row, N, R)
    total = code_sums(weight_ptr, codes_ptr, row, token, M, N, Kp, BN, BM, WAYS, STAGES, ASSEMBLY)
    y = total.to(tl.float32) * row_scale[:, None]
    if LATER:
        wait_for_previous_kernel(PDL)
    if F > E:
        y = tl.dot(shared_up, hidden_columns(hidden_ptr, 0, token, M, F, R), y)
    if E > 0:
        present = tl.load(present_ptr) >> (F - E)
        for e in range(E):
            if (present >> e) & 1 != 0:
                up = up_rows(up_ptr, F - E + e, row, N, R)
                y = tl.dot(up, hidden_columns(hidden_ptr, F - E + e, token, M, F, R), y)
    y = y * scale[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row)[:, None]
    mask = (rows < N)[:, None] & (token < M)[None, :]
    tl.store(y_ptr + token[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)
