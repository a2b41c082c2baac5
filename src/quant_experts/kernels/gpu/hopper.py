"""Pieces of Gluon kernels for Hopper GPUs: programmatic launches, and products of what lies in registers as loaded.

A product of matrix units takes two words of four bytes of a row from each of four threads. Which channels those are is
free, as long as weights and tokens agree; so each thread loads 16 consecutive bytes of a row, and its words are
channels of two successive products.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

RUN = gl.constexpr(32)
"""Expert ranks that a warp multiplies at a time."""


@gluon.jit
def across(size: gl.constexpr, axis: gl.constexpr, LAYOUT: gl.constexpr):
    """0, 1, ... along one of three axes, the others 1."""
    if axis == 0:
        i = gl.arange(0, size, gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
        i = gl.expand_dims(gl.expand_dims(i, 1), 2)
    elif axis == 1:
        i = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
        i = gl.expand_dims(gl.expand_dims(i, 0), 2)
    else:
        i = gl.arange(0, size, gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
        i = gl.expand_dims(gl.expand_dims(i, 0), 1)
    return i


@gluon.jit
def words(loaded, WORD: gl.constexpr):
    """(ways, rows, four threads x four words x WORD) -> the same values in the order in which products take them."""
    SHAPE: gl.constexpr = loaded.shape
    split = loaded.reshape([SHAPE[0], SHAPE[1], 4, 4, WORD])
    return split.permute([0, 1, 3, 2, 4]).reshape([SHAPE[0], SHAPE[1], SHAPE[2]])


@gluon.jit
def multiply(weights, tokens, acc, WORD: gl.constexpr):
    """acc (ways, rows, tokens) + weights (ways, rows, channels) times tokens (ways, tokens, channels), each as loaded;
    no value moves between threads. WORD: values in four bytes."""
    LEFT: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, WORD)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, acc.type.layout, WORD)
    left = gl.convert_layout(words(weights, WORD), LEFT, assert_trivial=True)
    right = gl.convert_layout(words(tokens, WORD).permute([0, 2, 1]), RIGHT, assert_trivial=True)
    return mma_v2(left, right, acc)


@gluon.jit
def factor_of(slot, present, F: gl.constexpr, USED: gl.constexpr):
    """The slot-th of the factors whose bits are set in `present`, USED at most, or F if there are fewer."""
    factor = slot * 0 + F
    for i in gl.static_range(USED):
        lowest = present & -present
        place = (lowest.to(gl.float32).to(gl.int32, bitcast=True) >> 23) - 127  # of a power of two, or below zero
        factor = gl.where((slot == i) & (lowest != 0), place, factor)
        present ^= lowest
    return factor


@gluon.jit
def factors_of_experts(expert, used, SHARED: gl.constexpr):
    """Bits of the factors that some tokens use: SHARED of them, 0 or 1, come first and serve all."""
    return gl.reduce_or(gl.where(used, 1 << (expert + SHARED), 0), axis=0) | SHARED


@gluon.jit
def factors_of_tile(mask_ptr, tile, M, TOKENS: gl.constexpr):
    """Bits of the factors that serve a tile of tokens; masks are kept for blocks of 16 tokens."""
    mask = 0
    for i in gl.static_range(TOKENS // 16):
        block = tile * (TOKENS // 16) + i
        mask |= gl.load(mask_ptr + block, mask=block * 16 < M, other=0, cache_modifier=".cg")
    return mask


@gluon.jit
def wait_for_previous_kernel():
    """Programmatic launch: what earlier kernels wrote may be read from here on."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def allow_next_kernel():
    """Programmatic launch: the next kernel may start its own prologue."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
