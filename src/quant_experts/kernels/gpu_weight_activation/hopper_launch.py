"""Launches of `hopper_linear`: tile sizes by shape, and tensor descriptors for the bulk copy engine."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.factors import RANK_MULTIPLE
from quant_experts.kernels.gpu.launch import LARGEST_TILE, Boxes, options, programs, ptr, start, zeros
from quant_experts.kernels.gpu_weight_activation import hopper_few, hopper_settle
from quant_experts.kernels.gpu_weight_activation.hopper_linear import Config, kernel
from quant_experts.kernels.gpu_weight_activation.layout import BLOCK, Kind, LinearLayout, Tokens, padded_experts

LAYOUTS = {
    (width, size): gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8 * size, rank=2)
    for width in (64, 128)
    for size in (1, 2)
}
"""Of rows of so many bytes, of elements of so many."""


FEW, MOST_FEW = 8, 16
"""Tokens that `linear_few` takes at most of any group, and of groups that are neither wide nor too long."""
MOST_RANKS, FEW_RANKS = 320, 64
"""Ranks that it takes at most, of the factors that tokens use together: up factors wait in registers. Few ranks."""
FEW_RANKS_BLOCKS, MORE_RANKS_BLOCKS = 160, 32
"""Blocks of 128 channels of groups that are too long for more than FEW tokens, with few ranks and with more, begin
above these."""
SETTLED_RANK = 64
"""Of experts that read values, at most, whose hidden values it settles: they take registers from all its programs."""
FEW_BLOCKS, SHORT_BLOCKS = 32, 64
"""Blocks of short inputs, and of those that are not long, at most."""
LEAST_ROWS = 32
"""Rows of the largest tile of `linear_few`: a layout has as many."""


FP8_CHANNELS = 4096
"""Input channels, at most, whose fp8 sums are left to the matrix units altogether. Tiles of 256 rows do so: a second
set of sums would not fit registers."""
STEP_MICROSECONDS = {(256, 128): 0.69, (256, 64): 0.46, (128, 128): 0.35, (128, 64): 0.25, (128, 32): 0.23}
"""Of a step of 128 channels, by rows and tokens of a tile."""
FINISHING_MICROSECONDS = 1.4
"""Of finishing a tile."""
SHARED, SHARED_MICROSECONDS, ADDING_MICROSECONDS = 1.11, 3.2, 0.52
"""Where fewer tiles than multiprocessors are shared: how much longer steps take, what that costs once, and for adding
up 8,192 sums of a share."""
LAST_MICROSECONDS, LAST_SUMS_MICROSECONDS = 1.9, 1.6
"""Of more tiles than multiprocessors the last are shared: what that costs once, and for each 8,192 sums of a tile."""


def estimated(choice: tuple[int, int, bool], m: int, n: int, steps: int, count: int) -> float:
    """Microseconds on so many multiprocessors, but for what is the same for all tiles, of a product by tiles of so many
    rows and tokens, shared or not: a model fitted to times on an H200 (`benchmarks/kernels/gpu_tiles.py`)."""
    rows, tokens, shares = choice
    tiles, step, sums = -(-n // rows) * -(-m // tokens), steps * STEP_MICROSECONDS[rows, tokens], rows * tokens / 8192
    if tiles >= count:
        whole = tiles / count * (step + FINISHING_MICROSECONDS)
        return whole + LAST_MICROSECONDS + LAST_SUMS_MICROSECONDS * sums
    if not shares:
        return step + FINISHING_MICROSECONDS
    adding = ADDING_MICROSECONDS * count / tiles * sums
    return SHARED * tiles / count * step + adding + SHARED_MICROSECONDS


@cache
def config(m: int, n: int, k: int, factors: int, rank: int, count: int = 132, **flags: bool) -> Config:
    """The tile that is estimated to be fastest for a shape; flags are those of `Config`."""
    fixed: dict[str, Any] = dict(GROUP_M=8, FACTORS=factors, RANK=rank, **flags)
    if m <= 16:
        small: dict[str, Any] = dict(REGISTERS=88, LAUNCH_REGISTERS=72)
        return Config(BN=128, BM=16, STAGES=12, PAIRS=True, **small, **fixed)
    most = 128 if flags.get("FP8") and k > FP8_CHANNELS else 256
    fitting = [choice for choice in choices(m, n, count) if choice[0] <= most]
    return tile(*min(fitting, key=lambda choice: estimated(choice, m, n, k // BLOCK, count)), fixed)


def choices(m: int, n: int, count: int) -> list[tuple[int, int, bool]]:
    """Tiles for more than 16 tokens, as `estimated` takes them: none with twice the tokens that are needed; shared or
    not where multiprocessors are more (`count`), because of more tiles the last are shared always."""
    return [
        (rows, tokens, shares)
        for rows, tokens in STEP_MICROSECONDS
        if tokens < 2 * max(m, 32)
        for shares in (False, True)
        if not shares or -(-n // rows) * -(-m // tokens) < count
    ]


def tile(rows: int, tokens: int, shares: bool, fixed: dict[str, Any]) -> Config:
    """A tile's `Config`, with what is decided elsewhere."""
    stages = {(256, 128): 6, (256, 64): 8, (128, 128): 8}.get((rows, tokens), 12)
    chosen: dict[str, Any] = dict(BN=rows, BM=tokens, STAGES=stages, PAIRS=rows * tokens < 256 * 128, SHARES=shares)
    return Config(**chosen, UNITS=rows == 256, **fixed)


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


def linear(tokens: Tokens, layout: LinearLayout, y: Tensor, chosen: Config | None = None) -> None:
    """y (M, N) = tokens times layout, scales, bias and experts included."""
    assert tokens.codes is not None and tokens.token_scale is not None and tokens.sums is None
    (m, k), n, device = tokens.codes.shape, layout.out_features, y.device
    up, hidden = layout.up, tokens.hidden
    factors, rank = (0, 32) if up is None or hidden is None else (up.shape[0], up.shape[2])
    fp8 = tokens.codes.dtype == torch.float8_e4m3fn
    flags = dict(BIAS=layout.bias is not None, SORTED=tokens.order is not None, FP8=fp8)
    flags["LATER"] = factors > 0 and tokens.hidden_comes_later
    count = programs(device)
    c = chosen or config(m, n, k, factors, rank, count, **flags)
    assert not (fp8 and c.UNITS.value) or k <= FP8_CHANNELS, "the matrix units would lose too much of such long sums"
    bn, bm = c.BN.value, c.BM.value
    weight_rows, up_rows = weight_descriptors(layout, bn)
    token_rows = descriptor(tokens.codes, bm, BLOCK)
    if hidden is None or up_rows is None:
        up_rows = hidden_rows = descriptor(tokens.codes[:, :64].view(torch.float16), bm, 32)
    else:
        hidden_rows = descriptor(hidden, bm, 32)
    sums = zeros("hopper sums", count * LARGEST_TILE, device)  # written before it is read: it need not stay zero
    sums = sums.view(torch.float32 if fp8 else torch.int32)
    done = zeros("hopper shares", count * 4, device).view(torch.int64)
    tiles = -(-n // bn) * -(-m // bm)
    used = min(count, tiles * (k // BLOCK) if c.SHARES.value else tiles)
    start(
        kernel, (used,),
        weight_rows, token_rows, up_rows, hidden_rows, done if tokens.present is None else tokens.present, y,
        layout.scale, tokens.token_scale, layout.scale if layout.bias is None else layout.bias,
        done if tokens.order is None else tokens.order, sums, done, m, n,
        k // BLOCK, tokens.headroom, c, num_warps=4, maxnreg=c.LAUNCH_REGISTERS.value, **options(device),
    )  # fmt: skip


def takes_few(m: int, codes: torch.dtype, layout: LinearLayout, ranks: int) -> bool:
    """Whether `linear_few` is the fastest for so many tokens that use experts of so many ranks together, as measured on
    an H200."""
    if codes != torch.int8 or layout.out_features < LEAST_ROWS or ranks > MOST_RANKS:
        return False
    most = FEW_RANKS_BLOCKS if ranks <= FEW_RANKS else MORE_RANKS_BLOCKS
    wide = is_wide(layout.out_features, layout.scale.device)
    return m <= FEW or (m <= MOST_FEW and not wide and layout.weight.shape[0] <= most)


def settles_few(kind: Kind) -> bool:
    """Whether `linear_few` settles the experts of a kind of group, and projects codes for them."""
    return kind.rows > 0 and (kind.reads_codes or kind.rank <= SETTLED_RANK)


def is_wide(n: int, device: torch.device) -> bool:
    """Whether there are many more tiles than multiprocessors."""
    return n >= 128 * programs(device)


def few_tile(m: int, layout: LinearLayout, factors: int, projects: bool) -> tuple[int, int, int, int | None]:
    """Rows and warps of a program, blocks of 128 channels that a warp asks for at a time, and registers of a thread if
    they are limited, as measured on an H200; projects: whether programs project codes."""
    blocks, registers = layout.weight.shape[0], None
    if is_wide(layout.out_features, layout.scale.device):
        tall = blocks <= FEW_BLOCKS if not factors else m <= 4 and not projects
        rows, ways, most = (32, 2, 2) if tall else (16, 2, 4 if factors else 8)
    elif blocks > SHORT_BLOCKS:
        eight = not factors or (m == 1 and not projects)
        rows, ways, most, registers = (16, 8, 5, 128) if eight else (16, 4, 10, None)
        if projects and m == MOST_FEW:  # whose kernel lets three programs on a multiprocessor: slower than two or four
            registers = 128
    else:
        rows, ways, most = 16, 2, 8 if projects or blocks > FEW_BLOCKS else 16
    turns = -(-blocks // ways)
    return rows, ways, -(-turns // -(-turns // most)), registers


def linear_few(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    """As `linear`, for what `takes_few`; `tokens` may be unsettled, if their kind `settles_few`."""
    assert tokens.codes is not None
    m, n, steps, device = len(tokens.codes), layout.out_features, layout.weight.shape[0], y.device
    nothing, up, sums = layout.scale, layout.up, tokens.sums
    if tokens.hidden is None and sums is None:
        up = None
    factors, rank = (0, RANK_MULTIPLE) if up is None else (up.shape[0], up.shape[2])
    settles = factors > 0 and sums is not None
    projects = settles and tokens.projection is not None
    slices, _, total = (0, 0, 0) if sums is None else sums.shape
    experts = tokens.experts if factors else 0
    rows, ways, ahead, registers = few_tile(m, layout, factors, projects)
    workers, hidden = 0, tokens.hidden
    if settles:
        parts = -(-steps // ways) * (total // hopper_settle.ROWS.value) if projects else factors
        workers = min(parts, programs(device))  # one of which waits for the others: all of them must run at once
        hidden = torch.empty(m, factors * rank, dtype=torch.float16, device=device)
    start(
        hopper_few.kernel, (workers + -(-n // rows),),
        layout.weight, tokens.codes, ptr(tokens.projection, nothing), ptr(up, nothing), ptr(sums, nothing),
        ptr(hidden, nothing), ptr(tokens.present, nothing), ptr(tokens.counts, nothing),
        ptr(tokens.router_bias, nothing), ptr(tokens.code_scale, nothing), y, layout.scale, tokens.token_scale,
        ptr(layout.bias, nothing), m, n, steps, workers, tokens.headroom, 1.0 / tokens.headroom,
        BN=rows, BM=8 if m <= 8 else 16, WAYS=ways, AHEAD=ahead, EVEN=steps % (ways * ahead) == 0,
        ONCE=steps <= ways * ahead, F=factors, E=experts, R=rank,
        USED=factors - experts + min(experts, 1 << (m - 1).bit_length()), TOTAL=total, EP=padded_experts(experts),
        SLICES=slices, PROJECTS=projects, SETTLES=settles, BIAS=layout.bias is not None, num_warps=ways,
        maxnreg=registers, **options(device),
    )  # fmt: skip
