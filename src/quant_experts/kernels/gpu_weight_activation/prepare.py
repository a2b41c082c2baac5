"""`prepare` for up to a few hundred tokens, in two launches: `begin`, where some programs quantize tokens and others
project them, and `end`, where programs settle experts and hidden values. Of tokens too long for one program `begin`
finds the largest value of each part, and `end` quantizes them too. For experts that read codes `project` comes between.

A program that projects owns rows of the stacked down factors and router weights and a slice of the input channels, and
writes its sums; one that settles adds the slices, always in the same order, chooses experts, and keeps the hidden
values of each token's own. Hidden values of all experts are computed: tokens need no sorting, and no launch stands
between routing and projecting.

The linear kernel after them needs codes at once and hidden values only at its end (`Tokens.hidden_comes_later`, where
`end` does not quantize). So `end` lets it start when codes are complete, which is before its own wait where `project`
had waited for them, and after it where `begin` comes just before. What was written before the previous kernel is read
past the first-level cache (".cg"), which may hold what was there before.

In decode a kernel runs once through cold instruction caches, so the code is short loops. Exactness: see
`prepare_many`.
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
    nan_max,
    reciprocal,
    rounded,
    token_scale,
    transformed,
    wait_for_previous_kernel,
)


@triton.jit
def begin(
    x_ptr, inverse_ptr, signs_ptr, largest_ptr, codes_ptr, token_scale_ptr, projection_ptr, sums_ptr, M, K, Kp, parts,
    slices, LARGEST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
    FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs: tokens x parts, which quantize a token, or, if it has several PARTS, find their largest magnitudes;
    then, for experts that read values, those of `project`."""
    program = tl.program_id(0)
    if program < M * parts:
        wait_for_previous_kernel(PDL)
        if PARTS > 1:
            row, part = program // parts + tl.arange(0, 1), program % parts
            columns = part * CHUNK + tl.arange(0, CHUNK)
            z = transformed(load_raw(x_ptr, row, row >= 0, columns, K), columns, K, inverse_ptr, signs_ptr, SMOOTH, ROT)
            tl.store(largest_ptr + row * parts + part, tl.reduce(tl.abs(z), 1, nan_max))
        else:
            quantize_part(
                x_ptr, inverse_ptr, signs_ptr, largest_ptr, codes_ptr, token_scale_ptr, program, K, Kp, parts, LARGEST,
                CHUNK, PARTS, SMOOTH, ROT,
            )  # fmt: skip
    elif TOTAL > 0:
        project_part(
            x_ptr, projection_ptr, sums_ptr, program - M * parts, slices, M, K, Kp, FACTOR_ROWS, TOTAL, RC, BM, WAYS,
            STAGES, PDL,
        )  # fmt: skip


@triton.jit
def largest_of_parts(largest_ptr, row, there, parts, PARTS: tl.constexpr):
    """(rows,) the largest magnitude of whole tokens, NaN where one is."""
    others = tl.arange(0, PARTS)[None, :]
    at = largest_ptr + row[:, None] * parts + others
    return tl.reduce(tl.load(at, mask=there[:, None] & (others < parts), other=0.0), 1, nan_max)


@triton.jit
def quantize_part(
    x_ptr, inverse_ptr, signs_ptr, largest_ptr, codes_ptr, token_scale_ptr, program, K, Kp, parts,
    LARGEST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
):  # fmt: skip
    """CHUNK codes of a token, and its scale. PARTS: of a token, padded to a power of two; if there are several, their
    largest magnitudes are there."""
    row, part = program // parts + tl.arange(0, 1), program % parts
    columns = part * CHUNK + tl.arange(0, CHUNK)
    z = transformed(load_raw(x_ptr, row, row >= 0, columns, K), columns, K, inverse_ptr, signs_ptr, SMOOTH, ROT)
    if PARTS > 1:
        most = largest_of_parts(largest_ptr, row, row >= 0, parts, PARTS)
    else:
        most = tl.reduce(tl.abs(z), 1, nan_max)
    scale = token_scale(most, LARGEST)
    finite = scale == scale
    steps = tl.where(finite[:, None], z * reciprocal(tl.where(finite, scale, 1.0))[:, None], 0.0)
    at = codes_ptr + row.to(tl.int64)[:, None] * Kp + columns[None, :]
    tl.store(at, rounded(steps, codes_ptr.dtype.element_ty == tl.float8e4nv), mask=(columns < Kp)[None, :])
    if part == 0:
        tl.store(token_scale_ptr + row, scale)


@triton.jit
def project(
    codes_ptr, projection_ptr, sums_ptr, slices, M, Kp, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """For experts that read codes. Programs: blocks of tokens x TOTAL / RC x slices."""
    project_part(
        codes_ptr, projection_ptr, sums_ptr, tl.program_id(0), slices, M, Kp, Kp, FACTOR_ROWS, TOTAL, RC, BM, WAYS,
        STAGES, PDL,
    )  # fmt: skip


@triton.jit
def project_part(
    x_ptr, projection_ptr, sums_ptr, program, slices, M, K, Kp, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Sums (slices, M, TOTAL): RC rows of the projection for BM tokens over one slice of the input channels, of values
    or of codes. Where loops are not pipelined, the first weights are asked for before the previous kernel has ended:
    none of the kernels that prepare or multiply writes them."""
    piece, chunk = program % slices, program // slices % (TOTAL // RC)
    token = program // (slices * (TOTAL // RC)) * BM + tl.arange(0, BM)
    rank = chunk * RC + tl.arange(0, RC)
    steps = Kp // 128
    begin, end = piece * steps // slices, (piece + 1) * steps // slices
    SUMS: tl.constexpr = tl.int32 if x_ptr.dtype.element_ty == tl.int8 else tl.float32
    rows_at = projection_ptr + rank * 128
    if WAYS > 1:  # tokens are too few to fill a product: a block of 128 channels for each warp
        way = tl.arange(0, WAYS)
        column = tl.arange(0, 128)
        total = tl.zeros((WAYS, RC, BM), SUMS)
        for start in tl.range(begin, end, WAYS, num_stages=STAGES):
            block = (start + way)[:, None, None]
            weight_at = rows_at[None, :, None] + block.to(tl.int64) * (TOTAL * 128) + column[None, None, :]
            weight = tl.load(weight_at, mask=block < end, other=0)
            if start == begin:
                wait_for_previous_kernel(PDL)
            columns = block * 128 + column[None, :, None]
            there = (block < end) & (token < M)[None, None, :] & (columns < K)
            at = x_ptr + token[None, None, :].to(tl.int64) * K + columns
            x = tl.load(at, mask=there, other=0.0, cache_modifier=".cg")
            if FACTOR_ROWS < TOTAL:
                x = tl.where(chunk * RC >= FACTOR_ROWS, tl.abs(x), x)  # the router's rows
            total = add_product(total, weight, x)
        sums = tl.trans(tl.sum(total, axis=0))
    else:
        wait_for_previous_kernel(PDL)
        sums = tl.zeros((BM, RC), SUMS)
        for step in tl.range(begin, end, num_stages=STAGES):
            columns = step * 128 + tl.arange(0, 128)
            x = load_raw(x_ptr, token, token < M, columns, K)
            if FACTOR_ROWS < TOTAL:
                x = tl.where(chunk * RC >= FACTOR_ROWS, tl.abs(x), x)
            at = rows_at[None, :] + tl.cast(step, tl.int64) * (TOTAL * 128) + tl.arange(0, 128)[:, None]
            sums = add_product(sums, x, tl.load(at))
    at = sums_ptr + (piece * M + token[:, None]) * TOTAL + rank[None, :]
    tl.store(at, sums, mask=(token < M)[:, None])


@triton.jit
def end(
    x_ptr, inverse_ptr, signs_ptr, largest_ptr, codes_ptr, token_scale_ptr, sums_ptr, bias_ptr, code_scale_ptr,
    hidden_ptr, present_ptr, expert_ptr, M, K, Kp, parts, slices, inverse_headroom, QUANTIZE: tl.constexpr,
    LARGEST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
    F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, SLICES: tl.constexpr,
    CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs: QUANTIZE, tokens x parts of several PARTS that quantize; then, if there are sums, one for each factor
    and block of 16 tokens, which settles. SLICES: slices, padded."""
    if CODES and PDL:  # codes were complete when `project` began
        tl.extra.cuda.gdc_launch_dependents()
    wait_for_previous_kernel(PDL)
    program = tl.program_id(0)
    if QUANTIZE:
        if program < M * parts:
            quantize_part(
                x_ptr, inverse_ptr, signs_ptr, largest_ptr, codes_ptr, token_scale_ptr, program, K, Kp, parts, LARGEST,
                CHUNK, PARTS, SMOOTH, ROT,
            )  # fmt: skip
        program -= M * parts
    if TOTAL > 0:
        if program >= 0:
            settle_part(
                sums_ptr, bias_ptr, code_scale_ptr, largest_ptr, token_scale_ptr, hidden_ptr, present_ptr, expert_ptr,
                program, M, parts, slices, inverse_headroom, LARGEST, PARTS if QUANTIZE else 1, F, E, EP, R, TOTAL,
                SLICES, CODES,
            )  # fmt: skip


@triton.jit
def settle_part(
    sums_ptr, bias_ptr, code_scale_ptr, largest_ptr, token_scale_ptr, hidden_ptr, present_ptr, expert_ptr, program, M,
    parts, slices, inverse_headroom, LARGEST: tl.constexpr, PARTS: tl.constexpr, F: tl.constexpr, E: tl.constexpr,
    EP: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr, SLICES: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Experts, and hidden values in units of scale * headroom, zeros for experts that a token does not use. With
    several PARTS a token's scale is not there yet, but their largest magnitudes are."""
    factor, block = program % F, program // F
    token = block * 16 + tl.arange(0, 16)
    rank = tl.arange(0, R)
    used = (token < M)[:, None]
    at = sums_ptr + token[:, None] * TOTAL
    total = tl.load(at + factor * R + rank[None, :], mask=used, other=0)
    for piece in tl.static_range(1, SLICES):  # unrolled: all loads are under way at once
        there = used & (piece < slices)
        total += tl.load(at + piece * M * TOTAL + factor * R + rank[None, :], mask=there, other=0)
    if PARTS > 1:
        scale = token_scale(largest_of_parts(largest_ptr, token, token < M, parts, PARTS), LARGEST)
    else:
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
        tl.store(present_ptr + block + tl.arange(0, 1), factors_used(expert, token < M, F, E))
        if E > 0:
            tl.store(expert_ptr + token, expert, mask=token < M)
