"""fp8 e4m3fn as its definition says it (OCP 8-bit floating point, 2023), one number at a time."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction

LARGEST = 448


def value(byte: int) -> Fraction:
    """The number of a byte 0 to 126: 4 bits of exponent with bias 7, then 3 of mantissa; exponent 0 is subnormal, and
    127, all bits set, would be NaN."""
    exponent, mantissa = divmod(byte, 8)
    if exponent == 0:
        return Fraction(mantissa, 8) * Fraction(2) ** -6
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


POSITIVE = [value(byte) for byte in range(127)]


def nearest(number: float) -> float:
    """The nearest e4m3 number, on a tie the one of even mantissa; at most 448."""
    magnitude = Fraction(abs(number))
    above = bisect_left(POSITIVE, magnitude)
    if above == len(POSITIVE):
        return float(LARGEST if number > 0 else -LARGEST)
    below = max(above - 1, 0)
    up, down = POSITIVE[above] - magnitude, magnitude - POSITIVE[below]
    byte = above if up < down or (up == down and above % 2 == 0) else below
    return float(POSITIVE[byte] if number >= 0 else -POSITIVE[byte])
