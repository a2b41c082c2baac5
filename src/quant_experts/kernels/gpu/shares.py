"""Products whose input channels are cut over programs where their tiles are few.

Each share writes its float32 sums, and the last one to finish adds them in order: results do not depend on timing.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_shares(total, sums_ptr, done_ptr, share, SHARES, SPLIT: tl.constexpr):
    """-> (the sum of all shares of a tile, True) in the last program to come here; others get (something, False).

    sums_ptr, done_ptr: the tile's part of the workspace, and its counter, which is zero before and after. Of small
    tiles several shares are read at a time: one by one each would wait for the memory. Without SPLIT there is one.
    """
    if SPLIT:
        SIZE: tl.constexpr = total.shape[0] * total.shape[1]
        BATCH: tl.constexpr = max(1, min(8, 4096 // SIZE))
        place = tl.arange(0, total.shape[0])[:, None] * total.shape[1] + tl.arange(0, total.shape[1])[None, :]
        at = sums_ptr + place
        tl.store(at + share * SIZE, total)
        tl.debug_barrier()
        last = tl.atomic_add(done_ptr, 1, sem="acq_rel") == SHARES - 1
        if last:
            tl.debug_barrier()
            tl.store(done_ptr, 0)
            total = tl.zeros_like(total)
            for start in range(0, SHARES, BATCH):
                for i in tl.static_range(BATCH):
                    there = (start + i < SHARES) & (place >= 0)
                    total += tl.load(at + (start + i) * SIZE, mask=there, other=0.0, cache_modifier=".cg")
        return total, last
    else:
        return total, True


@triton.jit
def share_of(steps, share, SHARES):
    """-> first and end of the steps of a share, which has some: a loop that may be empty keeps the assembler from
    letting matrix products run on from one step to the next."""
    per = tl.cdiv(steps, SHARES)
    first = share * per
    last = tl.minimum(first + per, steps)
    tl.assume(first < last)
    return first, last
