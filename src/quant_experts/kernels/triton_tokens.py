"""What the `prepare` kernels share: smoothing, rounding, routing, in pieces that compile into each of them."""

from __future__ import annotations

import triton
import triton.language as tl

ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding and subtracting it rounds a float32 below 2^22 to an integer, halves to even."""
PART = tl.constexpr(2048.0)
"""2^11: what float16 leaves of a number is at most 2^-12 of it; scaled by this it is a float16 number again."""


@triton.jit
def allow_next_kernel(PDL: tl.constexpr):
    """Programmatic launch: the next kernel may start once all programs have come here."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait_for_previous_kernel(PDL: tl.constexpr):
    """Programmatic launch: what earlier kernels wrote may be read from here on, and the next kernel may start."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def divide(a, b, inverse, PLAIN: tl.constexpr):
    """a / b correctly rounded, given 1 / b correctly rounded (Markstein): the first correction makes the quotient
    faithful, the second exact, while quotient and remainder are normal numbers.

    The hardware has no division; the general routine branches for every element and was most of `prepare`.
    """
    if PLAIN:  # the interpreter, which has no fused multiply-add
        return tl.div_rn(a, b)
    else:
        quotient = a * inverse
        quotient = tl.fma(tl.fma(-quotient, b, a), inverse, quotient)
        return tl.fma(tl.fma(-quotient, b, a), inverse, quotient)


@triton.jit
def load_smoothed(x_ptr, rows, row_mask, columns, K, smooth_ptr, SMOOTH: tl.constexpr, PLAIN: tl.constexpr):
    """x / m in float32 at rows x columns, zero outside. `smooth_ptr`: m, then 1 / m."""
    inside = columns < K
    at = x_ptr + rows.to(tl.int64)[:, None] * K + columns[None, :]
    x = tl.load(at, mask=row_mask[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if SMOOTH:
        m = tl.load(smooth_ptr + columns, mask=inside, other=1.0)
        inverse = tl.load(smooth_ptr + K + columns, mask=inside, other=1.0)
        x = divide(x, tl.broadcast_to(m[None, :], x.shape), tl.broadcast_to(inverse[None, :], x.shape), PLAIN)
    return x


@triton.jit
def nan_max(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def token_scale(absmax, LARGEST: tl.constexpr):
    """absmax / LARGEST; 1 for a zero token; NaN for one that is not finite."""
    scale = tl.div_rn(absmax, tl.full(absmax.shape, LARGEST, tl.float32))
    scale = tl.where(scale > 0, scale, 1.0)
    return tl.where(absmax < float("inf"), scale, float("nan"))


@triton.jit
def power_below(x):
    """The power of two at or below each positive x, at least 2^-100."""
    bits = tl.maximum(x, 2.0**-100).to(tl.int32, bitcast=True) & 0x7F800000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def reciprocal(power):
    """1 / power, exact, for a power of two."""
    return (0x7F000000 - power.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)


@triton.jit
def hidden_scale(absmax, headroom):
    """A power of two above absmax * headroom: what a token's hidden values are stored in units of."""
    return 2.0 * power_below(tl.where(absmax < 2.0**100, absmax, 2.0**100)) * headroom


@triton.jit
def hidden_unit(absmax, scale, headroom, F: tl.constexpr, CODES: tl.constexpr):
    """What a token's hidden values are stored in units of: of an expert that reads codes, multiples of the token's
    scale."""
    if F == 0:
        return tl.full(absmax.shape, 1.0, tl.float32)
    elif CODES:
        return scale * headroom
    else:
        return hidden_scale(absmax, headroom)


@triton.jit
def quantize(x, scale, PLAIN: tl.constexpr):
    """Codes of x (M, columns) for scale (M,): rounded half to even, 0 where the scale is NaN.

    No clamp: |x| / (absmax / largest) exceeds `largest` by rounding only, far less than one half. A scale below 2^-100
    is raised by 2^100 with its token, so that its reciprocal is finite.
    """
    finite = scale == scale
    lift = tl.where(scale < 2.0**-100, 2.0**100, 1.0)
    step = tl.where(finite, scale * lift, 1.0)
    inverse = tl.div_rn(tl.full(step.shape, 1.0, tl.float32), step)
    x = tl.where(finite[:, None], x * lift[:, None], 0.0)
    steps = divide(x, tl.broadcast_to(step[:, None], x.shape), tl.broadcast_to(inverse[:, None], x.shape), PLAIN)
    return (steps + ROUNDING).to(tl.int32, bitcast=True).to(tl.int8)  # the integer is in the low bits


@triton.jit
def choose(scores, E: tl.constexpr):
    """The first smallest score of each row (M, padded E); a NaN score counts as smallest."""
    column = tl.arange(0, scores.shape[1])[None, :]
    scores = tl.where(scores != scores, float("-inf"), scores)
    scores = tl.where(column < E, scores, float("inf"))
    least = tl.min(scores, axis=1)
    return tl.min(tl.where((scores == least[:, None]) & (column < E), column, E - 1), axis=1)


@triton.jit
def router_scores(x, router_ptr, columns, Kp, EP: tl.constexpr):
    """|x| (M, columns) times router weights -> (M, EP) float32. x, below 65504, in two parts of 11 bits."""
    expert = tl.arange(0, EP)
    weight = tl.load(router_ptr + expert[None, :].to(tl.int64) * Kp + columns[:, None])
    size = tl.abs(x)
    high = size.to(tl.float16)
    low = ((size - high.to(tl.float32)) * PART).to(tl.float16)
    rest = tl.dot(low, weight, tl.zeros((x.shape[0], EP), tl.float32))
    return tl.dot(high, weight, rest * (1.0 / PART))


@triton.jit
def down_dot(x, down_ptr, rows, columns, Kp, hidden):
    """hidden + x (M, columns) float16 times rows of the down factors."""
    at = down_ptr + rows.to(tl.int64)[None, :] * Kp + columns[:, None]
    return tl.dot(x, tl.load(at), hidden)
