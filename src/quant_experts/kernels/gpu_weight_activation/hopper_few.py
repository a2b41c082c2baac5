"""The linear for a few int8 tokens on Hopper GPUs, in Gluon: weights go from memory to registers, as they lie.

Neither weights nor codes pass through shared memory (`gpu.hopper`), and a program asks for the weights of its first
steps before it waits for the codes.

A program owns BN rows over all input channels. Its WAYS warps take every WAYS-th block of 128 channels each, and every
WAYS-th run of 32 expert ranks; what they find is added up at the end, int32 sums exactly.

Experts that read codes are projected and settled by programs of their own, the first ones, and those that read values,
which `prepare` has projected, are settled by such (`hopper_settle`). They are waited for at the end.

`linear_few` is the same for other GPUs, the interpreter and fp8 tokens. Rejected: passing
weights through shared memory as it does, sixteen warps a program, and programs that settle, and multiply too: what a
program holds in registers decides how many there are on a multiprocessor (EXPERIMENTS.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import across, allow_next_kernel, multiply, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_counts import count_done, wait_for
from quant_experts.kernels.gpu.hopper_few import (
    ask_for_hiddens,
    ask_for_ups,
    expert_sums,
    load_there,
    wait_for_factors,
)
from quant_experts.kernels.gpu_tokens.hopper_settle import LINE, add_projection, ask_for_piece, settle
from quant_experts.kernels.gpu_weight_activation.hopper_codes import unpack_int8

EARLY_RANKS = gl.constexpr(128)
"""Ranks, at most, whose up factors wait in registers from the start."""


@gluon.jit
def ask_for_weights(weight_at, block, steps, block_bytes, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """Packed weights of every WAYS-th block of 128 channels from `block` on, AHEAD of them."""
    packed = ()
    for i in gl.static_range(AHEAD):
        there = block + i * WAYS
        packed = packed + (load_there(weight_at + there * block_bytes, there < steps, EVEN),)
    return packed


@gluon.jit
def ask_for_codes(codes_at, there, block, steps, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """Both halves of the same blocks of the tokens."""
    codes = ()
    for i in gl.static_range(AHEAD):
        at = codes_at + (block + i * WAYS) * 128
        if not EVEN:
            there = there & (block + i * WAYS < steps)
        low = gl.load(at, mask=there, other=0)
        high = gl.load(at + 64, mask=there, other=0)
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
def multiply_tile(
    tile, weight_ptr, codes_ptr, up_ptr, hidden_ptr, present_ptr, settled_ptr, y_ptr, scale_ptr, token_scale_ptr,
    bias_ptr, M, N, steps, settlers, headroom, inverse_headroom, BN: gl.constexpr, BM: gl.constexpr,
    WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr,
    R: gl.constexpr, USED: gl.constexpr, SETTLES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """BN rows of y. Arguments are those of `kernel`; `settlers` programs count themselves at `settled_ptr`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, 8])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    ASK_EARLY: gl.constexpr = F > 0 and E == 0 and USED * R <= EARLY_RANKS
    first = gl.minimum(tile * BN, N - BN)
    row = first + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    token = gl.arange(0, BM, gl.SliceLayout(0, TILE))
    row_scale = gl.load(scale_ptr + row)  # used at the end: a product here would wait for it
    way = across(WAYS, 0, BYTES)
    there = across(BM, 1, BYTES) < M
    weight_at = weight_ptr + first * 64 + across(BN, 1, BYTES) * 64 + across(64, 2, BYTES)
    codes_at = codes_ptr + across(BM, 1, BYTES) * (steps * 128) + across(64, 2, BYTES)
    block_bytes = N.to(gl.int64) * 64
    packed = ask_for_weights(weight_at, way, steps, block_bytes, WAYS, AHEAD, EVEN)
    if ASK_EARLY:
        ups = ask_for_ups(up_ptr, 1, first, N, BN, WAYS, F, R, USED, HALVES)
    wait_for_previous_kernel()
    codes = ask_for_codes(codes_at, there, way, steps, WAYS, AHEAD, EVEN)
    low_sums = gl.zeros([WAYS, BN, BM], gl.int32, MMA)
    high_sums = gl.zeros([WAYS, BN, BM], gl.int32, MMA)
    low_sums, high_sums = add_products(low_sums, high_sums, packed, codes)
    if not ONCE:
        for start in range(WAYS * AHEAD, steps, WAYS * AHEAD):
            packed = ask_for_weights(weight_at, start + way, steps, block_bytes, WAYS, AHEAD, EVEN)
            codes = ask_for_codes(codes_at, there, start + way, steps, WAYS, AHEAD, EVEN)
            low_sums, high_sums = add_products(low_sums, high_sums, packed, codes)
    token_scale = gl.load(token_scale_ptr + token, mask=token < M, other=0.0) * headroom
    if F > 0:
        present = wait_for_factors(settled_ptr, settlers, present_ptr, E, SETTLES)
        if not ASK_EARLY:
            ups = ask_for_ups(up_ptr, present, first, N, BN, WAYS, F, R, USED, HALVES)
        hiddens = ask_for_hiddens(hidden_ptr, present, M, BM, WAYS, F, R, USED, HALVES)
    y = gl.sum(low_sums + high_sums, axis=0).to(gl.float32) * (row_scale * (0.0625 * inverse_headroom))[:, None]
    if F > 0:
        y += expert_sums(ups, hiddens, MMA)
    y = y * token_scale[None, :]
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    at = y_ptr + token[None, :].to(gl.int64) * N + row[:, None]
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=(token < M)[None, :] & (row >= 0)[:, None])


@gluon.jit
def kernel(
    weight_ptr, codes_ptr, down_ptr, up_ptr, sums_ptr, hidden_ptr, present_ptr, counts_ptr, router_bias_ptr,
    code_scale_ptr, y_ptr, scale_ptr, token_scale_ptr, bias_ptr, M, N, steps, workers, headroom, inverse_headroom,
    BN: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr,
    ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr, USED: gl.constexpr, TOTAL: gl.constexpr,
    EP: gl.constexpr, SLICES: gl.constexpr, PROJECTS: gl.constexpr, SETTLES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (M, N), M <= BM, N >= BN, from tokens (M, 128 steps) and weight (steps, N, 64). Programs: `workers`, then tiles
    of BN rows; the last one ends with the last row. EVEN: every warp has as many blocks as it asks for each time; ONCE:
    it asks only once. USED: factors that M tokens use at most.

    SETTLES: workers settle sums (SLICES, M, TOTAL), to hidden values (M, F R); with PROJECTS they project codes before,
    to one slice of sums. Without, hidden values are there, and at `present_ptr` the factors present."""
    allow_next_kernel()
    tile = gl.program_id(0) - workers
    if tile >= 0:
        multiply_tile(
            tile, weight_ptr, codes_ptr, up_ptr, hidden_ptr, present_ptr, counts_ptr + LINE, y_ptr, scale_ptr,
            token_scale_ptr, bias_ptr, M, N, steps, 1 if PROJECTS else workers, headroom, inverse_headroom, BN, BM,
            WAYS, AHEAD, EVEN, ONCE, F, E, R, USED, SETTLES, BIAS,
        )  # fmt: skip
    elif SETTLES:
        worker = tile + workers
        factors = F
        present = worker * 0
        if PROJECTS:
            down = ask_for_piece(down_ptr, worker, steps, WAYS, TOTAL)
            wait_for_previous_kernel()
            add_projection(down, worker, workers, codes_ptr, down_ptr, sums_ptr, M, steps, WAYS, BM, TOTAL)
            count_done(counts_ptr, present)
            factors = gl.where(worker == 0, F, 0)
            if worker == 0:
                wait_for(counts_ptr, workers)
        else:
            wait_for_previous_kernel()
        for factor in range(worker, factors, workers):
            present |= settle(
                factor, sums_ptr, router_bias_ptr, code_scale_ptr, token_scale_ptr, hidden_ptr, M, inverse_headroom,
                WAYS, BM, F, E, EP, R, TOTAL, SLICES, PROJECTS,
            )  # fmt: skip
        if worker < factors:
            count_done(counts_ptr + LINE, present)
