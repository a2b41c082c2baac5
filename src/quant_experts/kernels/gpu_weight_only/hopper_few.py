"""The weight-only linear for up to eight tokens and 4 bits on Hopper GPUs, in Gluon: words of codes go from memory to
registers and are operands there as they lie (`gpu.hopper`).

The design is that of `gpu_weight_activation.hopper_few`. A block of 128 input channels is 64 bytes of a row, and has
one scale and zero point: a product of codes less their zero, which are exact in float16, is multiplied by the scale
once, in float32. So groups have 128 input channels or more; `linear` is the same for others, 3 bits, fewer rows than a
tile has, other GPUs and the interpreter.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.assembly import TINY_CODES
from quant_experts.kernels.gpu.hopper import (
    RUN,
    across,
    allow_next_kernel,
    factor_of,
    multiply,
    wait_for_previous_kernel,
)

UNIT = gl.constexpr(512.0)
"""Of codes less their zero."""
ZERO = gl.constexpr(
    """{
            .reg .b32 constant;
            prmt.b32 $0, $1, $1, 0x3232;
            mov.b32 constant, 0xE400E400; add.rn.f16x2 $0, $0, constant;
            mov.b32 constant, 0x98009800; mul.rn.f16x2 $0, $0, constant;
            }"""
)
"""1024 plus a zero, float16 in the upper half of $1 -> -zero / UNIT, twice."""
FROM_LOW, FROM_HIGH = (
    gl.constexpr("{ .reg .b32 slope; mov.b32 slope, " + slope + "; fma.rn.f16x2 $0, $1, slope, $2; } // $3")
    for slope in ("0x78007800", "0x68006800")
)
"""$1 times 2^15 or 2^11, plus $2."""


@gluon.jit
def unpack(words):
    """int16 words of four codes -> four pieces of 32 channels, in 2^-24 and 2^-20 by turns, in float16."""
    return gl.inline_asm_elementwise(
        TINY_CODES,
        "=&r,=&r,=&r,=&r,r",
        [words],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=2,
    )


@gluon.jit
def less_zero(codes, zero, HIGH: gl.constexpr):
    """(code - zero) / UNIT, exact, of codes in 2^-20 if HIGH, else in 2^-24; zero: int32, -zero / UNIT in float16 in
    both halves."""
    return gl.inline_asm_elementwise(
        FROM_HIGH if HIGH else FROM_LOW, "=&r,r,r,r", [codes, zero], dtype=gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def ask_for_words(
    words_at, pairs_at, block, steps, N, pairs_row, blocks_per_group, AHEAD: gl.constexpr, WAYS: gl.constexpr
):
    """Words of every WAYS-th block of 128 channels from `block` on, AHEAD of them, and their scales and offsets."""
    asked = ()
    for i in gl.static_range(AHEAD):
        at = block + i * WAYS
        there = at < steps
        words = gl.load(words_at + at.to(gl.int64) * N * 32, mask=there, other=0)
        pairs = gl.load(pairs_at + at // blocks_per_group * pairs_row, mask=there, other=0)
        asked = asked + ((words, pairs),)
    return asked


@gluon.jit
def ask_for_values(values_at, there, block, steps, AHEAD: gl.constexpr, WAYS: gl.constexpr):
    """The four pieces of 32 values of the same blocks of the tokens."""
    asked = ()
    for i in gl.static_range(AHEAD):
        at, here = values_at + (block + i * WAYS) * 128, there & (block + i * WAYS < steps)
        pieces = ()
        for piece in gl.static_range(4):
            pieces = pieces + (gl.load(at + piece * 32, mask=here, other=0.0),)
        asked = asked + (pieces,)
    return asked


@gluon.jit
def add_products(total, asked, values):
    """total + scale times (codes - zero) times values."""
    MMA: gl.constexpr = total.type.layout
    LAYOUT: gl.constexpr = asked[0][0].type.layout
    for i in gl.static_range(len(asked)):
        words, pairs = asked[i]
        zero = gl.inline_asm_elementwise(ZERO, "=&r,r", [pairs], dtype=gl.int32, is_pure=True, pack=1)
        zero = zero + gl.zeros(words.shape, gl.int32, LAYOUT)
        a, b, c, d = unpack(words)
        sums = gl.zeros(total.shape, gl.float32, MMA)
        sums = multiply(less_zero(a, zero, False), values[i][0], sums, 2)
        sums = multiply(less_zero(b, zero, True), values[i][1], sums, 2)
        sums = multiply(less_zero(c, zero, False), values[i][2], sums, 2)
        sums = multiply(less_zero(d, zero, True), values[i][3], sums, 2)
        scale = (pairs & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        scale = gl.convert_layout(scale.reshape([scale.shape[0], scale.shape[1]]), gl.SliceLayout(2, MMA))
        total += sums * gl.expand_dims(scale, 2)
    return total


@gluon.jit
def expert_sums(
    up_ptr, hidden_ptr, present_ptr, first, M, N, BN: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr,
    F: gl.constexpr, R: gl.constexpr, USED: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """(WAYS, BN, BM) up factors that are present times hidden values. USED: factors that M tokens use."""
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    token = across(BM, 1, HALVES)
    rank = across(RUN, 2, HALVES)
    present = gl.load(present_ptr, cache_modifier=".cg")
    sums = gl.zeros([WAYS, BN, BM], gl.float32, MMA)
    for start in gl.static_range(0, USED * (R // RUN), WAYS):
        run = start + across(WAYS, 0, HALVES)
        factor, column = factor_of(run // (R // RUN), present, F, USED), run % (R // RUN) * RUN + rank
        row = first.to(gl.int64) + across(BN, 1, HALVES)
        up = gl.load(up_ptr + (row + factor * N) * R + column, mask=factor < F, other=0.0)
        here = (factor < F) & (token < M)
        at = hidden_ptr + token * (F * R) + factor * R + column
        sums = multiply(up, gl.load(at, mask=here, other=0.0, cache_modifier=".cg"), sums, 2)
    return sums


@gluon.jit
def kernel(
    words_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N,
    pairs_row, Kp, blocks_per_group, headroom, inverse_headroom, BN: gl.constexpr, BM: gl.constexpr,
    WAYS: gl.constexpr, AHEAD: gl.constexpr, F: gl.constexpr, R: gl.constexpr, USED: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, N >= BN. Programs: tiles of BN rows; the last one ends with the last row."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, 8])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    allow_next_kernel()
    first = gl.minimum(gl.program_id(0) * BN, N - BN)
    row = first + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    token = gl.arange(0, BM, gl.SliceLayout(0, TILE))
    row_scale = gl.load(scale_ptr + row)
    steps = Kp // 128
    block = across(WAYS, 0, HALVES)
    there = across(BM, 1, HALVES) < M
    words_at = words_ptr + first * 32 + across(BN, 1, HALVES) * 32 + across(32, 2, HALVES)
    pairs_at = pair_ptr + first + across(BN, 1, HALVES)
    values_at = values_ptr + across(BM, 1, HALVES) * Kp + across(32, 2, HALVES)
    asked = ask_for_words(words_at, pairs_at, block, steps, N, pairs_row, blocks_per_group, AHEAD, WAYS)
    wait_for_previous_kernel()
    values = ask_for_values(values_at, there, block, steps, AHEAD, WAYS)
    total = add_products(gl.zeros([WAYS, BN, BM], gl.float32, MMA), asked, values)
    for start in range(WAYS * AHEAD, steps, WAYS * AHEAD):
        asked = ask_for_words(words_at, pairs_at, start + block, steps, N, pairs_row, blocks_per_group, AHEAD, WAYS)
        values = ask_for_values(values_at, there, start + block, steps, AHEAD, WAYS)
        total = add_products(total, asked, values)
    y = gl.sum(total, axis=0) * (row_scale * UNIT)[:, None]
    if F > 0:
        experts = expert_sums(up_ptr, hidden_ptr, present_ptr, first, M, N, BN, BM, WAYS, F, R, USED, MMA)
        y = (y * inverse_headroom + gl.sum(experts, axis=0)) * headroom
    y = y * gl.load(unit_ptr + token, mask=token < M, other=0.0, cache_modifier=".cg")[None, :]
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    at = y_ptr + token[None, :].to(gl.int64) * N + row[:, None]
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row >= 0)[:, None])
