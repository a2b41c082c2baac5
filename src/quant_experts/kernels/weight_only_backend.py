"""The GPU backend of weight-only schemes: allocations and launches around `triton_weight_only_*`, tiles by size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared
from quant_experts.kernels.triton_launch import INTERPRETED, options, overlapped, programs, ptr, zeros
from quant_experts.kernels.weight_only_layout import (
    BLOCK,
    GroupLayout,
    LinearLayout,
    Tokens,
    fits_groups,
    pack_group,
    pack_linear,
    unpack_codes,
)

CHUNK = 4096
"""Input channels that one program scales at a time."""
MAX_TILES = 4096
"""Tiles of a launch that is cut along the input channels."""
FEW_TOKENS = 32
"""Up to here a tile reads only the factors that its tokens use; more tokens use nearly all."""
BAND = 8
"""Token tiles whose values stay in the cache while the weights pass by once."""
STEP = {4: 128, 3: 256}
"""Input channels of a step of the linear kernel, by bits."""


class Tile(NamedTuple):
    """How the linear kernel cuts its work."""

    rows: int
    tokens: int
    warps: int
    stages: int
    programs: int
    """The most programs a multiprocessor that input channels are cut for."""


@cache
def usable() -> bool:
    """Whether the kernels can run: Triton is installed, and there is a GPU that copies ahead (or the interpreter)."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def fits(weights: tuple[int, int | None, bool]) -> bool:
    """Weights of at most 4 bits, one scale a channel or groups of 32, 64, 128 or multiples of 256; others run on the
    reference."""
    bits, group_size, _ = weights
    return bits <= 4 and fits_groups(group_size)


@dataclass(frozen=True)
class Packed:
    """A group and its linears, stacked."""

    group: GroupLayout
    linear: LinearLayout


def pack(group: GroupOperands, linears: list[LinearOperands], _dtype: torch.dtype = torch.float32) -> Packed:
    """Lay a group out; see `weight_only_layout`."""
    _counters(linears[0].codes.device)  # made before a CUDA graph may be captured
    return Packed(pack_group(group, linears[0].codes.shape[1], linears[0].codes.device), pack_linear(linears))


def apply(x: Tensor, packed: Packed) -> Tensor:
    """x (M, K) -> outputs of all linears of a group side by side (M, sum of N), in x's dtype."""
    return linear(prepare(x, packed.group), packed.linear)


def codes(packed: Packed, rows: slice, columns: int) -> Tensor:
    """(N, K) int8 codes of some rows of a stacked layout."""
    high = packed.linear.high
    return unpack_codes(packed.linear.low[:, rows], None if high is None else high[:, rows], columns)


def prepare(x: Tensor, group: GroupOperands | GroupLayout) -> Tokens:
    """As `reference.prepare`, laid out for `linear`: values and hidden values are rounded to float16 in units of each
    token's largest value, experts chosen in float32."""
    from quant_experts.kernels.triton_weight_only_prepare import scale_tokens

    layout = group if isinstance(group, GroupLayout) else pack_group(group, x.shape[1], x.device)
    (m, k), device, dtype = x.shape, x.device, x.dtype
    inverse = layout.inverse
    if layout.rotation and layout.signs is None:
        x = x.float() if inverse is None else x.float() * inverse
        x, inverse = reference.rotate(x, layout.rotation), None
    x = x.contiguous()
    padded = max(1, -(-k // BLOCK)) * BLOCK
    values = torch.empty(m, padded, dtype=torch.float16, device=device)
    unit = torch.empty(m, dtype=torch.float32, device=device)
    columns = 0 if layout.down is None else len(layout.down)
    hidden = torch.empty(m, columns, dtype=torch.float16, device=device) if columns else None
    expert = torch.empty(m, dtype=torch.int32, device=device) if layout.experts else None
    tokens = Tokens(
        values=values, codes=None, token_scale=None, shared_hidden=None, routed_hidden=None, expert=expert,
        unit=unit, hidden=hidden, headroom=layout.headroom, experts=layout.experts, dtype=dtype,
    )  # fmt: skip
    if not m:
        return tokens
    rotation = 0 if layout.signs is None else layout.rotation
    chunk = min(CHUNK, max(1 << (padded - 1).bit_length(), 16 * rotation))
    scale_tokens[(m, -(-padded // chunk) if m <= 64 else 1)](
        x, ptr(inverse, unit), ptr(layout.signs, unit), values, unit, k, padded, CHUNK=chunk, ROT=rotation,
        SMOOTH=inverse is not None, PDL=overlapped(device), num_warps=8, **options(device),
    )  # fmt: skip
    if hidden is not None:
        _project(x, inverse, tokens, layout)
    return tokens


def linear(prepared: Prepared, weight: LinearOperands | LinearLayout) -> Tensor:
    """All rows of a layout in one launch -> (M, N) in the dtype of the input."""
    from quant_experts.kernels.triton_weight_only_linear import linear as kernel

    assert isinstance(prepared, Tokens) and prepared.values is not None
    layout = weight if isinstance(weight, LinearLayout) else pack_linear([weight])
    (m, padded), n, device = prepared.values.shape, layout.out_features, prepared.values.device
    y = torch.empty(m, n, dtype=prepared.dtype, device=device)
    if not y.numel():
        return y
    tile = tile_for(m, n, layout.bits, programs(device))
    tiles = -(-n // tile.rows) * -(-m // tile.tokens)
    shares = _shares(tiles, padded // STEP[layout.bits], tile.programs * programs(device))
    sums = torch.empty(tiles * shares * tile.rows * tile.tokens if shares > 1 else 1, device=device)
    up = layout.up if prepared.hidden is not None else None
    kernel[(tiles, shares)](
        layout.low, ptr(layout.high, layout.low), layout.pairs, prepared.values, ptr(up, y), ptr(prepared.hidden, y),
        ptr(prepared.expert, y), prepared.unit, layout.scale, ptr(layout.bias, layout.scale), y, sums,
        _counters(device), m, n, padded, shares, prepared.headroom,
        BITS=layout.bits, PER=layout.pieces, F=0 if up is None else len(up), E=0 if up is None else prepared.experts,
        R=32 if up is None else up.shape[2], BIAS=layout.bias is not None, BN=tile.rows, BM=tile.tokens, BAND=BAND,
        DENSE=m > FEW_TOKENS, SPLIT=shares > 1, STAGES=tile.stages,
        ASSEMBLY=not INTERPRETED, PDL=overlapped(device), num_warps=tile.warps, **options(device),
    )  # fmt: skip
    return y


def _project(x: Tensor, inverse: Tensor | None, tokens: Tokens, layout: GroupLayout) -> None:
    from quant_experts.kernels.triton_weight_only_prepare import project

    assert tokens.values is not None and layout.down is not None
    (m, padded), device, router = tokens.values.shape, x.device, layout.router_weight
    rows, chunk, step, warps = (16, 32, 128, 4) if m <= 16 or INTERPRETED else (64, 64, 64, 4)
    if m > 1024:
        rows, chunk, warps = 128, 128, 8
    blocks, chunks = -(-m // rows), -(-len(layout.down) // chunk) + (layout.experts > 0)
    experts = 16 if router is None else len(router)
    shares = _shares(blocks * chunks, padded // 128, programs(device))
    sums = torch.empty(blocks * chunks * shares * rows * max(chunk, experts) if shares > 1 else 1, device=device)
    project[(blocks, chunks, shares)](
        x, ptr(inverse, sums), tokens.values, tokens.unit, layout.down, ptr(router, layout.down),
        ptr(layout.router_bias, sums), tokens.hidden, ptr(tokens.expert, sums), sums, _counters(device), m, x.shape[1],
        padded, shares, layout.headroom, FR=len(layout.down), RC=chunk, KB=step, E=layout.experts, EP=experts,
        ROWS=rows, SPLIT=shares > 1, STAGES=4,
        SMOOTH=inverse is not None, PDL=overlapped(device), num_warps=warps, **options(device),
    )  # fmt: skip


def tile_for(m: int, n: int, bits: int, programs: int) -> Tile:
    """Weights are the left operand, so a tile has at least 64 rows, and as few tokens as there are. Tiles of 256 tokens
    unpack each weight half as often, where there are enough of them for all multiprocessors."""
    if INTERPRETED:  # few and small programs: each costs the same there
        return Tile(64, 32, 4, 2, 1)
    if m <= FEW_TOKENS:
        return Tile(64, 16 if m <= 16 else 32, 4, 4, 3)
    if m <= 64:
        return Tile(128, 64, 8, 4 if bits == 4 else 3, 1)
    if bits == 4 and -(-n // 128) * -(-m // 256) >= 2 * programs:
        return Tile(128, 256, 8, 3, 1)
    return Tile(128, 128, 8, 3 if bits == 4 else 2, 1)


def _shares(tiles: int, steps: int, wanted: int) -> int:
    """Programs that share the input channels of a tile: as many as fill the GPU, each with two steps at least where
    there are any, none without."""
    shares = max(1, min(wanted // tiles, steps // 2)) if tiles <= MAX_TILES else 1
    return -(-steps // -(-steps // shares))


def _counters(device: torch.device) -> Tensor:
    return zeros("weight-only shares", MAX_TILES, device)
