"""`prepare` for few tokens (decode): programs that quantize and programs that project, side by side in one launch.

A projecting program owns a few rows of the stacked down factors and router weights and a slice of the input channels,
and writes its sums; `linear_few` adds the slices, always in the same order. Nothing waits for anything inside the
launch. Hidden values of all experts are computed: fewer bytes move than a launch between routing and projecting would
cost. An expert that reads codes is projected by a second launch, of integers.

Factors are asked for before the previous kernel has ended. In decode a kernel runs once through cold instruction
caches, so the code is short loops. Exactness: see `triton_prepare_many`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import (
    add_product,
    allow_next_kernel,
    load_raw,
    nan_max,
    prefetch,
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
    LINES: tl.constexpr = RC * 128 * projection_ptr.dtype.element_ty.primitive_bitwidth // 1024
    line = tl.arange(0, LINES) * (RC * 128 // LINES)  # of a block's rows, which are one piece of memory
    for start in range(begin, end, WAYS):
        block = tl.minimum(start + way, end - 1).to(tl.int64)
        prefetch(projection_ptr + (block * TOTAL + chunk * RC)[:, None] * 128 + line[None, :], PDL)
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
    ROT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """M <= BM tokens. Programs: M * parts that quantize, then TOTAL / RC * slices that project (none if it is 0)."""
    allow_next_kernel(PDL)
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
    allow_next_kernel(PDL)
    program = tl.program_id(0)
    project_program(
        codes_ptr, projection_ptr, sums_ptr, program // slices, program % slices, slices, M, Kp, Kp,
        TOTAL, TOTAL, RC, BM, WAYS, STAGES, PDL,
    )  # fmt: skip
