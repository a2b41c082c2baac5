"""The GPU backend: checks, allocations and launches around the Triton kernels, and the choice among them by size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.gpu_layout import (
    BLOCK,
    MASK_TOKENS,
    RANK_MULTIPLE,
    GroupLayout,
    LinearLayout,
    Tokens,
    pack_group,
    pack_linear,
    padded_experts,
    unpack_codes,
)
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared
from quant_experts.kernels.triton_launch import (
    INTERPRETED,
    MAX_BLOCKS,
    MAX_PLACES,
    hopper,
    options,
    overlapped,
    programs,
    reserve,
    zeros,
)

FEW_TOKENS = 16 if INTERPRETED else 256
"""Up to here one launch prepares; measured in docs/performance.md."""
OVERLAP = True
"""Whether hidden values of few tokens are computed beside the linear's main loop."""
RANK_CHUNK = 64
"""Rows of the stacked down factors that one program takes when tokens are few."""
CHUNK = 4096
"""Input channels that one program quantizes of a token when tokens are few."""
BLOCK_TOKENS = 16 if INTERPRETED else 64
"""Tokens that one program takes when tokens are many."""
MAX_SLICES = 28
"""Programs that share the input channels of a block of tokens: each is a read of the one that adds them up."""


@cache
def is_exact() -> bool:
    """Whether the kernels can run: Triton is installed, and there is a GPU with int8 matrix units (or the interpreter).
    Their int32 sums are exact wherever they run."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def fits(weights: tuple[int, int | None, bool]) -> bool:
    """Weights of at most 4 bits, symmetric, one scale a channel; others run on the reference."""
    bits, group_size, symmetric = weights
    return bits <= 4 and group_size is None and symmetric


@dataclass(frozen=True)
class Packed:
    """A group and its linears, stacked."""

    group: GroupLayout
    linear: LinearLayout


def pack(group: GroupOperands, linears: list[LinearOperands]) -> Packed:
    """Lay a group out; see `gpu_layout`."""
    if hopper(linears[0].codes.device):
        reserve(linears[0].codes.device)
    return Packed(pack_group(group), pack_linear(linears))


def apply(x: Tensor, packed: Packed) -> Tensor:
    """x (M, K) -> outputs of all linears of a group side by side (M, sum of N), in x's dtype."""
    return linear(prepare(x, packed.group, overlap=OVERLAP and hopper(x.device)), packed.linear)


def codes(packed: Packed, rows: slice, columns: int) -> Tensor:
    """(N, K) int8 codes of some rows of a stacked layout."""
    return unpack_codes(packed.linear.weight[:, rows], columns)


def prepare(x: Tensor, group: GroupOperands | GroupLayout, overlap: bool = False) -> Tokens:
    """As `reference.prepare`, laid out for `linear`. Rows may be sorted by expert.

    overlap: the result goes to exactly one `linear`, launched next, which waits itself for what is still pending.
    """
    layout = group if isinstance(group, GroupLayout) else pack_group(group)
    dtype = x.dtype
    if layout.rotation:  # before the kernels: in them it would cost each program that reads a token again
        m = None if layout.smooth_scale is None else layout.smooth_scale[0]
        x = reference.rotate(reference.smooth(x, m), layout.rotation)
        layout = replace(layout, smooth_scale=None)
    x = x.contiguous()
    if not len(x):
        tokens = _allocate(x, layout, sort=False)
    elif len(x) <= FEW_TOKENS:
        tokens = _prepare_few(x, layout, overlap)
    else:
        tokens = _prepare_many(x, layout)
    return tokens if dtype == x.dtype else replace(tokens, dtype=dtype)


def linear(prepared: Prepared, weight: LinearOperands | LinearLayout) -> Tensor:
    """All rows of a layout in one launch -> (M, N) in the dtype of the input."""
    assert isinstance(prepared, Tokens) and prepared.codes is not None
    layout = weight if isinstance(weight, LinearLayout) else pack_linear([weight])
    y = torch.empty(len(prepared.codes), layout.out_features, dtype=prepared.dtype, device=prepared.codes.device)
    if not y.numel():
        return y
    if hopper(y.device):
        from quant_experts.kernels import hopper_launch

        hopper_launch.linear(prepared, layout, y)
    else:
        _plain_linear(prepared, layout, y)
    return y


def _allocate(x: Tensor, layout: GroupLayout, sort: bool) -> Tokens:
    """Tokens with every tensor allocated and none written."""
    (m, k), device = x.shape, x.device
    padded = max(1, -(-k // BLOCK)) * BLOCK
    factors = layout.factors
    columns = 0 if layout.down is None else factors * layout.down.shape[1]
    return Tokens(
        values=None,
        codes=torch.empty(m, padded, dtype=torch.int8, device=device),
        token_scale=torch.empty(m, 1, device=device),
        shared_hidden=None,
        routed_hidden=None,
        expert=torch.empty(m, dtype=torch.int32, device=device) if layout.experts else None,
        hidden=torch.empty(m, columns, dtype=torch.float16, device=device) if factors else None,
        scales=torch.empty(2, m, device=device),
        present=torch.empty(-(-m // MASK_TOKENS), dtype=torch.int32, device=device) if factors else None,
        order=torch.empty(m, dtype=torch.int32, device=device) if sort else None,
        dtype=x.dtype,
    )


def _shape(layout: GroupLayout) -> dict[str, int]:
    """Constants that a layout fixes."""
    rank = RANK_MULTIPLE if layout.down is None else layout.down.shape[1]
    return dict(F=layout.factors, E=layout.experts, EP=padded_experts(max(1, layout.experts)), R=rank)


def _project_codes(tokens: Tokens, layout: GroupLayout) -> None:
    """Hidden values from codes that are written."""
    from quant_experts.kernels.triton_project_codes import project_codes

    assert tokens.codes is not None and layout.down is not None
    (m, padded), rank, device = tokens.codes.shape, layout.down.shape[1], tokens.codes.device
    rows = 16 if m <= 16 or INTERPRETED else 64
    blocks = -(-m // rows)
    slices = min(padded // BLOCK, MAX_SLICES, max(1, 2 * programs(device) // blocks))
    project_codes[(blocks, slices)](
        tokens.codes, layout.down, layout.code_scale, tokens.hidden, tokens.present,
        zeros("code sums", blocks * rows * rank, device), zeros("code sums done", blocks, device), m, padded, slices,
        R=rank, ROWS=rows, PDL=overlapped(device), num_warps=4, **options(device),
    )  # fmt: skip


def _prepare_few(x: Tensor, layout: GroupLayout, overlap: bool) -> Tokens:
    from quant_experts.kernels.triton_prepare import project_few, quantize_few

    tokens = _allocate(x, layout, sort=False)
    assert tokens.codes is not None
    (m, k), padded, shape = x.shape, tokens.codes.shape[1], _shape(layout)
    flags = dict(SMOOTH=layout.smooth_scale is not None, PLAIN=INTERPRETED, PDL=overlapped(x.device))
    smooth = _or(layout.smooth_scale, x)
    pending, reads_codes = 0, layout.code_scale is not None
    if layout.factors and not reads_codes:
        rows = 16 if m <= 16 else 32
        blocks, chunks = -(-m // rows), -(-shape["F"] * shape["R"] // RANK_CHUNK)
        pending = blocks * chunks
        assert pending <= MAX_PLACES
        slices = min(padded // BLOCK, MAX_SLICES, max(1, 2 * programs(x.device) // pending))
        part = torch.empty(
            pending * slices * rows * (RANK_CHUNK + shape["EP"] + 1), dtype=torch.float32, device=x.device
        )
        project_few[(pending, slices)](
            x, smooth, layout.down, _or(layout.router_weight, x), _or(layout.router_bias, part), tokens.hidden,
            tokens.present, _or(tokens.expert, part), part, zeros("few tokens", MAX_PLACES, x.device),
            zeros("finished" if overlap else "unread", 2, x.device), m, k, padded, layout.headroom,
            slices, **shape, RC=RANK_CHUNK, ROWS=rows, BATCH=8 if rows == 16 else 4, **flags, num_warps=8, maxnreg=128,
            **options(x.device),
        )  # fmt: skip
    chunk = min(CHUNK, 1 << (padded - 1).bit_length())
    quantize_few[(m, -(-padded // chunk))](
        x, smooth, tokens.codes, tokens.scales, tokens.token_scale, m, k, padded, layout.headroom,
        LARGEST=2 ** (layout.activation_bits - 1) - 1, F=shape["F"], CODES=reads_codes, CHUNK=chunk,
        WAIT=not (overlap and pending), **flags, num_warps=8, **options(x.device),
    )  # fmt: skip
    if reads_codes:
        _project_codes(tokens, layout)
    return replace(tokens, pending=pending) if overlap else tokens


def _prepare_many(x: Tensor, layout: GroupLayout) -> Tokens:
    from quant_experts.kernels.triton_prepare_many import measure, place, project, quantize_sorted

    sort = layout.experts > 0
    tokens = _allocate(x, layout, sort)
    assert tokens.codes is not None
    (m, k), padded, device, shape = x.shape, tokens.codes.shape[1], x.device, _shape(layout)
    flags = dict(PLAIN=INTERPRETED, PDL=overlapped(device), SMOOTH=layout.smooth_scale is not None)
    rows = BLOCK_TOKENS
    blocks = -(-m // rows)
    slices = min(padded // BLOCK, max(1, 4 * programs(device) // blocks), 16)
    expert = torch.empty(m, dtype=torch.int32, device=device)
    absmax = torch.empty(m, dtype=torch.float32, device=device)
    counts = torch.empty(blocks, shape["EP"], dtype=torch.int32, device=device)
    part = torch.empty(
        blocks * slices * rows * max(shape["EP"] + 1, 2 * shape["R"]), dtype=torch.float32, device=device
    )
    done = zeros("many tokens", max(blocks, MAX_BLOCKS), device)
    smooth = _or(layout.smooth_scale, absmax)
    measure[(blocks, slices)](
        x, smooth, _or(layout.router_weight, x), _or(layout.router_bias, absmax), expert, absmax, counts, part, done,
        m, k, padded, E=shape["E"], EP=shape["EP"], ROWS=rows, SLICES=slices, **flags, num_warps=8, **options(device),
    )  # fmt: skip
    if sort:
        place[(blocks,)](
            expert, counts, tokens.order, blocks, m, EP=shape["EP"], ROWS=rows, BLOCKS=64, PDL=flags["PDL"],
            num_warps=8, **options(device),
        )  # fmt: skip
    tile, width = 8, min(512, 1 << (padded - 1).bit_length())
    quantize_sorted[(-(-m // tile), -(-padded // width))](
        x, smooth, expert, _or(tokens.order, expert), absmax, tokens.codes, tokens.scales, tokens.token_scale,
        _or(tokens.expert, expert), m, k, padded, layout.headroom, LARGEST=2 ** (layout.activation_bits - 1) - 1,
        F=shape["F"], E=shape["E"], CODES=layout.code_scale is not None, TILE=tile, WIDTH=width, **flags, num_warps=8,
        **options(device),
    )  # fmt: skip
    if layout.code_scale is not None:
        _project_codes(tokens, layout)
    elif layout.factors:
        project[(blocks, slices)](
            x, smooth, layout.down, expert, _or(tokens.order, expert), absmax, tokens.hidden, tokens.present, part,
            done, m, k, padded, layout.headroom, slices, F=shape["F"], E=shape["E"], R=shape["R"], ROWS=rows,
            SMOOTH=flags["SMOOTH"], PDL=flags["PDL"], num_warps=8, **options(device),
        )  # fmt: skip
    return tokens


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor for a pointer argument that the kernel does not read."""
    return other if tensor is None else tensor


def _plain_linear(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.triton_linear import linear as kernel

    assert tokens.codes is not None
    (m, padded), n, device = tokens.codes.shape, layout.out_features, y.device
    bm = min(128, max(16, 1 << (m - 1).bit_length()))
    bn = 64 if bm == 16 else 128
    tiles = -(-n // bn) * -(-m // bm)
    shares = max(1, min(padded // BLOCK // 4, 4 * programs(device) // (tiles * 3)))
    if INTERPRETED:  # small tiles and few programs: each costs the same there
        bm, bn, shares = 16, 32, min(2, padded // BLOCK)
        tiles = -(-n // bn) * -(-m // bm)
    sums = zeros("linear sums", tiles * bn * bm if shares > 1 else 1, device)
    done = zeros("linear done", tiles if shares > 1 else 1, device)
    factors = layout.up is not None and tokens.hidden is not None
    kernel[(-(-n // bn), -(-m // bm), shares)](
        layout.weight, tokens.codes, _or(layout.up, layout.weight), _or(tokens.hidden, layout.weight),
        _or(tokens.present, done), y, layout.scale, tokens.scales, _or(layout.bias, layout.scale),
        _or(tokens.order, done), sums, done, m, n, padded,
        BN=bn, BM=bm, F=len(layout.up) if factors and layout.up is not None else 0,
        R=layout.up.shape[2] if factors and layout.up is not None else 32, BIAS=layout.bias is not None,
        SORTED=tokens.order is not None, SHARES=shares, STAGES=4, ASSEMBLY=not INTERPRETED, PDL=overlapped(device),
        num_warps=4, **options(device),
    )  # fmt: skip
