"""`prepare` for many tokens of routed experts, in launches: `score` (the expert of each token), `place` (a stable
counting sort by expert), `prepare.quantize` of tokens in that order, and beside it `project` (hidden values of the
shared expert and of those that a block of tokens uses).

Programs of `score` and `project` own a block of tokens and a slice of the input channels; the last slice to finish adds
them up in order, so that results do not depend on timing.

Exactness. Codes and scales are the oracle's bit for bit, the same float32 products; a rotation's sums come in another
order, so that its codes may differ by one where a value lies on a tie. Routers and experts that read values read the
input as it is: smoothing and rotation are folded into their weights (`layout`). Router scores are float32 sums of
exact products with weights of 24 bits, in another order than the oracle's: scores that differ by less than about 1e-6
of their terms may choose otherwise; equal scores go to the first. Down factors are rounded to bfloat16, as weights of
such models are (for float32 inputs they are float32), and hidden values to float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.tokens import (
    ROUTER_PARTS,
    add_product,
    choose,
    factors_used,
    load_raw,
    reciprocal,
    wait_for_previous_kernel,
)


@triton.jit
def score(
    x_ptr, projection_ptr, bias_ptr, expert_ptr, count_ptr, part_ptr, done_ptr, M, K, Kp, SLICES,
    FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Per token: the expert. Per block of ROWS tokens: how many go to each expert (blocks, EP)."""
    wait_for_previous_kernel(PDL)
    WIDTH: tl.constexpr = ROUTER_PARTS * EP
    block, piece = tl.program_id(0), tl.program_id(1)
    token = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    scores = tl.zeros((ROWS, WIDTH), tl.float32)
    steps = Kp // 128
    for step in tl.range(piece * steps // SLICES, (piece + 1) * steps // SLICES, num_stages=STAGES):
        x = load_raw(x_ptr, token, token < M, step * 128 + tl.arange(0, 128), K)
        at = projection_ptr + (step * TOTAL + FACTOR_ROWS + column)[None, :].to(tl.int64) * 128
        scores = add_product(scores, tl.abs(x), tl.load(at + tl.arange(0, 128)[:, None]))
    at = part_ptr + block.to(tl.int64) * SLICES * (ROWS * WIDTH)
    at += tl.arange(0, ROWS)[:, None] * WIDTH + column[None, :]
    tl.store(at + piece * (ROWS * WIDTH), scores)
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        tl.store(done_ptr + block, 0)
        scores = tl.zeros((ROWS, WIDTH), tl.float32)
        for i in tl.range(SLICES, num_stages=4):
            scores += tl.load(at + i * (ROWS * WIDTH), cache_modifier=".cg")
        expert = choose(tl.sum(tl.reshape(scores, (ROWS, ROUTER_PARTS, EP)), axis=1), bias_ptr, E, EP)
        tl.store(expert_ptr + token, expert, mask=token < M)
        place = tl.arange(0, EP)
        chosen = (expert[:, None] == place[None, :]) & (token < M)[:, None]
        tl.store(count_ptr + block * EP + place, tl.sum(chosen.to(tl.int32), axis=0))


@triton.jit
def place(
    expert_ptr, count_ptr, order_ptr, sorted_expert_ptr, blocks, M,
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
    tl.store(sorted_expert_ptr + position, expert, mask=row < M)


@triton.jit
def factor_at(projection_ptr, factor, step, TOTAL: tl.constexpr, R: tl.constexpr):
    """(128, R) addresses of a block of a down factor."""
    rank = (step * TOTAL + factor * R + tl.arange(0, R)).to(tl.int64)
    return projection_ptr + rank[None, :] * 128 + tl.arange(0, 128)[:, None]


@triton.jit
def project_slice(
    x_ptr, token, used, expert, projection_ptr, begin, end, K, TOTAL: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    R: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(ROWS, R) sums over steps [begin, end) of a block's channels, of the shared expert and of each token's own."""
    first = tl.minimum(tl.min(tl.where(used, expert, E), axis=0), E - 1)
    last = tl.max(tl.where(used, expert, 0), axis=0)
    # In most blocks all tokens have one expert: then the second is the first once more.
    second = tl.minimum(tl.min(tl.where(used & (expert > first), expert, E), axis=0), tl.maximum(last, first))
    shared = tl.zeros((ROWS, R), tl.float32)
    own = tl.zeros((ROWS, R), tl.float32)
    others = tl.zeros((ROWS, R), tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        x = load_raw(x_ptr, token, used, step * 128 + tl.arange(0, 128), K)
        if F > E:
            shared = add_product(shared, x, tl.load(factor_at(projection_ptr, 0, step, TOTAL, R)))
        own = add_product(own, x, tl.load(factor_at(projection_ptr, F - E + first, step, TOTAL, R)))
        others = add_product(others, x, tl.load(factor_at(projection_ptr, F - E + second, step, TOTAL, R)))
    own = tl.where((expert == first)[:, None], own, others)
    for e in range(second + 1, last + 1):  # three experts and more in one block: few tokens, or rare ones
        others = tl.zeros((ROWS, R), tl.float32)
        for step in range(begin, end):
            x = load_raw(x_ptr, token, used, step * 128 + tl.arange(0, 128), K)
            others = add_product(others, x, tl.load(factor_at(projection_ptr, F - E + e, step, TOTAL, R)))
        own = tl.where((expert == e)[:, None], others, own)
    return shared, own


@triton.jit
def store_hidden(
    shared, own, expert, unit, hidden_ptr, present_ptr, place, block, M,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Hidden sums times unit (ROWS,), zeros for experts that a token does not use; and the factors in use."""
    at = hidden_ptr + place.to(tl.int64)[:, None] * (F * R) + tl.arange(0, R)[None, :]
    mask = (place < M)[:, None]
    if F > E:
        tl.store(at, (shared * unit[:, None]).to(tl.float16), mask=mask)
    for e in range(E):
        kept = tl.where((expert == e)[:, None], own * unit[:, None], 0.0)
        tl.store(at + (F - E + e) * R, kept.to(tl.float16), mask=mask)
    masks = block * (ROWS // 16) + tl.arange(0, ROWS // 16)
    tl.store(present_ptr + masks, factors_used(expert, place < M, F, E), mask=masks * 16 < M)


@triton.jit
def project(
    x_ptr, projection_ptr, expert_ptr, order_ptr, token_scale_ptr, hidden_ptr, present_ptr, part_ptr, done_ptr, M, K,
    Kp, SLICES, inverse_headroom, TOTAL: tl.constexpr, F: tl.constexpr, E: tl.constexpr, R: tl.constexpr,
    ROWS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Hidden values of ROWS places of the sorted order. The order was complete when the kernel before this one started;
    token scales are when it has ended."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    block, piece = tl.program_id(0), tl.program_id(1)
    place = block * ROWS + tl.arange(0, ROWS)
    token = tl.load(order_ptr + place, mask=place < M, other=0, cache_modifier=".cg")
    expert = tl.load(expert_ptr + place, mask=place < M, other=0, cache_modifier=".cg")
    steps = Kp // 128
    shared, own = project_slice(
        x_ptr, token, place < M, expert, projection_ptr, piece * steps // SLICES, (piece + 1) * steps // SLICES, K,
        TOTAL, F, E, R, ROWS, STAGES,
    )  # fmt: skip
    PARTS: tl.constexpr = 2 if F > E else 1
    base = part_ptr + block.to(tl.int64) * SLICES * (PARTS * ROWS * R)
    inner = tl.arange(0, ROWS)[:, None] * R + tl.arange(0, R)[None, :]
    at = base + piece * (PARTS * ROWS * R) + inner
    if F > E:
        tl.store(at, shared)
    tl.store(at + (PARTS - 1) * ROWS * R, own)
    tl.debug_barrier()
    if PDL:
        tl.extra.cuda.gdc_wait()
    if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        tl.store(done_ptr + block, 0)
        shared = tl.zeros_like(shared)
        own = tl.zeros_like(own)
        for i in tl.range(SLICES, num_stages=3):
            at = base + i * (PARTS * ROWS * R) + inner
            if F > E:
                shared += tl.load(at, cache_modifier=".cg")
            own += tl.load(at + (PARTS - 1) * ROWS * R, cache_modifier=".cg")
        scale = tl.load(token_scale_ptr + place, mask=place < M, other=1.0, cache_modifier=".cg")
        unit = reciprocal(tl.where(scale == scale, scale, 1.0)) * inverse_headroom
        store_hidden(shared, own, expert, unit, hidden_ptr, present_ptr, place, block, M, F, E, R, ROWS)
