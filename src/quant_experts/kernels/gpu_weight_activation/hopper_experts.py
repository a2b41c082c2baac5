"""What programs of the Hopper linear do for experts before they multiply, in Gluon: project codes, or settle what
`prepare` has projected.

A launch between quantization and the product costs more than what it does: its programs hold multiprocessors on which
those of the product, equal shares of its work, then begin late, and all others wait for their shares. So the first
programs of the product do it first, and have less to multiply (`hopper_work.share`). Hidden values are needed when a
tile's other steps are done; who copies them, and who asks which factors are present, waits for a count then. Programs
are no more than multiprocessors, so all of them run.

Codes: an expert's down factors times tokens of a tile, over a run of input channels, are a piece; it passes through
the ring as other steps do. Pieces of int8 codes are added where they are, exactly, to zeros that quantization leaves;
those of fp8 codes are written. The warp group that is last with its half of a tile makes hidden values of the sums. Few
long pieces are better than many: what a program does before it multiplies costs it more than a step. Values: 16 tokens
of one factor are a piece.

fp8 codes are multiplied by factors of e4m3 too, by two for each: an int8 factor is 16 a + b with a and b from -8 to 8,
and e4m3 holds 16 a and b. So a piece has two ring steps for each block of channels.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

from quant_experts.kernels.gpu.hopper import factors_of_experts
from quant_experts.kernels.gpu.hopper_counts import count_done, wait_for
from quant_experts.kernels.gpu.hopper_work import GROUPS, barrier
from quant_experts.kernels.gpu_tokens.hopper_settle import best, in_units
from quant_experts.kernels.gpu_tokens.layout import MASK_TOKENS
from quant_experts.kernels.gpu_weight_activation.hopper_codes import FP8_STEPS

RANKS = gl.constexpr(64)
"""Rows of a projection of codes in a piece."""
BLOCK_TOKENS = gl.constexpr(MASK_TOKENS)
"""Of values, in a piece, of which each warp group takes its own: those of a mask of factors present."""
FOUR_EACH = gl.constexpr(gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0]))
"""Of tokens and ranks of values: 16 bytes of each thread."""
SLICES_AT_ONCE = gl.constexpr(10)
"""Slices of a projection of values that are asked for at once."""
DOWN_LAYOUT = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2))
"""Of RANKS rows of 128 channels."""


@gluon.jit
def fence_copies():
    """What threads wrote to memory, or have seen written, copies that they or others start may read."""
    gl.inline_asm_elementwise("fence.proxy.async.global; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def piece_of_codes(index, steps, pieces, C: gl.constexpr):
    """-> token tile, first row of the projection, first and end ring step of the index-th piece, of which a tile has
    `pieces` for each RANKS rows."""
    CHUNKS: gl.constexpr = (C.TOTAL + RANKS - 1) // RANKS
    piece, rest = index % pieces, index // pieces
    if C.FP8:
        steps *= 2
    return rest // CHUNKS, rest % CHUNKS * RANKS, piece * steps // pieces, (piece + 1) * steps // pieces


@gluon.jit
def down_slot(w_ring, slot, C: gl.constexpr):
    """RANKS rows of the projection in a slot of weights."""
    TYPE: gl.constexpr = gl.float8e4nv if C.FP8 else gl.int8
    return w_ring.index(slot)._reinterpret(TYPE, [C.BN // 2, 128], DOWN_LAYOUT).slice(0, RANKS)


@gluon.jit
def ask_for_down(down_desc, k, row, i, rings, C: gl.constexpr):
    """Copy a step's rows of the projection into the slot of ring step i, which is empty."""
    w_ring, _x_ring, ready, _empty = rings
    slot = i % C.STAGES
    mbarrier.expect(ready.index(slot), (RANKS + C.BM) * C.STEP)
    at = [k * C.TOTAL + row, 0]
    if C.FP8:
        at = [k // 2 * C.TOTAL + row, k % 2 * C.STEP]
    tma.async_copy_global_to_shared(down_desc, at, ready.index(slot), down_slot(w_ring, slot, C))


@gluon.jit
def ask_for_first_piece(down_desc, rings, steps, work, C: gl.constexpr):
    """Of the copying warp: rows of the projection of this program's first piece, as many steps as fit the ring. -> how
    many those are."""
    pieces, workers, _cost, _slices = work
    _tile, row, first, last = piece_of_codes(gl.program_id(0), steps, pieces, C)
    ahead = gl.where(gl.program_id(0) < workers, gl.minimum(C.STAGES, last - first), 0)
    for i in range(ahead):
        ask_for_down(down_desc, first + i, row, i, rings, C)
    return ahead


@gluon.jit
def copy_pieces(down_desc, x_desc, ahead, rings, steps, work, C: gl.constexpr):
    """Of the copying warp: this program's pieces of codes, of which `ask_for_first_piece` has asked for `ahead` steps.
    -> the next ring step."""
    _w_ring, x_ring, ready, empty = rings
    pieces, workers, _cost, _slices = work
    i = 0
    for index in range(gl.program_id(0), workers, gl.num_programs(0)):
        tile, row, first, last = piece_of_codes(index, steps, pieces, C)
        for k in range(first, last):
            slot = i % C.STAGES
            if i >= ahead:
                mbarrier.wait(empty.index(slot), ((i // C.STAGES) & 1) ^ 1)
                ask_for_down(down_desc, k, row, i, rings, C)
            block = k // 2 if C.FP8 else k
            at = [tile * C.BM, block * C.STEP]
            tma.async_copy_global_to_shared(x_desc, at, ready.index(slot), x_ring.index(slot))
            i += 1
    return i


@gluon.jit
def multiply_piece(acc, i, count, rings, WG: gl.constexpr, C: gl.constexpr):
    """acc + factors of `count` ring steps times half of their tokens. -> that, and the next ring step."""
    w_ring, x_ring, ready, empty = rings
    HALF: gl.constexpr = C.BM // GROUPS
    for _ in range(count):
        slot = i % C.STAGES
        mbarrier.wait(ready.index(slot), (i // C.STAGES) & 1)
        tokens = x_ring.index(slot).slice(WG * HALF, HALF).permute([1, 0])
        token = warpgroup_mma(down_slot(w_ring, slot, C), tokens, acc, is_async=True)
        acc = warpgroup_mma_wait(0, deps=[token])
        mbarrier.arrive(empty.index(slot))
        i += 1
    return acc, i


@gluon.jit
def multiply_fp8_piece(acc, i, count, rings, WG: gl.constexpr, C: gl.constexpr):
    """As `multiply_piece`; sums of FP8_STEPS steps are added up in float32."""
    LAYOUT: gl.constexpr = acc.type.layout
    for first in range(0, count, FP8_STEPS):
        some = gl.zeros(acc.shape, gl.float32, LAYOUT)
        some, i = multiply_piece(some, i, gl.minimum(FP8_STEPS, count - first), rings, WG, C)
        acc += some
    return acc, i


@gluon.jit
def project_pieces(rings, experts, sizes, work, WG: gl.constexpr, C: gl.constexpr):
    """Of a multiplying warp group: the same pieces, half of the tokens of each. -> the next ring step."""
    projected_ptr, hidden_ptr, _mask_ptr, settled_ptr, arrived_ptr, _bias_ptr, code_scale_ptr, _token_ptr = experts
    M, _N, steps, _tiles_n, _tiles_m, headroom = sizes
    pieces, workers, _cost, _slices = work
    HALF: gl.constexpr = C.BM // GROUPS
    CHUNKS: gl.constexpr = (C.TOTAL + RANKS - 1) // RANKS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 32])
    i = 0
    for index in range(gl.program_id(0), workers, gl.num_programs(0)):
        tile, row, first, last = piece_of_codes(index, steps, pieces, C)
        token = tile * C.BM + WG * HALF + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
        rank = row + gl.arange(0, RANKS, gl.SliceLayout(1, LAYOUT))
        at = projected_ptr + token.to(gl.int64)[None, :] * C.TOTAL + rank[:, None]
        there = (token < M)[None, :] & (rank < C.TOTAL)[:, None]
        if C.FP8:
            acc = gl.zeros([RANKS, HALF], gl.float32, LAYOUT)
            acc, i = multiply_fp8_piece(acc, i, last - first, rings, WG, C)
            gl.store(at + (index % pieces).to(gl.int64) * M * C.TOTAL, acc, mask=there)
        else:
            acc = gl.zeros([RANKS, HALF], gl.int32, LAYOUT)
            acc, i = multiply_piece(acc, i, last - first, rings, WG, C)
            gl.atomic_add(at, acc, mask=there, sem="relaxed")
        barrier()
        arrived = gl.atomic_add(arrived_ptr + tile * GROUPS + WG, 1, sem="acq_rel")
        if arrived == CHUNKS * pieces - 1:
            barrier()
            gl.store(arrived_ptr + tile * GROUPS + WG, 0)
            sums = (projected_ptr, pieces if C.FP8 else 1)
            settle_codes(sums, hidden_ptr, code_scale_ptr, tile * C.BM + WG * HALF, M, 1.0 / headroom, C)
            fence_copies()
            count_done(settled_ptr, 0 * tile)
    return i


@gluon.jit
def settle_codes(sums, hidden_ptr, code_scale_ptr, first, M, inverse_headroom, C: gl.constexpr):
    """Hidden values of half a tile's tokens, as `prepare.end` leaves them. sums: address and number of the slices
    (M, TOTAL) that add up to them."""
    projected_ptr, slices = sums
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    token = first + gl.arange(0, C.BM // GROUPS, gl.SliceLayout(1, WIDE))
    for start in range(0, C.TOTAL, RANKS):
        rank = start + gl.arange(0, RANKS, gl.SliceLayout(0, WIDE))
        there = (token < M)[:, None] & (rank < C.TOTAL)[None, :]
        at = token.to(gl.int64)[:, None] * C.TOTAL + rank[None, :]
        total = gl.load(projected_ptr + at, mask=there, other=0, cache_modifier=".cg")
        for i in range(1, slices):
            more = projected_ptr + (0 * first + i).to(gl.int64) * M * C.TOTAL
            total += gl.load(more + at, mask=there, other=0, cache_modifier=".cg")
        scale = gl.load(code_scale_ptr + rank, mask=rank < C.TOTAL, other=0.0)
        hidden = total.to(gl.float32) * inverse_headroom * scale[None, :]
        gl.store(hidden_ptr + at, hidden.to(gl.float16), mask=there)


@gluon.jit
def settle_pieces(experts, sizes, work, WG: gl.constexpr, C: gl.constexpr):
    """Of a multiplying warp group: this program's pieces of values, which are settled."""
    projected_ptr, hidden_ptr, mask_ptr, settled_ptr, _arrived_ptr, router_bias_ptr, code_scale_ptr, token_ptr = experts
    M, _N, _steps, _tiles_n, _tiles_m, headroom = sizes
    _pieces, _workers, _cost, slices = work
    for piece in range(GROUPS * gl.program_id(0) + WG, pieces_of_values(M, C), GROUPS * gl.num_programs(0)):
        block, factor = piece // C.FACTORS, piece % C.FACTORS
        first = block * BLOCK_TOKENS
        token = first + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(1, FOUR_EACH))
        rank = gl.arange(0, C.RANK, gl.SliceLayout(0, FOUR_EACH))[None, :]
        total = added_slices(projected_ptr + factor * C.RANK, first, M, slices, C.RANK, C.TOTAL, FOUR_EACH)
        hidden = in_units(total, token, rank, M, code_scale_ptr, token_ptr, 1.0 / headroom, False)
        uses = token < M
        if C.EXPERTS > 0:
            SHARED: gl.constexpr = C.FACTORS - C.EXPERTS
            CHOICE: gl.constexpr = gl.BlockedLayout([1, C.PADDED_EXPERTS // 4], [8, 4], [4, 1], [1, 0])
            expert = choose(projected_ptr + C.FACTORS * C.RANK, router_bias_ptr, first, M, slices, CHOICE, C)
            used = first + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(1, CHOICE)) < M
            if factor == 0:
                gl.store(mask_ptr + block, factors_of_experts(expert, used, SHARED))
            uses = uses & ((factor < SHARED) | (gl.convert_layout(expert, token.type.layout) == factor - SHARED))
        hidden = gl.where(uses[:, None], hidden, 0.0).to(gl.float16)
        at = hidden_ptr + token.to(gl.int64)[:, None] * (C.FACTORS * C.RANK) + factor * C.RANK + rank
        gl.store(at, hidden, mask=(token < M)[:, None])
        fence_copies()
        count_done(settled_ptr, 0 * piece)


@gluon.jit
def choose(scores_ptr, bias_ptr, first, M, slices, LAYOUT: gl.constexpr, C: gl.constexpr):
    """As `hopper_settle.choose`, of a block of tokens, with all parts of the router's weights in one load."""
    EP: gl.constexpr = C.PADDED_EXPERTS
    WIDE: gl.constexpr = gl.BlockedLayout([1, 4], [32 // EP, EP], [4, 1], [1, 0])
    parts = added_slices(scores_ptr, first, M, slices, 4 * EP, C.TOTAL, WIDE)
    scores = gl.convert_layout(gl.sum(parts.reshape([BLOCK_TOKENS, 4, EP]), axis=1), LAYOUT)
    return best(scores, gl.arange(0, EP, gl.SliceLayout(0, LAYOUT))[None, :], bias_ptr, C.EXPERTS)


@gluon.jit
def added_slices(
    sums_ptr, first, M, slices, COLUMNS: gl.constexpr, TOTAL: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """(BLOCK_TOKENS, COLUMNS) of sums (slices, M, TOTAL) of a block of tokens, added up in order, SLICES_AT_ONCE asked
    for at once: more code would come from memory, and take longer than the sums."""
    token = first + gl.arange(0, BLOCK_TOKENS, gl.SliceLayout(1, LAYOUT))[:, None]
    at = sums_ptr + token.to(gl.int64) * TOTAL + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]
    stride = (0 * first + M).to(gl.int64) * TOTAL
    total = gl.zeros([BLOCK_TOKENS, COLUMNS], sums_ptr.dtype.element_ty, LAYOUT)
    for start in range(0, slices, SLICES_AT_ONCE):
        for i in gl.static_range(SLICES_AT_ONCE):
            there = (token < M) & (start + i < slices)
            total += gl.load(at, mask=there, other=0, cache_modifier=".cg")
            at += stride
    return total


@gluon.jit
def pieces_of_values(M, C: gl.constexpr):
    """Of all tokens and factors."""
    return gl.cdiv(M, BLOCK_TOKENS) * C.FACTORS


@gluon.jit
def wait_until_settled(settled_ptr, M, C: gl.constexpr):
    """Until hidden values of all tokens are there, for copies as well, and masks of factors present."""
    if C.PROJECTS:
        wait_for(settled_ptr, GROUPS * gl.cdiv(M, C.BM))
    else:
        wait_for(settled_ptr, pieces_of_values(M, C))
    fence_copies()
