"""What the GPU kernels share: smoothing, rotation, rounding, routing, in pieces that compile into each of them."""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu import launch

INTERPRETED = tl.constexpr(launch.INTERPRETED)
ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, halves to even, and leaves that in the low bits."""
SMALLEST = tl.constexpr(2.0**-100)
"""As `reference.SMALLEST`."""
ROUTER_PARTS = tl.constexpr(4)
"""Blocks of rows of router weights: the parts of `router_rows` in a layout, one of zeros for a power of two."""


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Programmatic launch: what earlier kernels wrote may be read from here on, and the next kernel may start.

    Not before: programs of the next kernel that wait beside the ones of this would be spread unevenly.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def load_raw(x_ptr, rows, row_mask, columns, K):
    """x (rows, columns) as it is, zero outside."""
    at = x_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    return interpretable(tl.load(at, mask=row_mask[:, None] & (columns < K)[None, :], other=0.0, cache_modifier=".cg"))


@triton.jit
def interpretable(x):
    """x, in float32 where it is bfloat16 and the interpreter's, which would multiply its bits."""
    return x.to(tl.float32) if INTERPRETED and x.dtype == tl.bfloat16 else x


@triton.jit
def transformed(x, columns, K, inverse_ptr, signs_ptr, SMOOTH: tl.constexpr, ROT: tl.constexpr):
    """x (rows, columns) -> x (1 / m), blocks of ROT columns rotated: float32."""
    z = x.to(tl.float32)
    if SMOOTH:
        z = z * tl.load(inverse_ptr + columns, mask=columns < K, other=1.0)[None, :]
    if ROT > 0:
        BLOCKS: tl.constexpr = x.shape[0] * x.shape[1] // ROT
        index = tl.arange(0, ROT)
        matrix = tl.load(signs_ptr + index[:, None] * ROT + index[None, :])
        z = rotated(tl.reshape(z * (ROT**-0.5), (BLOCKS, ROT)), matrix)
        z = tl.reshape(z, (x.shape[0], x.shape[1]))
    return z


@triton.jit
def first_bits(x):
    """x float32 cut to the 8 bits that bfloat16 holds. Single conversions are slow on GPUs, masks are not."""
    return (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def parts(x):
    """Three bfloat16 numbers that add up to x."""
    x = x.to(tl.float32)
    high = first_bits(x)
    middle = first_bits(x - high)
    return high.to(tl.bfloat16), middle.to(tl.bfloat16), (x - high - middle).to(tl.bfloat16)


@triton.jit
def rotated(z, matrix):
    """z (blocks, ROT) float32 times a matrix of signs, in three parts of 8 bits: every product is exact."""
    if matrix.dtype == tl.float32:  # the interpreter
        return tl.dot(z, matrix, input_precision="ieee")
    else:
        high, middle, low = parts(z)
        return tl.dot(high, matrix, tl.dot(middle, matrix, tl.dot(low, matrix)))


@triton.jit
def nan_max(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def token_scale(absmax, LARGEST: tl.constexpr):
    """absmax / LARGEST, 1 for a zero token; where LARGEST is 0, the power of two at or below absmax, at least 2^-100
    and at most 2^126; NaN for a token that is not finite."""
    if LARGEST > 0:
        scale = tl.div_rn(absmax, tl.full(absmax.shape, LARGEST, tl.float32))
        scale = tl.where(absmax >= SMALLEST, scale, 1.0)
    else:
        bits = tl.minimum(tl.maximum(absmax, SMALLEST), 2.0**126).to(tl.int32, bitcast=True) & 0x7F800000
        scale = bits.to(tl.float32, bitcast=True)
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def reciprocal(scale):
    """1 / scale, correctly rounded."""
    return tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)


@triton.jit
def rounded(steps, TYPE: tl.constexpr):
    """float32 in [-127, 127] -> int8, or in [-448, 448] (but for rounding) -> e4m3, or -> float16. Halves to even."""
    if tl.float16 == TYPE:
        return steps.to(tl.float16)
    elif tl.int8 == TYPE:
        return (steps + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)
    elif INTERPRETED:  # its own conversion rounds halves up
        return nearest_e4m3(steps).to(tl.float8e4nv)
    else:
        return steps.to(tl.float8e4nv)


@triton.jit
def nearest_e4m3(steps):
    """The nearest numbers of e4m3 in float32, halves to even: adding 2^20 times a value's power of two leaves its first
    four bits, or multiples of 2^-9 where it is small."""
    power = (steps.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    power = tl.maximum(power, 2.0**-6) * 2.0**20
    magnitude = (tl.abs(steps) + power) - power
    return tl.where(steps < 0, -magnitude, magnitude)


@triton.jit
def add_product(total, left, right):
    """total + left times right (2 or 3 axes), one of them weights, one tokens: integers, to int32 sums; or e4m3 tokens
    and int8 or e4m3 weights, as float16, which holds all of these; or float32 weights, in three products of 11 bits; or
    bfloat16 weights, with tokens of other types in three parts of 8 bits. So products are exact. Sums are float32."""
    if left.dtype == tl.float8e4nv or right.dtype == tl.float8e4nv:
        return tl.dot(left.to(tl.float16), right.to(tl.float16), total)
    elif left.dtype == tl.int8:
        return tl.dot(left, right, total, out_dtype=tl.int32)
    elif left.dtype == tl.float32 and right.dtype != tl.bfloat16:
        return tl.dot(left, right.to(tl.float32), total, input_precision="tf32x3")
    elif right.dtype == tl.float32 and left.dtype != tl.bfloat16:
        return tl.dot(left.to(tl.float32), right, total, input_precision="tf32x3")
    elif left.dtype == right.dtype:
        return tl.dot(left, right, total)
    elif left.dtype == tl.bfloat16:  # weights on the left
        high, middle, low = parts(right)
        return tl.dot(left, high, tl.dot(left, middle, tl.dot(left, low, total)))
    else:
        high, middle, low = parts(left)
        return tl.dot(high, right, tl.dot(middle, right, tl.dot(low, right, total)))


@triton.jit
def choose(scores, bias_ptr, E: tl.constexpr, EP: tl.constexpr):
    """scores (rows, EP) -> (rows,) the first least sum of score and bias; NaN counts as least."""
    column = tl.arange(0, EP)
    scores += tl.load(bias_ptr + column, mask=column < E, other=0.0)[None, :]
    column = column[None, :]
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(column < E, scores, float("inf"))
    least = tl.min(scores, axis=1)
    return tl.min(tl.where((scores == least[:, None]) & (column < E), column, E - 1), axis=1)


@triton.jit
def factors_used(expert, used, F: tl.constexpr, E: tl.constexpr):
    """Experts of tokens (rows,) -> (rows / 16,) bits of the factors that each run of 16 used tokens needs."""
    bits = tl.where(used, 1 << (expert + (F - E)), 0) if E > 0 else expert * 0
    present = tl.reduce(tl.reshape(bits, (expert.shape[0] // 16, 16)), 1, bitwise_or)
    return present | 1 if F > E else present
