"""The weight-only linear for nine tokens and more on Hopper GPUs, in Gluon: one persistent kernel, whose weights of 3
or 4 bits become float16 in registers, on the way to the matrix units.

Two warps copy tiles into rings in shared memory with the bulk copy engine: one weights and their scales, which it asks
for before the previous kernel has ended, one the tokens' values. Two warp groups multiply, each with half of a tile's
rows: words of codes are the *left* operand as they lie, piece by piece of 32 input channels, so dequantized weights
never touch memory, and each is dequantized once for as many tokens as a tile has: bits of a code are a subnormal
float16 number, of which one instruction makes a weight. Expert factors pass through the same rings as further steps.
The last tiles are cut into equal shares (`gpu.hopper_work`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from quant_experts.kernels.gpu.assembly import SLOPES, TINY_CODES_OF_3_BITS
from quant_experts.kernels.gpu.hopper import allow_next_kernel, factors_of_tile, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_shares import collect, hand_over
from quant_experts.kernels.gpu.hopper_store import store
from quant_experts.kernels.gpu.hopper_work import holder, ring_barriers, segment, share, tile_place
from quant_experts.kernels.gpu_weight_only.hopper_few import unpack

Constant = Any
"""An int or a bool, wrapped as the compiler wants it."""
UNIT = gl.constexpr(512.0)
"""Of dequantized weights, times their row's scale."""
CHUNK = gl.constexpr(32)
"""Expert ranks in a slot of weights, and half of those in a slot of values: 64 bytes of float16."""
WIDTH = gl.constexpr(64)
"""Channels in a slot of values: 128 bytes."""
BAND = gl.constexpr(8)
"""Token tiles that are walked together, for the L2 cache."""
REGISTERS, LAUNCH_REGISTERS = gl.constexpr(232), 168
"""Of each multiplying thread, and of each thread at the start, before they are shared out anew."""
RANKS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
"""Of CHUNK ranks of rows of a tile, or of its tokens."""


@dataclass(frozen=True, eq=False)  # hashed at each launch: by identity, as there is one of each
class Config:
    """What a compiled kernel is specialised to."""

    BN: Constant
    """Weight rows in a tile, half for each warp group."""
    BM: Constant
    """Tokens in a tile."""
    STAGES: Constant
    """Slots of the ring of weights, a step each,"""
    VALUE_STAGES: Constant
    """and of the ring of values, WIDTH channels each."""
    BITS: Constant
    PIECES: Constant
    """Of 32 channels, in a step."""
    PER: Constant
    """Pieces that share a scale, at most those of a step."""
    GROUPS: Constant
    """Scales of a row in a step."""
    FACTORS: Constant
    """Shared and routed experts together; 0 for none."""
    RANK: Constant
    """Rank of each, a multiple of CHUNK."""
    BIAS: Constant
    SORTED: Constant = False
    """Whether tokens were sorted by expert, so that rows of y must be put back."""
    LATER: Constant = False
    """Whether values are complete when the kernel starts, and hidden values only when the previous one has ended."""
    SHARES: Constant = True
    """Whether tiles are cut into shares where programs are more."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, gl.constexpr(value))


@gluon.jit
def copy_factors(
    desc, i, present, row, rows_apart, columns_apart, ring, ROWS: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr
):
    """Boxes of ROWS rows and CHUNK ranks of the factors that are present into a ring, from its step i on -> the next
    one. Factors are so many rows or columns apart."""
    slots, ready, empty = ring
    for j in range(C.FACTORS):
        if (present >> j) & 1 != 0:
            for c in gl.static_range(C.RANK // CHUNK):
                slot = i % STAGES
                mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(slot), ROWS * CHUNK * 2)
                box = slots.index(slot)._reinterpret(gl.float16, [ROWS, CHUNK], RANKS)
                at = [row + j * rows_apart, j * columns_apart + c * CHUNK]
                tma.async_copy_global_to_shared(desc, at, ready.index(slot), box)
                i += 1
    return i


@gluon.jit
def copy_weights(low_desc, high_desc, pair_desc, up_desc, mask_ptr, rings, sizes, C: gl.constexpr):
    """A copying warp: weights and their scales, which were there before the previous kernel, and up factors, as its
    tokens need them."""
    low_ring, high_ring, pair_ring, _value_ring, ready, empty, _value_ready, _value_empty = rings
    M, N, pairs_row, steps, steps_of_group, tiles_n, tiles_m, _headroom = sizes
    start, end, segments, first_whole, whole, _per = share(steps, tiles_n * tiles_m, 0, 0, C.SHARES)
    SLOT: gl.constexpr = C.BN * (64 + (32 if C.BITS == 3 else 0) + 4 * C.GROUPS)
    i = 0
    for index in range(segments + whole):
        tile, first, last = segment(index, steps, start, end, segments, first_whole)
        row_tile, token_tile = tile_place(tile, tiles_n, tiles_m, BAND)
        for k in range(first, last):
            slot = i % C.STAGES
            mbarrier.wait(empty.index(slot), ((i // C.STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(slot), SLOT)
            at = k * N + row_tile * C.BN
            tma.async_copy_global_to_shared(low_desc, [at, 0], ready.index(slot), low_ring.index(slot))
            if C.BITS == 3:
                tma.async_copy_global_to_shared(high_desc, [at, 0], ready.index(slot), high_ring.index(slot))
            for g in gl.static_range(C.GROUPS):
                at = (k * C.GROUPS // steps_of_group + g) * pairs_row + row_tile * C.BN
                pairs = pair_ring.index(slot * C.GROUPS + g)
                tma.async_copy_global_to_shared(pair_desc, [at], ready.index(slot), pairs)
            i += 1
        if C.FACTORS > 0 and first == 0:
            wait_for_previous_kernel()
            present = factors_of_tile(mask_ptr, token_tile, M, C.BM)
            i = copy_factors(up_desc, i, present, row_tile * C.BN, N, 0, (low_ring, ready, empty), C.BN, C.STAGES, C)


@gluon.jit
def copy_values(value_desc, hidden_desc, mask_ptr, rings, sizes, C: gl.constexpr):
    """The other copying warp: values of the tokens, and hidden values."""
    _low_ring, _high_ring, _pair_ring, value_ring, _ready, _empty, ready, empty = rings
    M, _N, _pairs_row, steps, _steps_of_group, tiles_n, tiles_m, _headroom = sizes
    start, end, segments, first_whole, whole, _per = share(steps, tiles_n * tiles_m, 0, 0, C.SHARES)
    SLOTS: gl.constexpr = C.PIECES // 2
    if not C.LATER:
        wait_for_previous_kernel()
    i = 0
    for index in range(segments + whole):
        tile, first, last = segment(index, steps, start, end, segments, first_whole)
        _, token_tile = tile_place(tile, tiles_n, tiles_m, BAND)
        for k in range(first * SLOTS, last * SLOTS):
            slot = i % C.VALUE_STAGES
            mbarrier.wait(empty.index(slot), ((i // C.VALUE_STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(slot), C.BM * WIDTH * 2)
            at = [token_tile * C.BM, k * WIDTH]
            tma.async_copy_global_to_shared(value_desc, at, ready.index(slot), value_ring.index(slot))
            i += 1
        if C.FACTORS > 0 and first == 0:
            wait_for_previous_kernel()
            present = factors_of_tile(mask_ptr, token_tile, M, C.BM)
            ring = (value_ring, ready, empty)
            i = copy_factors(hidden_desc, i, present, token_tile * C.BM, 0, C.RANK, ring, C.BM, C.VALUE_STAGES, C)


@gluon.jit
def unpacked(words, high, C: gl.constexpr):
    """Words of a step -> pieces of 32 channels, codes in 2^-24, of 4 bits every other piece in 2^-20, in float16."""
    if C.BITS == 4:
        return unpack(words)
    else:
        return gl.inline_asm_elementwise(
            TINY_CODES_OF_3_BITS, "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r", [words, high],
            dtype=(
                gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16, gl.float16,
            ), is_pure=True, pack=2,
        )  # fmt: skip


@gluon.jit
def slopes(pair_ring, slot, WG: gl.constexpr, LEFT: gl.constexpr, C: gl.constexpr):
    """Of each group in a step: 2^15 scale, 2^11 scale, -2^-9 scale zero (rows, 1) of this warp group's rows, as float16
    numbers in both halves of an int32."""
    ROWS: gl.constexpr = C.BN // 2
    found = ()
    for group in gl.static_range(C.GROUPS):
        pairs = pair_ring.index(slot * C.GROUPS + group).slice(WG * ROWS, ROWS).load(gl.SliceLayout(1, LEFT))
        found = found + (
            gl.inline_asm_elementwise(
                SLOPES, "=&r,=&r,=&r,r", [gl.expand_dims(pairs, 1)],
                dtype=(gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
            ),
        )  # fmt: skip
    return found


@gluon.jit
def dequantized(codes, slope, intercept):
    """A piece as operand, (code - zero) scale / UNIT: codes slope + intercept, which is rounded once."""
    LEFT: gl.constexpr = codes.type.layout
    both = gl.zeros(codes.shape, gl.int32, LEFT)
    return gl.inline_asm_elementwise(
        "fma.rn.f16x2 $0, $1, $2, $4; // $3 $5",
        "=r,r,r,r,r,r",
        [codes, slope + both, intercept + both],
        dtype=gl.float16,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def multiply_step(acc, i, v, rings, WG: gl.constexpr, C: gl.constexpr):
    """acc + the weights of step i, in UNIT, times values from slot v on."""
    low_ring, high_ring, pair_ring, value_ring, ready, empty, value_ready, value_empty = rings
    ROWS: gl.constexpr = C.BN // 2
    SLOTS: gl.constexpr = C.PIECES // 2
    LEFT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    slot = i % C.STAGES
    mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
    words = low_ring.index(slot).slice(WG * ROWS, ROWS).load(LEFT)
    high = words
    if C.BITS == 3:
        high = high_ring.index(slot).slice(WG * ROWS, ROWS).load(LEFT).to(gl.int16)
    codes = unpacked(words, high, C)
    lines = slopes(pair_ring, slot, WG, LEFT, C)
    for half in gl.static_range(SLOTS):
        place = (v + half) % C.VALUE_STAGES
        mbarrier.wait(value_ready.index(place), ((v + half) // C.VALUE_STAGES) & 1)
        values = value_ring.index(place).permute([1, 0])
        for k in gl.static_range(2 * half, 2 * half + 2):
            steeper, slope, intercept = lines[k // C.PER]
            left = dequantized(codes[k], steeper if C.BITS == 3 or k % 2 == 0 else slope, intercept)
            acc = warpgroup_mma(left, values.slice(32 * (k % 2), 32, dim=0), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(slot))
    for half in gl.static_range(SLOTS):
        mbarrier.arrive(value_empty.index((v + half) % C.VALUE_STAGES))
    return acc, i + 1, v + SLOTS


@gluon.jit
def add_factors(acc, i, v, present, rings, WG: gl.constexpr, C: gl.constexpr):
    """acc + up factors of the experts present times hidden values."""
    low_ring, _high_ring, _pair_ring, value_ring, ready, empty, value_ready, value_empty = rings
    ROWS: gl.constexpr = C.BN // 2
    count = 0
    for j in gl.static_range(C.FACTORS):
        count += ((present >> j) & 1) * (C.RANK // CHUNK)
    for _ in range(count):
        slot = i % C.STAGES
        place = v % C.VALUE_STAGES
        mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
        mbarrier.wait(value_ready.index(place), (v // C.VALUE_STAGES) & 1)
        up = low_ring.index(slot)._reinterpret(gl.float16, [C.BN, CHUNK], RANKS).slice(WG * ROWS, ROWS)
        hidden = value_ring.index(place)._reinterpret(gl.float16, [C.BM, CHUNK], RANKS)
        acc = warpgroup_mma(up, hidden.permute([1, 0]), acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(empty.index(slot))
        mbarrier.arrive(value_empty.index(place))
        i += 1
        v += 1
    return acc, i, v


@gluon.jit
def multiply_tiles(mask_ptr, rings, ends, sizes, WG: gl.constexpr, C: gl.constexpr):
    """A multiplying warp group: half of each tile's weight rows."""
    y_ptr, scale_ptr, unit_ptr, bias_ptr, order_ptr, sums_ptr, count_ptr = ends
    M, N, _pairs_row, steps, _steps_of_group, tiles_n, tiles_m, headroom = sizes
    ROWS: gl.constexpr = C.BN // 2
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16])
    start, end, segments, first_whole, whole, per = share(steps, tiles_n * tiles_m, 0, 0, C.SHARES)
    i = 0
    v = 0
    for index in range(segments + whole):
        tile, first, last = segment(index, steps, start, end, segments, first_whole)
        row_tile, token_tile = tile_place(tile, tiles_n, tiles_m, BAND)
        acc = gl.zeros([ROWS, C.BM], gl.float32, LAYOUT)
        for _ in range(first, last):
            acc, i, v = multiply_step(acc, i, v, rings, WG, C)
        wait_for_previous_kernel()  # which may use the same workspaces
        if first > 0:
            hand_over(acc, holder(tile * steps, per, 0, 0), sums_ptr, count_ptr, WG)
        else:
            if last < steps:
                shares = holder((tile + 1) * steps - 1, per, 0, 0) - gl.program_id(0)
                acc = collect(acc, shares, sums_ptr, count_ptr, WG)
            rows = row_tile * C.BN + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
            acc *= (gl.load(scale_ptr + rows, mask=rows < N, other=0.0) * (UNIT / headroom))[:, None]
            if C.FACTORS > 0:
                present = factors_of_tile(mask_ptr, token_tile, M, C.BM)
                acc, i, v = add_factors(acc, i, v, present, rings, WG, C)
            store(acc, row_tile, token_tile, unit_ptr, bias_ptr, order_ptr, y_ptr, M, N, headroom, WG, C)


@gluon.jit(do_not_specialize=["M", "steps", "steps_of_group"])  # else numbers of tokens compile it anew
def kernel(
    low_desc, high_desc, pair_desc, value_desc, up_desc, hidden_desc, mask_ptr, y_ptr, scale_ptr, unit_ptr, bias_ptr,
    order_ptr, sums_ptr, count_ptr, M, N, pairs_row, steps, steps_of_group, headroom, C: gl.constexpr,
):  # fmt: skip
    """y (M, N). One program a multiprocessor. steps_of_group: GROUPS of a step for each scale of a row, 1 where a scale
    serves a step or less."""
    low_ring = gl.allocate_shared_memory(gl.int16, [C.STAGES, C.BN, 32], low_desc.layout)
    high_ring = low_ring
    if C.BITS == 3:
        high_ring = gl.allocate_shared_memory(gl.int8, [C.STAGES, C.BN, 32], high_desc.layout)
    pair_ring = gl.allocate_shared_memory(gl.int32, [C.STAGES * C.GROUPS, C.BN], pair_desc.layout)
    value_ring = gl.allocate_shared_memory(gl.float16, [C.VALUE_STAGES, C.BM, WIDTH], value_desc.layout)
    ready, empty = ring_barriers(C.STAGES)
    value_ready, value_empty = ring_barriers(C.VALUE_STAGES)
    allow_next_kernel()
    rings = (low_ring, high_ring, pair_ring, value_ring, ready, empty, value_ready, value_empty)
    sizes = (M, N, pairs_row, steps, steps_of_group, gl.cdiv(N, C.BN), gl.cdiv(M, C.BM), headroom)
    ends = (y_ptr, scale_ptr, unit_ptr, bias_ptr, order_ptr, sums_ptr, count_ptr)
    gl.warp_specialize(
        [
            (multiply_tiles, (mask_ptr, rings, ends, sizes, gl.constexpr(0), C)),
            (multiply_tiles, (mask_ptr, rings, ends, sizes, gl.constexpr(1), C)),
            (copy_weights, (low_desc, high_desc, pair_desc, up_desc, mask_ptr, rings, sizes, C)),
            (copy_values, (value_desc, hidden_desc, mask_ptr, rings, sizes, C)),
        ],
        [4, 1, 1],
        [REGISTERS, 40, 40],
    )
