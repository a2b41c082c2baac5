"""Assembly of the GPU kernels. Codes to operands, four bytes at a time, where the compiler takes plain forms apart byte
by byte, shared by plain Triton and Gluon; and rotations in registers."""

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
TINY_CODES = tl.constexpr(
    """{
            .reg .b32 upper;
            and.b32 $0, $4, 0x000F000F; and.b32 $1, $4, 0x00F000F0;
            shr.u32 upper, $4, 8;
            and.b32 $2, upper, 0x000F000F; and.b32 $3, upper, 0x00F000F0;
            }"""
)
"""The same words -> each code in the mantissa of a subnormal float16: 2^-24 times the first and the third, 2^-20 times
the others."""


def _codes_of_3_bits(exponent: int) -> str:
    """$0 to $7 from words $8 of the low two bits of eight codes, and $9, whose low halves hold the third bits."""
    lines = [".reg .b32 low, third;"]
    for i in range(8):
        lines += [f"shr.u32 low, $8, {2 * i};", f"lop3.b32 ${i}, low, 0x00030003, {exponent:#x}, 0xEA;"]
        lines += [f"shl.b32 third, $9, {2 - i};" if i < 2 else f"shr.u32 third, $9, {i - 2};"]
        lines += [f"lop3.b32 ${i}, third, 0x00040004, ${i}, 0xEA;"]
    return "{" + " ".join(lines) + "}"


FLOAT16_CODES_OF_3_BITS, TINY_CODES_OF_3_BITS = (tl.constexpr(_codes_of_3_bits(bits)) for bits in (0x64006400, 0))
"""Eight codes of 3 bits, plus 1024 in float16, and in 2^-24."""

SLOPES = tl.constexpr(
    """{
            .reg .b32 scale, zero, constant;
            prmt.b32 scale, $3, $3, 0x1010; prmt.b32 zero, $3, $3, 0x3232;
            mov.b32 constant, 0xE400E400; add.rn.f16x2 zero, zero, constant;
            mov.b32 constant, 0x98009800; mul.rn.f16x2 zero, zero, constant;
            mul.rn.f16x2 $2, zero, scale;
            mov.b32 constant, 0x78007800; mul.rn.f16x2 $0, scale, constant;
            mov.b32 constant, 0x68006800; mul.rn.f16x2 $1, scale, constant;
            }"""
)
"""A scale and 1024 plus a zero, float16 in the halves of $3 -> 2^15 scale, 2^11 scale, -2^-9 scale zero, each twice."""


def _hadamard(block: int) -> str:
    """$0-$7 from $8-$15: sums of a thread's own eight numbers first, then with threads at a distance of 1, 2, 4..."""
    lines = [".reg .f32 a<8>, b<8>, sign;", ".reg .b32 upper;", *(f"mov.f32 a{i}, ${8 + i};" for i in range(8))]
    old, new = "a", "b"
    for bit in (1, 2, 4):
        for i in range(8):
            what = "sub" if i & bit else "add"
            lines.append(f"{what}.f32 {new}{i}, {old}{i ^ bit}, {old}{i};")
        old, new = new, old
    for bit in range((block // 8).bit_length() - 1):
        # sign = -1 in the upper thread of a pair, else 1
        lines += ["mov.u32 upper, %laneid;", f"and.b32 upper, upper, {1 << bit};", f"shl.b32 upper, upper, {31 - bit};"]
        lines += ["or.b32 upper, upper, 0x3f800000;", "mov.b32 sign, upper;"]
        lines += [f"shfl.sync.bfly.b32 {new}{i}, {old}{i}, {1 << bit}, 31, -1;" for i in range(8)]
        lines += [f"fma.rn.f32 {new}{i}, {old}{i}, sign, {new}{i};" for i in range(8)]
        old, new = new, old
    return "{" + " ".join([*lines, *(f"mov.f32 ${i}, {old}{i};" for i in range(8))]) + "}"


HADAMARD_16, HADAMARD_32, HADAMARD_64, HADAMARD_128 = (tl.constexpr(_hadamard(block)) for block in (16, 32, 64, 128))
"""Eight consecutive numbers of each thread -> those of the Hadamard transform, without its factor block^-0.5, of each
block of consecutive numbers of consecutive threads. float32 sums, each rounded once."""
EIGHT = tl.constexpr(",".join(["=f"] * 8 + ["f"] * 8))
"""Their operands."""
