"""A few bfloat16 tokens of experts that read values, on Hopper GPUs, in Gluon: quantized and projected by one launch.

Tokens have a program each (`hopper_tokens`). Beside them others multiply tokens by rows of the stacked down factors and
router weights: a program owns ROWS of them and a slice of the input channels, of which each of its warps takes every
WAYS-th block of 128, and writes its sums; who reads them adds the slices, always in the same order. Weights and tokens
are operands as they lie in memory (`gpu.hopper`), and a program asks for all its weights before it waits for the
tokens. `prepare` is the same for other GPUs, other types and the interpreter, through shared memory.

The next kernel may start at once: that it may only after tokens are there, as in `prepare`, was slower here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import across, allow_next_kernel, multiply, wait_for_previous_kernel
from quant_experts.kernels.gpu.hopper_few import load_there
from quant_experts.kernels.gpu.launch import options, ptr, start
from quant_experts.kernels.gpu_tokens.hopper_tokens import ask_for_inverses, ask_for_token, smoothed, write_token
from quant_experts.kernels.gpu_tokens.layout import BLOCK, GroupLayout

MOST_TOKENS = 16
"""Of a launch."""
LONGEST = 32768
"""Input channels, at most: a program holds a token in registers."""
ROWS = gl.constexpr(16)
"""Of a program that projects, as of a matrix product."""
EARLY_PARTS = gl.constexpr(4)
"""Of a token, at most, whose 1 / m wait in registers from the start."""
MASKED = gl.constexpr("and.b32 $0, $1, $2; // $3")
"""$1 and $2, bit by bit: two bfloat16 numbers."""


class Tile(NamedTuple):
    """How a projection is cut over programs."""

    warps: int
    ahead: int
    """Blocks of 128 channels of a warp, all of which it asks for at once."""
    slices: int
    """Of the input channels."""


def tile(m: int, blocks: int) -> Tile:
    """For m tokens of so many blocks of 128 channels, as measured on an H200."""
    if blocks > 64:
        return sliced(8, 3 if m <= 8 else 4, blocks)
    return sliced(4, 2 if blocks >= 32 else 1, blocks)


def sliced(warps: int, ahead: int, blocks: int) -> Tile:
    """A tile with as many slices as it takes."""
    return Tile(warps, ahead, -(-blocks // (warps * ahead)))


def takes(x: Tensor, layout: GroupLayout) -> bool:
    """Whether the kernel prepares these tokens."""
    projection = layout.projection
    return (
        projection is not None
        and not layout.kind.reads_codes
        and 0 < x.shape[0] <= MOST_TOKENS
        and x.dtype == projection.dtype == torch.bfloat16
        and x.shape[1] <= LONGEST
    )


@gluon.jit
def ask_for_rows(at, first, blocks, TOTAL: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """Of the projection, the four pieces of 32 channels of every WAYS-th block from `first` on, AHEAD of them. EVEN:
    all are there."""
    LAYOUT: gl.constexpr = at.type.layout
    asked = ()
    for i in gl.static_range(AHEAD):
        block = first + i * WAYS + across(WAYS, 0, LAYOUT)
        block_at = at + block.to(gl.int64) * (TOTAL * 128)
        pieces = ()
        for piece in gl.static_range(4):
            pieces = pieces + (load_there(block_at + piece * 32, block < blocks, EVEN),)
        asked = asked + (pieces,)
    return asked


@gluon.jit
def ask_for_values(at, first, K, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr):
    """The same pieces of the tokens."""
    LAYOUT: gl.constexpr = at.type.layout
    asked = ()
    for i in gl.static_range(AHEAD):
        block = first + i * WAYS + across(WAYS, 0, LAYOUT)
        pieces = ()
        for piece in gl.static_range(4):
            column = block * 128 + piece * 32
            if EVEN:
                values = gl.load(at + column, cache_modifier=".cg")
            else:
                there = column + across(32, 2, LAYOUT) < K
                values = gl.load(at + column, mask=there, other=0.0, cache_modifier=".cg")
            pieces = pieces + (values,)
        asked = asked + (pieces,)
    return asked


@gluon.jit
def add_products(even, odd, rows, values, signs):
    """Two sums, whose products need not wait for one another; signs: a mask of two values."""
    for i in gl.static_range(len(rows)):
        for piece in gl.static_range(4):
            part = gl.inline_asm_elementwise(
                MASKED, "=r,r,r,r", [values[i][piece], signs], dtype=gl.bfloat16, is_pure=True, pack=2
            )
            if piece % 2 == 0:
                even = multiply(rows[i][piece], part, even, 2)
            else:
                odd = multiply(rows[i][piece], part, odd, 2)
    return even, odd


@gluon.jit
def project(
    program, x_ptr, rows_ptr, sums_ptr, M, K, blocks, blocks_per_slice, FACTOR_ROWS: gl.constexpr, TOTAL: gl.constexpr,
    BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """ROWS rows of one slice, to sums (slices, M, TOTAL)."""
    MMA: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WAYS, 1, 1], [1, 16, 8])
    SUMS: gl.constexpr = gl.SliceLayout(0, MMA)
    HALVES: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 8, 4], [WAYS, 1, 1], [2, 1, 0])
    first_row, piece = program % (TOTAL // ROWS) * ROWS, program // (TOTAL // ROWS)
    first = piece * blocks_per_slice
    rows_at = rows_ptr + first_row * 128 + across(ROWS, 1, HALVES) * 128 + across(32, 2, HALVES)
    rows = ask_for_rows(rows_at, first, blocks, TOTAL, WAYS, AHEAD, EVEN)
    wait_for_previous_kernel()
    repeated = gl.minimum(across(BM, 1, HALVES), M - 1)  # so that a load needs no mask
    values_at = x_ptr + repeated * K + across(32, 2, HALVES)
    values = ask_for_values(values_at, first, K, WAYS, AHEAD, EVEN)
    signs = gl.where(first_row >= FACTOR_ROWS, 0x7FFF7FFF, -1)  # the router reads magnitudes
    even = gl.zeros([WAYS, ROWS, BM], gl.float32, MMA)
    odd = gl.zeros([WAYS, ROWS, BM], gl.float32, MMA)
    even, odd = add_products(even, odd, rows, values, signs)
    sums = gl.sum(even + odd, axis=0)
    row = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
    token = gl.arange(0, BM, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(sums_ptr + (piece * M + token) * TOTAL + row, sums, mask=(token < M) & (row >= 0))


@gluon.jit
def kernel(
    x_ptr, inverse_ptr, codes_ptr, unit_ptr, rows_ptr, sums_ptr, counts_ptr, M, K, Kp, blocks_per_slice,
    LARGEST: gl.constexpr, PARTS: gl.constexpr, SMOOTH: gl.constexpr, ROT: gl.constexpr, COUNTS: gl.constexpr,
    FACTOR_ROWS: gl.constexpr, TOTAL: gl.constexpr, BM: gl.constexpr, WAYS: gl.constexpr, AHEAD: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Of x (M, K): codes (M, Kp) and units (M), or values, as `hopper_tokens`, and `project`. Programs: tokens, then
    rows of the projection and slices. COUNTS: zeros for the linear. A slice has WAYS AHEAD blocks, and the last one,
    unless EVEN, fewer."""
    allow_next_kernel()
    program = gl.program_id(0)
    if program >= M:
        project(
            program - M, x_ptr, rows_ptr, sums_ptr, M, K, Kp // 128, blocks_per_slice, FACTOR_ROWS, TOTAL, BM, WAYS,
            AHEAD, EVEN,
        )  # fmt: skip
    else:
        PART: gl.constexpr = WAYS * 256
        column = gl.arange(0, PART, gl.BlockedLayout([8], [32], [WAYS], [0]))
        inverses = ()
        if SMOOTH and PARTS <= EARLY_PARTS:
            inverses = ask_for_inverses(inverse_ptr, column, K, PARTS, PART)
        wait_for_previous_kernel()
        if COUNTS > 0:
            count = gl.arange(0, COUNTS, gl.BlockedLayout([1], [32], [WAYS], [0]))
            gl.store(counts_ptr + count, gl.zeros_like(count), mask=(count < COUNTS) & (program == 0))
        raw = ask_for_token(x_ptr + program * K, True, column, K, PARTS, PART)
        values, largest = smoothed(raw, inverses, inverse_ptr, column, K, SMOOTH, ROT)
        write_token(values, largest, codes_ptr + program * Kp, unit_ptr + program, column, Kp, LARGEST)


def begin(
    x: Tensor, layout: GroupLayout, codes: Tensor, unit: Tensor, sums: Tensor, counts: Tensor | None, cut: Tile
) -> None:
    """x (M, K), contiguous -> codes, or values (M, Kp), unit (M, 1), and sums (slices, M, rows of the projection)
    float32; counts (a power of two): written zero."""
    (m, k), padded, kind = x.shape, codes.shape[1], layout.kind
    warps, ahead, slices = cut
    assert layout.projection is not None
    start(
        kernel, (m + slices * (kind.rows // ROWS.value),),
        x, ptr(layout.inverse_smooth, unit), codes, unit, layout.projection, sums, ptr(counts, unit), m, k, padded,
        warps * ahead, LARGEST=kind.largest_code, PARTS=-(-padded // (256 * warps)), SMOOTH=kind.smooths,
        ROT=kind.rotation, COUNTS=0 if counts is None else len(counts), FACTOR_ROWS=kind.factors * kind.rank,
        TOTAL=kind.rows, BM=8 if m <= 8 else 16, WAYS=warps, AHEAD=ahead,
        EVEN=k == padded == BLOCK * slices * warps * ahead,
        num_warps=warps, enable_fp_fusion=False,
        **options(x.device),
    )  # fmt: skip
