"""A group of linears without experts for one int8 token on Hopper GPUs, in Gluon, in one launch: every program
quantizes the token for itself.

A launch that waits for another costs one token as much as reading a small group's weights. What `prepare` does for it
is little work, so every program smooths, rotates and quantizes the whole token while its first weights are on their way
from memory, and goes on as in `hopper_few`.

Rejected: codes quantized once, by a program that the others wait for; programs that take tile after tile; and experts
here, whose work takes registers from all programs: `hopper_few` has programs of their own for it (EXPERIMENTS.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import across, allow_next_kernel, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_work import barrier
from quant_experts.kernels.gpu.tokens import ROUNDING
from quant_experts.kernels.gpu_tokens.hopper_tokens import ask_for_inverses, ask_for_token, smoothed, unit_and_inverse
from quant_experts.kernels.gpu_weight_activation.hopper_few import add_products, ask_for_weights

COLUMNS = gl.constexpr(8)
"""Tokens of a matrix product, at least: all of them are the one token here."""


@gluon.jit
def to_columns(token):
    """(ways, channels) of the token -> (ways, COLUMNS, channels), columns alike, in the layout that is its parent."""
    one = gl.expand_dims(token, 1)
    LAYOUT: gl.constexpr = one.type.layout
    like = gl.zeros([one.shape[0], COLUMNS, one.shape[2]], one.dtype, LAYOUT)
    return gl.broadcast(one, like)[0]


@gluon.jit
def quantize(raw, inverses, inverse_ptr, column, codes, K, LARGEST: gl.constexpr, SMOOTH: gl.constexpr,
    ROT: gl.constexpr,
):  # fmt: skip
    """The token's codes, to shared memory -> its scale; NaN, and zero codes, if it is not finite."""
    values, largest = smoothed(raw, inverses, inverse_ptr, column, K, SMOOTH, ROT)
    finite = largest < float("inf")
    unit, inverse = unit_and_inverse(largest, finite, LARGEST)
    for part in gl.static_range(len(values)):
        steps = (gl.where(finite, values[part] * inverse, 0.0) + ROUNDING).to(gl.int32, bitcast=True)
        codes.index(part).store(steps.to(gl.int8))
    return gl.where(finite, unit, float("nan"))


@gluon.jit
def in_turns(codes, TURNS: gl.constexpr, WAYS: gl.constexpr):
    """Codes in shared memory, complete -> (turns, ways, 128)."""
    barrier()
    return codes._reinterpret(gl.int8, [TURNS, WAYS, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def codes_of(codes, turn, half: gl.constexpr, BYTES: gl.constexpr):
    """Codes (turns, ways, 128) of one half of each block of a turn."""
    return to_columns(codes.index(turn).slice(half * 64, 64, 1).load(gl.SliceLayout(1, BYTES)))


@gluon.jit
def ask_for_codes(codes, first, AHEAD: gl.constexpr, BYTES: gl.constexpr):
    """Both halves of the blocks of AHEAD turns."""
    asked = ()
    for i in gl.static_range(AHEAD):
        asked = asked + ((codes_of(codes, first + i, 0, BYTES), codes_of(codes, first + i, 1, BYTES)),)
    return asked


@gluon.jit
def kernel(
    weight_ptr, x_ptr, inverse_ptr, y_ptr, scale_ptr, bias_ptr, N, K, steps, LARGEST: gl.constexpr,
    SMOOTH: gl.constexpr, ROT: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr, BN: gl.constexpr,
    WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (N) from one token x (K) and weight (steps, N, 64). Programs: tiles of BN rows, the last one of which ends with
    the last row. WAYS warps take a block of 128 channels each in every turn, and ask for AHEAD turns at a time. EVEN:
    there is a block for each of them whenever they ask; ONCE: they ask once. PARTS: of the token as it is quantized."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, COLUMNS])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    PART: gl.constexpr = WAYS * 256
    allow_next_kernel()
    first = gl.minimum(gl.program_id(0) * BN, N - BN)
    row = first + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    way = across(WAYS, 0, BYTES)
    weight_at = weight_ptr + first * 64 + across(BN, 1, BYTES) * 64 + across(64, 2, BYTES)
    block_bytes = N.to(gl.int64) * 64
    packed = ask_for_weights(weight_at, way, steps, block_bytes, WAYS, AHEAD, EVEN)
    row_scale = gl.load(scale_ptr + row)  # used at the end: a product here would wait for it
    column = gl.arange(0, PART, gl.BlockedLayout([8], [32], [WAYS], [0]))
    inverses = ()
    if SMOOTH:
        inverses = ask_for_inverses(inverse_ptr, column, K, PARTS, PART)
    wait_for_previous_kernel()
    raw = ask_for_token(x_ptr, True, column, K, PARTS, PART)
    codes = gl.allocate_shared_memory(gl.int8, [TURNS // 2, PART], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token_scale = quantize(raw, inverses, inverse_ptr, column, codes, K, LARGEST, SMOOTH, ROT)
    codes = in_turns(codes, TURNS, WAYS)
    low_sums = gl.zeros([WAYS, BN, COLUMNS], gl.int32, MMA)
    high_sums = gl.zeros([WAYS, BN, COLUMNS], gl.int32, MMA)
    low_sums, high_sums = add_products(low_sums, high_sums, packed, ask_for_codes(codes, 0, AHEAD, BYTES))
    if not ONCE:
        for start in range(AHEAD, (steps + WAYS - 1) // WAYS, AHEAD):
            packed = ask_for_weights(weight_at, start * WAYS + way, steps, block_bytes, WAYS, AHEAD, EVEN)
            asked = ask_for_codes(codes, start, AHEAD, BYTES)
            low_sums, high_sums = add_products(low_sums, high_sums, packed, asked)
    y = gl.sum(low_sums + high_sums, axis=0).to(gl.float32) * (row_scale * 0.0625)[:, None] * token_scale
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    one = gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE)) == 0
    at = (y_ptr + row)[:, None] + gl.zeros([BN, COLUMNS], gl.int32, TILE)
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=one[None, :] & (row >= 0)[:, None])
