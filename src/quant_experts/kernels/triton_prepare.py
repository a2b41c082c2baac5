"""`prepare` for few tokens (decode): programs that quantize and programs that project, side by side in one launch, then
a small one that chooses experts.

A projecting program owns a few rows of the stacked down factors and router weights and a slice of the input channels,
and writes its sums; `settle` adds the slices, always in the same order, and keeps the hidden values of each token's own
experts. Hidden values of all experts are computed: fewer bytes move than a launch between routing and projecting would
cost. An expert that reads codes is projected by a launch of its own, of integers.

In decode a kernel runs once through cold instruction caches, so the code is short loops. Exactness: see
`triton_prepare_many`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import (
    ROUTER_PARTS,
    add_product,
    choose,
    factors_used,
    load_raw,
    nan_max,
    reciprocal,
    rounded,
    token_scale,
    transformed,
    wait_for_previous_kernel,
)


@triton.jit
def project_program(
    x_ptr, projection_ptr, sums_ptr, chunk, piece, slices, M, K, Kp, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RC rows of the projection over one slice of the input channels, a block of 128 for each of WAYS warps."""
    token = tl.arange(0, BM)
    rank = chunk * RC + tl.arange(0, RC)
    way = tl.arange(0, WAYS)
    column = tl.arange(0, 128)
    steps = Kp // 128
    begin = piece * steps // slices
    end = (piece + 1) * steps // slices
    rows_at = projection_ptr + rank * 128
    wait_for_previous_kernel(PDL)
    SUMS: tl.constexpr = tl.int32 if projection_ptr.dtype.element_ty == tl.int8 else tl.float32
    total = tl.zeros((WAYS, RC, BM), SUMS)
    for start in tl.range(begin, end, WAYS, num_stages=STAGES):
        block = (start + way)[:, None, None]
        columns = block * 128 + column[None, :, None]
        there = (block < end) & (token < M)[None, None, :] & (columns < K)
        x = tl.load(x_ptr + token[None, None, :].to(tl.int64) * K + columns, mask=there, other=0)
        if FACTOR_ROWS < TOTAL:
            x = tl.where(chunk * RC >= FACTOR_ROWS, tl.abs(x), x)  # the router's rows
        at = rows_at[None, :, None] + block.to(tl.int64) * (TOTAL * 128) + column[None, None, :]
        weight = tl.load(at, mask=block < end, other=0)
        total = add_product(total, weight, x)
    at = sums_ptr + (piece * M + token[None, :]) * TOTAL + rank[:, None]
    tl.store(at, tl.sum(total, axis=0), mask=(token < M)[None, :])


@triton.jit
def quantize_program(
    x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, token, part, K, Kp, LARGEST: tl.constexpr,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
):  # fmt: skip
    """CHUNK codes of a token, after a pass over all of it for the scale. WHOLE: the chunk is all of it."""
    row = token + tl.arange(0, 1)
    columns = part * CHUNK + tl.arange(0, CHUNK)
    x = load_raw(x_ptr, row, row >= 0, columns, K)
    z = transformed(x, columns, K, inverse_ptr, signs_ptr, SMOOTH, ROT)
    if WHOLE:
        absmax = tl.reduce(tl.abs(z), 1, nan_max)
    else:
        most = tl.zeros((1, CHUNK), tl.float32)
        for start in range(0, Kp, CHUNK):
            other = start + tl.arange(0, CHUNK)
            x = load_raw(x_ptr, row, row >= 0, other, K)
            most = nan_max(most, tl.abs(transformed(x, other, K, inverse_ptr, signs_ptr, SMOOTH, ROT)))
        absmax = tl.reduce(most, 1, nan_max)
    scale = token_scale(absmax, LARGEST)
    finite = scale == scale
    steps = tl.where(finite[:, None], z * reciprocal(tl.where(finite, scale, 1.0))[:, None], 0.0)
    at = codes_ptr + row.to(tl.int64)[:, None] * Kp + columns[None, :]
    tl.store(at, rounded(steps), mask=(columns < Kp)[None, :])
    if part == 0:
        tl.store(token_scale_ptr + row, scale)


@triton.jit
def prepare_few(
    x_ptr, inverse_ptr, signs_ptr, projection_ptr, sums_ptr, codes_ptr, token_scale_ptr, slices, parts, M, K, Kp,
    LARGEST: tl.constexpr, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    WAYS: tl.constexpr, STAGES: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr, SMOOTH: tl.constexpr,
    ROT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """M <= BM tokens. Programs: M * parts that quantize, then TOTAL / RC * slices that project (none if it is 0)."""
    program = tl.program_id(0)
    if program < M * parts:
        wait_for_previous_kernel(PDL)
        quantize_program(
            x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, program // parts, program % parts, K, Kp,
            LARGEST, CHUNK, WHOLE, SMOOTH, ROT,
        )  # fmt: skip
    if TOTAL > 0:
        program -= M * parts
        if program >= 0:
            project_program(
                x_ptr, projection_ptr, sums_ptr, program // slices, program % slices, slices, M, K, Kp,
                FACTOR_ROWS, TOTAL, RC, BM, WAYS, STAGES, PDL,
            )  # fmt: skip


@triton.jit
def project_codes_few(
    codes_ptr, projection_ptr, sums_ptr, slices, M, Kp, TOTAL: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr,
    WAYS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As the projecting programs of `prepare_few`, of codes. Programs: TOTAL / RC * slices."""
    program = tl.program_id(0)
    project_program(
        codes_ptr, projection_ptr, sums_ptr, program // slices, program % slices, slices, M, Kp, Kp,
        TOTAL, TOTAL, RC, BM, WAYS, STAGES, PDL,
    )  # fmt: skip


@triton.jit
def settle(
    sums_ptr, bias_ptr, code_scale_ptr, token_scale_ptr, hidden_ptr, present_ptr, expert_ptr, M, slices,
    inverse_headroom, F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr,
    SLICES: tl.constexpr, CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts of at most 16 tokens, and hidden values in units of scale * headroom, zeros for experts that a token does
    not use. SLICES: slices, padded. Programs: F, one for each factor."""
    wait_for_previous_kernel(PDL)
    factor = tl.program_id(0)
    token = tl.arange(0, 16)
    rank = tl.arange(0, R)
    used = (token < M)[:, None]
    at = sums_ptr + token[:, None] * TOTAL
    total = tl.load(at + factor * R + rank[None, :], mask=used, other=0)
    for piece in tl.static_range(1, SLICES):  # unrolled: all loads are under way at once
        there = used & (piece < slices)
        total += tl.load(at + piece * M * TOTAL + factor * R + rank[None, :], mask=there, other=0)
    scale = tl.load(token_scale_ptr + token, mask=token < M, other=1.0)
    expert = token * 0
    uses = used
    if E > 0:
        column = F * R + tl.arange(0, EP)[None, :]
        scores = tl.zeros((16, EP), tl.float32)
        for piece in tl.static_range(SLICES):
            there = used & (piece < slices)
            for part in tl.static_range(ROUTER_PARTS - 1):
                scores += tl.load(at + piece * M * TOTAL + column + part * EP, mask=there, other=0.0)
        expert = choose(scores, bias_ptr, E, EP)
        uses = used & ((factor < F - E) | (expert == factor - (F - E))[:, None])
    hidden = total.to(tl.float32) * inverse_headroom
    if CODES:
        hidden = hidden * tl.load(code_scale_ptr + rank)[None, :]
    else:
        hidden = hidden * reciprocal(tl.where(scale == scale, scale, 1.0))[:, None]
    hidden = tl.where(uses, hidden, 0.0)
    at = hidden_ptr + token[:, None] * (F * R) + factor * R + rank[None, :]
    tl.store(at, hidden.to(tl.float16), mask=used)
    if factor == 0:
        tl.store(present_ptr + tl.arange(0, 1), factors_used(expert, token < M, F, E))
        if E > 0:
            tl.store(expert_ptr + token, expert, mask=token < M)
