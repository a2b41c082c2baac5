"""A group of linears for one int8 token on Hopper GPUs, in Gluon, in one launch: every program quantizes the token for
itself.

A launch that waits for another costs one token as much as reading a small group's weights. What `prepare` does for it
is little work, so every program smooths, rotates and quantizes the whole token while its first weights are on their way
from memory, and goes on as in `hopper_few`. Only the projection of experts is shared out: each of the first programs
owns 16 rows of the stacked down factors and router weights and a slice of the input channels, writes its sums and
counts itself done, before it multiplies its rows of the weight like all others. After that the sums are there: each
program adds them up, always in the same order, chooses the expert and adds what it says.

Programs that project are no more than multiprocessors and come first, so that all of them run before one of them
waits: programs start in the order of their numbers. The last program to see them done sets the counts to zero for the
next launch.

Rejected: codes quantized once, by a program that the others wait for; a launch or programs of their own for the
projection; sums that are read again and again until they are there; programs that take tile after tile
(EXPERIMENTS.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import RUN, across, allow_next_kernel, multiply, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_tokens import ask_for_inverses, ask_for_token, smoothed, unit_and_inverse
from quant_experts.kernels.gpu.tokens import ROUNDING
from quant_experts.kernels.gpu_weight_activation.hopper_few import add_products, ask_for_weights
from quant_experts.kernels.gpu_weight_activation.hopper_work import barrier

COLUMNS = gl.constexpr(8)
"""Tokens of a matrix product, at least: all of them are the one token here."""
ROWS = gl.constexpr(16)
"""Of a matrix product: rows of the projection that a program owns."""
BUNCHES = gl.constexpr(16)
"""Programs that have seen the projection done are counted in so many places: one for all would keep them waiting."""
LINE = gl.constexpr(32)
"""Numbers from count to count, so that each has a line of the cache: first of programs that have projected, then of
bunches that have seen all of them done, then of such programs of each bunch."""


@gluon.jit
def to_columns(token):
    """(ways, channels) of the token -> (ways, COLUMNS, channels), columns alike, in the layout that is its parent."""
    one = gl.expand_dims(token, 1)
    LAYOUT: gl.constexpr = one.type.layout
    like = gl.zeros([one.shape[0], COLUMNS, one.shape[2]], one.dtype, LAYOUT)
    return gl.broadcast(one, like)[0]


@gluon.jit
def quantize(raw, inverses, inverse_ptr, column, codes, K, LARGEST: gl.constexpr, SMOOTH: gl.constexpr,
    ROT: gl.constexpr,
):  # fmt: skip
    """The token's codes, to shared memory -> its scale; NaN, and zero codes, if it is not finite."""
    values, largest = smoothed(raw, inverses, inverse_ptr, column, K, SMOOTH, ROT)
    finite = largest < float("inf")
    unit, inverse = unit_and_inverse(largest, finite, LARGEST)
    for part in gl.static_range(len(values)):
        steps = (gl.where(finite, values[part] * inverse, 0.0) + ROUNDING).to(gl.int32, bitcast=True)
        codes.index(part).store(steps.to(gl.int8))
    return gl.where(finite, unit, float("nan"))


@gluon.jit
def in_turns(codes, TURNS: gl.constexpr, WAYS: gl.constexpr):
    """Codes in shared memory, complete -> (turns, ways, 128)."""
    barrier()
    return codes._reinterpret(gl.int8, [TURNS, WAYS, 128], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def codes_of(codes, turn, half: gl.constexpr, BYTES: gl.constexpr):
    """Codes (turns, ways, 128) of one half of each block of a turn."""
    return to_columns(codes.index(turn).slice(half * 64, 64, 1).load(gl.SliceLayout(1, BYTES)))


@gluon.jit
def ask_for_codes(codes, first, AHEAD: gl.constexpr, BYTES: gl.constexpr):
    """Both halves of the blocks of AHEAD turns."""
    asked = ()
    for i in gl.static_range(AHEAD):
        asked = asked + ((codes_of(codes, first + i, 0, BYTES), codes_of(codes, first + i, 1, BYTES)),)
    return asked


@gluon.jit
def ask_for_down(down_ptr, block, row, steps, TOTAL: gl.constexpr, WORDS: gl.constexpr):
    """ROWS rows of the projection, the block of 128 channels of each warp, in runs that fill 16 bytes a thread."""
    CHANNELS: gl.constexpr = 4 * WORDS.size_per_thread[2]
    at = down_ptr + (block.to(gl.int64) * TOTAL + row + across(ROWS, 1, WORDS)) * 128 + across(CHANNELS, 2, WORDS)
    down = ()
    for run in gl.static_range(128 // CHANNELS):
        down = down + (gl.load(at + run * CHANNELS, mask=block < steps, other=0),)
    return down


@gluon.jit
def project(
    down, down_ptr, x_ptr, codes, sums_ptr, row, piece, steps, K, WAYS: gl.constexpr, SLICE_TURNS: gl.constexpr,
    FACTOR_ROWS: gl.constexpr, TOTAL: gl.constexpr, CODES: gl.constexpr, WORDS: gl.constexpr, MMA: gl.constexpr,
):  # fmt: skip
    """Sums of ROWS rows of the projection, of the token's codes or values, over the turns of a slice. down: what the
    first of them reads."""
    CHANNELS: gl.constexpr = 64 if CODES else 32
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    total = gl.zeros([WAYS, ROWS, COLUMNS], gl.int32 if CODES else gl.float32, MMA)
    for i in gl.static_range(SLICE_TURNS):
        turn = piece * SLICE_TURNS + i
        block = turn * WAYS + across(WAYS, 0, WORDS)
        if i > 0:
            down = ask_for_down(down_ptr, block, row, steps, TOTAL, WORDS)
        for run in gl.static_range(128 // CHANNELS):
            if CODES:
                token = codes_of(codes, turn, run, WORDS)
            else:
                channel = block * 128 + run * CHANNELS + across(CHANNELS, 2, WORDS)
                token = gl.load(x_ptr + channel, mask=channel < K, other=0.0, cache_modifier=".cg")
                if FACTOR_ROWS < TOTAL:
                    token = gl.where(row >= FACTOR_ROWS, gl.abs(token), token)  # the router's rows
                token = gl.broadcast(token, gl.zeros([WAYS, COLUMNS, CHANNELS], token.dtype, WORDS))[0]
            total = multiply(down[run], token, total, 4 if CODES else 2)
    at = sums_ptr + piece * TOTAL + row + gl.arange(0, ROWS, gl.SliceLayout(1, TILE))
    first = gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE)) == 0
    gl.store(at[:, None] + gl.zeros([ROWS, COLUMNS], gl.int32, TILE), gl.sum(total, axis=0), mask=first[None, :])


@gluon.jit
def wait_for(count_ptr, programs):
    """Until so many programs have counted themselves; what they wrote before can be read then. Each thread reads for
    itself."""
    at = count_ptr.to(gl.int64, bitcast=True)
    seen = gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
    )
    while seen != programs:
        seen = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1
        )
    barrier()


@gluon.jit
def clear_counts(before, counts_ptr):
    """In the last program that has seen the projection done, set all counts to zero; before: programs of this one's
    bunch that had seen it."""
    programs, bunch = gl.num_programs(0), gl.program_id(0) % BUNCHES
    if before == (programs - bunch + BUNCHES - 1) // BUNCHES - 1:
        gl.store(counts_ptr + (2 + bunch) * LINE, 0)
        if gl.atomic_add(counts_ptr + LINE, 1, sem="relaxed") == gl.minimum(programs, BUNCHES) - 1:
            gl.store(counts_ptr + LINE, 0)
            gl.store(counts_ptr, 0)


@gluon.jit
def choose(
    sums_ptr, bias_ptr, E: gl.constexpr, EP: gl.constexpr, TOTAL: gl.constexpr, FACTOR_ROWS: gl.constexpr,
    SLICES: gl.constexpr, PADDED: gl.constexpr, WAYS: gl.constexpr,
):  # fmt: skip
    """The expert with the first least score; NaN counts as least."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, EP // 4], [8, 4], [WAYS, 1], [1, 0])
    part = gl.arange(0, 4 * PADDED, gl.SliceLayout(1, LAYOUT))[:, None]  # of each slice three and one of zeros
    column = gl.arange(0, EP, gl.SliceLayout(0, LAYOUT))
    at = sums_ptr + part // 4 * TOTAL + FACTOR_ROWS + part % 4 * EP + column[None, :]
    there = (part < 4 * SLICES) & (column >= 0)[None, :]
    scores = gl.sum(gl.load(at, mask=there, other=0.0, cache_modifier=".cg"), axis=0)
    scores += gl.load(bias_ptr + column, mask=column < E, other=0.0)
    scores = gl.where(scores != scores, float("-inf"), scores)
    scores = gl.where(column < E, scores, float("inf"))
    least = gl.min(scores, axis=0)
    return gl.min(gl.where((scores == least) & (column < E), column, E - 1), axis=0)


@gluon.jit
def ask_for_up(up_ptr, factor, first, N, BN: gl.constexpr, WAYS: gl.constexpr, R: gl.constexpr, HALVES: gl.constexpr):
    """Rows of an up factor, a run of ranks a warp at a time, zeros where it has no more."""
    row = first.to(gl.int64) + factor * N + across(BN, 1, HALVES)
    up = ()
    for start in gl.static_range(0, R // RUN, WAYS):
        run = start + across(WAYS, 0, HALVES)
        at = up_ptr + row * R + run * RUN + across(RUN, 2, HALVES)
        up = up + (gl.load(at, mask=run < R // RUN, other=0.0),)
    return up


@gluon.jit
def add_expert(
    experts, up, sums_ptr, factor, code_scale_ptr, inverse_headroom, inverse, WAYS: gl.constexpr, R: gl.constexpr,
    TOTAL: gl.constexpr, SLICES: gl.constexpr, CODES: gl.constexpr, HALVES: gl.constexpr,
):  # fmt: skip
    """experts + up times hidden values of a factor. inverse: of the token's scale, for sums of values."""
    for i in gl.static_range(len(up)):
        rank = (i * WAYS + across(WAYS, 0, HALVES)) * RUN + across(RUN, 2, HALVES)
        there = rank < R
        at = sums_ptr + factor * R + rank
        total = gl.load(at, mask=there, other=0, cache_modifier=".cg")
        for piece in gl.static_range(1, SLICES):
            total += gl.load(at + piece * TOTAL, mask=there, other=0, cache_modifier=".cg")
        hidden = total.to(gl.float32) * inverse_headroom
        if CODES:
            hidden = hidden * gl.load(code_scale_ptr + rank, mask=there, other=0.0)
        else:
            hidden = hidden * inverse
        like = gl.zeros([WAYS, COLUMNS, RUN], gl.float16, HALVES)
        experts = multiply(up[i], gl.broadcast(hidden.to(gl.float16), like)[0], experts, 2)
    return experts


@gluon.jit
def kernel(
    weight_ptr, x_ptr, inverse_ptr, down_ptr, up_ptr, router_bias_ptr, code_scale_ptr, y_ptr, scale_ptr, bias_ptr,
    sums_ptr, counts_ptr, N, K, steps, headroom, inverse_headroom, LARGEST: gl.constexpr, SMOOTH: gl.constexpr,
    ROT: gl.constexpr, PARTS: gl.constexpr, TURNS: gl.constexpr, BN: gl.constexpr, WAYS: gl.constexpr,
    AHEAD: gl.constexpr, EVEN: gl.constexpr, ONCE: gl.constexpr, F: gl.constexpr, E: gl.constexpr, EP: gl.constexpr,
    R: gl.constexpr, TOTAL: gl.constexpr, SLICES: gl.constexpr, PADDED: gl.constexpr, SLICE_TURNS: gl.constexpr,
    CODES: gl.constexpr, BIAS: gl.constexpr,
):  # fmt: skip
    """y (N) from one token x (K) and weight (steps, N, 64). Programs: tiles of BN rows, the last one of which ends with
    the last row; the first TOTAL / 16 x SLICES project, where there are F experts, E of them routed. WAYS warps take a
    block of 128 channels each in every turn, and ask for AHEAD turns at a time. EVEN: there is a block for each of them
    whenever they ask; ONCE: they ask once. PARTS: of the token as it is quantized. CODES: the expert reads codes."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, ROWS, COLUMNS])
    TILE: gl.constexpr = gl.SliceLayout(0, MMA)
    BYTES: gl.constexpr = gl.BlockedLayout([1, 1, 16], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    WORDS: gl.constexpr = BYTES if CODES else HALVES
    PART: gl.constexpr = WAYS * 256
    allow_next_kernel()
    program = gl.program_id(0)
    first = gl.minimum(program * BN, N - BN)
    row = first + gl.arange(0, BN, gl.SliceLayout(1, TILE))
    way = across(WAYS, 0, BYTES)
    weight_at = weight_ptr + first * 64 + across(BN, 1, BYTES) * 64 + across(64, 2, BYTES)
    block_bytes = N.to(gl.int64) * 64
    packed = ask_for_weights(weight_at, way, steps, block_bytes, WAYS, AHEAD, EVEN)
    row_scale = gl.load(scale_ptr + row)  # used at the end: a product here would wait for it
    column = gl.arange(0, PART, gl.BlockedLayout([8], [32], [WAYS], [0]))
    inverses = ()
    if SMOOTH:
        inverses = ask_for_inverses(inverse_ptr, column, K, PARTS, PART)
    if F > 0:
        piece, down_row = program // (TOTAL // ROWS), program % (TOTAL // ROWS) * ROWS
        block = piece * SLICE_TURNS * WAYS + across(WAYS, 0, WORDS)
        down = ask_for_down(down_ptr, block, down_row, gl.where(piece < SLICES, steps, 0), TOTAL, WORDS)
        if F > E:
            shared_up = ask_for_up(up_ptr, 0, first, N, BN, WAYS, R, HALVES)
    wait_for_previous_kernel()
    raw = ask_for_token(x_ptr, True, column, K, PARTS, PART)
    codes = gl.allocate_shared_memory(gl.int8, [TURNS // 2, PART], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    token_scale = quantize(raw, inverses, inverse_ptr, column, codes, K, LARGEST, SMOOTH, ROT)
    codes = in_turns(codes, TURNS, WAYS)
    if F > 0:
        if piece < SLICES:
            project(
                down, down_ptr, x_ptr, codes, sums_ptr, down_row, piece, steps, K, WAYS, SLICE_TURNS, F * R, TOTAL,
                CODES, WORDS, MMA,
            )  # fmt: skip
            barrier()
            gl.atomic_add(counts_ptr, 1, sem="release")
    low_sums = gl.zeros([WAYS, BN, COLUMNS], gl.int32, MMA)
    high_sums = gl.zeros([WAYS, BN, COLUMNS], gl.int32, MMA)
    low_sums, high_sums = add_products(low_sums, high_sums, packed, ask_for_codes(codes, 0, AHEAD, BYTES))
    if not ONCE:
        for start in range(AHEAD, (steps + WAYS - 1) // WAYS, AHEAD):
            packed = ask_for_weights(weight_at, start * WAYS + way, steps, block_bytes, WAYS, AHEAD, EVEN)
            asked = ask_for_codes(codes, start, AHEAD, BYTES)
            low_sums, high_sums = add_products(low_sums, high_sums, packed, asked)
    y = gl.sum(low_sums + high_sums, axis=0).to(gl.float32) * (row_scale * (0.0625 * inverse_headroom))[:, None]
    before = 0
    if F > 0:
        wait_for(counts_ptr, SLICES * (TOTAL // ROWS))
        before = gl.atomic_add(counts_ptr + (2 + program % BUNCHES) * LINE, 1, sem="relaxed")
        inverse = gl.div_rn(1.0, gl.where(token_scale == token_scale, token_scale, 1.0))
        experts = gl.zeros([WAYS, BN, COLUMNS], gl.float32, MMA)
        if E > 0:
            factor = F - E + choose(sums_ptr, router_bias_ptr, E, EP, TOTAL, F * R, SLICES, PADDED, WAYS)
            own_up = ask_for_up(up_ptr, factor, first, N, BN, WAYS, R, HALVES)
        if F > E:
            experts = add_expert(
                experts, shared_up, sums_ptr, 0, code_scale_ptr, inverse_headroom, inverse, WAYS, R, TOTAL, SLICES,
                CODES, HALVES,
            )  # fmt: skip
        if E > 0:
            experts = add_expert(
                experts, own_up, sums_ptr, factor, code_scale_ptr, inverse_headroom, inverse, WAYS, R, TOTAL, SLICES,
                CODES, HALVES,
            )  # fmt: skip
        y += gl.sum(experts, axis=0)
    y = y * (token_scale * headroom)
    if BIAS:
        y = y + gl.load(bias_ptr + row)[:, None]
    one = gl.arange(0, COLUMNS, gl.SliceLayout(0, TILE)) == 0
    at = (y_ptr + row)[:, None] + gl.zeros([BN, COLUMNS], gl.int32, TILE)
    gl.store(at, y.to(y_ptr.dtype.element_ty), mask=one[None, :] & (row >= 0)[:, None])
    if F > 0:
        clear_counts(before, counts_ptr)
