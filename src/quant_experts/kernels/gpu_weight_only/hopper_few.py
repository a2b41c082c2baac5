"""The weight-only linear for up to eight tokens and 4 bits on Hopper GPUs, in Gluon: words of codes go from memory to
registers and are operands there as they lie (`gpu.hopper`).

The design is that of `gpu_weight_activation.hopper_few`, its programs that settle experts too. A block of 128 input
channels is 64 bytes of a row, and has one scale and zero point: a product of codes less their zero, which are exact in
float16, is multiplied by the scale once, in float32. So groups have 128 input channels or more; `linear` is the same
for others, 3 bits, fewer rows than a tile has, other GPUs and the interpreter.

Rejected (EXPERIMENTS.md): products of codes with their zero, less the zero times a token's sum over the block, which
another product finds; weights asked for while those before them are multiplied; up factors that wait in registers from
the start; tiles of more rows, and sixteen tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.assembly import TINY_CODES
from quant_experts.kernels.gpu.hopper import across, allow_next_kernel, multiply, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_counts import count_done
from quant_experts.kernels.gpu.hopper_few import (
    ask_for_hiddens,
    ask_for_ups,
    expert_sums,
    load_there,
    wait_for_factors,
)
from quant_experts.kernels.gpu_tokens.hopper_settle import LINE, settle

ROWS = gl.constexpr(16)
"""Of a program's tile, as of a matrix product."""
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
def ask_for_weights(
    words_at, pairs_at, start, steps, N, pairs_row, blocks_per_group, WAYS: gl.constexpr, AHEAD: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Words of every WAYS-th block of 128 channels from `start` on, AHEAD of them, and their scales and zeros. EVEN:
    all are there."""
    LAYOUT: gl.constexpr = words_at.type.layout
    PAIRS: gl.constexpr = pairs_at.type.layout
    asked = ()
    for i in gl.static_range(AHEAD):
        block = start + i * WAYS + across(WAYS, 0, LAYOUT)
        words = load_there(words_at + block.to(gl.int64) * N * 32, block < steps, EVEN)
        block = start + i * WAYS + gl.arange(0, WAYS, gl.SliceLayout(1, PAIRS))[:, None]
        pairs = load_there(pairs_at + block // blocks_per_group * pairs_row, block < steps, EVEN)
        asked = asked + ((words, pairs),)
    return asked


@gluon.jit
def ask_for_values(values_at, start, steps, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """The four pieces of 32 values of the same blocks of the tokens."""
    LAYOUT: gl.constexpr = values_at.type.layout
    asked = ()
    for i in gl.static_range(AHEAD):
        block = start + i * WAYS + across(WAYS, 0, LAYOUT)
        pieces = ()
        for piece in gl.static_range(4):
            pieces = pieces + (load_there(values_at + block * 128 + piece * 32, block < steps, EVEN),)
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
        zero = gl.convert_layout(gl.expand_dims(zero, 2), LAYOUT, assert_trivial=True)
        zero = zero + gl.zeros(words.shape, gl.int32, LAYOUT)
        a, b, c, d = unpack(words)
        even = gl.zeros(total.shape, gl.float32, MMA)  # two sums: their products need not wait for one another
        odd = gl.zeros(total.shape, gl.float32, MMA)
        even = multiply(less_zero(a, zero, False), values[i][0], even, 2)
        odd = multiply(less_zero(b, zero, True), values[i][1], odd, 2)
        even = multiply(less_zero(c, zero, False), values[i][2], even, 2)
        odd = multiply(less_zero(d, zero, True), values[i][3], odd, 2)
        scale = (pairs & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
        total += (even + odd) * gl.expand_dims(scale, 2)
    return total


@gluon.jit
def multiply_tile(
    tile, words_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, settled_ptr, unit_ptr, scale_ptr, bias_ptr,
    y_ptr, M, N, steps, pairs_row, blocks_per_group, settlers, headroom, inverse_headroom, BM: gl.constexpr,
    WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr,
    R: gl.constexpr, USED: gl.constexpr, SETTLES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """ROWS rows of y. Arguments are those of `kernel`; `settlers` programs count themselves at `settled_ptr`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, 8])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    PAIRS: gl.constexpr = gl.SliceLayout(2, MMA)
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    first = gl.minimum(tile * ROWS, N - ROWS)
    row = first + gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    token = gl.arange(0, BM, gl.SliceLayout(0, TILE))
    row_scale = gl.load(scale_ptr + row)  # used at the end: a product here would wait for it
    words_at = words_ptr + first * 32 + across(ROWS, 1, HALVES) * 32 + across(32, 2, HALVES)
    pairs_at = pair_ptr + first + gl.arange(0, ROWS, gl.SliceLayout(0, PAIRS))[None, :]
    repeated = gl.minimum(across(BM, 1, HALVES), M - 1)  # so that a load needs no mask, and its registers no zeros
    values_at = values_ptr + repeated * (steps * 128) + across(32, 2, HALVES)
    asked = ask_for_weights(words_at, pairs_at, 0, steps, N, pairs_row, blocks_per_group, WAYS, AHEAD, EVEN)
    wait_for_previous_kernel()
    values = ask_for_values(values_at, 0, steps, WAYS, AHEAD, EVEN)
    total = add_products(gl.zeros([WAYS, ROWS, BM], gl.float32, MMA), asked, values)
    if not ONCE:
        for start in range(WAYS * AHEAD, steps, WAYS * AHEAD):
            asked = ask_for_weights(words_at, pairs_at, start, steps, N, pairs_row, blocks_per_group, WAYS, AHEAD, EVEN)
            values = ask_for_values(values_at, start, steps, WAYS, AHEAD, EVEN)
            total = add_products(total, asked, values)
    unit = gl.load(unit_ptr + token, mask=token < M, other=0.0, cache_modifier=".cg")
    if F > 0:
        present = wait_for_factors(settled_ptr, settlers, present_ptr, E, SETTLES)
        ups = ask_for_ups(up_ptr, present, first, N, ROWS, WAYS, F, R, USED, HALVES)
        hiddens = ask_for_hiddens(hidden_ptr, present, M, BM, WAYS, F, R, USED, HALVES)
    y = gl.sum(total, axis=0) * (row_scale * UNIT)[:, None]
    if F > 0:
        y = (y * inverse_headroom + expert_sums(ups, hiddens, MMA)) * headroom
    y = y * unit[None, :]
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    at = y_ptr + token[None, :].to(gl.int64) * N + row[:, None]
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row >= 0)[:, None])


@gluon.jit
def kernel(
    words_ptr, pair_ptr, values_ptr, up_ptr, sums_ptr, hidden_ptr, present_ptr, counts_ptr, router_bias_ptr, unit_ptr,
    scale_ptr, bias_ptr, y_ptr, M, N, steps, pairs_row, blocks_per_group, workers, headroom, inverse_headroom,
    BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr,
    F: gl.constexpr, E: gl.constexpr, R: gl.constexpr, USED: gl.constexpr, TOTAL: gl.constexpr, EP: gl.constexpr,
    SLICES: gl.constexpr, SETTLES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, N >= ROWS, from values (M, 128 steps). Programs: `workers`, then tiles of ROWS rows; the last
    one ends with the last row. EVEN: every warp has as many blocks as it asks for each time; ONCE: it asks only once.
    USED: factors that M tokens use at most.

    SETTLES: workers settle sums (SLICES, M, TOTAL), to hidden values (M, F R). Without, hidden values are there, and at
    `present_ptr` the factors present."""
    allow_next_kernel()
    tile = gl.program_id(0) - workers
    if tile >= 0:
        multiply_tile(
            tile, words_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, counts_ptr + LINE, unit_ptr,
            scale_ptr, bias_ptr, y_ptr, M, N, steps, pairs_row, blocks_per_group, workers, headroom, inverse_headroom,
            BM, WAYS, AHEAD, EVEN, ONCE, F, E, R, USED, SETTLES, BIAS,
        )  # fmt: skip
    elif SETTLES:
        wait_for_previous_kernel()
        present = settle(
            tile + workers, sums_ptr, router_bias_ptr, scale_ptr, unit_ptr, hidden_ptr, M, inverse_headroom, WAYS, BM,
            F, E, EP, R, TOTAL, SLICES, False,
        )  # fmt: skip
        count_done(counts_ptr + LINE, present)
