"""The linear in plain Triton: any GPU with int8 matrix units, and the interpreter.

Hopper has a kernel of its own (`hopper_linear`), which is faster there; both read the same layouts and give the same
int32 sums. The weight is the left operand, so that its codes are unpacked in registers. The input channels are cut over
programs where tiles are few; shares of a tile add up in int32, exact in any order, and the last one finishes the tile.

fp8 tokens and the weights beside them are multiplied as float16, which holds both: products are exact, sums float32.
Those are not cut, because their order would count.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.assembly import FP8_CODES, INT8_CODES
from quant_experts.kernels.gpu.tokens import add_product, bitwise_or, wait_for_previous_kernel


@triton.jit
def unpack_fp8(packed, ASSEMBLY: tl.constexpr):
    """As `hopper_codes.unpack_fp8`: bytes of two zigzag codes -> (low code, high code) / 256 as e4m3."""
    if ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            FP8_CODES,
            "=&r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (packed & 15) + (packed & 1) * -127
        high = ((packed >> 4) & 15) + ((packed >> 4) & 1) * -127
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def unpack(packed, FP8: tl.constexpr, ASSEMBLY: tl.constexpr):
    """Bytes of two codes -> (16 * low code, 16 * high code) as int8, or FP8: codes / 256 as e4m3. The factor goes into
    the scale.

    In assembly four bytes at a time: the compiler takes the plain form byte by byte.
    """
    if FP8:
        low, high = unpack_fp8(packed, ASSEMBLY)
    elif ASSEMBLY:
        low, high = tl.inline_asm_elementwise(
            INT8_CODES,
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = packed << 4
        high = (packed >> 4) << 4
    return low, high


@triton.jit
def sums(
    weight_ptr, codes_ptr, rows, tokens, N, Kp, first, last,
    BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """16 * sum of code products over blocks [first, last) of 128 channels: (BN, BM) int32; of fp8 tokens 1 / 256 of it,
    float32."""
    FP8: tl.constexpr = codes_ptr.dtype.element_ty == tl.float8e4nv
    byte = tl.arange(0, 64)
    weight_at = weight_ptr + (first.to(tl.int64) * N + rows)[:, None] * 64 + byte[None, :]
    codes_at = codes_ptr + tokens.to(tl.int64)[None, :] * Kp + first * 128 + byte[:, None]
    total = tl.zeros((BN, BM), tl.float32 if FP8 else tl.int32)
    for _ in tl.range(0, last - first, num_stages=STAGES):
        packed = tl.load(weight_at)
        x_low = tl.load(codes_at)
        x_high = tl.load(codes_at + 64)
        low, high = unpack(packed, FP8, ASSEMBLY)
        total = add_product(total, low, x_low)
        total = add_product(total, high, x_high)
        weight_at += tl.cast(N, tl.int64) * 64
        codes_at += 128
    return total


@triton.jit
def finish(
    total, rows, tokens, up_ptr, hidden_ptr, present_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr, order_ptr, M,
    N, headroom, inverse_headroom, token_tile, BM: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
    SORTED: tl.constexpr,
):  # fmt: skip
    """Scales, experts, bias; write (tokens, rows) of y in the order of the input."""
    row = tl.minimum(rows, N - 1)
    token = tl.minimum(tokens, M - 1)
    UNIT: tl.constexpr = 0.0625 if total.dtype == tl.int32 else 256.0
    y = total.to(tl.float32) * (tl.load(scale_ptr + row) * (UNIT * inverse_headroom))[:, None]
    if F > 0:
        block = token_tile * (BM // 16) + tl.arange(0, BM // 16)
        present = tl.reduce(tl.load(present_ptr + block, mask=block * 16 < M, other=0), 0, bitwise_or)
        rank = tl.arange(0, R)
        for factor in range(F):
            if (present >> factor) & 1 != 0:
                up = tl.load(up_ptr + (factor * N + row).to(tl.int64)[:, None] * R + rank[None, :])
                hidden = tl.load(hidden_ptr + token.to(tl.int64)[None, :] * (F * R) + factor * R + rank[:, None])
                y = tl.dot(up, hidden, y)
    y = y * (tl.load(token_scale_ptr + token) * headroom)[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row)[:, None]
    place = token
    if SORTED:
        place = tl.load(order_ptr + token)
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    tl.store(y_ptr + place.to(tl.int64)[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear(
    weight_ptr, codes_ptr, up_ptr, hidden_ptr, present_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr, order_ptr,
    sums_ptr, done_ptr, M, N, Kp, headroom, inverse_headroom,
    BN: tl.constexpr, BM: tl.constexpr, F: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, SORTED: tl.constexpr,
    SHARES: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N) from tokens (M, Kp) and weight (Kp / 128, N, 64). Programs: row tiles x token tiles x SHARES.
    inverse_headroom: 1 / headroom, exact because a power of two."""
    wait_for_previous_kernel(PDL)
    row_tile, token_tile, piece = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = row_tile * BN + tl.arange(0, BN)
    tokens = token_tile * BM + tl.arange(0, BM)
    steps = Kp // 128
    per = tl.cdiv(steps, SHARES)
    first = tl.minimum(piece * per, steps)
    last = tl.minimum(first + per, steps)
    total = sums(
        weight_ptr, codes_ptr, tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1), N, Kp, first, last,
        BN, BM, STAGES, ASSEMBLY,
    )  # fmt: skip
    if SHARES == 1:
        finish(
            total, rows, tokens, up_ptr, hidden_ptr, present_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr,
            order_ptr, M, N, headroom, inverse_headroom, token_tile, BM, F, R, BIAS, SORTED,
        )  # fmt: skip
    else:
        tile = token_tile * tl.num_programs(0) + row_tile
        place = tl.arange(0, BN)[:, None] * BM + tl.arange(0, BM)[None, :]
        at = sums_ptr + tile.to(tl.int64) * (BN * BM) + place
        tl.atomic_add(at, total, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(done_ptr + tile, 1, sem="acq_rel") == SHARES - 1:
            tl.debug_barrier()
            total = tl.load(at, cache_modifier=".cg")
            tl.debug_barrier()  # loads and stores may be spread over threads in different ways
            tl.store(at, tl.zeros((BN, BM), tl.int32))
            tl.store(done_ptr + tile, 0)
            finish(
                total, rows, tokens, up_ptr, hidden_ptr, present_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr,
                order_ptr, M, N, headroom, inverse_headroom, token_tile, BM, F, R, BIAS, SORTED,
            )  # fmt: skip
