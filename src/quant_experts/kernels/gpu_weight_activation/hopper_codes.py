"""Codes of weights as operands, for Hopper GPUs, in Gluon."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.assembly import FP8_CODES, INT8_CODES

FP8_STEPS = gl.constexpr(16)
"""Ring steps, of 128 channels each, whose fp8 products are added up in the matrix units; tiles of 256 rows leave them
more."""


@gluon.jit
def unpack_int8(packed):
    """Bytes of two codes -> (16 * low code, 16 * high code) as int8: the factor 16 goes into the scale."""
    return gl.inline_asm_elementwise(
        INT8_CODES,
        "=r,=r,r",
        [packed],
        dtype=(gl.int8, gl.int8),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def unpack_fp8(packed):
    """Bytes of two zigzag codes -> (low code, high code) / 2^8 as e4m3: the factor 2^8 goes into the scale."""
    return gl.inline_asm_elementwise(
        FP8_CODES,
        "=&r,=r,r",
        [packed],
        dtype=(gl.float8e4nv, gl.float8e4nv),
        is_pure=True,
        pack=4,
    )
