"""The linear for Hopper GPUs in Gluon: packed int4 weights, int8 or fp8 tokens, experts, all in one persistent kernel.

One warp copies tiles into a ring in shared memory with the bulk copy engine; two warp groups multiply. A group's rows
of the weight are the *left* operand: they are unpacked in registers, which `wgmma` reads directly, so unpacked codes
never touch shared memory, and few tokens cost few columns. Work is counted in steps of 128 input channels. The last one
or two waves of tiles are cut into equal shares of steps (stream-K): the program that holds a tile's first step adds up
the other shares, always in the same order. Expert factors pass through the same ring as further steps.

int32 sums are exact. fp8 products are exact, but the matrix units keep some 14 bits of their sums: those of FP8_STEPS
steps are added up in float32 outside; tiles that have no registers for that leave more to the units, and add up their
sums of long inputs in memory.

Layouts are those of `layout`. Rejected: plain Triton at large M, and int8 weights through `torch._int_mm`, whose
figures are in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quant_experts.kernels.gpu.hopper import allow_next_kernel, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_shares import collect, hand_over, keep, with_kept
from quant_experts.kernels.gpu.hopper_store import store
from quant_experts.kernels.gpu.hopper_work import holder, ring_barriers, segment, share, tile_place
from quant_experts.kernels.gpu_weight_activation.hopper_codes import FP8_STEPS, unpack_fp8, unpack_int8
from quant_experts.kernels.gpu_weight_activation.hopper_experts import (
    ask_for_first_piece,
    copy_pieces,
    project_pieces,
    settle_pieces,
)
from quant_experts.kernels.gpu_weight_activation.hopper_factors import (
    add_factors,
    copy_factors,
    early_factors,
    late_factors,
)

Constant = Any
"""An int or a bool, wrapped as the compiler wants it."""


@dataclass(frozen=True, eq=False)  # hashed at each launch: by identity, as there is one of each
class Config:
    """What a compiled kernel is specialised to."""

    BN: Constant
    """Weight rows in a tile, half for each warp group."""
    BM: Constant
    """Tokens in a tile."""
    STAGES: Constant
    """Slots of the ring."""
    GROUP_M: Constant
    """Token tiles in a band that is walked together, for the L2 cache."""
    FACTORS: Constant
    """Shared and routed experts together; 0 for none."""
    RANK: Constant
    """Rank of each, a multiple of CHUNK."""
    BIAS: Constant
    SORTED: Constant
    """Whether tokens were sorted by expert, so that rows of y must be put back."""
    FP8: Constant = False
    """Whether tokens are e4m3 numbers and weights zigzag codes."""
    UNITS: Constant = False
    """Whether the matrix units add up fp8 products of all channels."""
    KEEPS: Constant = 0
    """Ring steps, at most, whose fp8 products the units add up; those of further parts are added up in memory. 0: tiles
    are not cut into parts."""
    PAIRS: Constant = False
    """Whether ring steps are multiplied two at a time."""
    REGISTERS: Constant = 232
    """Of each multiplying thread."""
    LAUNCH_REGISTERS: Constant = 168
    """Of each thread at the start, before they are shared out anew: 64 Ki over the threads that share a processor."""
    SHARES: Constant = True
    """Whether more programs than tiles start, so that tiles are cut into shares."""
    LATER: Constant = False
    """Whether codes are complete when the kernel starts, and hidden values only when the previous one has ended."""
    PROJECTS: Constant = False
    """Whether programs project codes first, and settle them (`hopper_experts`),"""
    SETTLES: Constant = False
    """or settle values that `prepare` has projected."""
    TOTAL: Constant = 0
    """Rows of that projection."""
    EXPERTS: Constant = 0
    """Routed ones among the factors, and as kernels count them"""
    PADDED_EXPERTS: Constant = 8
    STEP: Constant = 128
    """Input channels in one step of the ring: 64 bytes of a packed weight row."""
    CHUNK: Constant = 32
    """Expert ranks in one step of the ring: 64 bytes of float16."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, gl.constexpr(value))


@gluon.jit
def producer(w_desc, x_desc, up_desc, hidden_desc, down_desc, experts, rings, sizes, work, C: gl.constexpr):
    """The copying warp. Weights of the first steps are asked for before the previous kernel has ended."""
    w_ring, x_ring, ready, empty = rings
    M, N, steps, tiles_n, tiles_m, _headroom = sizes
    _projected_ptr, _hidden_ptr, mask_ptr, settled_ptr, _arrived_ptr, _bias_ptr, _code_scale_ptr, _token_ptr = experts
    _pieces, workers, cost, _slices = work
    start, end, segments, first_whole, whole, _per = share(steps, tiles_n * tiles_m, workers, cost, C.SHARES)
    total = segments + whole
    tile, first, last = segment(0, steps, start, end, segments, first_whole)
    row_tile, token_tile = tile_place(tile, tiles_n, tiles_m, C.GROUP_M)
    ahead = gl.where(total > 0, gl.minimum(C.STAGES, last - first), 0)
    if C.PROJECTS:
        down_ahead = ask_for_first_piece(down_desc, rings, steps, work, C)
        ahead = gl.where(gl.program_id(0) < workers, 0, ahead)
    for i in range(ahead):
        mbarrier.expect(ready.index(i), (C.BN + 2 * C.BM) * 64)
        at = (first + i) * N + row_tile * C.BN
        tma.async_copy_global_to_shared(w_desc, [at, 0], ready.index(i), w_ring.index(i))
    if not C.LATER:
        wait_for_previous_kernel()
    for i in range(ahead):
        at = [token_tile * C.BM, (first + i) * C.STEP]
        tma.async_copy_global_to_shared(x_desc, at, ready.index(i), x_ring.index(i))
    WAITS: gl.constexpr = C.LATER or C.SETTLES or C.PROJECTS
    waited = 0
    i = ahead
    if C.PROJECTS:
        i += copy_pieces(down_desc, x_desc, down_ahead, rings, steps, work, C)
    for index in range(total):
        tile, first, last = segment(index, steps, start, end, segments, first_whole)
        row_tile, token_tile = tile_place(tile, tiles_n, tiles_m, C.GROUP_M)
        present = early_factors(mask_ptr, token_tile, waited, M, WAITS, C)
        for k in range(gl.where(index == 0, first + ahead, first), last):
            slot = i % C.STAGES
            mbarrier.wait(empty.index(slot), ((i // C.STAGES) & 1) ^ 1)
            mbarrier.expect(ready.index(slot), (C.BN + 2 * C.BM) * 64)
            at = [k * N + row_tile * C.BN, 0]
            tma.async_copy_global_to_shared(w_desc, at, ready.index(slot), w_ring.index(slot))
            at = [token_tile * C.BM, k * C.STEP]
            tma.async_copy_global_to_shared(x_desc, at, ready.index(slot), x_ring.index(slot))
            i += 1
        present, waited = late_factors(present, waited, first, mask_ptr, settled_ptr, token_tile, M, WAITS, C)
        if C.FACTORS > 0 and first == 0:
            i = copy_factors(up_desc, hidden_desc, i, present, row_tile, token_tile, N, rings, C)


@gluon.jit
def unpacked(i, w_ring, ready, LEFT: gl.constexpr, WG: gl.constexpr, C: gl.constexpr):
    """Wait for ring step i; this warp group's rows of its weights as two operands of a product."""
    ROWS: gl.constexpr = C.BN // 2
    slot = i % C.STAGES
    mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
    packed = w_ring.index(slot).slice(WG * ROWS, ROWS).load(LEFT)
    if C.FP8:
        low, high = unpack_fp8(packed)
    else:
        low, high = unpack_int8(packed)
    return low, high


@gluon.jit
def multiply_step(acc, i, low, high, x_ring, C: gl.constexpr):
    """Start acc + operands times the tokens of ring step i."""
    slot = i % C.STAGES
    tokens = x_ring.index(slot).permute([1, 0])
    acc = warpgroup_mma(low, tokens.slice(0, 64, dim=0), acc, is_async=True)
    return warpgroup_mma(high, tokens.slice(64, 64, dim=0), acc, is_async=True)


@gluon.jit
def multiply(acc, i, count, w_ring, x_ring, ready, empty, WG: gl.constexpr, C: gl.constexpr):
    """acc + codes of `count` ring steps times tokens. Two steps at a time: the second unpacks while the first
    multiplies. (Carrying operands over the loop's end would have the compiler take them apart byte by byte.)"""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
    if C.PAIRS:
        for _ in range(count // 2):
            low, high = unpacked(i, w_ring, ready, LEFT, WG, C)
            token = multiply_step(acc, i, low, high, x_ring, C)
            next_low, next_high = unpacked(i + 1, w_ring, ready, LEFT, WG, C)
            token = multiply_step(token, i + 1, next_low, next_high, x_ring, C)
            acc = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(i % C.STAGES))
            mbarrier.arrive(empty.index((i + 1) % C.STAGES))
            i += 2
        count = count % 2
    for _ in range(count):
        low, high = unpacked(i, w_ring, ready, LEFT, WG, C)
        token = multiply_step(acc, i, low, high, x_ring, C)
        acc = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(i % C.STAGES))
        i += 1
    return acc, i


@gluon.jit
def multiply_fp8(i, count, w_ring, x_ring, ready, empty, sums_ptr, WG: gl.constexpr, C: gl.constexpr):
    """As `multiply`, of fp8 codes, from zero: the matrix units keep 14 bits of a sum, so theirs of FP8_STEPS ring steps
    are added up in float32, or those of equal parts of at most KEEPS steps, in memory, or all is left to them. That
    memory an earlier kernel may use as long as it runs."""
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 32])
    total = gl.zeros([C.BN // 2, C.BM], gl.float32, LAYOUT)
    if C.KEEPS > 0:
        parts = gl.cdiv(count, C.KEEPS)
        each = gl.cdiv(count, parts)
        for part in range(parts):
            total = gl.zeros([C.BN // 2, C.BM], gl.float32, LAYOUT)
            some = gl.minimum(each, count - part * each)
            total, i = multiply(total, i, some, w_ring, x_ring, ready, empty, WG, C)
            if part + 1 < parts:
                if C.LATER:
                    wait_for_previous_kernel()
                keep(total, part, sums_ptr, WG)
            elif part > 0:
                total = with_kept(total, sums_ptr, WG)
    elif C.UNITS:
        total, i = multiply(total, i, count, w_ring, x_ring, ready, empty, WG, C)
    else:
        for first in range(0, count, FP8_STEPS):
            acc = gl.zeros([C.BN // 2, C.BM], gl.float32, LAYOUT)
            acc, i = multiply(acc, i, gl.minimum(FP8_STEPS, count - first), w_ring, x_ring, ready, empty, WG, C)
            total += acc
    return total, i


@gluon.jit
def to_float(acc, row_tile, scale_ptr, N, headroom, WG: gl.constexpr, C: gl.constexpr):
    """Sums (rows, tokens) -> float32 in units of token scale * headroom, a power of two."""
    ROWS: gl.constexpr = C.BN // 2
    rows = row_tile * C.BN + WG * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    scale = gl.load(scale_ptr + rows, mask=rows < N, other=0.0)
    UNIT: gl.constexpr = 256.0 if C.FP8 else 0.0625
    return acc.to(gl.float32) * (scale * (UNIT / headroom))[:, None]


@gluon.jit
def consumer(experts, rings, ends, sizes, work, WG: gl.constexpr, C: gl.constexpr):
    """A multiplying warp group: half of each tile's weight rows."""
    w_ring, x_ring, ready, empty = rings
    y_ptr, scale_ptr, token_ptr, bias_ptr, order_ptr, sums_ptr, count_ptr = ends
    M, N, steps, tiles_n, tiles_m, headroom = sizes
    _projected_ptr, _hidden_ptr, mask_ptr, settled_ptr, _arrived_ptr, _bias_ptr, _code_scale_ptr, _token_ptr = experts
    _pieces, workers, cost, _slices = work
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 32])
    if not C.LATER:
        wait_for_previous_kernel()
    start, end, segments, first_whole, whole, per = share(steps, tiles_n * tiles_m, workers, cost, C.SHARES)
    WAITS: gl.constexpr = C.LATER or C.SETTLES  # what is copied has been waited for
    waited = 0
    i = 0
    if C.PROJECTS:
        i += project_pieces(rings, experts, sizes, work, WG, C)
    if C.SETTLES:
        settle_pieces(experts, sizes, work, WG, C)
    for index in range(segments + whole):
        tile, first, last = segment(index, steps, start, end, segments, first_whole)
        row_tile, token_tile = tile_place(tile, tiles_n, tiles_m, C.GROUP_M)
        present = early_factors(mask_ptr, token_tile, waited, M, WAITS, C)
        if C.FP8:
            acc, i = multiply_fp8(i, last - first, w_ring, x_ring, ready, empty, sums_ptr, WG, C)
        else:
            acc = gl.zeros([C.BN // 2, C.BM], gl.int32, LAYOUT)
            acc, i = multiply(acc, i, last - first, w_ring, x_ring, ready, empty, WG, C)
        present, waited = late_factors(present, waited, first, mask_ptr, settled_ptr, token_tile, M, WAITS, C)
        if first > 0:
            hand_over(acc, holder(tile * steps, per, workers, cost), sums_ptr, count_ptr, WG)
        else:
            if last < steps:
                shares = holder((tile + 1) * steps - 1, per, workers, cost) - gl.program_id(0)
                acc = collect(acc, shares, sums_ptr, count_ptr, WG)
            y = to_float(acc, row_tile, scale_ptr, N, headroom, WG, C)
            if C.FACTORS > 0:
                y, i = add_factors(y, i, present, w_ring, x_ring, ready, empty, WG, C)
            store(y, row_tile, token_tile, token_ptr, bias_ptr, order_ptr, y_ptr, M, N, headroom, WG, C)


@gluon.jit(do_not_specialize=["pieces", "workers", "cost", "slices"])
def kernel(
    w_desc, x_desc, up_desc, hidden_desc, down_desc, mask_ptr, y_ptr, scale_ptr, token_ptr, bias_ptr, order_ptr,
    sums_ptr, count_ptr, projected_ptr, hidden_ptr, settled_ptr, arrived_ptr, router_bias_ptr, code_scale_ptr, M, N,
    steps, headroom, pieces, workers, cost, slices, C: gl.constexpr,
):  # fmt: skip
    """y (M, N) = tokens (M, K) times weight (N, K)^T with scales, bias and experts. One program a multiprocessor."""
    w_ring = gl.allocate_shared_memory(gl.int8, [C.STAGES, C.BN, 64], w_desc.layout)
    x_ring = gl.allocate_shared_memory(x_desc.dtype, [C.STAGES, C.BM, C.STEP], x_desc.layout)
    ready, empty = ring_barriers(C.STAGES)
    allow_next_kernel()
    tiles_n = gl.cdiv(N, C.BN)
    tiles_m = gl.cdiv(M, C.BM)
    rings = (w_ring, x_ring, ready, empty)
    sizes = (M, N, steps, tiles_n, tiles_m, headroom)
    ends = (y_ptr, scale_ptr, token_ptr, bias_ptr, order_ptr, sums_ptr, count_ptr)
    experts = (
        projected_ptr, hidden_ptr, mask_ptr, settled_ptr, arrived_ptr, router_bias_ptr, code_scale_ptr, token_ptr,
    )  # fmt: skip
    if not (C.PROJECTS or C.SETTLES):  # known when it is compiled
        workers = 0
        cost = 0
    work = (pieces, workers, cost, slices)
    gl.warp_specialize(
        [
            (consumer, (experts, rings, ends, sizes, work, gl.constexpr(0), C)),
            (consumer, (experts, rings, ends, sizes, work, gl.constexpr(1), C)),
            (producer, (w_desc, x_desc, up_desc, hidden_desc, down_desc, experts, rings, sizes, work, C)),
        ],
        [4, 1],
        [C.REGISTERS, 40],
    )
