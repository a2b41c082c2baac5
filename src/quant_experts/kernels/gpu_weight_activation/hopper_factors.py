"""What the Hopper linear adds to a tile for experts, in Gluon: which factors serve its tokens, and up factors times
hidden values, which pass through the ring as further steps of 32 ranks.

Hidden values may come later than codes. Then who copies them waits for them, and who multiplies for which factors are
present, once.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from quant_experts.kernels.gpu.hopper import factors_of_tile, wait_for_previous_kernel
from quant_experts.kernels.gpu_weight_activation.hopper_experts import wait_until_settled

LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2))
"""Of CHUNK ranks of rows of a tile, or of its tokens."""


@gluon.jit
def factors_present(mask_ptr, token_tile, M, C: gl.constexpr):
    """Bit j is set where factor j serves a token of the tile."""
    mask = 0
    if (C.PROJECTS or C.SETTLES) and C.EXPERTS == 0:
        mask += (1 << C.FACTORS) - 1
    elif C.FACTORS > 0:
        mask = factors_of_tile(mask_ptr, token_tile, M, C.BM)
    return mask


@gluon.jit
def early_factors(mask_ptr, token_tile, waited, M, WAITS: gl.constexpr, C: gl.constexpr):
    """`factors_present`, asked for before a tile's steps because they are needed after the last, unless hidden values
    are still to be waited for."""
    present = 0
    if not WAITS or waited != 0:
        present = factors_present(mask_ptr, token_tile, M, C)
    return present


@gluon.jit
def late_factors(present, waited, first, mask_ptr, settled_ptr, token_tile, M, WAITS: gl.constexpr, C: gl.constexpr):
    """Of a tile whose steps from `first` on are done: where hidden values come later, wait for them once. Those of
    another launch after the first piece of work, needed or not: what follows also writes to workspaces that an earlier
    kernel may have used, and the factors present of further tiles are asked for early. Those of this one not before
    they are needed. -> factors present, and whether that was waited for."""
    if C.LATER:
        if waited == 0:
            wait_for_previous_kernel()
            present = factors_present(mask_ptr, token_tile, M, C)
            waited += 1
    elif WAITS:
        if first + waited == 0:
            wait_until_settled(settled_ptr, M, C)
            present = factors_present(mask_ptr, token_tile, M, C)
            waited += 1
    return present, waited


@gluon.jit
def copy_factors(up_desc, hidden_desc, i, present, row_tile, token_tile, N, rings, C: gl.constexpr):
    """Of the copying warp: factors of a tile that are present, from ring step i on. -> the next one."""
    w_ring, x_ring, ready, empty = rings
    for j in range(C.FACTORS):
        if (present >> j) & 1 != 0:
            for c in gl.static_range(C.RANK // C.CHUNK):
                slot = i % C.STAGES
                mbarrier.wait(empty.index(slot), ((i // C.STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(slot), (C.BN + C.BM) * 64)
                up = w_ring.index(slot)._reinterpret(gl.float16, [C.BN, C.CHUNK], LAYOUT)
                at = [j * N + row_tile * C.BN, c * C.CHUNK]
                tma.async_copy_global_to_shared(up_desc, at, ready.index(slot), up)
                hidden = x_ring.index(slot)._reinterpret(gl.float16, [C.BM, C.CHUNK], LAYOUT)
                at = [token_tile * C.BM, j * C.RANK + c * C.CHUNK]
                tma.async_copy_global_to_shared(hidden_desc, at, ready.index(slot), hidden)
                i += 1
    return i


@gluon.jit
def add_factors(y, i, present, w_ring, x_ring, ready, empty, WG: gl.constexpr, C: gl.constexpr):
    """y + up factors of the experts present times hidden, float16 products, float32 sums. Two ring steps at a time."""
    CHUNKS: gl.constexpr = C.RANK // C.CHUNK
    y = gl.convert_layout(y, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BM, 16]))  # moves nothing
    count = 0
    for j in gl.static_range(C.FACTORS):
        count += ((present >> j) & 1) * CHUNKS
    for _ in range(count // 2):
        token = multiply_factor(y, i, w_ring, x_ring, ready, WG, C)
        token = multiply_factor(token, i + 1, w_ring, x_ring, ready, WG, C)
        y = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(i % C.STAGES))
        mbarrier.arrive(empty.index((i + 1) % C.STAGES))
        i += 2
    if count % 2 != 0:
        token = multiply_factor(y, i, w_ring, x_ring, ready, WG, C)
        y = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(i % C.STAGES))
        i += 1
    return y, i


@gluon.jit
def multiply_factor(y, i, w_ring, x_ring, ready, WG: gl.constexpr, C: gl.constexpr):
    """Start y + the factors of ring step i times their hidden values."""
    ROWS: gl.constexpr = C.BN // 2
    slot = i % C.STAGES
    mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
    up = w_ring.index(slot)._reinterpret(gl.float16, [C.BN, C.CHUNK], LAYOUT).slice(WG * ROWS, ROWS)
    hidden = x_ring.index(slot)._reinterpret(gl.float16, [C.BM, C.CHUNK], LAYOUT)
    return warpgroup_mma(up, hidden.permute([1, 0]), y, is_async=True)
