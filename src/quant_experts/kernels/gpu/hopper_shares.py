"""Shares of a tile of the Hopper linear, in Gluon: their holders write them, the tile's owner adds them up.

What is shared costs a chain of steps that each wait for memory: a share is written, all can read it, the owner is told,
the owner reads. So sums are written as threads hold them, 16 bytes of each thread one after another, and the owner asks
for as many shares at once as its registers hold. Rejected: a warp of its own that tells the owner, so that those that
multiply need not wait until all can read (EXPERIMENTS.md).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper import across
from quant_experts.kernels.gpu.hopper_counts import count_done, wait_for
from quant_experts.kernels.gpu.hopper_work import GROUPS

MOST_AT_ONCE, HELD = gl.constexpr(4), gl.constexpr(128)
"""Shares of a tile, at most, that a warp group asks for at once, and numbers of them that each of its threads holds."""
THREADS, EACH = gl.constexpr(128), gl.constexpr(4)
"""Of a warp group, and numbers in the 16 bytes that each of them writes at a time."""


@gluon.jit
def hand_over(acc, owner, sums_ptr, count_ptr, WG: gl.constexpr):
    """Write this program's share of a tile, of which it has one at most, and tell the owner. acc: the sums (rows,
    tokens) of warp group WG, one of GROUPS; counts are int64, one for each program and warp group."""
    written = as_written(acc)
    gl.store(sums_ptr + workspace(gl.program_id(0), written, WG), written)
    no_word = 0 * owner
    count_done(count_ptr + owner * GROUPS + WG, no_word)


@gluon.jit
def collect(acc, shares, sums_ptr, count_ptr, WG: gl.constexpr):
    """acc and a tile's other shares, which the programs after this one hold, added in their order. The count that tells
    of them is zero again."""
    owner = gl.program_id(0)
    wait_for(count_ptr + owner * GROUPS + WG, shares)
    written = as_written(acc)
    LAYOUT: gl.constexpr = written.type.layout
    PARTS: gl.constexpr = written.shape[0]
    AT_ONCE: gl.constexpr = max(1, min(MOST_AT_ONCE, HELD // (PARTS * EACH)))
    at = sums_ptr + workspace(owner, written, WG)
    most = shares + 0 * across(PARTS, 0, LAYOUT)  # the same for all numbers, in the shape of a mask
    for other in range(1, shares + 1, AT_ONCE):
        found = ()
        for i in gl.static_range(AT_ONCE):
            there = other + i <= most
            share_at = at + (other + i) * (GROUPS * PARTS * THREADS * EACH)
            found = found + (gl.load(share_at, mask=there, other=0, cache_modifier=".cg"),)
        for i in gl.static_range(AT_ONCE):
            written += found[i]
    gl.store(count_ptr + owner * GROUPS + WG, 0)
    return as_multiplied(written, acc)


@gluon.jit
def keep(acc, part, sums_ptr, WG: gl.constexpr):
    """Write the sums of the first part of a tile's channels, or add those of a further one to them in memory, which
    nobody waits for. Each program has a place for that, behind the places of all programs' shares."""
    written = as_written(acc)
    at = sums_ptr + workspace(gl.num_programs(0) + gl.program_id(0), written, WG)
    if part == 0:
        gl.store(at, written)
    else:
        gl.atomic_add(at, written, sem="relaxed")


@gluon.jit
def with_kept(acc, sums_ptr, WG: gl.constexpr):
    """acc and what was kept before, which each thread wrote itself."""
    written = as_written(acc)
    at = sums_ptr + workspace(gl.num_programs(0) + gl.program_id(0), written, WG)
    return as_multiplied(written + gl.load(at, cache_modifier=".cg"), acc)


@gluon.jit
def as_written(acc):
    """Sums (rows, tokens) of a warp group -> (parts, THREADS, EACH), of each part what threads hold; nothing moves."""
    ROWS: gl.constexpr = acc.shape[0]
    TOKENS: gl.constexpr = acc.shape[1]
    apart = acc.reshape([ROWS // 64, 4, 2, 8, TOKENS // 8, 4, 2])
    return apart.permute([0, 4, 1, 3, 5, 2, 6]).reshape([ROWS * TOKENS // (THREADS * EACH), THREADS, EACH])


@gluon.jit
def as_multiplied(written, like):
    """The reverse, in the layout of `like`."""
    ROWS: gl.constexpr = like.shape[0]
    TOKENS: gl.constexpr = like.shape[1]
    apart = written.reshape([ROWS // 64, TOKENS // 8, 4, 8, 4, 2, 2])
    acc = apart.permute([0, 2, 5, 3, 1, 4, 6]).reshape([ROWS, TOKENS])
    return gl.convert_layout(acc, like.type.layout, assert_trivial=True)


@gluon.jit
def workspace(program, written, WG: gl.constexpr):
    """Offsets of a warp group's part of a program's share."""
    LAYOUT: gl.constexpr = written.type.layout
    PARTS: gl.constexpr = written.shape[0]
    part = (program * GROUPS + WG) * PARTS + across(PARTS, 0, LAYOUT)
    return (part * THREADS + across(THREADS, 1, LAYOUT)) * EACH + across(EACH, 2, LAYOUT)
