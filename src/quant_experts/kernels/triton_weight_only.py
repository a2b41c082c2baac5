"""Weight-only linears in Triton: 3- and 4-bit weights times activations in half precision. Runs on any GPU with matrix
units for float16, and in the interpreter.

`scale_tokens` smooths and rotates each token and writes it in float16 in units of a power of two; `project` computes
the experts' hidden values and chooses experts; `linear` does the rest. Weights are the left operand, dequantized in
registers, so few tokens are few columns. See `weight_only_layout` for what lies where.

A product is cut along the input channels over programs where its tiles are few. Each share writes its float32 sums, and
the last one to finish adds them in order: results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.triton_tokens import nan_max, wait_for_previous_kernel

PIECE = tl.constexpr(32)
"""Input channels of one matrix product: `weight_only_layout.PIECE`."""
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
    x_ptr, inverse_ptr, signs_ptr, values_ptr, unit_ptr, K, Kp, CHUNK: tl.constexpr, ROT: tl.constexpr,
    SMOOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """values = x / m / unit (M, Kp) float16, blocks of ROT channels rotated by signs (ROT, ROT) float16 if ROT > 0.

    unit (M,) is the power of two at or below the token's largest |x / m|. A token that is not finite gets zeros and
    unit NaN. Programs: M x parts; part i of n writes chunks i, i + n, ...
    """
    wait_for_previous_kernel(PDL)
    token, part = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, CHUNK)
    most = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, Kp, CHUNK):
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
        tl.store(values_ptr + token.to(tl.int64) * Kp + columns, z.to(tl.float16), mask=columns < Kp)
    if part == 0:
        tl.store(unit_ptr + token, tl.where(finite, unit, float("nan")))


@triton.jit
def add_shares(total, sums_ptr, done_ptr, share, SHARES, SPLIT: tl.constexpr):
    """-> (the sum of all shares of a tile, True) in the last program to come here; others get (something, False).

    sums_ptr, done_ptr: the tile's part of the workspace, and its counter, which is zero before and after. Of small
    tiles several shares are read at a time: one by one each would wait for the memory. Without SPLIT there is one.
    """
    if SPLIT:
        SIZE: tl.constexpr = total.shape[0] * total.shape[1]
        BATCH: tl.constexpr = max(1, min(8, 4096 // SIZE))
        place = tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
        at = sums_ptr + place
        tl.store(at + share * SIZE, total)
        tl.debug_barrier()
        last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == SHARES - 1
        if last:
            tl.debug_barrier()
            tl.store(done_ptr, 0)
            total = tl.zeros_like(total)
            for start in range(0, SHARES, BATCH):
                for i in tl.static_range(BATCH):
                    there = (start + i < SHARES) & (place >= 0)
                    total += tl.load(at + (start + i) * SIZE, mask=there, other=0.0, cache_modifier=".cg")
        return total, last
    else:
        return total, True


@triton.jit
def share_of(steps, share, SHARES):
    """-> first and end of the steps of a share, which has some: a loop that may be empty keeps the assembler from
    letting matrix products run on from one step to the next."""
    per = tl.cdiv(steps, SHARES)
    first = share * per
    last = tl.minimum(first + per, steps)
    tl.assume(first < last)
    return first, last


@triton.jit
def hidden_sums(
    values_ptr, down_ptr, token, factor_row, Kp, first, last, ROWS: tl.constexpr, RC: tl.constexpr, KB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """values (ROWS, Kp) times rows of the down factors, over blocks [first, last) of 128 channels, KB at a time:
    (ROWS, RC)."""
    column = first * 128 + tl.arange(0, KB)
    values_at = values_ptr + token.to(tl.int64)[:, None] * Kp + column[None, :]
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
def choose(scores, E: tl.constexpr):
    """The first least score of each row (ROWS, EP); NaN counts as least."""
    column = tl.arange(0, scores.shape[1])[None, :]
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(column < E, scores, float("inf"))
    least = tl.min(scores, axis=1)
    return tl.min(tl.where((scores == least[:, None]) & (column < E), column, E - 1), axis=1)


@triton.jit
def project(
    x_ptr, inverse_ptr, values_ptr, unit_ptr, down_ptr, router_ptr, bias_ptr, hidden_ptr, expert_ptr, sums_ptr,
    done_ptr, M, K, Kp, SHARES, headroom,
    FR: tl.constexpr, RC: tl.constexpr, KB: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, SMOOTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden (M, FR) float16, in the tokens' units times headroom, of all factors, and expert (M,).

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
        total = hidden_sums(values_ptr, down_ptr, token, factor_row, Kp, first, last, ROWS, RC, KB, STAGES)
        total, done = add_shares(total, sums_ptr, done_ptr, share, SHARES, SPLIT)
        if done:
            at = hidden_ptr + token.to(tl.int64)[:, None] * FR + columns[None, :]
            hidden = (total / headroom).to(tl.float16)
            tl.store(at, hidden, mask=(tokens < M)[:, None] & (columns < FR)[None, :])
    elif E > 0:
        unit = tl.load(unit_ptr + token)
        known = tl.where(unit > 0, unit, 1.0)
        inverse_unit = tl.where(unit > 0, one_over(known), 0.0)  # of a token that is not finite: never read
        scores = score_sums(x_ptr, inverse_ptr, router_ptr, token, inverse_unit, K, Kp, first, last, ROWS, EP, SMOOTH)
        scores, done = add_shares(scores, sums_ptr, done_ptr, share, SHARES, SPLIT)
        if done:
            column = tl.arange(0, EP)
            bias = tl.load(bias_ptr + column, mask=column < E, other=0.0)
            expert = choose(scores * known[:, None] + bias[None, :], E)
            tl.store(expert_ptr + token, expert, mask=tokens < M)


@triton.jit
def code4(words, PLACE: tl.constexpr):
    """The PLACE-th code of each word plus 1024, in float16."""
    return (1024 + ((words >> 4 * PLACE) & 15)).to(tl.float16)


@triton.jit
def code3(words, high, PLACE: tl.constexpr):
    """As `code4`, from two low bits in `words` and one in `high`."""
    return (1024 + ((words >> 2 * PLACE) & 3) + ((high >> PLACE) & 1) * 4).to(tl.float16)


@triton.jit
def unpack4(words, ASSEMBLY: tl.constexpr):
    """words (BN, 32) int16 of four codes -> each code plus 1024 in float16: its bits under the exponent of 1024.

    Assembly takes two channels at a time: the compiler takes the plain form one by one.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 4;
            lop3.b32 $1, $3, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 8;
            lop3.b32 $2, $3, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 12;
            lop3.b32 $3, $3, 0x000F000F, 0x64006400, 0xEA;
            """,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return code4(words, 0), code4(words, 1), code4(words, 2), code4(words, 3)


@triton.jit
def unpack3(words, high, ASSEMBLY: tl.constexpr):
    """words (BN, 32) int16: the low two bits of eight codes; high: their third bits -> as `unpack4`, eight."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """
            { .reg .b32 low, third;
            lop3.b32 $0, $8, 0x00030003, 0x64006400, 0xEA;
            shl.b32 third, $9, 2; lop3.b32 $0, third, 0x00040004, $0, 0xEA;
            shr.u32 low, $8, 2; lop3.b32 $1, low, 0x00030003, 0x64006400, 0xEA;
            shl.b32 third, $9, 1; lop3.b32 $1, third, 0x00040004, $1, 0xEA;
            shr.u32 low, $8, 4; lop3.b32 $2, low, 0x00030003, 0x64006400, 0xEA;
            lop3.b32 $2, $9, 0x00040004, $2, 0xEA;
            shr.u32 low, $8, 6; lop3.b32 $3, low, 0x00030003, 0x64006400, 0xEA;
            shr.u32 third, $9, 1; lop3.b32 $3, third, 0x00040004, $3, 0xEA;
            shr.u32 low, $8, 8; lop3.b32 $4, low, 0x00030003, 0x64006400, 0xEA;
            shr.u32 third, $9, 2; lop3.b32 $4, third, 0x00040004, $4, 0xEA;
            shr.u32 low, $8, 10; lop3.b32 $5, low, 0x00030003, 0x64006400, 0xEA;
            shr.u32 third, $9, 3; lop3.b32 $5, third, 0x00040004, $5, 0xEA;
            shr.u32 low, $8, 12; lop3.b32 $6, low, 0x00030003, 0x64006400, 0xEA;
            shr.u32 third, $9, 4; lop3.b32 $6, third, 0x00040004, $6, 0xEA;
            shr.u32 low, $8, 14; lop3.b32 $7, low, 0x00030003, 0x64006400, 0xEA;
            shr.u32 third, $9, 5; lop3.b32 $7, third, 0x00040004, $7, 0xEA; }
            """,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return (
            code3(words, high, 0), code3(words, high, 1), code3(words, high, 2), code3(words, high, 3),
            code3(words, high, 4), code3(words, high, 5), code3(words, high, 6), code3(words, high, 7),
        )  # fmt: skip


@triton.jit
def in_order(words, high, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """-> (BN, step) float16: each code plus 1024, in the order of the input channels. No thread gives any away: the 32
    words that a row's threads share are spread like 32 channels of a matrix product."""
    if BITS == 4:
        a, b, c, d = unpack4(words, ASSEMBLY)
        codes = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1))
        return tl.reshape(codes, (words.shape[0], 128))
    else:
        a, b, c, d, e, f, g, h = unpack3(words, high, ASSEMBLY)
        codes = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
        return tl.reshape(tl.permute(codes, (0, 4, 3, 2, 1)), (words.shape[0], 256))


@triton.jit
def spread(numbers, WIDTH: tl.constexpr):
    """(BN, G) -> (BN, WIDTH): each for its share of the columns."""
    BN: tl.constexpr = numbers.shape[0]
    G: tl.constexpr = numbers.shape[1]
    if G == 1:
        return tl.broadcast_to(numbers, (BN, WIDTH))
    else:
        return tl.reshape(tl.broadcast_to(numbers[:, :, None], (BN, G, WIDTH // G)), (BN, WIDTH))


@triton.jit
def dequantize(codes, pairs, ASSEMBLY: tl.constexpr):
    """(code - offset) * scale in float16: codes (BN, step), each plus 1024; pairs (BN, G) int32, scale and offset.

    The difference is exact: the offset is 1024 + zero.
    """
    STEP: tl.constexpr = codes.shape[1]
    if ASSEMBLY:
        scale = (pairs & 0xFFFF) | (pairs << 16)
        offset = ((pairs >> 16) & 0xFFFF) | (pairs & -65536)
        return tl.inline_asm_elementwise(
            "sub.f16x2 $0, $1, $4; mul.f16x2 $0, $0, $2; // $3 $5",
            "=&r,r,r,r,r,r",
            [codes, spread(scale, STEP), spread(offset, STEP)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        scale = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
        offset = (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)
        return (codes - spread(offset, STEP)) * spread(scale, STEP)


@triton.jit
def weight_sums(
    low_ptr, high_ptr, pair_ptr, values_ptr, row, token, N, Kp, first, last,
    BITS: tl.constexpr, PER: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):  # fmt: skip
    """Dequantized weights times values over steps [first, last): (BN, BM) float32.

    A step is 128 input channels of 4 bits or 256 of 3 bits, in pieces of 32; PER pieces share a scale.
    """
    PIECES: tl.constexpr = 4 if BITS == 4 else 8
    GROUPS: tl.constexpr = max(1, PIECES // PER)
    column = tl.arange(0, PIECE)
    at = (first.to(tl.int64) * N + row)[:, None] * PIECE + column[None, :]
    channel = first * (PIECES * PIECE) + tl.arange(0, PIECES * PIECE)
    values_at = values_ptr + token.to(tl.int64)[None, :] * Kp + channel[:, None]
    total = tl.zeros((BN, BM), tl.float32)
    for step in tl.range(first, last, num_stages=STAGES):
        words = tl.load(low_ptr + at)
        high = words
        if BITS == 3:
            high = tl.load(high_ptr + at).to(tl.int16)
        group = step * PIECES // PER + tl.arange(0, GROUPS)
        pairs = tl.load(pair_ptr + group[None, :] * N + row[:, None])
        weight = dequantize(in_order(words, high, BITS, ASSEMBLY), pairs, ASSEMBLY)
        total = tl.dot(weight, tl.load(values_at), total)
        at += tl.cast(N, tl.int64) * PIECE
        values_at += PIECES * PIECE
    return total


@triton.jit
def uses(expert, factor, F: tl.constexpr, E: tl.constexpr):
    """Which tokens use a factor: all of them the shared expert's, which is first."""
    return (factor < F - E) | (expert == factor - (F - E))


@triton.jit
def add_factor(
    y, factor, expert, row, token, up_ptr, hidden_ptr, N, F: tl.constexpr, E: tl.constexpr, R: tl.constexpr
):  # fmt: skip
    """y (BN, BM) + up (BN, R) times the hidden values of the tokens that use a factor."""
    rank = tl.arange(0, R)
    up = tl.load(up_ptr + (factor * N + row).to(tl.int64)[:, None] * R + rank[None, :])
    at = hidden_ptr + token.to(tl.int64)[None, :] * (F * R) + factor * R + rank[:, None]
    return tl.dot(up, tl.load(at, mask=uses(expert, factor, F, E)[None, :], other=0.0), y)


@triton.jit
def finish(
    total, rows, tokens, up_ptr, hidden_ptr, expert_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, headroom,
    F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Scales, experts, bias; write (tokens, rows) of y. Unless DENSE, a factor that no token of the tile uses is not
    read."""
    row = tl.minimum(rows, N - 1)
    token = tl.minimum(tokens, M - 1)
    unit = tl.load(unit_ptr + token)
    y = total * tl.load(scale_ptr + row)[:, None]
    if F > 0:
        y = y / headroom
        expert = tl.zeros(token.shape, tl.int32)
        if E > 0:
            expert = tl.load(expert_ptr + token)
        if DENSE:
            for factor in tl.range(F, num_stages=3):
                y = add_factor(y, factor, expert, row, token, up_ptr, hidden_ptr, N, F, E, R)
        else:
            for factor in range(F):
                if tl.max(uses(expert, factor, F, E).to(tl.int32), 0) > 0:
                    y = add_factor(y, factor, expert, row, token, up_ptr, hidden_ptr, N, F, E, R)
        y = y * headroom
    y = y * unit[None, :]
    if BIAS:
        y = y + tl.load(bias_ptr + row)[:, None]
    mask = (rows < N)[:, None] & (tokens < M)[None, :]
    tl.store(y_ptr + tokens.to(tl.int64)[None, :] * N + rows[:, None], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear(
    low_ptr, high_ptr, pair_ptr, values_ptr, up_ptr, hidden_ptr, expert_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr,
    sums_ptr, done_ptr, M, N, Kp, SHARES, headroom,
    BITS: tl.constexpr, PER: tl.constexpr, F: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BIAS: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BAND: tl.constexpr, DENSE: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, ASSEMBLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y (M, N). Programs: tiles x SHARES; tokens run fastest inside bands of BAND token tiles, whose values stay in the
    cache while the weights pass by once."""
    tile, share = tl.program_id(0), tl.program_id(1)
    tiles_n, tiles_m = tl.cdiv(N, BN), tl.cdiv(M, BM)
    band = tile // (BAND * tiles_n)
    width = tl.minimum(tiles_m - band * BAND, BAND)
    inner = tile - band * BAND * tiles_n
    rows = inner // width * BN + tl.arange(0, BN)
    tokens = (band * BAND + inner % width) * BM + tl.arange(0, BM)
    row, token = tl.minimum(rows, N - 1), tl.minimum(tokens, M - 1)
    steps = Kp // (128 if BITS == 4 else 256)
    first, last = share_of(steps, share, SHARES)
    wait_for_previous_kernel(PDL)
    total = weight_sums(
        low_ptr, high_ptr, pair_ptr, values_ptr, row, token, N, Kp, first, last, BITS, PER, BN, BM, STAGES, ASSEMBLY
    )
    sums_ptr += tile.to(tl.int64) * SHARES * (BN * BM)
    total, done = add_shares(total, sums_ptr, done_ptr + tile, share, SHARES, SPLIT)
    if done:
        finish(
            total, rows, tokens, up_ptr, hidden_ptr, expert_ptr, unit_ptr, scale_ptr, bias_ptr, y_ptr, M, N, headroom,
            F, E, R, BIAS, DENSE,
        )  # fmt: skip
