"""Hidden values of a shared expert that reads activation codes: a product of integers, after the codes are written.

The input channels are cut over programs; shares add up in int32, exact in any order, and the last one to finish scales
them. So hidden values are those of the oracle up to one rounding to float16.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import wait_for_previous_kernel


@triton.jit
def project_codes(
    codes_ptr, down_ptr, scale_ptr, hidden_ptr, present_ptr, sums_ptr, done_ptr, M, Kp, SLICES,
    R: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden (M, R) float16 = codes (M, Kp) int8 times down (R, Kp) int8, scaled. Programs: (cdiv(M, ROWS), SLICES)."""
    wait_for_previous_kernel(PDL)
    block, piece = tl.program_id(0), tl.program_id(1)
    token = block * ROWS + tl.arange(0, ROWS)
    row = tl.minimum(token, M - 1)
    rank = tl.arange(0, R)
    steps = Kp // 128
    per = tl.cdiv(steps, SLICES)
    total = tl.zeros((ROWS, R), tl.int32)
    for step in tl.range(piece * per, tl.minimum(piece * per + per, steps), num_stages=4):
        columns = step * 128 + tl.arange(0, 128)
        codes = tl.load(codes_ptr + row.to(tl.int64)[:, None] * Kp + columns[None, :])
        down = tl.load(down_ptr + rank.to(tl.int64)[None, :] * Kp + columns[:, None])
        total = tl.dot(codes, down, total, out_dtype=tl.int32)
    at = sums_ptr + block.to(tl.int64) * (ROWS * R) + tl.arange(0, ROWS)[:, None] * R + rank[None, :]
    tl.atomic_add(at, total, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + block, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        total = tl.load(at, cache_modifier=".cg")
        tl.debug_barrier()  # loads and stores may be spread over threads in different ways
        tl.store(at, tl.zeros((ROWS, R), tl.int32))
        tl.store(done_ptr + block, 0)
        hidden = total.to(tl.float32) * tl.load(scale_ptr + rank)[None, :]
        to = hidden_ptr + token.to(tl.int64)[:, None] * R + rank[None, :]
        tl.store(to, hidden.to(tl.float16), mask=(token < M)[:, None])
        masks = block * (ROWS // 16) + tl.arange(0, ROWS // 16)
        tl.store(present_ptr + masks, masks * 0 + 1, mask=masks * 16 < M)
