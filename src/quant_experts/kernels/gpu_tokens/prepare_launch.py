"""Launches of `prepare` and `prepare_many`: how their work is cut by size, and what they write allocated.

What depends on sizes alone is a `Plan`, made once for each: a model calls every group with the same ones, and in Python
cutting takes longer than launching.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.gpu.launch import (
    INTERPRETED,
    complete_writes,
    hopper,
    options,
    overlapped,
    programs,
    ptr,
    shared_memory,
    start,
)
from quant_experts.kernels.gpu_tokens.layout import (
    BLOCK,
    COUNTS,
    MASK_TOKENS,
    GroupLayout,
    Kind,
    Tokens,
    pack_group,
    padded_channels,
    padded_experts,
)
from quant_experts.kernels.operands import GroupOperands

FEW_TOKENS = 17 if INTERPRETED else 512
"""Up to here tokens of routed experts are never sorted."""
MOST_IDLE = 0 if INTERPRETED else 1 << 32
"""Multiplications by up factors that a token does not use, up to which they cost less than sorting: by measurements of
9 factors of rank 32 on an H200."""
CHUNK = 256 if INTERPRETED else 4096
"""Input channels of a token that a program reads at a time; longer tokens are quantized by a launch of their own."""
LONG = 8192
"""Input channels of the longest tokens of which a multiprocessor of Hopper quantizes more than one at a time."""
BLOCK_TOKENS = 16 if INTERPRETED else 64
"""Tokens that a program routes or places when they are many."""
COUNTED_BLOCKS = 1 if INTERPRETED else 64
"""Blocks of tokens whose experts a program that places tokens counts at a time."""
PROJECT_TILES = (
    (8, dict(RC=16, BM=8, WAYS=2 if INTERPRETED else 4), 20),
    (16, dict(RC=32, BM=16, WAYS=1), 10),
    (1 << 31, dict(RC=32, BM=16 if INTERPRETED else 64, WAYS=1), 14),
)
"""Up to so many tokens: rows of the projection, tokens and warps with channels of their own of a program that projects;
and how many programs share the input channels, at most."""
ADD_TOKENS = 16
"""Up to here integer sums of codes are added where they are; of more tokens that is slower than writing them, but for
linears that do it themselves."""
PLANS = 4096
"""Plans that are kept."""


def prepare(x: Tensor, group: GroupOperands | GroupLayout, settled: bool = True, sorts: bool | None = None) -> Tokens:
    """Tokens of x (M, K), as `reference.prepare`; not settled, with sums instead of hidden values, for a linear that
    settles, and projects codes. sorts: whether tokens are sorted by expert; if they are many where it is not given."""
    layout = group if isinstance(group, GroupLayout) else pack_group(group, x.dtype, x.device)
    if layout is not group:
        complete_writes(x.device)
    dtype = x.dtype
    if layout.before is not None:
        x = reference.transform(x, layout.before)
    (m, k), x = x.shape, x.contiguous()
    if not m:
        return _allocate(x, layout, dtype=dtype)
    if sorts is None:
        sorts = m > FEW_TOKENS
    sorts = sorts and layout.kind.experts > 0
    p = plan(layout.kind, m, k, x.dtype, x.device, settled, projector(x, layout, sorts), sorts)
    tokens = _prepare_many(x, layout, p) if p.sorts else _prepare(x, layout, p)
    return tokens if dtype == x.dtype else replace(tokens, dtype=dtype)


def sorts_tokens(kind: Kind, m: int, n: int) -> bool:
    """Whether m tokens are sorted by expert, by `prepare_many`, for n output channels: a token uses two of its factors,
    and unsorted it is multiplied by all."""
    return m > FEW_TOKENS and m * n * (kind.factors - 2) * kind.rank > MOST_IDLE


class Projector(Enum):
    """Which kernels project tokens."""

    PREPARE = "prepare"
    FEW = "hopper_begin"
    """Which quantizes too."""
    MANY = "hopper_project"


def projector(x: Tensor, layout: GroupLayout, sorts: bool) -> Projector:
    """Of tokens x (M, K) of a group: kernels for Hopper where they take them."""
    if hopper(x.device):
        from quant_experts.kernels.gpu_tokens import hopper_begin, hopper_project

        if not sorts and hopper_begin.takes(x, layout):
            return Projector.FEW
        if hopper_project.takes(x, layout):
            return Projector.MANY
    return Projector.PREPARE


class Cut(NamedTuple):
    """How a projection is cut over programs."""

    slices: int
    """Of the input channels."""
    sums: int
    """That are to be added up: as many as slices, or one, if they were added already."""
    programs: int
    constants: dict[str, Any]
    projector: Projector = Projector.PREPARE
    tile: Any = None
    """Of kernels for Hopper."""


NO_PROJECTION = Cut(0, 0, 0, {})


@dataclass(frozen=True)
class Plan:
    """Launches of `prepare` for some number of tokens of a kind of group."""

    kind: Kind
    sizes: tuple[int, int, int]
    """M, K, Kp"""
    settled: bool
    """Whether there are experts, and their hidden values are finished here."""
    counts: bool
    """Whether programs of the linear settle them, and count themselves."""
    sorts: bool
    """Whether tokens are sorted by expert."""
    beside: bool
    """Whether `begin` projects values beside quantization."""
    cut: Cut
    sums_type: torch.dtype
    launch: dict[str, Any]
    """Options of any launch."""
    adds: bool
    """Whether integer sums are added where they are, and so are to be zero before."""
    projects: bool
    """Whether anything is projected here, and not by the linear."""
    end: dict[str, Any]
    """Those of `end`."""


@lru_cache(PLANS)
def plan(
    kind: Kind, m: int, k: int, dtype: torch.dtype, device: torch.device, settled: bool,
    by: Projector = Projector.PREPARE, sorts: bool = False,
) -> Plan:  # fmt: skip
    """For m tokens of k channels; by: what projects values; sorts: see `prepare`."""
    padded = padded_channels(k, kind.block)
    sums_type = torch.int32 if kind.reads_codes and kind.code_type == torch.int8 else torch.float32
    adds = sums_type == torch.int32 and (m <= ADD_TOKENS or not settled)
    if by is Projector.FEW:
        cut = _cut_few(kind, m, padded // BLOCK)
    elif by is Projector.MANY:
        cut = _cut_many(kind, m, padded // BLOCK, sorts, device)
    else:
        cut = _cut(kind, m, padded // BLOCK, adds, dtype, device)
    launch = dict(PDL=overlapped(device), num_warps=4, **options(device))
    constants = dict(
        F=kind.factors, E=kind.experts, EP=padded_experts(kind.experts), R=kind.rank, TOTAL=kind.rows,
        SLICES=1 << max(0, cut.sums - 1).bit_length(), CODES=kind.reads_codes,
    )  # fmt: skip
    return Plan(
        kind=kind, sizes=(m, k, padded), settled=settled and cut.programs > 0,
        counts=not settled and cut.programs > 0, sorts=sorts,
        beside=cut.programs > 0 and by is Projector.PREPARE and not (kind.reads_codes or sorts) and padded <= CHUNK,
        cut=cut,
        sums_type=sums_type, adds=adds, projects=cut.programs > 0 and (settled or not kind.reads_codes),
        launch=launch, end=constants | launch,
    )  # fmt: skip


@lru_cache(PLANS)
def _constants_of_quantize(kind: Kind, padded: int, device: torch.device) -> dict[str, Any]:
    """Of kernels that quantize tokens of so many channels, launch options among them."""
    chunk = max(min(CHUNK, 1 << (padded - 1).bit_length()), 16 * kind.rotation)
    parts = -(-padded // chunk)
    warps = min(16, 4 << (parts - 1).bit_length())  # parts of a token stay in registers
    return dict(
        LARGEST=kind.largest_code, CHUNK=chunk, PARTS=parts, SMOOTH=kind.smooths, ROT=kind.rotation,
        enable_fp_fusion=False, PDL=overlapped(device), num_warps=warps, **options(device),
    )  # fmt: skip


def _cut(kind: Kind, m: int, steps: int, adds: bool, dtype: torch.dtype, device: torch.device) -> Cut:
    """steps: blocks of 128 input channels."""
    if not kind.rows:
        return NO_PROJECTION
    tile, most_slices = next((tile, slices) for limit, tile, slices in PROJECT_TILES if m <= limit)
    if kind.reads_codes and m > 16:
        tile = tile | dict(RC=min(64, kind.rows))
    tiles = -(-m // tile["BM"]) * (kind.rows // tile["RC"])
    waves = 2 if kind.reads_codes else 3
    slices = min(-(-steps // tile["WAYS"]), max(1, waves * programs(device) // tiles))
    slices = slices if adds else min(slices, most_slices)
    ahead = 1 if tile["WAYS"] > 1 else 6 if m <= 16 else 3  # a few tokens' weights are most of a step's bytes
    fitting = stages(kind, dtype, device, tile["RC"], ahead, tile["BM"])
    constants = dict(FACTOR_ROWS=kind.factors * kind.rank, TOTAL=kind.rows, **tile, STAGES=fitting)
    return Cut(slices, 1 if adds else slices, tiles * slices, constants)


def _cut_many(kind: Kind, m: int, blocks: int, sorts: bool, device: torch.device) -> Cut:
    """The same, for `hopper_project`. Programs that quantize long tokens, one each, fill a multiprocessor's registers:
    a few tokens leave them theirs, so that both run side by side."""
    from quant_experts.kernels.gpu_tokens import hopper_project

    count, factor_rows = programs(device), kind.factors * kind.rank
    if blocks * BLOCK > LONG and 2 * m <= count:
        count -= m
    router_rows = kind.rows - factor_rows
    tile, slices = hopper_project.cut(factor_rows, router_rows, m, 2 * blocks, count, sorts)
    count = -(-m // hopper_project.TOKENS.value) * tile.CHUNKS.value * slices
    return Cut(slices, slices, count, {}, Projector.MANY, tile)


def _cut_few(kind: Kind, m: int, blocks: int) -> Cut:
    """The same, for `hopper_begin`."""
    from quant_experts.kernels.gpu_tokens import hopper_begin

    tile = hopper_begin.tile(m, blocks)
    return Cut(tile.slices, tile.slices, tile.slices * kind.rows // hopper_begin.ROWS.value, {}, Projector.FEW, tile)


def _prepare(x: Tensor, layout: GroupLayout, p: Plan) -> Tokens:
    from quant_experts.kernels.gpu_tokens.prepare import begin, end

    m, cut = p.sizes[0], p.cut
    summed = p.projects or p.adds
    sums = x.new_empty(cut.sums, m, p.kind.rows, dtype=p.sums_type) if summed else x
    if p.settled:
        tokens = _allocate(x, layout, **_hidden(m, layout, x.device), hidden_comes_later=True)
    elif cut.programs:
        projection = None if p.projects else layout.projection if p.adds else layout.fp8_projection
        assert p.projects or projection is not None, "nobody would project"
        tokens = _allocate(
            x, layout, experts=layout.experts, sums=sums if summed else None, router_bias=layout.router_bias,
            code_scale=layout.code_scale, projection=projection,
            counts=torch.empty(COUNTS, dtype=torch.int64, device=x.device) if p.counts else None,
        )  # fmt: skip
    else:
        tokens = _allocate(x, layout)
    codes, scale = tokens.codes, tokens.token_scale
    assert codes is not None and scale is not None
    if cut.projector is Projector.FEW:
        from quant_experts.kernels.gpu_tokens import hopper_begin

        hopper_begin.begin(x, layout, codes, scale, sums, tokens.counts, cut.tile)
    elif p.beside:
        start(
            begin, (m + cut.programs,),
            x, ptr(layout.inverse_smooth, x), ptr(layout.signs, x), codes, scale,
            layout.projection, sums, ptr(tokens.counts, sums), *p.sizes, cut.slices, COUNTS=COUNTS if p.counts else 0,
            **cut.constants,
            **_constants_of_quantize(p.kind, p.sizes[2], x.device),
        )  # fmt: skip
    elif p.kind.reads_codes:
        _quantize(x, layout, tokens, sums=sums if p.adds else None)
        if p.projects:
            _project(codes, layout, sums, p)
    else:
        if p.projects:
            _project(x, layout, sums, p)
        _quantize(x, layout, tokens, early=p.projects)
    if p.settled:
        start(
            end, (layout.factors * -(-m // MASK_TOKENS),),
            tokens.token_scale, sums, ptr(layout.router_bias, sums), ptr(layout.code_scale, sums), tokens.hidden,
            tokens.present, ptr(tokens.expert, sums), m, cut.sums, 1.0 / layout.headroom, **p.end,
        )  # fmt: skip
    return tokens


def _project(x: Tensor, layout: GroupLayout, sums: Tensor, p: Plan) -> None:
    """Of values x, or codes."""
    if p.cut.projector is Projector.MANY:
        from quant_experts.kernels.gpu_tokens import hopper_project

        return hopper_project.project(x, layout, sums, p.cut.tile, **options(x.device))
    from quant_experts.kernels.gpu_tokens.prepare import project

    m, _, padded = p.sizes
    start(
        project, (p.cut.programs,),
        x, layout.projection, sums, p.cut.slices, m, x.shape[1], padded, ADD=p.adds, **p.cut.constants, **p.launch,
    )  # fmt: skip


def _quantize(
    x: Tensor, layout: GroupLayout, tokens: Tokens, order: Tensor | None = None, early: bool = False,
    sums: Tensor | None = None,
) -> None:  # fmt: skip
    """Codes and scales, and sums and counts written zero. early: whether the previous kernel is not waited for until
    the end."""
    codes, scale = tokens.codes, tokens.token_scale
    assert codes is not None and scale is not None
    if hopper(x.device):
        from quant_experts.kernels.gpu_tokens.hopper_tokens import write_tokens

        write_tokens(
            x, layout.inverse_smooth, layout.rotation, layout.kind.largest_code, codes, scale, order,
            sums, tokens.counts, early,
        )  # fmt: skip
    else:
        from quant_experts.kernels.gpu_tokens.prepare import quantize

        start(
            quantize, (len(x),),
            x, ptr(layout.inverse_smooth, x), ptr(layout.signs, x), codes, scale, ptr(order, scale), ptr(sums, scale),
            x.shape[1], codes.shape[1], SORTED=order is not None, SUMS=0 if sums is None else sums.shape[-1],
            EARLY=early, **_constants_of_quantize(layout.kind, codes.shape[1], x.device),
        )  # fmt: skip


def _allocate(x: Tensor, layout: GroupLayout, **more: Any) -> Tokens:
    """Tokens with what all of them have allocated and not written, and more."""
    (m, k), device, kind = x.shape, x.device, layout.kind
    return Tokens(
        values=None,
        codes=torch.empty(m, padded_channels(k, kind.block), dtype=kind.code_type, device=device),
        token_scale=torch.empty(m, 1, device=device),
        shared_hidden=None,
        routed_hidden=None,
        headroom=layout.headroom,
        **{"expert": None, "dtype": x.dtype} | more,
    )


def stages(kind: Kind, dtype: torch.dtype, device: torch.device, rows: int, most: int, tokens: int) -> int:
    """How many steps of 128 channels, of so many tokens and rows of the projection, fit shared memory."""
    step = BLOCK * (tokens * dtype.itemsize + rows * kind.row_bytes)
    return max(1, min(most, shared_memory(device) * 9 // 10 // step))


def _hidden(m: int, layout: GroupLayout, device: torch.device) -> dict[str, Any]:
    """What experts of m tokens need, allocated and not written: fields of `Tokens`."""
    return dict(
        experts=layout.experts,
        expert=torch.empty(m, dtype=torch.int32, device=device) if layout.experts else None,
        hidden=torch.empty(m, layout.factors * layout.rank, dtype=torch.float16, device=device),
        present=torch.empty(-(-m // MASK_TOKENS), dtype=torch.int32, device=device),
    )


def _prepare_many(x: Tensor, layout: GroupLayout, p: Plan) -> Tokens:
    from quant_experts.kernels.gpu_tokens.prepare_many import place, route, settle

    m, device, kind, cut = p.sizes[0], x.device, p.kind, p.cut
    width, blocks = padded_experts(kind.experts), -(-m // BLOCK_TOKENS)
    sums = torch.empty(cut.sums, m, kind.rows, dtype=p.sums_type, device=device)
    expert, order = (torch.empty(m, dtype=torch.int32, device=device) for _ in range(2))
    counts = torch.empty(blocks, width, dtype=torch.int32, device=device)
    tokens = _allocate(x, layout, **_hidden(m, layout, device), order=order, hidden_comes_later=True)
    common = dict(E=kind.experts, TOTAL=kind.rows, SLICES=p.end["SLICES"], **p.launch)
    _project(x, layout, sums, p)
    start(
        route, (blocks,),
        sums, layout.router_bias, expert, counts, m, cut.sums, FACTOR_ROWS=kind.factors * kind.rank, EP=width,
        ROWS=BLOCK_TOKENS, **common,
    )  # fmt: skip
    start(
        place, (blocks,),
        expert, counts, order, tokens.expert, blocks, m, EP=width, ROWS=BLOCK_TOKENS, BLOCKS=COUNTED_BLOCKS, **p.launch,
    )  # fmt: skip
    _quantize(x, layout, tokens, order)
    start(
        settle, (-(-m // MASK_TOKENS),),
        sums, order, tokens.expert, tokens.token_scale, tokens.hidden, tokens.present, m, cut.sums,
        1.0 / layout.headroom, F=kind.factors, R=kind.rank, **common,
    )  # fmt: skip
    return tokens
