"""Assembly that plain Triton and Gluon kernels share: codes to operands, four bytes at a time, where the compiler takes
plain forms apart byte by byte."""

from __future__ import annotations

import triton.language as tl

INT8_CODES = tl.constexpr("shl.b32 $0, $2, 4; and.b32 $0, $0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0;")
"""Bytes $2 of two codes -> $0, $1: 16 times the low and 16 times the high codes, as int8."""

FP8_CODES = tl.constexpr(
    """{
            .reg .b32 code, odd;
            and.b32 code, $2, 0x0F0F0F0F; and.b32 odd, $2, 0x01010101; mad.lo.u32 $0, odd, 0x81, code;
            shr.u32 odd, $2, 4; and.b32 code, odd, 0x0F0F0F0F; and.b32 odd, odd, 0x01010101;
            mad.lo.u32 $1, odd, 0x81, code;
            }"""
)
"""Bytes $2 of two zigzag codes u -> $0, $1: codes / 2^8 as e4m3. Its bits are linear up to 16 / 2^9: u = 2 c is itself
the number c / 2^8, and an odd u = -2 c - 1 lacks one and the sign."""

FLOAT16_CODES = tl.constexpr(
    """
            lop3.b32 $0, $4, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 4;
            lop3.b32 $1, $3, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 8;
            lop3.b32 $2, $3, 0x000F000F, 0x64006400, 0xEA;
            shr.u32 $3, $4, 12;
            lop3.b32 $3, $3, 0x000F000F, 0x64006400, 0xEA;
            """
)
"""16-bit words $4 of four codes -> $0 to $3: each code plus 1024 in float16, its bits under the exponent of 1024."""
