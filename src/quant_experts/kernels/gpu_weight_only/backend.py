"""The GPU backend of weight-only schemes: allocations and launches around `gpu_weight_only`, tiles by size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from quant_experts.kernels.gpu import recorded
from quant_experts.kernels.gpu.factors import RANK_MULTIPLE
from quant_experts.kernels.gpu.launch import (
    INTERPRETED,
    complete_writes,
    hopper,
    options,
    overlapped,
    programs,
    ptr,
    reserve,
    start,
    zeros,
)
from quant_experts.kernels.gpu_tokens import prepare_launch
from quant_experts.kernels.gpu_tokens.layout import BLOCK, SETTLED_RANK, GroupLayout, Tokens, pack_group, padded_experts
from quant_experts.kernels.gpu_weight_only.layout import PIECE, LinearLayout, fits_groups, pack_linear, unpack_codes
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared

MAX_TILES = 4096
"""Tiles of a launch that is cut along the input channels."""
FEW_TOKENS = 32
"""Up to here a tile reads only the factors that its tokens use; more tokens use nearly all."""
DECODE_TOKENS = 8
"""Up to here Hopper GPUs have a kernel of its own."""
LEAST_ROWS = 16
"""Rows of its tile: a layout has as many."""
LONG = 8192
"""Input channels, at most, of those that are not long for it."""
MOST_RANKS = 320
"""Ranks that it takes at most, of the factors that tokens use together: up factors wait in registers."""
MANY_TOKENS = 20 if INTERPRETED else 512
"""From here on weights are dequantized in memory and multiplied by the GPU's library, for inputs of 16 bits; on Hopper
those of 3 bits only."""
SLAB_ROWS = 64
"""Output channels a multiprocessor that are dequantized at a time: the library's tiles of 128 x 256 then fill whole
waves for multiples of 512 tokens."""
WORKSPACE = 144 << 20
"""Bytes that they may take, but for rounding to 256 channels."""
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
def usable(activations: str = "values") -> bool:
    """Whether the kernels can run (values are all they take): Triton is installed, and there is a GPU that copies ahead
    (or the interpreter)."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def fits(weights: tuple[int, int | None, bool]) -> bool:
    """Weights of at most 4 bits, one scale a channel or groups of 32, 64, 128 or multiples of 256; others run on the
    reference."""
    bits, group_size, _ = weights
    return bits <= 4 and fits_groups(group_size)


@dataclass(frozen=True)
class Packed(recorded.Repeatable):
    """A group and its linears, stacked."""

    group: GroupLayout
    linear: LinearLayout


def pack(group: GroupOperands, linears: list[LinearOperands], dtype: torch.dtype = torch.float32) -> Packed:
    """Lay a group out for inputs of a dtype; see `gpu_tokens.layout` and `gpu_weight_only.layout`.

    Raises `QuantExpertsError` for more experts than the kernels take.
    """
    device = linears[0].codes.device
    _counters(device)  # made before a CUDA graph may be captured
    reserve(device, False)
    layout = pack_group(group, dtype, device)
    packed = Packed(layout, pack_linear(linears, layout.headroom))
    complete_writes(device)  # a program may ask for weights before it waits
    return packed


def apply(x: Tensor, packed: Packed) -> Tensor:
    """x (..., K) -> outputs of all linears of a group side by side (..., sum of N), in x's dtype."""
    return recorded.run(_apply, x, packed)


def _apply(x: Tensor, packed: Packed) -> Tensor:
    """As `apply` of x (M, K), by launches that are decided on now."""
    m, n = x.shape[0], packed.linear.out_features
    sorts = _streams(m, x.dtype, packed.linear) and prepare_launch.sorts_tokens(packed.group.kind, m, n)
    return linear(prepare_launch.prepare(x, packed.group, not _settles(m, packed), sorts), packed.linear)


def _settles(m: int, packed: Packed) -> bool:
    """Whether the linear itself chooses experts and finishes the hidden values of m tokens."""
    kind, layout = packed.group.kind, packed.linear
    return layout.up is not None and kind.settles_few and _takes_few(m, layout, kind.experts)


def codes(packed: Packed, rows: slice, columns: int) -> Tensor:
    """(N, K) int8 codes of some rows of a stacked layout."""
    high = packed.linear.high
    return unpack_codes(packed.linear.low[:, rows], None if high is None else high[:, rows], columns)


def prepare(x: Tensor, group: GroupOperands | GroupLayout) -> Tokens:
    """As `reference.prepare`, laid out for `linear`: values and hidden values are rounded to float16 in units of each
    token's largest value."""
    return prepare_launch.prepare(x, group, sorts=False)


def linear(prepared: Prepared, weight: LinearOperands | LinearLayout) -> Tensor:
    """All rows of a layout -> (M, N) in the dtype of the input."""
    assert isinstance(prepared, Tokens) and prepared.codes is not None
    layout = weight if isinstance(weight, LinearLayout) else pack_linear([weight], prepared.headroom)
    if layout is not weight:
        complete_writes(layout.scale.device)
    m, device = len(prepared.codes), prepared.codes.device
    y = torch.empty(m, layout.out_features, dtype=prepared.dtype, device=device)
    if y.numel():
        multiply = _linear_in_memory if dequantizes(m, y.dtype) else _linear_in_registers
        if _streams(m, y.dtype, layout):
            from quant_experts.kernels.gpu_weight_only.hopper_launch import linear as multiply
        elif _takes_few(m, layout, prepared.experts):
            multiply = _linear_few
        assert prepared.sums is None or multiply is _linear_few, "nobody would settle the experts"
        multiply(prepared, layout, y)
    return y


def _streams(m: int, dtype: torch.dtype, layout: LinearLayout) -> bool:
    """Whether Hopper's persistent kernel multiplies. Many tokens by 3 bits, which take it longer to dequantize, are
    faster by the library."""
    many = layout.bits == 3 and dequantizes(m, dtype)
    return hopper(layout.scale.device) and m > DECODE_TOKENS and not many


def _takes_few(m: int, layout: LinearLayout, experts: int) -> bool:
    """Whether the kernel for few tokens multiplies, `experts` of whose factors are routed: on Hopper, blocks of 128
    channels in one group."""
    if not (0 < m <= DECODE_TOKENS and hopper(layout.scale.device)):
        return False
    ranks = 0 if layout.up is None else _used(layout.up, experts, m) * layout.up.shape[2]
    whole = layout.pieces * PIECE % BLOCK == 0
    return whole and layout.out_features >= LEAST_ROWS and ranks <= MOST_RANKS


def _used(up: Tensor, experts: int, m: int) -> int:
    """Factors that m tokens use at most; `experts` of them are routed."""
    return len(up) - experts + min(experts, 1 << (m - 1).bit_length())


def _linear_few(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_only.hopper_few import ROWS, kernel

    assert tokens.codes is not None
    (m, n), step, device = y.shape, STEP[layout.bits], y.device
    steps = tokens.codes.shape[1] // step
    nothing, up, sums, hidden = layout.scale, layout.up, tokens.sums, tokens.hidden
    if not tokens.has_experts:
        up = None
    factors, rank = (0, RANK_MULTIPLE) if up is None else (up.shape[0], up.shape[2])
    experts, workers = tokens.experts if factors else 0, 0
    slices, _, total = (0, 0, 0) if sums is None else sums.shape
    if sums is not None and factors:
        workers = factors
        hidden = torch.empty(m, factors * rank, dtype=torch.float16, device=device)
    ways, ahead, registers = few_tile(layout.bits, n, steps * step, 0 if experts else factors * rank, programs(device))
    start(
        kernel, (workers + -(-n // ROWS.value),),
        layout.low, ptr(layout.high, layout.low), layout.pairs, tokens.codes, ptr(up, nothing), ptr(sums, nothing),
        ptr(hidden, nothing), ptr(tokens.present, nothing), ptr(tokens.counts, nothing),
        ptr(tokens.router_bias, nothing), tokens.token_scale, layout.scale, ptr(layout.bias, nothing), y, m, n, steps,
        layout.pairs.shape[1], layout.pieces * PIECE // BLOCK, workers, tokens.headroom, 1.0 / tokens.headroom,
        BLOCKS=step // BLOCK, BM=DECODE_TOKENS, WAYS=ways, AHEAD=ahead, EVEN=steps % (ways * ahead) == 0,
        ONCE=steps <= ways * ahead, F=factors, E=experts, R=rank, USED=0 if up is None else _used(up, experts, m),
        TOTAL=total, EP=padded_experts(experts), SLICES=slices, SETTLES=workers > 0, BIAS=layout.bias is not None,
        num_warps=ways, maxnreg=registers, **options(device),
    )  # fmt: skip


def few_tile(bits: int, n: int, k: int, static_rank: int, multiprocessors: int) -> tuple[int, int, int | None]:
    """Warps of a program, steps that a warp asks for at a time, and registers of a thread if they are limited, as
    measured on an H200; static_rank: of the one expert that serves all tokens, 0 for none or routed ones."""
    if n >= 128 * multiprocessors:
        if not static_rank:
            return 1, 2 if bits == 4 else 1, None
        return 2, 1, 56 if bits == 4 and static_rank <= SETTLED_RANK else None
    if k > LONG:
        return 8, 5 if bits == 4 else 2, 128
    return 4, 7 if bits == 4 else 4, None


def dequantizes(m: int, dtype: torch.dtype) -> bool:
    """Whether weights are dequantized in memory. Sums leave the library's product in float16, so not for float32."""
    return m >= MANY_TOKENS and dtype != torch.float32


def _factors(tokens: Tokens, layout: LinearLayout) -> tuple[Tensor | None, dict[str, int]]:
    """The up factors that tokens have hidden values for, and constants of kernels that read them."""
    up = None if tokens.hidden is None else layout.up
    return up, dict(F=0, R=32) if up is None else dict(F=len(up), R=up.shape[2])


def _linear_in_registers(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_only.linear import linear as kernel

    assert tokens.codes is not None
    (m, n), padded, device = y.shape, tokens.codes.shape[1], y.device
    tile = tile_for(m, n, layout.bits, programs(device))
    tiles = -(-n // tile.rows) * -(-m // tile.tokens)
    shares = _shares(tiles, padded // STEP[layout.bits], tile.programs * programs(device))
    sums = torch.empty(tiles * shares * tile.rows * tile.tokens if shares > 1 else 1, device=device)
    up, factors = _factors(tokens, layout)
    start(
        kernel, (tiles, shares),
        layout.low, ptr(layout.high, layout.low), layout.pairs, tokens.codes, ptr(up, y), ptr(tokens.hidden, y),
        ptr(tokens.present, y), tokens.token_scale, layout.scale, ptr(layout.bias, layout.scale), y, sums,
        _counters(device), m, n, layout.pairs.shape[1], padded, shares, tokens.headroom, BITS=layout.bits,
        PER=layout.pieces, **factors, BIAS=layout.bias is not None, BN=tile.rows, BM=tile.tokens, BAND=BAND,
        DENSE=m > FEW_TOKENS, SPLIT=shares > 1, STAGES=tile.stages, ASSEMBLY=not INTERPRETED, PDL=overlapped(device),
        num_warps=tile.warps, **options(device),
    )  # fmt: skip


def _linear_in_memory(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_only.many import dequantize_rows, rescale

    assert tokens.codes is not None
    (m, n), padded, device = y.shape, tokens.codes.shape[1], y.device
    up, factors = _factors(tokens, layout)
    values = tokens.codes
    if up is not None and tokens.hidden is not None:
        values = torch.cat([values, tokens.hidden], dim=1)
    width, sums = values.shape[1], y.view(torch.float16)
    rows, tile = slab_rows(n, width, programs(device)), 64
    weights = torch.empty(rows, width, dtype=torch.float16, device=device)
    steps, pdl = padded // STEP[layout.bits] + (up is not None), overlapped(device)
    for first in range(0, n, rows):
        end = min(n, first + rows)
        start(
            dequantize_rows, (steps, -(-(end - first) // tile)),
            layout.low, ptr(layout.high, layout.low), layout.pairs, layout.scale, layout.unit, ptr(up, weights),
            weights, first, end, n, layout.pairs.shape[1], padded, width, tokens.headroom, BITS=layout.bits,
            PER=layout.pieces, **factors, BN=tile, ASSEMBLY=not INTERPRETED, PDL=pdl, num_warps=4, **options(device),
        )  # fmt: skip
        torch.mm(values, weights[: end - first].T, out=sums[:, first:end])
        start(
            rescale, (-(-m // 8), -(-(end - first) // 512)),
            sums, y, tokens.token_scale, layout.unit, ptr(layout.bias, layout.unit), first, end, m, n,
            BIAS=layout.bias is not None, BM=8, BN=512, PDL=pdl, num_warps=4, **options(device),
        )  # fmt: skip


def slab_rows(n: int, width: int, programs: int) -> int:
    """Output channels that are dequantized at a time, a multiple of 256: equal parts where the workspace is too small
    for what would fill the multiprocessors."""
    rows = min(n, SLAB_ROWS * programs)
    parts = -(-rows * width * 2 // WORKSPACE)
    return -(-rows // (parts * 256)) * 256


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
