"""Pieces of the persistent Hopper kernels: rings, and how tiles and their steps are shared out."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

GROUPS = gl.constexpr(2)
"""Warp groups that multiply, each with half of a tile's rows."""
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
"""Of a warp group's threads, by its name in Triton 3.7 or in 3.6."""


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Of the slots of a ring: that one is full, which the copying warp says, and that it is empty again, which both
    multiplying groups do."""
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    return ready, empty


@gluon.jit
def tile_place(tile, tiles_n, tiles_m, GROUP_M: gl.constexpr):
    """Tile number -> (row tile of the weight, token tile); tokens run fastest inside bands of GROUP_M token tiles."""
    band = tile // (GROUP_M * tiles_n)
    first = band * GROUP_M
    width = gl.minimum(tiles_m - first, GROUP_M)
    inner = tile - first * tiles_n
    return inner // width, first + inner % width


@gluon.jit
def first_step(program, per, all_steps, workers, cost):
    """Of the shared steps: `per` for each program, less what experts cost the first `workers`."""
    return gl.minimum(program * per - gl.minimum(program, workers) * gl.minimum(cost, per), all_steps)


@gluon.jit
def holder(step, per, workers, cost):
    """The program that holds a shared step."""
    working = per - gl.minimum(cost, per)
    beyond = step - workers * working
    return gl.where(beyond < 0, step // gl.maximum(working, 1), workers + beyond // per)


@gluon.jit
def share(steps, tiles, workers, cost, SHARES: gl.constexpr):
    """(first shared step, last, number of segments in the shared tiles, first and number of whole tiles of this
    program, which are as many apart as there are programs, steps of a program).

    Tiles of all complete waves but one are whole; the rest are cut into equal shares, of which what the first `workers`
    programs do for experts is a part: `cost` steps each. Without SHARES tiles that are fewer than programs are whole,
    and the last programs have one each.
    """
    programs = gl.num_programs(0)
    program = gl.program_id(0)
    even = (tiles % programs == 0) & (workers == 0)
    whole = gl.where(even, tiles, gl.maximum(tiles // programs - 1, 0) * programs)
    ahead = 0 * programs
    if not SHARES:
        ahead = gl.maximum(programs - tiles, 0)  # programs without a tile
        whole = gl.where(ahead > 0, tiles, whole)
    cut = tiles - whole
    per = gl.cdiv(cut * steps + workers * cost, programs)
    start = first_step(program, per, cut * steps, workers, cost)
    end = first_step(program + 1, per, cut * steps, workers, cost)
    segments = gl.where(end > start, gl.cdiv(end, steps) - start // steps, 0)
    place = program - ahead
    count = gl.where(place < 0, 0, gl.cdiv(whole - place, programs))
    return start, end, segments, cut + place, count, per


@gluon.jit
def segment(index, steps, start, end, segments, first_whole):
    """The index-th piece of this program's work -> (tile, first step, end step)."""
    shared_tile = start // steps + index
    first = gl.maximum(start - shared_tile * steps, 0)
    last = gl.minimum(end - shared_tile * steps, steps)
    is_cut = index < segments
    tile = gl.where(is_cut, shared_tile, first_whole + (index - segments) * gl.num_programs(0))
    return tile, gl.where(is_cut, first, 0), gl.where(is_cut, last, steps)
