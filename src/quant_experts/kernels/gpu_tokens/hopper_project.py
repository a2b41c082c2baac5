"""The projection of values for Hopper GPUs in Gluon: more than 16 bfloat16 tokens times all experts' down factors, and
their magnitudes times the router's weights, in one dense product.

One warp copies blocks of 64 channels into a ring in shared memory with the bulk copy engine; two warp groups multiply,
64 tokens each. Tokens are the *left* operand, in registers: magnitudes are the same registers without their signs, so
that experts and router share what is read. A program owns a run of the factors' rows, one of the router's, and a slice
of the input channels, whose float32 sums it writes; who reads them adds the slices, always in the same order.

Tokens and rows of a program are few beside those of a large product, so that what limits it is the second-level cache:
programs own as many rows as registers hold sums, where tokens are enough to give each multiprocessor work.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from quant_experts.kernels.gpu.hopper import allow_next_kernel, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_work import ring_barriers
from quant_experts.kernels.gpu.launch import Boxes, start
from quant_experts.kernels.gpu_tokens.layout import GroupLayout

TOKENS = gl.constexpr(128)
"""In a program's tile."""
STEP = gl.constexpr(64)
"""Channels of a ring step: 128 bytes of a row, as many as the copy engine swizzles."""
MOST_ROWS = 320
"""Of the projection in a program's tile: 160 registers of each thread hold its sums."""
MOST_FEW_ROWS = 80
"""Up to here a program leaves registers for those of the next kernel, which quantize beside it."""
MOST_SLICES = 20
"""Programs that share the input channels of a tile, at most."""
CUTS = 4096
"""Choices that are kept."""
RING_BYTES = 220 * 1024
MOST_STAGES = 12
SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
MAGNITUDE = gl.constexpr("and.b32 $0, $1, 0x7FFF7FFF;")
"""Two bfloat16 numbers without their signs. Single ones the compiler would take out of a register and put back."""
CYCLES, L2_BYTES = 1.7e3, 7.5e6
"""Of a multiprocessor, and what the second-level cache gives to all of them, in a microsecond."""
STARTING_MICROSECONDS = 1.5
"""Of a program: its first copies, and writing its sums."""
SUMS_BYTES = 1.9e6
"""Bytes of sums of slices, written and read in a microsecond."""
READ, READ_SORTED = 0.5, 0.1
"""The share of a slice's sums whose reading is waited for: `prepare.end` runs beside the linear, and where tokens are
sorted by expert only `route`, which reads the router's, runs beside nothing."""


@dataclass(frozen=True, eq=False)  # hashed at each launch: by identity, as there is one of each
class Tile:
    """What a compiled kernel is specialised to."""

    PIECES: Any
    """Rows of a program, in one to three powers of two, which are multiplied one after another, the router's last."""
    FIRST: Any
    """Of each piece: its row of the projection in the first of the programs that share the rows,"""
    STRIDE: Any
    """how many rows later it is in the next,"""
    END: Any
    """and where rows of its kind end."""
    COUNT: Any
    """Pieces."""
    ROWS: Any
    """Of all pieces together."""
    ROUTER: Any
    """Whether the last piece is of the router."""
    CHUNKS: Any
    """Programs side by side that share the rows."""
    TOTAL: Any
    """Rows of the projection."""
    STAGES: Any
    """Slots of the ring."""
    REGISTERS: Any
    """Of each multiplying thread."""
    LAUNCH_REGISTERS: Any
    """Of each thread at the start, before they are shared out anew."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, gl.constexpr(value))


@gluon.jit
def ask_for_weights(descs, rings, ready, slot, step, chunk, C: gl.constexpr):
    """Copy a step's rows of the projection into a slot."""
    for p in gl.static_range(C.COUNT):
        row = (step // 2) * C.TOTAL + chunk * C.STRIDE[p] + C.FIRST[p]
        at = [row, (step % 2) * STEP]
        tma.async_copy_global_to_shared(descs[p], at, ready.index(slot), rings[p].index(slot))


@gluon.jit
def producer(x_desc, descs, x_ring, rings, ready, empty, place, C: gl.constexpr):
    """The copying warp. Weights of the first steps are asked for before the previous kernel has ended. The next one may
    read the tokens too, so it starts after that."""
    tile, chunk, first, last = place
    BYTES: gl.constexpr = (TOKENS + C.ROWS) * STEP * 2
    ahead = gl.minimum(C.STAGES, last - first)
    for i in range(ahead):
        mbarrier.expect(ready.index(i), BYTES)
        ask_for_weights(descs, rings, ready, i, first + i, chunk, C)
    wait_for_previous_kernel()
    allow_next_kernel()
    for i in range(ahead):
        at = [tile * TOKENS, (first + i) * STEP]
        tma.async_copy_global_to_shared(x_desc, at, ready.index(i), x_ring.index(i))
    for i in range(ahead, last - first):
        slot = i % C.STAGES
        mbarrier.wait(empty.index(slot), ((i // C.STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), BYTES)
        at = [tile * TOKENS, (first + i) * STEP]
        tma.async_copy_global_to_shared(x_desc, at, ready.index(slot), x_ring.index(slot))
        ask_for_weights(descs, rings, ready, slot, first + i, chunk, C)


@gluon.jit
def zeros(ROWS: gl.constexpr):
    """Sums (64, ROWS) of a warp group."""
    return gl.zeros([64, ROWS], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16]))


@gluon.jit
def zero_sums(C: gl.constexpr):
    """Of each piece."""
    sums = ()
    for p in gl.static_range(C.COUNT):
        sums = sums + (zeros(C.PIECES[p]),)
    return sums


@gluon.jit
def add_product(total, x, rows, MAGNITUDES: gl.constexpr):
    """Start total + tokens x (64, STEP), or their magnitudes, times rows (ROWS, STEP) in shared memory."""
    if MAGNITUDES:
        x = gl.inline_asm_elementwise(MAGNITUDE, "=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, total.type.layout, 2)
    x = gl.convert_layout(x, LEFT, assert_trivial=True)
    return warpgroup_mma(x, rows.permute([1, 0]), total, is_async=True)


@gluon.jit
def multiply_step(sums, x, rings, slot, C: gl.constexpr):
    """Sums and a step's tokens times the rows of a slot, all of which are finished."""
    started = ()
    for p in gl.static_range(C.COUNT):
        rows = rings[p].index(slot)
        started = started + (add_product(sums[p], x, rows, C.ROUTER and p == C.COUNT - 1),)
    sums = warpgroup_mma_wait(0, deps=started)
    if C.COUNT == 1:
        sums = (sums,)
    return sums


@gluon.jit
def multiply(count, x_ring, rings, ready, empty, WG: gl.constexpr, C: gl.constexpr):
    """Sums over so many steps of this warp group's tokens."""
    sums = zero_sums(C)
    LEFT: gl.constexpr = gl.DotOperandLayout(0, sums[0].type.layout, 2)
    for i in range(count):
        slot = i % C.STAGES
        mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
        x = x_ring.index(slot).slice(WG * 64, 64).load(LEFT)
        sums = multiply_step(sums, x, rings, slot, C)
        mbarrier.arrive(empty.index(slot))
    return sums


@gluon.jit
def store(total, sums_ptr, token, row, end, M, TOTAL: gl.constexpr):
    """Sums of tokens and rows from `token` and `row` on, but those beyond M and `end`, to sums_ptr (M, TOTAL)."""
    LAYOUT: gl.constexpr = total.type.layout
    tokens = token + gl.arange(0, total.shape[0], gl.SliceLayout(1, LAYOUT))
    rows = row + gl.arange(0, total.shape[1], gl.SliceLayout(0, LAYOUT))
    mask = (tokens < M)[:, None] & (rows < end)[None, :]
    gl.store(sums_ptr + tokens.to(gl.int64)[:, None] * TOTAL + rows[None, :], total, mask=mask)


@gluon.jit
def consumer(sums_ptr, x_ring, rings, ready, empty, place, M, WG: gl.constexpr, C: gl.constexpr):
    """A multiplying warp group: 64 tokens. It writes only what it was given after the previous kernel had ended."""
    tile, chunk, first, last = place
    token = tile * TOKENS + WG * 64
    if token < M:
        sums = multiply(last - first, x_ring, rings, ready, empty, WG, C)
        for p in gl.static_range(C.COUNT):
            store(sums[p], sums_ptr, token, chunk * C.STRIDE[p] + C.FIRST[p], C.END[p], M, C.TOTAL)
    else:
        for i in range(last - first):
            mbarrier.wait(ready.index(i % C.STAGES), (i // C.STAGES) & 1)
            mbarrier.arrive(empty.index(i % C.STAGES))


@gluon.jit
def ring(ROWS: gl.constexpr, desc, C: gl.constexpr):
    """Slots of boxes of ROWS rows, as a descriptor lays them out."""
    return gl.allocate_shared_memory(gl.bfloat16, [C.STAGES, ROWS, STEP], desc.layout)


@gluon.jit(do_not_specialize=["slices", "M", "steps"])  # else prompts of each kind of length compile it anew
def kernel(x_desc, first_desc, second_desc, third_desc, sums_ptr, slices, M, steps, C: gl.constexpr):
    """x (M, K), magnitudes for the router, times the projection ((Kp / 128) TOTAL, 128) -> sums (slices, M, TOTAL).
    Programs: tiles of tokens x CHUNKS x slices of `steps`, the blocks of 64 channels."""
    x_ring = ring(TOKENS, x_desc, C)
    rings = ()
    for p in gl.static_range(C.COUNT):
        rings = rings + (ring(C.PIECES[p], x_desc, C),)
    ready, empty = ring_barriers(C.STAGES)
    piece = gl.program_id(0) % slices
    chunk = gl.program_id(0) // slices % C.CHUNKS
    tile = gl.program_id(0) // (slices * C.CHUNKS)
    place = (tile, chunk, piece * steps // slices, (piece + 1) * steps // slices)
    sums_ptr += piece.to(gl.int64) * M * C.TOTAL
    descs = (first_desc, second_desc, third_desc)
    gl.warp_specialize(
        [
            (consumer, (sums_ptr, x_ring, rings, ready, empty, place, M, gl.constexpr(0), C)),
            (consumer, (sums_ptr, x_ring, rings, ready, empty, place, M, gl.constexpr(1), C)),
            (producer, (x_desc, descs, x_ring, rings, ready, empty, place, C)),
        ],
        [4, 1],
        [C.REGISTERS, 24],
    )


def power_above(number: int, least: int = 1) -> int:
    """The least power of two that is not below either."""
    return max(least, 1 << max(0, number - 1).bit_length())


def pieces(run: int) -> tuple[int, ...]:
    """Powers of two, from 16 to 256, that hold a run of rows of factors: one or two."""
    wide = min(256, power_above(run + 1, 32) // 2)
    rest = power_above(run - wide, 16) if run > wide else 0
    return (wide, rest) if rest < wide and rest else (wide + rest,)


@lru_cache(CUTS)
def tile(factor_rows: int, router_rows: int, chunks: int) -> Tile | None:
    """Where the rows of a projection are cut into so many runs; None if those are more than registers hold."""
    factors = pieces(-(-factor_rows // chunks))
    router = (power_above(-(-router_rows // chunks), 16),) if router_rows else ()
    both = factors + router
    if sum(both) > MOST_ROWS or max(both) > 256:
        return None
    total = factor_rows + router_rows
    first = tuple(sum(factors[:i]) for i in range(len(factors))) + (factor_rows,) * len(router)
    few = sum(both) <= MOST_FEW_ROWS
    return Tile(
        PIECES=both, FIRST=first, STRIDE=(sum(factors),) * len(factors) + router,
        END=(factor_rows,) * len(factors) + (total,) * len(router), COUNT=len(both), ROWS=sum(both),
        ROUTER=router_rows > 0, CHUNKS=chunks, TOTAL=total,
        STAGES=min(MOST_STAGES, RING_BYTES // ((TOKENS.value + sum(both)) * 128)),
        REGISTERS=104 if few else 232, LAUNCH_REGISTERS=80 if few else 168,
    )  # fmt: skip


def estimated(choice: tuple[Tile, int], m: int, steps: int, count: int, sorts: bool) -> float:
    """Microseconds that m tokens of so many steps take on so many multiprocessors, by a tile and so many slices of the
    input channels, and whoever adds the slices: a rough model of what limits them."""
    c, slices = choice
    programs: int = -(-m // TOKENS.value) * c.CHUNKS.value * slices
    cycles = 4 * sum(max(32, rows // 2) for rows in c.PIECES.value)  # of a warp group: few rows take as long as 64
    multiplying: float = max(250, cycles * (1 if m <= TOKENS.value // 2 else 2)) / CYCLES
    copying: float = (min(m, TOKENS.value) + c.ROWS.value) * 128 * min(programs, count) / L2_BYTES
    each = STARTING_MICROSECONDS + -(-steps // slices) * max(multiplying, copying)
    moved: float = m * c.TOTAL.value * 4 * (1 + (READ_SORTED if sorts else READ))
    return -(-programs // count) * each + slices * moved / SUMS_BYTES


def cut(factor_rows: int, router_rows: int, m: int, steps: int, count: int, sorts: bool) -> tuple[Tile, int]:
    """The tile, and the slices of the input channels, that are estimated to be fastest for m tokens on so many
    multiprocessors; sorts: whether tokens are sorted by expert then. Numbers of tokens that differ little are not told
    apart: to choose takes longer than to launch."""
    run = 16 if m <= TOKENS.value else TOKENS.value
    return _cut(factor_rows, router_rows, -(-m // run) * run, steps, count, sorts)


@lru_cache(CUTS)
def _cut(factor_rows: int, router_rows: int, m: int, steps: int, count: int, sorts: bool) -> tuple[Tile, int]:
    """As `cut`."""
    choices = [(c, slices) for c in tiles(factor_rows, router_rows) for slices in range(1, min(MOST_SLICES, steps) + 1)]
    return min(choices, key=lambda choice: estimated(choice, m, steps, count, sorts))


def tiles(factor_rows: int, router_rows: int) -> list[Tile]:
    """For programs side by side, from as few as registers allow to one for 32 rows of factors."""
    cut_by = range(1, -(-factor_rows // 32) + 1)
    return [c for chunks in cut_by if (c := tile(factor_rows, router_rows, chunks)) is not None]


def takes(x: Tensor, layout: GroupLayout) -> bool:
    """Whether the kernel projects these tokens: the copy engine wants rows of multiples of 16 bytes."""
    projection = layout.projection
    return (
        projection is not None
        and not layout.kind.reads_codes
        and layout.factors > 0
        and x.shape[0] > 16
        and x.dtype == projection.dtype == torch.bfloat16
        and x.shape[1] % 8 == 0
        and x.data_ptr() % 16 == 0
    )


def descriptor(tensor: Tensor, rows: int) -> Boxes:
    """A view of a matrix as boxes of `rows` rows and STEP columns."""
    return Boxes(tensor, tensor.shape, tensor.stride(), (rows, STEP.value), SWIZZLED)


def projection_descriptors(layout: GroupLayout, pieces: tuple[int, ...]) -> list[Boxes]:
    """Of the projection in boxes of so many rows, three whatever the pieces."""
    kept: dict[tuple[int, ...], list[Boxes]] = layout.descriptors
    if pieces not in kept:
        assert layout.projection is not None
        rows = layout.projection.view(-1, layout.projection.shape[2])
        made = [descriptor(rows, piece) for piece in pieces]
        kept[pieces] = made + made[-1:] * (3 - len(made))
    return kept[pieces]


def project(x: Tensor, layout: GroupLayout, sums: Tensor, c: Tile, **launch: Any) -> None:
    """x (M, K) -> sums (slices, M, rows of the projection) float32; launch: options of any launch."""
    (slices, m, _), steps = sums.shape, -(-x.shape[1] // 128) * 2
    rows = projection_descriptors(layout, c.PIECES.value)
    start(
        kernel, (-(-m // TOKENS.value) * c.CHUNKS.value * slices,),
        descriptor(x, TOKENS.value), *rows, sums, slices, m, steps, c, num_warps=4, maxnreg=c.LAUNCH_REGISTERS.value,
        **launch,
    )  # fmt: skip
