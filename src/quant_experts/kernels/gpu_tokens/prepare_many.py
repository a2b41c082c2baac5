"""`prepare` for many tokens of routed experts that are sorted by expert, because outputs are many as well: after the
projection of all of them, `route` (the expert of each token), `place` (a stable counting sort by expert),
`prepare.quantize` of tokens in that order, and `settle` (their hidden values, in that order).

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
    choose,
    factors_used,
    reciprocal,
    wait_for_previous_kernel,
)


@triton.jit
def added(at, there, stride, slices, SLICES: tl.constexpr):
    """The sum over slices, `stride` apart, of what lies at addresses (rows, columns), zero where not there; in order,
    and unrolled, so that all loads are under way at once. SLICES: slices, padded."""
    total = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
    for piece in tl.static_range(1, SLICES):
        total += tl.load(at + piece * stride, mask=there & (piece < slices), other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["M", "slices"])
def route(
    sums_ptr, bias_ptr, expert_ptr, count_ptr, M, slices, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """From sums (slices, M, TOTAL) per token: the expert. Per block of ROWS tokens, a program each: how many go to each
    expert (blocks, EP)."""
    wait_for_previous_kernel(PDL)
    block = tl.program_id(0)
    token = block * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, EP)[None, :]
    there = (token < M)[:, None]
    stride = M.to(tl.int64) * TOTAL
    at = sums_ptr + token.to(tl.int64)[:, None] * TOTAL + FACTOR_ROWS + column
    scores = added(at, there, stride, slices, SLICES)
    for part in tl.static_range(1, ROUTER_PARTS - 1):
        scores += added(at + part * EP, there, stride, slices, SLICES)
    expert = choose(scores, bias_ptr, E, EP)
    tl.store(expert_ptr + token, expert, mask=token < M)
    chosen = (expert[:, None] == column) & there
    tl.store(count_ptr + block * EP + tl.arange(0, EP), tl.sum(chosen.to(tl.int32), axis=0))


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


@triton.jit(do_not_specialize=["M", "slices"])
def settle(
    sums_ptr, order_ptr, expert_ptr, token_scale_ptr, hidden_ptr, present_ptr, M, slices, inverse_headroom,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, SLICES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Hidden values in units of scale * headroom, zeros for experts that a token does not use, and the factors in use.
    Programs: blocks of 16 places of the sorted order.

    Sums, order and experts were complete when the kernel before this one, which quantizes, started; token scales are
    when it has ended, and codes, so that the linear may start then.
    """
    place = tl.program_id(0) * 16 + tl.arange(0, 16)
    rank = tl.arange(0, R)[None, :]
    used = place < M
    there = used[:, None]
    token = tl.load(order_ptr + place, mask=used, other=0, cache_modifier=".cg")
    expert = tl.load(expert_ptr + place, mask=used, other=0, cache_modifier=".cg")
    stride = M.to(tl.int64) * TOTAL
    at = sums_ptr + token.to(tl.int64)[:, None] * TOTAL + rank
    own = added(at + (expert + (F - E))[:, None] * R, there, stride, slices, SLICES)
    shared = own
    if F > E:
        shared = added(at, there, stride, slices, SLICES)
    wait_for_previous_kernel(PDL)
    scale = tl.load(token_scale_ptr + place, mask=used, other=1.0, cache_modifier=".cg")
    unit = reciprocal(tl.where(scale == scale, scale, 1.0))[:, None]
    own = own * unit * inverse_headroom
    at = hidden_ptr + place.to(tl.int64)[:, None] * (F * R) + rank
    if F > E:
        tl.store(at, (shared * unit * inverse_headroom).to(tl.float16), mask=there)
    for e in range(E):
        kept = tl.where((expert == e)[:, None], own, 0.0)
        tl.store(at + (F - E + e) * R, kept.to(tl.float16), mask=there)
    tl.store(present_ptr + tl.program_id(0) + tl.arange(0, 1), factors_used(expert, used, F, E))
