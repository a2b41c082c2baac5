"""What linears for a few tokens on Hopper GPUs do for experts beside multiplying, in Gluon: some of their programs
project codes, or settle what `prepare` has projected, while others multiply.

A launch between two others costs a few tokens more than what it does, and the linear behind it asks for its weights the
later. So there is none: programs count themselves done, and those that need their results wait for the count at their
end. Programs that are waited for start before all others, and are no more than multiprocessors, because one of them
waits for the rest. Which factors are present stands beside the count: who waits needs that at once, to ask for the up
factors. Counts are zero when a linear starts: what quantizes its tokens leaves them so.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import across, factors_of_experts, multiply
from quant_experts.kernels.gpu_tokens.layout import COUNTS

ROWS = gl.constexpr(16)
"""Of a matrix product: rows of the projection that a program owns."""
LINE = gl.constexpr(COUNTS // 2)
"""Numbers from the first count to the second, so that each has a line of the cache."""


@gluon.jit
def piece_of_projection(i, WAYS: gl.constexpr, TOTAL: gl.constexpr, BYTES: gl.constexpr):
    """-> first of ROWS rows, and the block of channels of each warp, of the i-th piece of a projection of codes."""
    return i % (TOTAL // ROWS) * ROWS, i // (TOTAL // ROWS) * WAYS + across(WAYS, 0, BYTES)


@gluon.jit
def ask_for_piece(down_ptr, i, steps, WAYS: gl.constexpr, TOTAL: gl.constexpr):
    """Weights of a piece, both halves of its blocks."""
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    row, block = piece_of_projection(i, WAYS, TOTAL, BYTES)
    at = down_ptr + (block.to(gl.int64) * TOTAL + row + across(ROWS, 1, BYTES)) * 128 + across(64, 2, BYTES)
    return gl.load(at, mask=block < steps, other=0), gl.load(at + 64, mask=block < steps, other=0)


@gluon.jit
def add_piece(down, i, codes_ptr, sums_ptr, M, steps, WAYS: gl.constexpr, BM: gl.constexpr, TOTAL: gl.constexpr):
    """Add a piece's products, exact in any order, to sums (M, TOTAL); down: `ask_for_piece`."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, ROWS, 8])
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    row, block = piece_of_projection(i, WAYS, TOTAL, BYTES)
    token = across(BM, 1, BYTES)
    total = gl.zeros([WAYS, ROWS, BM], gl.int32, MMA)
    for run in gl.static_range(2):
        at = codes_ptr + (token * steps + block) * 128 + run * 64 + across(64, 2, BYTES)
        codes = gl.load(at, mask=(token < M) & (block < steps), other=0, cache_modifier=".cg")
        total = multiply(down[run], codes, total, 4)
    token = across(BM, 2, MMA)
    at = token * TOTAL + row + across(ROWS, 1, MMA) + 0 * across(WAYS, 0, MMA)  # each warp adds its own
    gl.atomic_add(sums_ptr + at, total, mask=(token < M) & (at >= 0), sem="relaxed")


@gluon.jit
def add_projection(
    down, program, programs, codes_ptr, down_ptr, sums_ptr, M, steps, WAYS: gl.constexpr, BM: gl.constexpr,
    TOTAL: gl.constexpr,
):  # fmt: skip
    """Add one program's part of a projection of codes (M, steps, 128) to sums: pieces from its number on, a step of so
    many programs apart. down: `ask_for_piece` of the first."""
    add_piece(down, program, codes_ptr, sums_ptr, M, steps, WAYS, BM, TOTAL)
    for i in range(program + programs, pieces(steps, WAYS, TOTAL), programs):
        more = ask_for_piece(down_ptr, i, steps, WAYS, TOTAL)
        add_piece(more, i, codes_ptr, sums_ptr, M, steps, WAYS, BM, TOTAL)


@gluon.jit
def pieces(steps, WAYS: gl.constexpr, TOTAL: gl.constexpr):
    """Of a projection of codes."""
    return (steps + WAYS - 1) // WAYS * (TOTAL // ROWS)


@gluon.jit
def choose(
    sums_ptr, bias_ptr, M, BM: gl.constexpr, F: gl.constexpr, E: gl.constexpr, R: gl.constexpr, TOTAL: gl.constexpr,
    EP: gl.constexpr, SLICES: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """(BM,) the expert of each token, as `tokens.choose`, from (SLICES, M, TOTAL) sums."""
    token = gl.arange(0, BM, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, EP, gl.SliceLayout(0, LAYOUT))[None, :]
    scores = gl.zeros([BM, EP], gl.float32, LAYOUT)
    for piece in gl.static_range(SLICES):
        for part in gl.static_range(3):
            at = sums_ptr + (piece * M + token) * TOTAL + F * R + part * EP + column
            scores += gl.load(at, mask=token < M, other=0.0, cache_modifier=".cg")
    return best(scores, column, bias_ptr, E)


@gluon.jit
def best(scores, column, bias_ptr, E: gl.constexpr):
    """Of each row of scores, the first column of E with the least score, bias included."""
    scores += gl.load(bias_ptr + column, mask=column < E, other=0.0)
    scores = gl.where(scores != scores, float("-inf"), scores)
    scores = gl.where(column < E, scores, float("inf"))
    least = gl.min(scores, axis=1)
    return gl.min(gl.where((scores == least[:, None]) & (column < E), column, E - 1), axis=1)


@gluon.jit
def settle(
    factor, sums_ptr, bias_ptr, code_scale_ptr, token_scale_ptr, hidden_ptr, M, inverse_headroom,
    WAYS: gl.constexpr, BM: gl.constexpr, F: gl.constexpr, E: gl.constexpr, EP: gl.constexpr, R: gl.constexpr,
    TOTAL: gl.constexpr, SLICES: gl.constexpr, CODES: gl.constexpr,
):  # fmt: skip
    """Hidden values (M, F R) of one factor, as `prepare.end` leaves them, M <= BM, from sums (SLICES, M, TOTAL). -> of
    the first, which factors are present, where experts are routed; else 0."""
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WAYS, 1], [1, 0])
    SHARED: gl.constexpr = F - E
    token = gl.arange(0, BM, gl.SliceLayout(1, WIDE))
    rank = gl.arange(0, R, gl.SliceLayout(0, WIDE))[None, :]
    uses = token < M
    present = 0
    row = token[:, None]
    at = sums_ptr + row * TOTAL + factor * R + rank
    total = gl.load(at, mask=row < M, other=0, cache_modifier=".cg")
    for piece in gl.static_range(1, SLICES):  # unrolled: all loads are under way at once
        total += gl.load(at + piece * M * TOTAL, mask=row < M, other=0, cache_modifier=".cg")
    hidden = in_units(total, token, rank, M, code_scale_ptr, token_scale_ptr, inverse_headroom, CODES)
    if E > 0:
        CHOICE: gl.constexpr = gl.BlockedLayout([1, EP // 4], [8, 4], [WAYS, 1], [1, 0])
        expert = choose(sums_ptr, bias_ptr, M, BM, F, E, R, TOTAL, EP, SLICES, CHOICE)
        used = gl.arange(0, BM, gl.SliceLayout(1, CHOICE)) < M
        present = gl.where(factor == 0, factors_of_experts(expert, used, SHARED), 0)
        uses = uses & ((factor < SHARED) | (gl.convert_layout(expert, token.type.layout) == factor - SHARED))
    hidden = gl.where(uses[:, None], hidden, 0.0).to(gl.float16)
    gl.store(hidden_ptr + row * (F * R) + factor * R + rank, hidden, mask=row < M)
    return present


@gluon.jit
def in_units(total, token, rank, M, code_scale_ptr, token_scale_ptr, inverse_headroom, CODES: gl.constexpr):
    """Sums of tokens and ranks as float32 hidden values, in units of token scale * headroom."""
    hidden = total.to(gl.float32)
    if CODES:
        hidden = hidden * gl.load(code_scale_ptr + rank)
    else:
        scale = gl.load(token_scale_ptr + token, mask=token < M, other=1.0, cache_modifier=".cg")
        scale = gl.where(scale == scale, scale, 1.0)
        hidden = hidden * gl.div_rn(gl.full(scale.shape, 1.0, gl.float32, scale.type.layout), scale)[:, None]
    return hidden * inverse_headroom  # last: of the largest values it could be too large
