"""Launches of `prepare` and `prepare_many`: how their work is cut by size, and what they write allocated.

What depends on sizes alone is a `Plan`, made once for each: a model calls every group with the same ones, and in Python
cutting takes longer than launching.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels.gpu.launch import (
    INTERPRETED,
    MAX_BLOCKS,
    options,
    overlapped,
    programs,
    ptr,
    shared_memory,
    zeros,
)
from quant_experts.kernels.gpu_weight_activation.layout import (
    BLOCK,
    MASK_TOKENS,
    GroupLayout,
    Kind,
    Tokens,
    padded_experts,
)

FEW_TOKENS, LONG_TOKENS = (17, 17) if INTERPRETED else (512, 256)
"""Up to here `prepare` prepares, above `prepare_many`; the second for tokens of more than LONG channels, whose
projection reads so much more than the factors of one expert that sorting pays earlier."""
LONG = 8192
CHUNK = 256 if INTERPRETED else 4096
"""Input channels that one program quantizes of a token when tokens are few."""
BLOCK_TOKENS = 16 if INTERPRETED else 64
"""Tokens that one program takes when tokens are many."""
PROJECT_TILES = (
    (8, dict(RC=16, BM=8, WAYS=2 if INTERPRETED else 4), 20),
    (16, dict(RC=32, BM=16, WAYS=1), 10),
    (FEW_TOKENS, dict(RC=32, BM=16 if INTERPRETED else 64, WAYS=1), 24),
)
"""Up to so many tokens: rows of the projection, tokens and warps with channels of their own of a program that projects;
and how many programs share the input channels, at most."""
MAX_SLICES = 32
"""Programs that share the input channels of a block of tokens, at most: each is a read of the one that adds up."""
WAVES = 2
"""Programs for each multiprocessor when tokens are many."""
UNSETTLED_SLICES = 8
"""The same, where the linear adds up."""
PLANS = 4096
"""Plans that are kept."""


def prepare(x: Tensor, layout: GroupLayout, settled: bool = True) -> Tokens:
    """Tokens of x (M, K), contiguous; not settled, with sums instead of hidden values where tokens are few."""
    m, k = x.shape
    if m and m <= (FEW_TOKENS if k <= LONG else LONG_TOKENS):
        return _prepare_few(x, layout, plan(layout.kind, m, k, x.dtype, x.device, settled))
    return _prepare_many(x, layout) if m else _allocate(x, layout)


class Cut(NamedTuple):
    """How a projection is cut over programs."""

    slices: int
    programs: int
    constants: dict[str, Any]


NO_PROJECTION = Cut(0, 0, dict(FACTOR_ROWS=0, TOTAL=0, RC=16, BM=8, WAYS=1, STAGES=1))


@dataclass(frozen=True)
class Plan:
    """Launches of `prepare` for some number of tokens of a kind of group, if they are few."""

    kind: Kind
    sizes: tuple[int, int, int, int]
    """M, K, Kp, parts"""
    settled: bool
    """Whether there are experts, and their hidden values are finished here."""
    cut: Cut
    sums_type: torch.dtype
    launch: dict[str, Any]
    """Options of any launch."""
    begin: dict[str, Any]
    """Constants of `begin`, launch options among them."""
    ends: dict[tuple[bool, bool], dict[str, Any]]
    """Those of `end`, by whether it quantizes and whether it settles."""

    @property
    def long(self) -> bool:
        """Whether a token has several parts."""
        return self.sizes[3] > 1


@lru_cache(PLANS)
def plan(kind: Kind, m: int, k: int, dtype: torch.dtype, device: torch.device, settled: bool) -> Plan:
    """For m tokens of k channels."""
    padded = max(1, -(-k // BLOCK)) * BLOCK
    chunk = min(CHUNK, 1 << (padded - 1).bit_length())
    parts = -(-padded // chunk)
    cut = _cut(kind, m, padded // BLOCK, MAX_SLICES if settled else UNSETTLED_SLICES, dtype, device)
    launch = dict(PDL=overlapped(device), num_warps=4, **options(device))
    shared = dict(LARGEST=kind.largest_code, CHUNK=chunk, PARTS=1 << (parts - 1).bit_length())
    shared |= dict(SMOOTH=kind.smooths, ROT=kind.rotation, enable_fp_fusion=False) | launch
    sums_type = torch.int32 if kind.reads_codes and kind.code_type == torch.int8 else torch.float32
    begin = (NO_PROJECTION if kind.reads_codes else cut).constants | shared
    pairs = [(quantize, settle) for quantize in (False, True) for settle in (False, True)]
    ends = {(quantize, settle): shared | _constants_of_end(kind, cut, quantize, settle) for quantize, settle in pairs}
    return Plan(kind, (m, k, padded, parts), settled and cut.programs > 0, cut, sums_type, launch, begin, ends)


def _constants_of_end(kind: Kind, cut: Cut, quantize: bool, settle: bool) -> dict[str, Any]:
    cut = cut if settle else NO_PROJECTION
    return dict(
        QUANTIZE=quantize, F=kind.factors, E=kind.experts, EP=padded_experts(kind.experts), R=kind.rank,
        TOTAL=cut.constants["TOTAL"], SLICES=1 << max(0, cut.slices - 1).bit_length(),
        CODES=kind.reads_codes and settle,
    )  # fmt: skip


def _cut(kind: Kind, m: int, steps: int, most: int, dtype: torch.dtype, device: torch.device) -> Cut:
    """steps: blocks of 128 input channels. most: slices."""
    if not kind.rows:
        return NO_PROJECTION
    tile, most_slices = next((tile, slices) for limit, tile, slices in PROJECT_TILES if m <= limit)
    tiles = -(-m // tile["BM"]) * (kind.rows // tile["RC"])
    slices = min(-(-steps // tile["WAYS"]), most, most_slices, max(1, 3 * programs(device) // tiles))
    fitting = stages(kind, dtype, device, tile["RC"], 3 if tile["WAYS"] == 1 else 1, tile["BM"])
    constants = dict(FACTOR_ROWS=kind.factors * kind.rank, TOTAL=kind.rows, **tile, STAGES=fitting)
    return Cut(slices, tiles * slices, constants)


def _prepare_few(x: Tensor, layout: GroupLayout, p: Plan) -> Tokens:
    from quant_experts.kernels.gpu_weight_activation.prepare import begin, project

    (m, _, padded, parts), cut, device = p.sizes, p.cut, x.device
    tokens = _allocate(x, layout)
    most = torch.empty(m, parts, device=device)
    sums = torch.empty(cut.slices, m, p.kind.rows, dtype=p.sums_type, device=device) if cut.programs else most
    if p.settled:
        tokens = _with_hidden(tokens, layout, later=p.kind.reads_codes or not p.long)
    elif cut.programs:
        bias, scale = layout.router_bias, layout.code_scale
        tokens = replace(tokens, experts=layout.experts, sums=sums, router_bias=bias, code_scale=scale)
    first = (x, ptr(layout.inverse_smooth, x), ptr(layout.signs, x), most, tokens.codes, tokens.token_scale)
    beside = NO_PROJECTION if p.kind.reads_codes else cut
    begin[(m * parts + beside.programs,)](*first, ptr(layout.projection, x), sums, *p.sizes, beside.slices, **p.begin)
    if p.kind.reads_codes:
        if p.long:
            _end(first, sums, tokens, layout, p, quantize=True, settle=False)
        project[(cut.programs,)](
            tokens.codes, layout.projection, sums, cut.slices, m, padded, **cut.constants, **p.launch
        )
        if p.settled:
            _end(first, sums, tokens, layout, p, quantize=False, settle=True)
    elif p.long or p.settled:
        _end(first, sums, tokens, layout, p, quantize=p.long, settle=p.settled)
    return tokens


def _end(
    first: tuple[Any, ...], sums: Tensor, tokens: Tokens, layout: GroupLayout, p: Plan, quantize: bool, settle: bool
) -> None:
    """first: the arguments that `begin` and `end` share."""
    from quant_experts.kernels.gpu_weight_activation.prepare import end

    m, _, _, parts = p.sizes
    settling = layout.factors * -(-m // MASK_TOKENS) if settle else 0
    end[(m * parts * quantize + settling,)](
        *first, sums, ptr(layout.router_bias, sums), ptr(layout.code_scale, sums), ptr(tokens.hidden, sums),
        ptr(tokens.present, sums), ptr(tokens.expert, sums), *p.sizes, p.cut.slices, 1.0 / layout.headroom,
        **p.ends[quantize, settle],
    )  # fmt: skip


def _allocate(x: Tensor, layout: GroupLayout) -> Tokens:
    """Tokens with what all of them have allocated and not written."""
    (m, k), device = x.shape, x.device
    padded = max(1, -(-k // BLOCK)) * BLOCK
    return Tokens(
        values=None,
        codes=torch.empty(m, padded, dtype=layout.kind.code_type, device=device),
        token_scale=torch.empty(m, 1, device=device),
        shared_hidden=None,
        routed_hidden=None,
        expert=None,
        headroom=layout.headroom,
        dtype=x.dtype,
    )


def stages(kind: Kind, dtype: torch.dtype, device: torch.device, rows: int, most: int, tokens: int) -> int:
    """How many steps of 128 channels, of so many tokens and rows of the projection, fit shared memory.

    Raises `QuantExpertsError` where none does.
    """
    step = BLOCK * (tokens * dtype.itemsize + rows * kind.row_bytes)
    fitting = shared_memory(device) * 9 // 10 // step
    if not fitting:
        raise QuantExpertsError(
            f"{kind.experts or 'No'} routed experts of rank {kind.rank} with {dtype} inputs are too large for this "
            "GPU's shared memory: load the model with backend='reference'."
        )
    return min(most, fitting)


def _with_hidden(tokens: Tokens, layout: GroupLayout, later: bool = False) -> Tokens:
    """Tokens with what experts need allocated and not written."""
    assert tokens.codes is not None
    m, device = tokens.codes.shape[0], tokens.codes.device
    return replace(
        tokens,
        experts=layout.experts,
        expert=torch.empty(m, dtype=torch.int32, device=device) if layout.experts else None,
        hidden=torch.empty(m, layout.factors * layout.rank, dtype=torch.float16, device=device),
        present=torch.empty(-(-m // MASK_TOKENS), dtype=torch.int32, device=device),
        hidden_comes_later=later,
    )


def _prepare_many(x: Tensor, layout: GroupLayout) -> Tokens:
    from quant_experts.kernels.gpu_weight_activation.prepare_many import convert, measure, place

    tokens = _allocate(x, layout)
    assert tokens.codes is not None
    (m, k), padded, device, rank = x.shape, tokens.codes.shape[1], x.device, layout.rank
    factors, experts, width = layout.factors, layout.experts, padded_experts(layout.experts)
    flags = dict(SMOOTH=layout.inverse_smooth is not None, ROT=layout.rotation, PDL=overlapped(device))
    inputs, kind = (x, ptr(layout.inverse_smooth, x), ptr(layout.signs, x)), layout.kind
    rows = BLOCK_TOKENS
    blocks = -(-m // rows)
    steps = padded // BLOCK
    slices = min(steps, max(1, WAVES * programs(device) // blocks), MAX_SLICES)
    expert, order = (torch.empty(m if experts else 1, dtype=torch.int32, device=device) for _ in range(2))
    absmax = torch.empty(slices, m, dtype=torch.float32, device=device)
    counts = torch.empty(blocks, width, dtype=torch.int32, device=device)
    part = torch.empty(blocks * slices * rows * max(4 * width, 2 * rank), dtype=torch.float32, device=device)
    done = zeros("many tokens", max(blocks, MAX_BLOCKS), device)
    read = (factors > experts) + 2 * (experts > 0)  # factors in a step of `convert`
    measure[(blocks, slices)](
        *inputs, ptr(layout.projection, x), ptr(layout.router_bias, absmax), expert, absmax, counts, part, done,
        m, k, padded, slices, FACTOR_ROWS=factors * rank, TOTAL=kind.rows, E=experts, EP=width, ROWS=rows, **flags,
        STAGES=stages(kind, x.dtype, device, 4 * width if experts else 0, 4, rows), num_warps=4, **options(device),
    )  # fmt: skip
    if experts:
        place[(blocks,)](
            expert, counts, order, blocks, m, EP=width, ROWS=rows, BLOCKS=64, PDL=flags["PDL"],
            num_warps=4, **options(device),
        )  # fmt: skip
    if factors:
        tokens = _with_hidden(replace(tokens, order=order if experts else None), layout)
    convert[(blocks, slices)](
        *inputs, ptr(layout.projection, x), ptr(layout.code_scale, absmax), expert, order, absmax,
        tokens.codes, tokens.token_scale, ptr(tokens.expert, expert), ptr(tokens.hidden, part),
        ptr(tokens.present, expert), part, done, m, k, padded, slices, 1.0 / layout.headroom,
        LARGEST=kind.largest_code, TOTAL=kind.rows, F=factors, E=experts, R=rank, CODES=kind.reads_codes, ROWS=rows,
        **flags, STAGES=stages(kind, x.dtype, device, read * rank, 3, rows), num_warps=4, enable_fp_fusion=False,
        **options(device),
    )  # fmt: skip
    return tokens
