"""The weight-only linear for up to eight tokens on Hopper GPUs, in Gluon: words of codes go from memory to registers,
and are operands there as they lie (`gpu.hopper`).

The design is that of `gpu_weight_activation.hopper_few`, its programs that settle experts too. A step is 64 bytes of a
row, a block of 128 input channels, or of 3 bits 64 bytes and 32 of third bits, two blocks. A block has one scale and
zero point: a product of codes less their zero, which are exact in float16, is multiplied by the scale once, in float32.
So groups have 128 input channels or more; `linear` is the same for others, fewer rows than a tile has, other GPUs and
the interpreter.

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


def _less_zero_of_3_bits(block: int) -> str:
    """Four outputs of two registers from $8 and $9, words of the low two bits of eight codes, $10, their third bits,
    and zeros $11 and $13: the low bits where they are, and the third, are subnormal numbers, each made one of UNIT."""
    lines = [".reg .b32 low, third, a, b, slope;"]
    for pair in range(2):
        lines += [f"prmt.b32 third, $10, 0, {('0x4140', '0x4342')[pair]}; shl.b32 third, third, 2;"]
        lines += [f"shr.u32 low, ${8 + pair}, {8 * block};"]
        for piece in range(4):
            out, place = f"${2 * piece + pair}", 4 * block + piece
            lines += [f"and.b32 a, low, {0x30003 << 2 * piece:#x}; and.b32 b, third, {0x40004 << place:#x};"]
            for part, power, to in (("a", 15 - 2 * piece, f"${11 + 2 * pair}"), ("b", 15 - place, out)):
                lines += [f"mov.b32 slope, {(power + 15 << 10) * 0x10001:#x}; fma.rn.f16x2 {out}, {part}, slope, {to};"]
    return "{ " + " ".join(lines) + " } // $12 $14"


FIRST_OF_3_BITS, SECOND_OF_3_BITS = (gl.constexpr(_less_zero_of_3_bits(block)) for block in range(2))
"""Of the first and the second block of 128 channels of a step of 256."""


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
def less_zero_of_3_bits(words, high, zero, SECOND: gl.constexpr):
    """The same of the four pieces of the first or the second block, from int16 words of the low two bits of eight codes
    and int8 third bits."""
    return gl.inline_asm_elementwise(
        SECOND_OF_3_BITS if SECOND else FIRST_OF_3_BITS,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r,r,r",
        [words, high, zero],
        dtype=(gl.float16, gl.float16, gl.float16, gl.float16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def ask_for_weights(
    words_at, high_at, pairs_at, start, steps, N, pairs_row, blocks_per_group, BLOCKS: gl.constexpr, WAYS: gl.constexpr,
    AHEAD: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Words of every WAYS-th step from `start` on, AHEAD of them, their third bits if there are any, and scales and
    zeros of each of their blocks. EVEN: all are there."""
    LAYOUT: gl.constexpr = words_at.type.layout
    PAIRS: gl.constexpr = pairs_at.type.layout
    asked = ()
    for i in gl.static_range(AHEAD):
        step = start + i * WAYS + across(WAYS, 0, LAYOUT)
        words = load_there(words_at + step.to(gl.int64) * N * 32, step < steps, EVEN)
        high = words
        if BLOCKS == 2:
            high = load_there(high_at + step.to(gl.int64) * N * 32, step < steps, EVEN)
        step = start + i * WAYS + gl.arange(0, WAYS, gl.SliceLayout(1, PAIRS))[:, None]
        pairs = ()
        for block in gl.static_range(BLOCKS):
            group = (step * BLOCKS + block) // blocks_per_group
            pairs = pairs + (load_there(pairs_at + group * pairs_row, step < steps, EVEN),)
        asked = asked + ((words, high, pairs),)
    return asked


@gluon.jit
def ask_for_values(
    values_at, start, steps, BLOCKS: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr
):
    """The pieces of 32 values of the same steps of the tokens."""
    LAYOUT: gl.constexpr = values_at.type.layout
    PIECES: gl.constexpr = 4 * BLOCKS
    asked = ()
    for i in gl.static_range(AHEAD):
        step = start + i * WAYS + across(WAYS, 0, LAYOUT)
        pieces = ()
        for piece in gl.static_range(PIECES):
            pieces = pieces + (load_there(values_at + step * (PIECES * 32) + piece * 32, step < steps, EVEN),)
        asked = asked + (pieces,)
    return asked


@gluon.jit
def codes_less_zero(words, high, zero, block: gl.constexpr, BLOCKS: gl.constexpr):
    """(code - zero) / UNIT of the four pieces of a block."""
    if BLOCKS == 2:
        return less_zero_of_3_bits(words, high, zero, block)
    else:
        a, b, c, d = unpack(words)
        return less_zero(a, zero, False), less_zero(b, zero, True), less_zero(c, zero, False), less_zero(d, zero, True)


@gluon.jit
def add_products(total, asked, values, BLOCKS: gl.constexpr):
    """total + scale times (codes - zero) times values."""
    MMA: gl.constexpr = total.type.layout
    LAYOUT: gl.constexpr = asked[0][0].type.layout
    for i in gl.static_range(len(asked)):
        words, high, pairs = asked[i]
        for block in gl.static_range(BLOCKS):
            zero = gl.inline_asm_elementwise(ZERO, "=&r,r", [pairs[block]], dtype=gl.int32, is_pure=True, pack=1)
            zero = gl.convert_layout(gl.expand_dims(zero, 2), LAYOUT, assert_trivial=True)
            zero = zero + gl.zeros(words.shape, gl.int32, LAYOUT)
            a, b, c, d = codes_less_zero(words, high, zero, block, BLOCKS)
            even = gl.zeros(total.shape, gl.float32, MMA)  # two sums: their products need not wait for one another
            odd = gl.zeros(total.shape, gl.float32, MMA)
            even = multiply(a, values[i][4 * block], even, 2)
            odd = multiply(b, values[i][4 * block + 1], odd, 2)
            even = multiply(c, values[i][4 * block + 2], even, 2)
            odd = multiply(d, values[i][4 * block + 3], odd, 2)
            scale = (pairs[block] & 0xFFFF).to(gl.int16).to(gl.float16, bitcast=True).to(gl.float32)
            total += (even + odd) * gl.expand_dims(scale, 2)
    return total


@gluon.jit
def multiply_tile(
    tile, words_ptr, high_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, settled_ptr, unit_ptr,
    scale_ptr, bias_ptr, y_ptr, M, N, steps, pairs_row, blocks_per_group, settlers, headroom, inverse_headroom,
    BLOCKS: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr,
    ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr, USED: gl.constexpr, SETTLES: gl.constexpr,
    BIAS: gl.constexpr,
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
    word = first * 32 + across(ROWS, 1, HALVES) * 32 + across(32, 2, HALVES)
    words_at, high_at = words_ptr + word, high_ptr + word
    pairs_at = pair_ptr + first + gl.arange(0, ROWS, gl.SliceLayout(0, PAIRS))[None, :]
    repeated = gl.minimum(across(BM, 1, HALVES), M - 1)  # so that a load needs no mask, and its registers no zeros
    values_at = values_ptr + repeated * (steps * (128 * BLOCKS)) + across(32, 2, HALVES)
    asked = ask_for_weights(
        words_at, high_at, pairs_at, 0, steps, N, pairs_row, blocks_per_group, BLOCKS, WAYS, AHEAD, EVEN
    )
    wait_for_previous_kernel()
    values = ask_for_values(values_at, 0, steps, BLOCKS, WAYS, AHEAD, EVEN)
    total = add_products(gl.zeros([WAYS, ROWS, BM], gl.float32, MMA), asked, values, BLOCKS)
    if not ONCE:
        for start in range(WAYS * AHEAD, steps, WAYS * AHEAD):
            asked = ask_for_weights(
                words_at, high_at, pairs_at, start, steps, N, pairs_row, blocks_per_group, BLOCKS, WAYS, AHEAD, EVEN
            )
            values = ask_for_values(values_at, start, steps, BLOCKS, WAYS, AHEAD, EVEN)
            total = add_products(total, asked, values, BLOCKS)
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
    words_ptr, high_ptr, pair_ptr, values_ptr, up_ptr, sums_ptr, hidden_ptr, present_ptr, counts_ptr, router_bias_ptr,
    unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, steps, pairs_row, blocks_per_group, workers, headroom,
    inverse_headroom, BLOCKS: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr,
    EVEN: gl.constexpr, ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr, USED: gl.constexpr,
    TOTAL: gl.constexpr, EP: gl.constexpr, SLICES: gl.constexpr, SETTLES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, N >= ROWS, from values (M, 128 BLOCKS steps). Programs: `workers`, then tiles of ROWS rows;
    the last one ends with the last row. BLOCKS: of 128 channels in a step, one of codes of 4 bits, two of 3. EVEN:
    every warp has as many steps as it asks for each time; ONCE: it asks only once. USED: factors that M tokens use at
    most.

    SETTLES: workers settle sums (SLICES, M, TOTAL), to hidden values (M, F R). Without, hidden values are there, and at
    `present_ptr` the factors present."""
    allow_next_kernel()
    tile = gl.program_id(0) - workers
    if tile >= 0:
        multiply_tile(
            tile, words_ptr, high_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, present_ptr, counts_ptr + LINE,
            unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, steps, pairs_row, blocks_per_group, workers, headroom,
            inverse_headroom, BLOCKS, BM, WAYS, AHEAD, EVEN, ONCE, F, E, R, USED, SETTLES, BIAS,
        )  # fmt: skip
    elif SETTLES:
        wait_for_previous_kernel()
        present = settle(
            tile + workers, sums_ptr, router_bias_ptr, scale_ptr, unit_ptr, hidden_ptr, M, inverse_headroom, WAYS, BM,
            F, E, EP, R, TOTAL, SLICES, False,
        )  # fmt: skip
        count_done(counts_ptr + LINE, present)
