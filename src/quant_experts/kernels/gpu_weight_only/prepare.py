"""Tokens for weight-only linears: `scale_tokens` smooths and rotates each token and writes it in float16 in units of a
power of two; `project` computes the experts' hidden values and chooses experts. See `layout` for what lies
where."""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.shares import add_shares, share_of
from quant_experts.kernels.gpu.tokens import choose, nan_max, wait_for_previous_kernel

LOW_PART = tl.constexpr(2048.0)
"""2^11: what float16 leaves of a number is at most 2^-12 of it; scaled by this it is a float16 number again."""


@triton.jit
def power_below(x):
    """The power of two at or below each positive x, at least 2^-100 and at most 2^126, so that 1 / it is normal."""
    bits = tl.minimum(tl.maximum(x, 2.0**-100), 2.0**126).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def one_over(power):
    """1 / power, exact, for a power of two."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def load_values(x_ptr, token, columns, inside, K, inverse_ptr, SMOOTH: tl.constexpr):
    """x / m of tokens x columns in float32, zero where not inside."""
    x = tl.load(x_ptr + token.to(tl.int64) * K + columns, mask=inside, other=0.0).to(tl.float32)
    if SMOOTH:
        x *= tl.load(inverse_ptr + columns, mask=columns < K, other=0.0)
    return x


@triton.jit
def in_two_parts(x):
    """x below 65504 -> float16 numbers (high, low) with high + low / 2^11 = x in 22 bits."""
    high = x.to(tl.float16)
    return high, ((x - high.to(tl.float32)) * LOW_PART).to(tl.float16)


@triton.jit
def scale_tokens(
    x_ptr, inverse_ptr, signs_ptr, values_ptr, unit_ptr, K, Kp, width, CHUNK: tl.constexpr, ROT: tl.constexpr,
    SMOOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """values = x / m / unit, the first Kp columns of (M, width) float16, blocks of ROT channels rotated by signs
    (ROT, ROT) float16 if ROT > 0.

    unit (M,) is the power of two at or below the token's largest |x / m|. A token that is not finite gets zeros and
    unit NaN. Programs: M x parts; part i of n writes chunks i, i + n, ...
    """
    wait_for_previous_kernel(PDL)
    token, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, CHUNK)
    most = tl.zeros((CHUNK,), tl.float32)
    for start in tl.range(0, Kp, CHUNK, loop_unroll_factor=4):  # whose loads are then under way together
        columns = start + column
        most = nan_max(most, tl.abs(load_values(x_ptr, token, columns, columns < K, K, inverse_ptr, SMOOTH)))
    absmax = tl.reduce(most, 0, nan_max)
    finite = absmax < float("inf")
    unit = power_below(tl.where(finite, absmax, 1.0))
    inverse = one_over(unit)
    if ROT > 0:
        index = tl.arange(0, ROT)
        signs = tl.load(signs_ptr + index[:, None] * ROT + index[None, :])
        column = tl.arange(0, CHUNK // ROT)[:, None] * ROT + index[None, :]
    for start in tl.range(part * CHUNK, Kp, tl.num_programs(1) * CHUNK, num_stages=1):
        columns = start + column
        x = load_values(x_ptr, token, columns, columns < K, K, inverse_ptr, SMOOTH)
        z = tl.where(finite, x * inverse, 0.0)
        if ROT > 0:
            high, low = in_two_parts(z)
            z = (tl.dot(high, signs) + tl.dot(low, signs) * (1.0 / LOW_PART)) * (ROT**-0.5)
        tl.store(values_ptr + token.to(tl.int64) * width + columns, z.to(tl.float16), mask=columns < Kp)
    if part == 0:
        tl.store(unit_ptr + token, tl.where(finite, unit, float("nan")))


@triton.jit
def hidden_sums(
    values_ptr, down_ptr, token, factor_row, Kp, width, first, last, ROWS: tl.constexpr, RC: tl.constexpr,
    KB: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """ROWS tokens' values times rows of the down factors, over blocks [first, last) of 128 channels, KB at a time:
    (ROWS, RC)."""
    column = first * 128 + tl.arange(0, KB)
    values_at = values_ptr + token.to(tl.int64)[:, None] * width + column[None, :]
    down_at = down_ptr + factor_row.to(tl.int64)[None, :] * Kp + column[:, None]
    total = tl.zeros((ROWS, RC), tl.float32)
    for _ in tl.range(0, (last - first) * (128 // KB), num_stages=STAGES):
        total = tl.dot(tl.load(values_at), tl.load(down_at), total)
        values_at += KB
        down_at += KB
    return total


@triton.jit
def score_sums(
    x_ptr, inverse_ptr, router_ptr, token, inverse_unit, K, Kp, first, last, ROWS: tl.constexpr, EP: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """|x / m| in the tokens' units times router weights, over blocks [first, last) of 128 channels: (ROWS, EP). x in
    two parts of 11 bits: experts are chosen as if in float32."""
    expert = tl.arange(0, EP)
    total = tl.zeros((ROWS, EP), tl.float32)
    rest = tl.zeros((ROWS, EP), tl.float32)
    for step in range(first, last):
        columns = step * 128 + tl.arange(0, 128)
        inside = (columns < K)[None, :] & (inverse_unit > 0)[:, None]
        x = load_values(x_ptr, token[:, None], columns[None, :], inside, K, inverse_ptr, SMOOTH)
        weight = tl.load(router_ptr + expert.to(tl.int64)[None, :] * Kp + columns[:, None])
        high, low = in_two_parts(tl.abs(x) * inverse_unit[:, None])
        total = tl.dot(high, weight, total)
        rest = tl.dot(low, weight, rest)
    return total + rest * (1.0 / LOW_PART)


@triton.jit
def project(
    x_ptr, inverse_ptr, values_ptr, unit_ptr, down_ptr, router_ptr, bias_ptr, expert_ptr, sums_ptr, done_ptr,
    M, K, Kp, width, SHARES, headroom,
    FR: tl.constexpr, RC: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, SMOOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Behind the values of each token its hidden values of all factors, FR float16 numbers in the token's unit times
    headroom, and expert (M,).

    Programs: token blocks x (chunks of RC hidden values, and one for the router if E > 0) x SHARES.
    """
    CHUNKS: tl.constexpr = (FR + RC - 1) // RC
    block, chunk, share = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile = block * tl.num_programs(1) + chunk
    sums_ptr += tile.to(tl.int64) * SHARES * (ROWS * max(RC, EP))
    done_ptr += tile
    tokens = block * ROWS + tl.arange(0, ROWS)
    token = tl.minimum(tokens, M - 1)
    first, last = share_of(Kp // 128, share, SHARES)
    columns = chunk * RC + tl.arange(0, RC)
    factor_row = tl.minimum(columns, FR - 1)
    wait_for_previous_kernel(PDL)
    if chunk < CHUNKS:
        total = hidden_sums(values_ptr, down_ptr, token, factor_row, Kp, width, first, last, ROWS, RC, KB, STAGES)
        total, done = add_shares(total, sums_ptr, done_ptr, share, SHARES, SPLIT)
        if done:
            at = values_ptr + token.to(tl.int64)[:, None] * width + Kp + columns[None, :]
            hidden = (total / headroom).to(tl.float16)
            tl.store(at, hidden, mask=(tokens < M)[:, None] & (columns < FR)[None, :])
    elif E > 0:
        unit = tl.load(unit_ptr + token)
        known = tl.where(unit > 0, unit, 1.0)
        inverse_unit = tl.where(unit > 0, one_over(known), 0.0)  # of a token that is not finite: never read
        scores = score_sums(x_ptr, inverse_ptr, router_ptr, token, inverse_unit, K, Kp, first, last, ROWS, EP, SMOOTH)
        scores, done = add_shares(scores, sums_ptr, done_ptr, share, SHARES, SPLIT)
        if done:
            expert = choose(scores * known[:, None], bias_ptr, E, EP)
            tl.store(expert_ptr + token, expert, mask=tokens < M)
