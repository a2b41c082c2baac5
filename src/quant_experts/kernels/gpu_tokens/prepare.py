"""`prepare` in up to three launches. Tokens are quantized by `begin` or `quantize`, a program each; experts are
projected by `begin`, beside quantization, or by `project`; `end` settles experts and hidden values. (On Hopper
`hopper_begin` and `hopper_tokens` stand for `begin` and `quantize`, `hopper_project` for `project` of more than 16
tokens, and the linear projects codes, and settles experts, of values up to a number of tokens: `hopper_few`,
`hopper_experts`.)

A program that projects owns rows of the stacked down factors and router weights and a slice of the input channels, and
writes its sums; `end` adds the slices, always in the same order, chooses experts, and keeps the hidden values of each
token's own. Integer sums of a few tokens' codes are added where they are instead, in any order, to zeros that
`quantize` leaves. Hidden values of all experts are computed: tokens need no sorting, and no launch stands between
routing and projecting. (Where sorting pays, tokens of routed experts are projected alike, and sorted, by
`prepare_many`.)

Linears for more tokens need codes at once and hidden values only at their end (`Tokens.hidden_comes_later`). So
`end` lets it start when codes are complete, which is before its own wait where `project` had waited for them, and after
it otherwise. `project` reads values, or `quantize` codes them, while the other runs (EARLY): what was written before
the previous kernel is read past the first-level cache (".cg"), which may hold what was there before, and a kernel ends
only after the one before it.

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
    interpretable,
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
    x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, projection_ptr, sums_ptr, counts_ptr, M, K, Kp, slices,
    LARGEST: tl.constexpr, CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
    FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr, RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr,
    STAGES: tl.constexpr, COUNTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs: tokens, which are quantized, then those of `project`, of values. COUNTS: zeros for the linear."""
    program = tl.program_id(0)
    if program < M:
        wait_for_previous_kernel(PDL)
        if COUNTS > 0:
            tl.store(counts_ptr + tl.arange(0, COUNTS), tl.zeros((COUNTS,), tl.int64), mask=program == 0)
        quantize_token(
            x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, program, program, K, Kp, LARGEST, CHUNK, PARTS,
            SMOOTH, ROT,
        )  # fmt: skip
    else:
        project_part(
            x_ptr, projection_ptr, sums_ptr, program - M, slices, M, K, Kp, FACTOR_ROWS, TOTAL, RC, BM, WAYS, False,
            STAGES, PDL,
        )  # fmt: skip


@triton.jit
def quantize(
    x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, order_ptr, sums_ptr, K, Kp, LARGEST: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr, SORTED: tl.constexpr,
    SUMS: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `hopper_tokens.kernel`. Programs: tokens. SUMS: zeros for `project` of each."""
    place = tl.program_id(0)
    if not EARLY:
        wait_for_previous_kernel(PDL)
    elif PDL:
        tl.extra.cuda.gdc_launch_dependents()
    token = tl.load(order_ptr + place, cache_modifier=".cg") if SORTED else place
    quantize_token(
        x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, token, place, K, Kp, LARGEST, CHUNK, PARTS, SMOOTH,
        ROT,
    )  # fmt: skip
    if SUMS > 0:
        tl.store(sums_ptr + place.to(tl.int64) * SUMS + tl.arange(0, SUMS), tl.zeros((SUMS,), tl.int32))
    if EARLY and PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def quantize_token(
    x_ptr, inverse_ptr, signs_ptr, codes_ptr, token_scale_ptr, token, place, K, Kp, LARGEST: tl.constexpr,
    CHUNK: tl.constexpr, PARTS: tl.constexpr, SMOOTH: tl.constexpr, ROT: tl.constexpr,
):  # fmt: skip
    """Codes of a token, in PARTS of CHUNK channels, and its scale, in some place."""
    row = token + tl.arange(0, 1)
    values = ()
    most = tl.zeros((1, CHUNK), tl.float32)
    for part in tl.static_range(PARTS):
        columns = part * CHUNK + tl.arange(0, CHUNK)
        z = transformed(load_raw(x_ptr, row, row >= 0, columns, K), columns, K, inverse_ptr, signs_ptr, SMOOTH, ROT)
        most = nan_max(most, tl.abs(z))
        values = values + (z,)
    scale = token_scale(tl.reduce(most, 1, nan_max), LARGEST)
    finite = scale == scale
    inverse = reciprocal(tl.where(finite, scale, 1.0))[:, None]
    for part in tl.static_range(PARTS):
        columns = part * CHUNK + tl.arange(0, CHUNK)
        steps = tl.where(finite[:, None], values[part] * inverse, 0.0)
        at = codes_ptr + (place + tl.arange(0, 1)).to(tl.int64)[:, None] * Kp + columns[None, :]
        tl.store(at, rounded(steps, codes_ptr.dtype.element_ty), mask=(columns < Kp)[None, :])
    tl.store(token_scale_ptr + place + tl.arange(0, 1), scale)


@triton.jit
def project(
    x_ptr, projection_ptr, sums_ptr, slices, M, K, Kp, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs: blocks of tokens x TOTAL / RC x slices. x: values, or codes."""
    project_part(
        x_ptr, projection_ptr, sums_ptr, tl.program_id(0), slices, M, K, Kp, FACTOR_ROWS, TOTAL, RC, BM, WAYS, ADD,
        STAGES, PDL,
    )  # fmt: skip


@triton.jit
def project_part(
    x_ptr, projection_ptr, sums_ptr, program, slices, M, K, Kp, FACTOR_ROWS: tl.constexpr, TOTAL: tl.constexpr,
    RC: tl.constexpr, BM: tl.constexpr, WAYS: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """RC rows of the projection for BM tokens over one slice of the input channels: to sums (slices, M, TOTAL), or, if
    it is to ADD, to sums (M, TOTAL). Where loops are not pipelined, the first weights are asked for before the previous
    kernel has ended: none of the kernels that prepare or multiply writes them."""
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
            x = interpretable(tl.load(at, mask=there, other=0.0, cache_modifier=".cg"))
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
    at = token.to(tl.int64)[:, None] * TOTAL + rank[None, :]
    if ADD:
        tl.atomic_add(sums_ptr + at, sums, mask=(token < M)[:, None], sem="relaxed")
    else:
        tl.store(sums_ptr + piece * M * TOTAL + at, sums, mask=(token < M)[:, None])


@triton.jit
def end(
    token_scale_ptr, sums_ptr, bias_ptr, code_scale_ptr, hidden_ptr, present_ptr, expert_ptr, M, slices,
    inverse_headroom, F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, TOTAL: tl.constexpr,
    SLICES: tl.constexpr, CODES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Experts, and hidden values in units of scale * headroom, zeros for experts that a token does not use. Programs:
    factors x blocks of 16 tokens. SLICES: slices, padded."""
    if CODES and PDL:  # codes were complete when `project` began
        tl.extra.cuda.gdc_launch_dependents()
    wait_for_previous_kernel(PDL)
    factor, block = tl.program_id(0) % F, tl.program_id(0) // F
    token = block * 16 + tl.arange(0, 16)
    rank = tl.arange(0, R)
    used = (token < M)[:, None]
    at = sums_ptr + token.to(tl.int64)[:, None] * TOTAL
    total = tl.load(at + factor * R + rank[None, :], mask=used, other=0)
    for piece in tl.static_range(1, SLICES):  # unrolled: all loads are under way at once
        there = used & (piece < slices)
        total += tl.load(at + piece * M * TOTAL + factor * R + rank[None, :], mask=there, other=0)
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
    hidden = total.to(tl.float32)
    if CODES:
        hidden = hidden * tl.load(code_scale_ptr + rank)[None, :]
    else:
        scale = tl.load(token_scale_ptr + token, mask=token < M, other=1.0)
        hidden = hidden * reciprocal(tl.where(scale == scale, scale, 1.0))[:, None]
    hidden = tl.where(uses, hidden * inverse_headroom, 0.0)  # last: of the largest values it could be too large
    at = hidden_ptr + token.to(tl.int64)[:, None] * (F * R) + factor * R + rank[None, :]
    tl.store(at, hidden.to(tl.float16), mask=used)
    if factor == 0:
        tl.store(present_ptr + block + tl.arange(0, 1), factors_used(expert, token < M, F, E))
        if E > 0:
            tl.store(expert_ptr + token, expert, mask=token < M)
