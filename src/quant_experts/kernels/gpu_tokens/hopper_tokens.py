"""Tokens for quantized linears on Hopper GPUs, in Gluon: a program reads a whole token once, keeps it in registers,
smooths and rotates it there, and writes its codes, or its values in units of a power of two.

A thread holds eight consecutive channels of each part of a token, so a rotation is sums within a thread and with its
neighbours, without shared memory. `prepare.quantize` is the same for other GPUs and the interpreter, where a rotation
is a product of matrix units on parts of each value: here that took up to four times as long (EXPERIMENTS.md).
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.assembly import EIGHT, HADAMARD_16, HADAMARD_32, HADAMARD_64, HADAMARD_128
from quant_experts.kernels.gpu.hopper import allow_next_kernel, wait_for_previous_kernel
from quant_experts.kernels.gpu.launch import options, programs, ptr, start
from quant_experts.kernels.gpu.tokens import ROUNDING, SMALLEST

WARPS = ((4096, 4), (8192, 8), (32768, 16), (1 << 31, 32))
"""Warps of a program, by input channels, up to so many."""
NAN_TOO = gl.constexpr(tl.PropagateNan.ALL)


@gluon.jit
def nan_max(a, b):
    """max(a, b), NaN if either is."""
    return gl.maximum(a, b, propagate_nan=NAN_TOO)


@gluon.jit
def rotated(z, ROT: gl.constexpr):
    """z, of which each thread holds runs of eight, in rotated blocks of ROT."""
    z = z * (ROT**-0.5)  # first: sums of values near the largest of float32 stay finite where the oracle's do
    if ROT == 16:
        z = gl.inline_asm_elementwise(HADAMARD_16, EIGHT, [z], dtype=gl.float32, is_pure=True, pack=8)
    elif ROT == 32:
        z = gl.inline_asm_elementwise(HADAMARD_32, EIGHT, [z], dtype=gl.float32, is_pure=True, pack=8)
    elif ROT == 64:
        z = gl.inline_asm_elementwise(HADAMARD_64, EIGHT, [z], dtype=gl.float32, is_pure=True, pack=8)
    else:
        gl.static_assert(ROT == 128)
        z = gl.inline_asm_elementwise(HADAMARD_128, EIGHT, [z], dtype=gl.float32, is_pure=True, pack=8)
    return z


@gluon.jit
def unit_and_inverse(largest, finite, LARGEST: gl.constexpr):
    """Of codes up to LARGEST (`tokens.token_scale`), or, where that is 0, the power of two at or below the largest
    magnitude, at least 2^-100 and at most 2^126."""
    if LARGEST > 0:
        unit = gl.where(finite & (largest >= SMALLEST), gl.div_rn(largest, 1.0 * LARGEST), 1.0)
        inverse = gl.div_rn(1.0, unit)
    else:
        bits = gl.minimum(gl.maximum(gl.where(finite, largest, 1.0), SMALLEST), 2.0**126).to(gl.int32, bitcast=True)
        bits = bits & 0x7F800000
        unit = bits.to(gl.float32, bitcast=True)
        inverse = (0x7F000000 - bits).to(gl.float32, bitcast=True)
    return unit, inverse


@gluon.jit
def ask_for_inverses(inverse_ptr, column, K, PARTS: gl.constexpr, PART: gl.constexpr):
    """1 / m, in parts, one outside."""
    inverses = ()
    for part in gl.static_range(PARTS):
        at = part * PART + column
        inverses = inverses + (gl.load(inverse_ptr + at, mask=at < K, other=1.0),)
    return inverses


@gluon.jit
def ask_for_token(x_ptr, there, column, K, PARTS: gl.constexpr, PART: gl.constexpr):
    """Parts of the token at x_ptr as they are, zero where it is not there."""
    raw = ()
    for part in gl.static_range(PARTS):
        at = part * PART + column
        raw = raw + (gl.load(x_ptr + at, mask=(at < K) & there, other=0.0, cache_modifier=".cg"),)
    return raw


@gluon.jit
def smoothed(raw, inverses, inverse_ptr, column, K, SMOOTH: gl.constexpr, ROT: gl.constexpr):
    """-> parts of a token, multiplied by 1 / m, which is read where no inverses are given, and rotated; their largest
    magnitude."""
    PART: gl.constexpr = column.shape[0]
    LAYOUT: gl.constexpr = column.type.layout
    values = ()
    most = gl.zeros([PART], gl.float32, LAYOUT)
    for part in gl.static_range(len(raw)):
        z = raw[part].to(gl.float32)
        if SMOOTH and len(inverses) > 0:
            z = z * inverses[part]
        elif SMOOTH:
            at = part * PART + column
            z = z * gl.load(inverse_ptr + at, mask=at < K, other=1.0)
        if ROT > 0:
            z = rotated(z, ROT)
        most = nan_max(most, gl.abs(z))
        values = values + (z,)
    return values, gl.reduce(most, 0, nan_max)


@gluon.jit
def write_token(values, largest, values_at, unit_at, column, Kp, LARGEST: gl.constexpr):
    """Codes, or values in a unit, of parts of a token, and its scale or unit; NaN, and zeros, if it is not finite."""
    PART: gl.constexpr = column.shape[0]
    finite = largest < float("inf")
    unit, inverse = unit_and_inverse(largest, finite, LARGEST)
    for part in gl.static_range(len(values)):
        steps = gl.where(finite, values[part] * inverse, 0.0)
        if values_at.dtype.element_ty == gl.int8:
            steps = (steps + ROUNDING).to(gl.int32, bitcast=True)
        at = part * PART + column
        gl.store(values_at + at, steps.to(values_at.dtype.element_ty), mask=at < Kp)
    gl.store(unit_at, gl.where(finite, unit, float("nan")))


@gluon.jit
def kernel(
    x_ptr, inverse_ptr, values_ptr, unit_ptr, order_ptr, sums_ptr, counts_ptr, M, K, Kp, LARGEST: gl.constexpr,
    PARTS: gl.constexpr, WARPS: gl.constexpr, SMOOTH: gl.constexpr, ROT: gl.constexpr, SORTED: gl.constexpr,
    SUMS: gl.constexpr, COUNTS: gl.constexpr, EARLY: gl.constexpr, HELD: gl.constexpr,
):  # fmt: skip
    """Values (M, Kp) of each token in its place of a sorted order, its unit, and SUMS zeros; and COUNTS
    zeros for all. A program takes every n-th place, n the number of programs. HELD: 1 / m and a second token fit its
    registers, and it asks for that before it works on the first; otherwise there are as many programs as tokens.

    EARLY: what is read was complete when the kernel before this one started.
    """
    PART: gl.constexpr = WARPS * 256
    LAYOUT: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    column = gl.arange(0, PART, LAYOUT)
    inverses = ()
    if SMOOTH and HELD:
        inverses = ask_for_inverses(inverse_ptr, column, K, PARTS, PART)
    if not EARLY:
        wait_for_previous_kernel()
    allow_next_kernel()
    first = gl.program_id(0)
    if COUNTS > 0:
        count = gl.arange(0, COUNTS, gl.BlockedLayout([1], [32], [WARPS], [0]))
        gl.store(counts_ptr + count, gl.zeros_like(count), mask=(count < COUNTS) & (first == 0))
    token = first
    if SORTED:
        token = gl.load(order_ptr + first, cache_modifier=".cg")
    raw = ask_for_token(x_ptr + token.to(gl.int64) * K, True, column, K, PARTS, PART)
    end, stride = first + 1, 1  # one token: the compiler then keeps no registers for another
    if HELD:
        end, stride = M, gl.num_programs(0)
    for i in range(first, end, stride):
        place = i.to(gl.int64)  # type: ignore[attr-defined]
        if HELD:
            token = i + gl.num_programs(0)
            there = token < M
            if SORTED:
                token = gl.load(order_ptr + token, mask=there, other=0, cache_modifier=".cg")
            next_raw = ask_for_token(x_ptr + token.to(gl.int64) * K, there, column, K, PARTS, PART)
        values, largest = smoothed(raw, inverses, inverse_ptr, column, K, SMOOTH, ROT)
        write_token(values, largest, values_ptr + place * Kp, unit_ptr + place, column, Kp, LARGEST)
        if SUMS > 0:
            rank = gl.arange(0, SUMS, gl.BlockedLayout([1], [32], [WARPS], [0]))
            gl.store(sums_ptr + place * SUMS + rank, gl.zeros_like(rank))
        if HELD:
            raw = next_raw
    if EARLY:
        wait_for_previous_kernel()


def write_tokens(
    x: Tensor, inverse_smooth: Tensor | None, rotation: int, largest: int, values: Tensor, unit: Tensor,
    order: Tensor | None = None, sums: Tensor | None = None, counts: Tensor | None = None, early: bool = False,
) -> None:  # fmt: skip
    """x (M, K) / m, rotated, in units of each token -> values (M, Kp), and unit (M).

    largest: the code of a token's largest magnitude, or 0 for units that are powers of two. order: the token of each
    row. sums (M, a power of two) and counts (a power of two): written zero. early: see `kernel`.
    """
    (m, k), padded = x.shape, values.shape[1]
    warps = next(warps for most, warps in WARPS if padded <= most)
    parts = -(-padded // (256 * warps))
    held = warps <= 16 and parts * x.element_size() <= 10
    start(
        kernel, (min(m, programs(x.device) * 16 // warps) if held else m,),
        x, ptr(inverse_smooth, unit), values, unit, ptr(order, unit), ptr(sums, unit), ptr(counts, unit), m, k, padded,
        LARGEST=largest, PARTS=parts, WARPS=warps, SMOOTH=inverse_smooth is not None, ROT=rotation,
        SORTED=order is not None, SUMS=0 if sums is None else sums.shape[-1],
        COUNTS=0 if counts is None else len(counts), EARLY=early, HELD=held, num_warps=warps,
        maxnreg=2048 // max(16, warps), enable_fp_fusion=False, **options(x.device),
    )  # fmt: skip
