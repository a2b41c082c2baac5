"""Launches of `hopper_linear`: tile sizes by shape, and tensor descriptors for the bulk copy engine."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper_tiles import Tile, TileTimes
from quant_experts.kernels.gpu.hopper_work import GROUPS
from quant_experts.kernels.gpu.launch import LARGEST_TILE, TOKEN_COUNTS, Boxes, options, programs, ptr, start, zeros
from quant_experts.kernels.gpu_tokens.layout import BLOCK, MASK_TOKENS, Kind, Tokens, padded_experts
from quant_experts.kernels.gpu_weight_activation.hopper_experts import BLOCK_TOKENS, RANKS
from quant_experts.kernels.gpu_weight_activation.hopper_linear import Config, kernel
from quant_experts.kernels.gpu_weight_activation.layout import LinearLayout

LAYOUTS = {
    (width, size): gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * size, rank=2)
    for width in (64, 128)
    for size in (1, 2)
}
"""Of rows of so many bytes, of elements of so many."""


FP8_CHANNELS = 10240
"""Input channels, at most, whose fp8 products the matrix units add up in tiles of 256 rows. A second set of sums would
not fit registers, so those of longer inputs are added up in memory, which costs the more the more often it is done."""
TIMES = TileTimes(
    steps={(256, 128): 0.69, (256, 64): 0.46, (128, 128): 0.35, (128, 64): 0.25, (128, 32): 0.23},
    finishing=1.4, longer=1.11, sharing=3.2, adding=0.52, last=1.9, last_adding=1.6,
)  # fmt: skip
"""Of tiles for more than 16 tokens."""
LEAST_STEP_MICROSECONDS = 0.2
"""Of a step of fewer tokens."""


LEAST_WORKERS, LEAST_STEPS, MOST_STEPS = 4, 4, 40
"""Programs that project codes, at least, and blocks of channels of a piece, at least and at most, unless one is against
another. Few long pieces cost less, but the product's end waits for them."""
PIECE_MICROSECONDS, PIECE_STEP_MICROSECONDS, SETTLING_MICROSECONDS = 4.0, 0.2, 5.0
"""What experts cost the programs that do something for them first: to project a piece, and each of its ring steps, or
to settle values."""
SHORT_MICROSECONDS, LONGER = 6.0, 1.5
"""What a piece may cost in any product, and how many times what all multiprocessors multiply, in the mean."""
MOST_SETTLED = 64
"""Tokens of experts that read values, at most, that the linear settles."""


@cache
def config(m: int, n: int, k: int, factors: int, rank: int, count: int = 132, **flags: Any) -> Config:
    """The tile that is estimated to be fastest for a shape; flags are those of `Config`."""
    fixed: dict[str, Any] = dict(GROUP_M=8, FACTORS=factors, RANK=rank, **flags)
    if m <= 16:
        small: dict[str, Any] = dict(REGISTERS=88, LAUNCH_REGISTERS=72)
        return Config(BN=128, BM=16, STAGES=12, PAIRS=True, **small, **fixed)
    return tile(TIMES.best(m, n, k // BLOCK, count), k, fixed)


def tile(best: Tile, k: int, fixed: dict[str, Any]) -> Config:
    """A tile's `Config`, with what is decided elsewhere."""
    rows, tokens, shares = best
    stages = {(256, 128): 6, (256, 64): 8, (128, 128): 8}.get((rows, tokens), 12)
    chosen: dict[str, Any] = dict(BN=rows, BM=tokens, STAGES=stages, PAIRS=rows * tokens < 256 * 128, SHARES=shares)
    if rows == 256 and fixed.get("FP8"):
        chosen |= dict(KEEPS=FP8_CHANNELS // BLOCK) if k > FP8_CHANNELS else dict(UNITS=True)
    return Config(**chosen, **fixed)


def descriptor(tensor: Tensor, rows: int, columns: int) -> Boxes:
    """A view of `tensor` as a matrix of `columns`-wide boxes of `rows` rows."""
    layout = LAYOUTS[columns * tensor.element_size(), tensor.element_size()]
    return Boxes(tensor, tensor.shape, tensor.stride(), (rows, columns), layout)


def weight_descriptors(layout: LinearLayout, rows: int) -> tuple[Boxes, Boxes | None]:
    """Of weights, and of up factors if there are any, in boxes of so many rows."""
    kept: dict[int, tuple[Boxes, Boxes | None]] = layout.descriptors
    if rows not in kept:
        up = None if layout.up is None else descriptor(layout.up.view(-1, layout.up.shape[2]), rows, 32)
        kept[rows] = descriptor(layout.weight.view(-1, BLOCK // 2), rows, BLOCK // 2), up
    return kept[rows]


def settles(kind: Kind, m: int) -> bool:
    """Whether `linear` settles m tokens of a kind of group, and projects codes for that."""
    return kind.rows > 0 and (m <= MOST_SETTLED or kind.reads_codes)


def settling(tokens: Tokens) -> dict[str, Any]:
    """Of the `Config` of a product that settles tokens."""
    projection, sums = tokens.projection, tokens.sums
    if projection is not None:
        return dict(PROJECTS=True, TOTAL=projection.shape[1])
    assert sums is not None
    experts = tokens.experts
    return dict(SETTLES=True, TOTAL=sums.shape[2], EXPERTS=experts, PADDED_EXPERTS=padded_experts(experts))


class Work(NamedTuple):
    """How a product, and what its first programs do for experts before they multiply, is cut over programs."""

    programs: int
    pieces: int
    """Of a tile's tokens, for each RANKS rows of a projection of codes."""
    workers: int
    """Programs that do something for experts; if those are more than there are, pieces."""
    cost: int
    """Of each, in steps of the product; 0 where all programs work for experts."""


def work(c: Config, m: int, n: int, steps: int, count: int) -> Work:
    """Of m tokens and n rows over at most so many programs."""
    token_tiles, pieces, workers, microseconds = -(-m // c.BM.value), 0, 0, 0.0
    tiles = -(-n // c.BN.value) * token_tiles
    step = TIMES.steps.get((c.BN.value, c.BM.value), LEAST_STEP_MICROSECONDS)
    if c.PROJECTS.value:
        projected, each = token_tiles * -(-c.TOTAL.value // RANKS.value), PIECE_STEP_MICROSECONDS * (1 + c.FP8.value)
        allowed = max(SHORT_MICROSECONDS, LONGER * tiles * steps * step / count) - PIECE_MICROSECONDS
        most = min(MOST_STEPS, int(allowed / each))
        wanted = max(-(-LEAST_WORKERS // projected), -(-steps // most))
        without = 0 if c.SHARES.value else count - tiles  # programs to which no tile is left
        free = without if without >= projected else count
        pieces = max(1, min(wanted, steps // LEAST_STEPS, free // projected))
        workers = projected * pieces
        microseconds = PIECE_MICROSECONDS + -(-steps // pieces) * each
    elif c.SETTLES.value:
        blocks = -(-m // BLOCK_TOKENS.value)
        workers, microseconds = -(-blocks * c.FACTORS.value // GROUPS.value), SETTLING_MICROSECONDS
    cost = round(microseconds / step)
    programs = min(count, tiles * steps if c.SHARES.value else tiles + workers)
    return Work(programs, pieces, workers, cost if workers < programs else 0)


def linear(tokens: Tokens, layout: LinearLayout, y: Tensor, chosen: Config | None = None) -> None:
    """y (M, N) = tokens times layout, scales, bias and experts included. Tokens that are not settled it settles."""
    assert tokens.codes is not None and tokens.token_scale is not None
    (m, k), n, device = tokens.codes.shape, layout.out_features, y.device
    up, hidden, present, sums, nothing = layout.up, tokens.hidden, tokens.present, tokens.sums, layout.scale
    factors, rank = (0, 32) if up is None or not tokens.has_experts else (up.shape[0], up.shape[2])
    fp8 = tokens.codes.dtype == torch.float8_e4m3fn
    flags: dict[str, Any] = dict(BIAS=layout.bias is not None, SORTED=tokens.order is not None, FP8=fp8)
    flags["LATER"] = factors > 0 and tokens.hidden_comes_later
    if factors and hidden is None:
        hidden = torch.empty(m, factors * rank, dtype=torch.float16, device=device)
        present = torch.empty(-(-m // MASK_TOKENS), dtype=torch.int32, device=device) if tokens.experts else None
        flags |= settling(tokens)
    steps, count = k // BLOCK, programs(device)
    c = chosen or config(m, n, k, factors, rank, count, **flags)
    assert (c.PROJECTS.value, c.SETTLES.value) == (flags.get("PROJECTS", False), flags.get("SETTLES", False))
    bn, bm = c.BN.value, c.BM.value
    weight_rows, up_rows = weight_descriptors(layout, bn)
    token_rows = down_rows = descriptor(tokens.codes, bm, BLOCK)
    if hidden is None or up_rows is None:
        up_rows = hidden_rows = descriptor(tokens.codes[:, :64].view(torch.float16), bm, 32)
    else:
        hidden_rows = descriptor(hidden, bm, 32)
    if c.PROJECTS.value:
        assert tokens.projection is not None
        down_rows = descriptor(tokens.projection.flatten(0, 1), RANKS.value, BLOCK)
    places = (1 + fp8) * count  # of tiles, written before they are read: they need not stay zero
    shares = zeros("hopper sums", places * LARGEST_TILE, device).view(torch.float32 if fp8 else torch.int32)
    done = zeros("hopper shares", count * 4, device).view(torch.int64)
    arrived, cut = done, work(c, m, n, steps, count)
    if c.PROJECTS.value:
        arrived = zeros("hopper tokens", max(TOKEN_COUNTS, GROUPS.value * -(-m // bm)), device)
        if sums is None:
            sums = torch.empty(cut.pieces, m, c.TOTAL.value, dtype=torch.float32, device=device)
    start(
        kernel, (cut.programs,),
        weight_rows, token_rows, up_rows, hidden_rows, down_rows, ptr(present, done), y, layout.scale,
        tokens.token_scale, ptr(layout.bias, nothing), ptr(tokens.order, done), shares, done, ptr(sums, nothing),
        ptr(hidden, nothing), ptr(tokens.counts, done), arrived, ptr(tokens.router_bias, nothing),
        ptr(tokens.code_scale, nothing), m, n, steps, tokens.headroom, cut.pieces, cut.workers,
        cut.cost, 0 if sums is None else len(sums), c, num_warps=4, maxnreg=c.LAUNCH_REGISTERS.value, **options(device),
    )  # fmt: skip
