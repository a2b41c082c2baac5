"""Weights of 3 and 4 bits from the words of `gpu_weight_only.layout` to float16, in registers."""

from __future__ import annotations

import triton
import triton.language as tl

from quant_experts.kernels.gpu.assembly import FLOAT16_CODES, FLOAT16_CODES_OF_3_BITS


@triton.jit
def code4(words, PLACE: tl.constexpr):
    """The PLACE-th code of each word plus 1024, in float16."""
    return (1024 + ((words >> 4 * PLACE) & 15)).to(tl.float16)


@triton.jit
def code3(words, high, PLACE: tl.constexpr):
    """As `code4`, from two low bits in `words` and one in `high`."""
    return (1024 + ((words >> 2 * PLACE) & 3) + ((high >> PLACE) & 1) * 4).to(tl.float16)


@triton.jit
def unpack4(words, ASSEMBLY: tl.constexpr):
    """words (BN, 32) int16 of four codes -> each code plus 1024 in float16: its bits under the exponent of 1024.

    Assembly takes two channels at a time: the compiler takes the plain form one by one.
    """
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            FLOAT16_CODES,
            "=&r,=&r,=&r,=&r,r",
            [words],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return code4(words, 0), code4(words, 1), code4(words, 2), code4(words, 3)


@triton.jit
def unpack3(words, high, ASSEMBLY: tl.constexpr):
    """words (BN, 32) int16: the low two bits of eight codes; high: their third bits -> as `unpack4`, eight."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            FLOAT16_CODES_OF_3_BITS,
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
            [words, high],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        return (
            code3(words, high, 0), code3(words, high, 1), code3(words, high, 2), code3(words, high, 3),
            code3(words, high, 4), code3(words, high, 5), code3(words, high, 6), code3(words, high, 7),
        )  # fmt: skip


@triton.jit
def in_order(words, high, BITS: tl.constexpr, ASSEMBLY: tl.constexpr):
    """-> (BN, step) float16: each code plus 1024, in the order of the input channels. No thread gives any away: the 32
    words that a row's threads share are spread like 32 channels of a matrix product."""
    if BITS == 4:
        a, b, c, d = unpack4(words, ASSEMBLY)
        codes = tl.permute(tl.join(tl.join(a, b), tl.join(c, d)), (0, 3, 2, 1))
        return tl.reshape(codes, (words.shape[0], 128))
    else:
        a, b, c, d, e, f, g, h = unpack3(words, high, ASSEMBLY)
        codes = tl.join(tl.join(tl.join(a, b), tl.join(c, d)), tl.join(tl.join(e, f), tl.join(g, h)))
        return tl.reshape(tl.permute(codes, (0, 4, 3, 2, 1)), (words.shape[0], 256))


@triton.jit
def spread(numbers, WIDTH: tl.constexpr):
    """(BN, G) -> (BN, WIDTH): each for its share of the columns."""
    BN: tl.constexpr = numbers.shape[0]
    G: tl.constexpr = numbers.shape[1]
    if G == 1:
        return tl.broadcast_to(numbers, (BN, WIDTH))
    else:
        return tl.reshape(tl.broadcast_to(numbers[:, :, None], (BN, G, WIDTH // G)), (BN, WIDTH))


@triton.jit
def scale_and_offset(pairs):
    """int32 -> the two float16 numbers in it."""
    scale = (pairs & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    return scale, (pairs >> 16).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def dequantize(codes, pairs, ASSEMBLY: tl.constexpr):
    """(code - offset) * scale in float16: codes (BN, step), each plus 1024; pairs (BN, G) int32, scale and offset.

    The difference is exact: the offset is 1024 + zero.
    """
    STEP: tl.constexpr = codes.shape[1]
    if ASSEMBLY:
        scale = (pairs & 0xFFFF) | (pairs << 16)
        offset = ((pairs >> 16) & 0xFFFF) | (pairs & -65536)
        return tl.inline_asm_elementwise(
            "sub.f16x2 $0, $1, $4; mul.f16x2 $0, $0, $2; // $3 $5",
            "=&r,r,r,r,r,r",
            [codes, spread(scale, STEP), spread(offset, STEP)],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    else:
        scale, offset = scale_and_offset(pairs)
        return (codes - spread(offset, STEP)) * spread(scale, STEP)
