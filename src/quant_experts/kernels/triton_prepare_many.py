"""`prepare` for many tokens in launches: measure (scale and expert of each token), place (a stable counting sort
by expert); then, in that order, quantize, and project (shared factor, and only the experts that a tile of tokens uses).

Programs of `measure` and `project` own a block of tokens and a slice of the input channels; the last slice to finish
adds them up in order. Exactness: see `triton_prepare`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import (
    bitwise_or,
    choose,
    down_dot,
    hidden_scale,
    hidden_unit,
    load_smoothed,
    nan_max,
    power_below,
    quantize,
    reciprocal,
    router_scores,
    token_scale,
    wait_for_previous_kernel,
)


@triton.jit
def measure(
    x_ptr, smooth_ptr, router_ptr, bias_ptr, expert_ptr, absmax_ptr, count_ptr, part_ptr, done_ptr, M, K, Kp,
    E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, SLICES, SMOOTH: tl.constexpr,
    PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per token: max |x / m| and the expert. Per block of ROWS tokens: how many go to each expert (blocks, EP)."""
    wait_for_previous_kernel(PDL)
    block, piece = tl.program_id(0), tl.program_id(1)
    row = tl.arange(0, ROWS)
    token = block * ROWS + row
    column = tl.arange(0, EP)
    scores = tl.zeros((ROWS, EP), tl.float32)
    absmax = tl.zeros((ROWS,), tl.float32)
    steps = Kp // 128
    per = tl.cdiv(steps, SLICES)
    first, last = piece * per, tl.minimum(piece * per + per, steps)
    for step in tl.range(first, last, num_stages=4):
        columns = step * 128 + tl.arange(0, 128)
        x = load_smoothed(x_ptr, token, token < M, columns, K, smooth_ptr, SMOOTH, PLAIN)
        most = tl.reduce(tl.abs(x), 1, nan_max)
        absmax = nan_max(absmax, most)
        if E > 0:
            unit = power_below(most)
            scores += router_scores(x * reciprocal(unit)[:, None], router_ptr, columns, Kp, EP) * unit[:, None]
    SIZE: tl.constexpr = ROWS * (EP + 1)
    base = part_ptr + block.to(tl.int64) * SLICES * SIZE
    tl.store(base + piece * SIZE + row[:, None] * EP + column[None, :], scores)
    tl.store(base + piece * SIZE + ROWS * EP + row, absmax)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        tl.store(done_ptr + block, 0)
        total = tl.zeros((ROWS, EP), tl.float32)
        absmax = tl.zeros((ROWS,), tl.float32)
        for i in range(SLICES):
            at = base + i * SIZE
            total += tl.load(at + row[:, None] * EP + column[None, :], cache_modifier=".cg")
            absmax = nan_max(absmax, tl.load(at + ROWS * EP + row, cache_modifier=".cg"))
        tl.store(absmax_ptr + token, absmax, mask=token < M)
        if E > 0:
            total += tl.load(bias_ptr + column, mask=column < E, other=0.0)[None, :]
            expert = choose(total, E)
            tl.store(expert_ptr + token, expert, mask=token < M)
            chosen = (expert[:, None] == column[None, :]) & (token < M)[:, None]
            tl.store(count_ptr + block * EP + column, tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit
def place(
    expert_ptr, count_ptr, order_ptr, blocks, M,
    EP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Stable counting sort: the place of each token of one block among all tokens sorted by expert."""
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    column = tl.arange(0, EP)
    total = tl.zeros((EP,), tl.int32)
    before = tl.zeros((EP,), tl.int32)
    for start in range(0, blocks, BLOCKS):
        other = start + tl.arange(0, BLOCKS)
        at = count_ptr + other[:, None] * EP + column[None, :]
        counts = tl.load(at, mask=(other < blocks)[:, None], other=0)
        total += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], counts, 0), axis=0)
    base = tl.cumsum(total, axis=0) - total + before
    row = block * ROWS + tl.arange(0, ROWS)
    expert = tl.load(expert_ptr + row, mask=row < M, other=-1)
    chosen = (expert[:, None] == column[None, :]).to(tl.int32)
    among = tl.cumsum(chosen, axis=0) - chosen
    position = tl.sum(chosen * (base[None, :] + among), axis=1)
    tl.store(order_ptr + position, row, mask=row < M)


@triton.jit
def sorted_tokens(row, expert_ptr, order_ptr, absmax_ptr, M, E: tl.constexpr):
    """Tokens, experts and largest magnitudes at places of the sorted order."""
    token = row
    expert = row * 0
    if E > 0:
        token = tl.load(order_ptr + row, mask=row < M, other=0)
        expert = tl.load(expert_ptr + token, mask=row < M, other=0)
    return token, expert, tl.load(absmax_ptr + token, mask=row < M, other=1.0)


@triton.jit
def quantize_sorted(
    x_ptr, smooth_ptr, expert_ptr, order_ptr, absmax_ptr, codes_ptr, scales_ptr, token_scale_ptr, sorted_expert_ptr,
    M, K, Kp, headroom, LARGEST: tl.constexpr, F: tl.constexpr, E: tl.constexpr, CODES: tl.constexpr,
    TILE: tl.constexpr, WIDTH: tl.constexpr, SMOOTH: tl.constexpr, PLAIN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes of TILE places by WIDTH channels; the first tile of a row writes its scales."""
    wait_for_previous_kernel(PDL)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    token, expert, absmax = sorted_tokens(row, expert_ptr, order_ptr, absmax_ptr, M, E)
    scale = token_scale(absmax, LARGEST)
    x = load_smoothed(x_ptr, token, row < M, columns, K, smooth_ptr, SMOOTH, PLAIN)
    at = codes_ptr + row.to(tl.int64)[:, None] * Kp + columns[None, :]
    tl.store(at, quantize(x, scale, PLAIN), mask=(row < M)[:, None] & (columns < Kp)[None, :])
    if tl.program_id(1) == 0:
        unit = hidden_unit(absmax, scale, headroom, F, CODES)
        tl.store(token_scale_ptr + row, scale, mask=row < M)
        tl.store(scales_ptr + row, tl.div_rn(scale, unit), mask=row < M)
        tl.store(scales_ptr + M + row, unit, mask=row < M)
        if E > 0:
            tl.store(sorted_expert_ptr + row, expert, mask=row < M)


@triton.jit
def load_near_one(x_ptr, token, row_mask, columns, K, smooth_ptr, inverse, SMOOTH: tl.constexpr):
    """x / m in units of the token's largest value, float16. Hidden values need no exact quotients."""
    inside = columns < K
    at = x_ptr + token.to(tl.int64)[:, None] * K + columns[None, :]
    x = tl.load(at, mask=row_mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if SMOOTH:
        x = x * tl.load(smooth_ptr + K + columns, mask=inside, other=1.0)[None, :]
    return (x * inverse[:, None]).to(tl.float16)


@triton.jit
def project(
    x_ptr, smooth_ptr, down_ptr, expert_ptr, order_ptr, absmax_ptr, hidden_ptr, present_ptr, part_ptr, done_ptr,
    M, K, Kp, headroom, SLICES, F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
    SMOOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A slice of the input channels of ROWS places times the shared factor and the experts that are there."""
    wait_for_previous_kernel(PDL)
    block, piece = tl.program_id(0), tl.program_id(1)
    row = block * ROWS + tl.arange(0, ROWS)
    token, expert, absmax = sorted_tokens(row, expert_ptr, order_ptr, absmax_ptr, M, E)
    first = tl.min(tl.where(row < M, expert, E), axis=0)
    last = tl.max(tl.where(row < M, expert, 0), axis=0)
    inverse = reciprocal(power_below(absmax))
    rank = tl.arange(0, R)
    shared = tl.zeros((ROWS, R), tl.float32)
    own = tl.zeros((ROWS, R), tl.float32)
    steps = Kp // 128
    per = tl.cdiv(steps, SLICES)
    begin, end = piece * per, tl.minimum(piece * per + per, steps)
    for step in tl.range(begin, end, num_stages=3):
        columns = step * 128 + tl.arange(0, 128)
        x = load_near_one(x_ptr, token, row < M, columns, K, smooth_ptr, inverse, SMOOTH)
        if F > E:
            shared = down_dot(x, down_ptr, rank, columns, Kp, shared)
        if E > 0:
            mine = tl.where((expert == first)[:, None], x, 0.0)
            own = down_dot(mine, down_ptr, (F - E + first) * R + rank, columns, Kp, own)
    if E > 0:  # a block where one expert's tokens end and others' begin: once more for each
        for e in range(first + 1, last + 1):
            for step in tl.range(begin, end, num_stages=3):
                columns = step * 128 + tl.arange(0, 128)
                x = load_near_one(x_ptr, token, row < M, columns, K, smooth_ptr, inverse, SMOOTH)
                mine = tl.where((expert == e)[:, None], x, 0.0)
                own = down_dot(mine, down_ptr, (F - E + e) * R + rank, columns, Kp, own)
    at = part_ptr + (block * SLICES + piece).to(tl.int64) * (2 * ROWS * R)
    inner = tl.arange(0, ROWS)[:, None] * R + rank[None, :]
    tl.store(at + inner, shared)
    tl.store(at + ROWS * R + inner, own)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        tl.store(done_ptr + block, 0)
        finish_block(
            part_ptr + block.to(tl.int64) * SLICES * (2 * ROWS * R), hidden_ptr, present_ptr, expert, absmax,
            block, M, headroom, F, E, R, ROWS, SLICES,
        )  # fmt: skip


@triton.jit
def finish_block(
    base, hidden_ptr, present_ptr, expert, absmax, block, M, headroom,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, SLICES,
):  # fmt: skip
    """Add a block's slices; write its hidden values, zeros for experts that a token does not use."""
    row = block * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, R)
    inner = tl.arange(0, ROWS)[:, None] * R + rank[None, :]
    shared = tl.zeros((ROWS, R), tl.float32)
    own = tl.zeros((ROWS, R), tl.float32)
    for i in range(0 if F == 0 else SLICES):
        shared += tl.load(base + i * (2 * ROWS * R) + inner, cache_modifier=".cg")
        own += tl.load(base + i * (2 * ROWS * R) + ROWS * R + inner, cache_modifier=".cg")
    unit = tl.broadcast_to((power_below(absmax) * reciprocal(hidden_scale(absmax, headroom)))[:, None], own.shape)
    own *= unit
    at = hidden_ptr + row.to(tl.int64)[:, None] * (F * R) + rank[None, :]
    bits = tl.full((ROWS,), 1, tl.int32)
    if F > E:
        tl.store(at, (shared * unit).to(tl.float16), mask=(row < M)[:, None])
    if E > 0:
        bits = 1 << (expert + (F - E))
        for e in range(E):
            kept = tl.where((expert == e)[:, None], own, 0.0)
            tl.store(at + (F - E + e) * R, kept.to(tl.float16), mask=(row < M)[:, None])
    present = tl.reduce(tl.reshape(tl.where(row < M, bits, 0), (ROWS // 16, 16)), 1, bitwise_or)
    if F > E:
        present = present | 1
    masks = block * (ROWS // 16) + tl.arange(0, ROWS // 16)
    tl.store(present_ptr + masks, present, mask=masks * 16 < M)
