"""`prepare` for few tokens (decode, small prefill) in two launches that run side by side: one projects, one quantizes.

Projecting programs own some rows of the stacked down factors, a block of tokens and a slice of the input channels; the
last slice to finish adds them all up in order, so that results do not depend on timing. Hidden values of all experts
are computed and those of a token's own kept: fewer bytes move than a launch between routing and projecting would cost.
Many tokens: `triton_prepare_many`.

Codes equal the oracle's bit for bit: the same float32 divisions, correctly rounded, and halves to even. (Tokens whose
largest value is below 2^-100 excepted, where quotients have fewer bits.) Router scores are sums in another order than
the oracle's, of x in 22 bits, so scores that differ by less than about 1e-6 of their terms may
choose otherwise; equal scores go to the first. Hidden values are products with x rounded to float16 in units of the
largest of 128 neighbours: off by 2^-12 of that.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import (
    allow_next_kernel,
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
def project_slice(
    x_ptr, smooth_ptr, down_ptr, router_ptr, base, chunk, block, piece, M, K, Kp, ROWS: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, RC: tl.constexpr, SLICES, SMOOTH: tl.constexpr,
    PLAIN: tl.constexpr,
):  # fmt: skip
    """One slice of the input channels for ROWS tokens and RC rows of the down factors -> the workspace."""
    token = block * ROWS + tl.arange(0, ROWS)
    rank = tl.minimum(chunk * RC + tl.arange(0, RC), F * R - 1)
    hidden = tl.zeros((ROWS, RC), tl.float32)
    scores = tl.zeros((ROWS, EP), tl.float32)
    absmax = tl.zeros((ROWS,), tl.float32)
    steps = Kp // 128
    per = tl.cdiv(steps, SLICES)
    for step in tl.range(piece * per, tl.minimum(piece * per + per, steps), num_stages=4):
        columns = step * 128 + tl.arange(0, 128)
        x = load_smoothed(x_ptr, token, token < M, columns, K, smooth_ptr, SMOOTH, PLAIN)
        most = tl.reduce(tl.abs(x), 1, nan_max)
        absmax = nan_max(absmax, most)
        unit = power_below(most)
        x = x * reciprocal(unit)[:, None]
        part = down_dot(x.to(tl.float16), down_ptr, rank, columns, Kp, tl.zeros((ROWS, RC), tl.float32))
        hidden += part * unit[:, None]
        if E > 0:
            scores += router_scores(x, router_ptr, columns, Kp, EP) * unit[:, None]
    row = tl.arange(0, ROWS)[:, None]
    tl.store(base + row * RC + tl.arange(0, RC)[None, :], hidden)
    if E > 0:
        tl.store(base + ROWS * RC + row * EP + tl.arange(0, EP)[None, :], scores)
    tl.store(base + ROWS * (RC + EP) + tl.arange(0, ROWS), absmax)


@triton.jit
def finish_chunk(
    base, bias_ptr, hidden_ptr, present_ptr, expert_ptr, chunk, block, M, headroom, ROWS: tl.constexpr, F: tl.constexpr,
    E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr, RC: tl.constexpr, SLICES, BATCH: tl.constexpr,
):  # fmt: skip
    """Add the slices, BATCH at a time, choose the experts, keep the hidden values of factors that a token uses."""
    SIZE: tl.constexpr = ROWS * (RC + EP + 1)
    row = tl.arange(0, ROWS)
    token = block * ROWS + row
    local = tl.arange(0, RC)
    hidden = tl.zeros((ROWS, RC), tl.float32)
    scores = tl.zeros((ROWS, EP), tl.float32)
    absmax = tl.zeros((ROWS,), tl.float32)
    for start in range(0, SLICES, BATCH):
        for i in tl.static_range(BATCH):
            there = (start + i < SLICES) & (row >= 0)
            at = base + (start + i) * SIZE
            inner = at + row[:, None] * RC + local[None, :]
            hidden += tl.load(inner, mask=there[:, None], other=0.0, cache_modifier=".cg")
            if E > 0:
                inner = at + ROWS * RC + row[:, None] * EP + tl.arange(0, EP)[None, :]
                scores += tl.load(inner, mask=there[:, None], other=0.0, cache_modifier=".cg")
            most = tl.load(at + ROWS * (RC + EP) + row, mask=there, other=0.0, cache_modifier=".cg")
            absmax = nan_max(absmax, most)
    rank = chunk * RC + local
    factor = rank // R
    uses = tl.full((ROWS, RC), 1, tl.int32) > 0
    present = tl.full((ROWS // 16,), 1, tl.int32)
    if E > 0:
        column = tl.arange(0, EP)
        scores += tl.load(bias_ptr + column, mask=column < E, other=0.0)[None, :]
        expert = choose(scores, E)
        uses = (factor < F - E)[None, :] | (expert[:, None] == factor[None, :] - (F - E))
        bits = tl.reshape(tl.where(token < M, 1 << (expert + (F - E)), 0), (ROWS // 16, 16))
        present = tl.reduce(bits, 1, bitwise_or)
        if F > E:
            present = present | 1
        if chunk == 0:
            tl.store(expert_ptr + token, expert, mask=token < M)
    if chunk == 0:
        masks = block * (ROWS // 16) + tl.arange(0, ROWS // 16)
        tl.store(present_ptr + masks, present, mask=masks * 16 < M)
    kept = tl.where(uses, hidden * reciprocal(hidden_scale(absmax, headroom))[:, None], 0.0)
    at = hidden_ptr + token.to(tl.int64)[:, None] * (F * R) + rank[None, :]
    tl.store(at, kept.to(tl.float16), mask=(token < M)[:, None] & (rank < F * R)[None, :])


@triton.jit
def project_few(
    x_ptr, smooth_ptr, down_ptr, router_ptr, bias_ptr, hidden_ptr, present_ptr, expert_ptr, part_ptr, done_ptr,
    finished_ptr, M, K, Kp, headroom, SLICES, F: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, R: tl.constexpr,
    RC: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, SMOOTH: tl.constexpr, PLAIN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Hidden values and experts. Programs: (cdiv(M, ROWS) * cdiv(F R, RC), SLICES)."""
    wait_for_previous_kernel(PDL)
    CHUNKS: tl.constexpr = (F * R + RC - 1) // RC
    SIZE: tl.constexpr = ROWS * (RC + EP + 1)
    place, piece = tl.program_id(0), tl.program_id(1)
    chunk, block = place % CHUNKS, place // CHUNKS
    base = part_ptr + place.to(tl.int64) * SLICES * SIZE
    project_slice(
        x_ptr, smooth_ptr, down_ptr, router_ptr, base + piece * SIZE, chunk, block, piece, M, K, Kp,
        ROWS, F, E, EP, R, RC, SLICES, SMOOTH, PLAIN,
    )  # fmt: skip
    tl.debug_barrier()
    if tl.atomic_add(done_ptr + place, 1, sem="acq_rel") == SLICES - 1:
        tl.debug_barrier()
        tl.store(done_ptr + place, 0)
        finish_chunk(
            base, bias_ptr, hidden_ptr, present_ptr, expert_ptr, chunk, block, M, headroom,
            ROWS, F, E, EP, R, RC, SLICES, BATCH,
        )  # fmt: skip
        tl.debug_barrier()
        tl.atomic_add(finished_ptr, 1, sem="release")


@triton.jit
def quantize_few(
    x_ptr, smooth_ptr, codes_ptr, scales_ptr, token_scale_ptr, M, K, Kp, headroom, LARGEST: tl.constexpr,
    F: tl.constexpr, CODES: tl.constexpr, CHUNK: tl.constexpr, SMOOTH: tl.constexpr, PLAIN: tl.constexpr,
    WAIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Codes and scales. Programs: (M, cdiv(Kp, CHUNK)); each passes over its whole token for the scale.

    Without WAIT it runs beside `project_few`, launched just before it: x was complete when that started.
    """
    if WAIT:
        wait_for_previous_kernel(PDL)
    else:
        allow_next_kernel(PDL)
    token, part = tl.program_id(0), tl.program_id(1)
    row = token + tl.arange(0, 1)
    most = tl.zeros((1, CHUNK), tl.float32)
    for start in range(0, Kp, CHUNK):
        x = load_smoothed(x_ptr, row, row < M, start + tl.arange(0, CHUNK), K, smooth_ptr, SMOOTH, PLAIN)
        most = nan_max(most, tl.abs(x))
    absmax = tl.reduce(most, 1, nan_max)
    scale = token_scale(absmax, LARGEST)
    columns = part * CHUNK + tl.arange(0, CHUNK)
    x = load_smoothed(x_ptr, row, row < M, columns, K, smooth_ptr, SMOOTH, PLAIN)
    at = codes_ptr + row.to(tl.int64)[:, None] * Kp + columns[None, :]
    tl.store(at, quantize(x, scale, PLAIN), mask=(columns < Kp)[None, :])
    if part == 0:
        unit = hidden_unit(absmax, scale, headroom, F, CODES)
        tl.store(token_scale_ptr + row, scale)
        tl.store(scales_ptr + row, tl.div_rn(scale, unit))
        tl.store(scales_ptr + M + row, unit)
