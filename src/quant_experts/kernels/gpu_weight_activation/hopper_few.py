"""The linear for a few int8 tokens on Hopper GPUs, in Gluon: weights go from memory to registers, as they lie.

Neither weights nor codes pass through shared memory (`gpu.hopper`), and a program asks for the weights of its first
steps before it waits for the codes.

A program owns BN rows over all input channels. Its WAYS warps take every WAYS-th block of 128 channels each, and every
WAYS-th run of 32 expert ranks; what they find is added up at the end, int32 sums exactly.

With SLICES, hidden values come as the programs that project leave them (`prepare`), and each program here chooses
experts and finishes the few hidden values that it needs: where those are few, or one slice has all, that costs less
than a launch of `prepare.end`.

`linear_few` is the same for other GPUs, the interpreter and fp8 tokens. Rejected: passing
weights through shared memory as it does, and eight or sixteen warps a program (EXPERIMENTS.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import (
    RUN,
    across,
    allow_next_kernel,
    factor_of,
    factors_of_experts,
    multiply,
    wait_for_previous_kernel,
)
from quant_experts.kernels.gpu_weight_activation.hopper_work import unpack_int8


@gluon.jit
def load_weights(at, there, EVEN: gl.constexpr):
    """EVEN: all are there."""
    if EVEN:
        return gl.load(at)
    else:
        return gl.load(at, mask=there, other=0)


@gluon.jit
def ask_for_weights(weight_at, block, steps, block_bytes, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """Packed weights of every WAYS-th block of 128 channels from `block` on, AHEAD of them."""
    packed = ()
    for i in gl.static_range(AHEAD):
        there = block + i * WAYS
        packed = packed + (load_weights(weight_at + there * block_bytes, there < steps, EVEN),)
    return packed


@gluon.jit
def ask_for_codes(codes_at, there, block, steps, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """Both halves of the same blocks of the tokens."""
    codes = ()
    for i in gl.static_range(AHEAD):
        at = codes_at + (block + i * WAYS) * 128
        if not EVEN:
            there = there & (block + i * WAYS < steps)
        low = gl.load(at, mask=there, other=0, cache_modifier=".cg")
        high = gl.load(at + 64, mask=there, other=0, cache_modifier=".cg")
        codes = codes + ((low, high),)
    return codes


@gluon.jit
def add_products(low_sums, high_sums, packed, codes):
    for i in gl.static_range(len(packed)):
        low, high = unpack_int8(packed[i])
        low_sums = multiply(low, codes[i][0], low_sums, 4)
        high_sums = multiply(high, codes[i][1], high_sums, 4)
    return low_sums, high_sums


@gluon.jit
def choose(sums_ptr, bias_ptr, M, BM: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr,
    TOTAL: gl.constexpr, EP: gl.constexpr, SLICES: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """(BM,) the expert of each token, as `tokens.choose`, from (SLICES, M, TOTAL) sums."""
    token = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, EP, gl.SliceLayout(0, LAYOUT))[None, :]
    scores = gl.zeros([BM, EP], gl.float32, LAYOUT)
    for piece in gl.static_range(SLICES):
        for part in gl.static_range(3):
            at = sums_ptr + (piece * M + token) * TOTAL + F * R + part * EP + column
            scores += gl.load(at, mask=token < M, other=0.0, cache_modifier=".cg")
    scores += gl.load(bias_ptr + column, mask=column < E, other=0.0)
    scores = gl.where(scores != scores, float("-inf"), scores)
    scores = gl.where(column < E, scores, float("inf"))
    least = gl.min(scores, axis=1)
    return gl.min(gl.where((scores == least[:, None]) & (column < E), column, E - 1), axis=1)


@gluon.jit
def ask_for_experts(
    up_ptr, hidden_ptr, present_ptr, router_bias_ptr, code_scale_ptr, token_scale_ptr, first, M, N, inverse_headroom,
    BN: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr,
    USED: gl.constexpr, TOTAL: gl.constexpr, EP: gl.constexpr, SLICES: gl.constexpr, CODES: gl.constexpr,
):  # fmt: skip
    """Up factors and hidden values of the runs of ranks of each warp. USED: factors that M tokens use at most."""
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    OF_TOKEN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, HALVES))
    SHARED: gl.constexpr = F - E
    token = across(BM, 1, HALVES)
    rank = across(RUN, 2, HALVES)
    expert = token * 0
    if SLICES == 0:
        present = gl.load(present_ptr)
    elif E == 0:
        present = 1
    else:
        CHOICE: gl.constexpr = gl.BlockedLayout([1, EP // 4], [8, 4], [WAYS, 1], [1, 0])
        chosen = choose(hidden_ptr, router_bias_ptr, M, BM, F, E, R, TOTAL, EP, SLICES, CHOICE)
        used = gl.arange(0, BM, gl.SliceLayout(1, CHOICE)) < M
        present = factors_of_experts(chosen, used, SHARED)
        expert = gl.expand_dims(gl.expand_dims(gl.convert_layout(chosen, OF_TOKEN, assert_trivial=True), 0), 2)
    if SLICES > 0:
        scale = gl.load(token_scale_ptr + token, mask=token < M, other=1.0, cache_modifier=".cg")
        inverse = gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, HALVES), gl.where(scale == scale, scale, 1.0))
    ups = ()
    hiddens = ()
    for start in gl.static_range(0, USED * (R // RUN), WAYS):
        run = start + across(WAYS, 0, HALVES)
        slot, column = run // (R // RUN), run % (R // RUN) * RUN + rank
        factor = factor_of(slot, present, F, USED)
        there = factor < F
        row = first.to(gl.int64) + across(BN, 1, HALVES)
        ups = ups + (gl.load(up_ptr + (row + factor * N) * R + column, mask=there, other=0.0),)
        here = there & (token < M)
        if SLICES == 0:
            at = hidden_ptr + token * (F * R) + factor * R + column
            hidden = gl.load(at, mask=here, other=0.0, cache_modifier=".cg")
        else:
            here = here & ((factor < SHARED) | (factor == expert + SHARED))
            at = hidden_ptr + token * TOTAL + factor * R + column
            total = gl.load(at, mask=here, other=0, cache_modifier=".cg")
            for piece in gl.static_range(1, SLICES):
                total += gl.load(at + piece * M * TOTAL, mask=here, other=0, cache_modifier=".cg")
            value = total.to(gl.float32) * inverse_headroom
            if CODES:
                value = value * gl.load(code_scale_ptr + column)
            else:
                value = value * inverse
            hidden = value.to(gl.float16)
        hiddens = hiddens + (hidden,)
    return ups, hiddens


@gluon.jit
def kernel(
    weight_ptr, codes_ptr, up_ptr, hidden_ptr, present_ptr, router_bias_ptr, code_scale_ptr, y_ptr, scale_ptr,
    token_scale_ptr, bias_ptr, M, N, Kp, headroom, inverse_headroom, BN: gl.constexpr, BM: gl.constexpr,
    WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr,
    R: gl.constexpr, USED: gl.constexpr, TOTAL: gl.constexpr, EP: gl.constexpr, SLICES: gl.constexpr,
    CODES: gl.constexpr, BIAS: gl.constexpr, LATER: gl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, N >= BN, from tokens (M, Kp) and weight (Kp / 128, N, 64). Programs: tiles of BN rows; the
    last one ends with the last row. EVEN: every warp has as many blocks as it asks for each time; ONCE: it asks only
    once; LATER: codes are complete at the start, hidden values when the previous kernel has ended."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, 8])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    allow_next_kernel()
    first = gl.minimum(gl.program_id(0) * BN, N - BN)
    row = first + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    token = gl.arange(0, BM, gl.SliceLayout(0, TILE))
    row_scale = gl.load(scale_ptr + row)  # used at the end: a product here would wait for it
    steps = Kp // 128
    way = across(WAYS, 0, BYTES)
    there = across(BM, 1, BYTES) < M
    weight_at = weight_ptr + first * 64 + across(BN, 1, BYTES) * 64 + across(64, 2, BYTES)
    codes_at = codes_ptr + across(BM, 1, BYTES) * Kp + across(64, 2, BYTES)
    block_bytes = N.to(gl.int64) * 64
    packed = ask_for_weights(weight_at, way, steps, block_bytes, WAYS, AHEAD, EVEN)
    if not LATER:
        wait_for_previous_kernel()
    codes = ask_for_codes(codes_at, there, way, steps, WAYS, AHEAD, EVEN)
    if F > 0 and not LATER:
        ups, hiddens = ask_for_experts(
            up_ptr, hidden_ptr, present_ptr, router_bias_ptr, code_scale_ptr, token_scale_ptr, first, M, N,
            inverse_headroom, BN, BM, WAYS, F, E, R, USED, TOTAL, EP, SLICES, CODES,
        )  # fmt: skip
    low_sums = gl.zeros([WAYS, BN, BM], gl.int32, MMA)
    high_sums = gl.zeros([WAYS, BN, BM], gl.int32, MMA)
    low_sums, high_sums = add_products(low_sums, high_sums, packed, codes)
    if not ONCE:
        for start in range(WAYS * AHEAD, steps, WAYS * AHEAD):
            packed = ask_for_weights(weight_at, start + way, steps, block_bytes, WAYS, AHEAD, EVEN)
            codes = ask_for_codes(codes_at, there, start + way, steps, WAYS, AHEAD, EVEN)
            low_sums, high_sums = add_products(low_sums, high_sums, packed, codes)
    if LATER:
        wait_for_previous_kernel()
    if F > 0 and LATER:
        ups, hiddens = ask_for_experts(
            up_ptr, hidden_ptr, present_ptr, router_bias_ptr, code_scale_ptr, token_scale_ptr, first, M, N,
            inverse_headroom, BN, BM, WAYS, F, E, R, USED, TOTAL, EP, SLICES, CODES,
        )  # fmt: skip
    token_scale = gl.load(token_scale_ptr + token, mask=token < M, other=0.0, cache_modifier=".cg") * headroom
    y = gl.sum(low_sums + high_sums, axis=0).to(gl.float32) * (row_scale * (0.0625 * inverse_headroom))[:, None]
    if F > 0:
        experts = gl.zeros([WAYS, BN, BM], gl.float32, MMA)
        for i in gl.static_range(len(ups)):
            experts = multiply(ups[i], hiddens[i], experts, 2)
        y += gl.sum(experts, axis=0)
    y = y * token_scale[None, :]
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    at = y_ptr + token[None, :].to(gl.int64) * N + row[:, None]
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row >= 0)[:, None])
