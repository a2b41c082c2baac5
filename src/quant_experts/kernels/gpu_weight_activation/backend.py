"""The GPU backend: checks, allocations and launches around the Triton kernels, and the choice among them by size."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError
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
from quant_experts.kernels.gpu_tokens.layout import BLOCK, GroupLayout, Tokens, pack_group
from quant_experts.kernels.gpu_weight_activation.layout import LinearLayout, pack_linear, unpack_codes, unzigzag
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared

LINEAR_FEW = 8
"""Up to here `linear_few` multiplies, on Hopper fp8 tokens only."""
FEW_TILE = dict(BN=32, WAYS=4)
"""Its tile."""
FEW_STAGES, ALONE_STAGES = 4, 6
"""Steps that it copies ahead, and where a multiprocessor has one tile at most, so that nothing else is under way."""


@cache
def is_exact() -> bool:
    """Whether the kernels can run: Triton is installed, and there is a GPU with int8 matrix units (or the interpreter).
    Their int32 sums are exact wherever they run."""
    if find_spec("triton") is None:
        return False
    return INTERPRETED or (torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0))


def usable(activations: str) -> bool:
    """fp8 needs Hopper or later: before, Triton converts to e4m3 by way of float16, rounding twice, or not at all."""
    return is_exact() and (activations != "fp8" or INTERPRETED or torch.cuda.get_device_capability() >= (9, 0))


def fits(weights: tuple[int, int | None, bool]) -> bool:
    """Weights of at most 4 bits, symmetric, one scale a channel; others run on the reference."""
    bits, group_size, symmetric = weights
    return bits <= 4 and group_size is None and symmetric


@dataclass(frozen=True)
class Packed(recorded.Repeatable):
    """A group and its linears, stacked."""

    group: GroupLayout
    linear: LinearLayout


def pack(group: GroupOperands, linears: list[LinearOperands], dtype: torch.dtype = torch.float32) -> Packed:
    """Lay a group out for inputs of a dtype; see `layout`.

    Raises `QuantExpertsError` for what the kernels do not take.
    """
    device = linears[0].codes.device
    if group.activation_format == "fp8" and device.type == "cuda" and not overlapped(device):
        raise QuantExpertsError(f"{device} is older than Hopper, which fp8 needs: load with backend='reference'.")
    reserve(device, group.activation_format == "fp8")
    packed = Packed(pack_group(group, dtype, device), pack_linear(linears, group.activation_format))
    complete_writes(device)  # a program may ask for weights before it waits
    return packed


def apply(x: Tensor, packed: Packed) -> Tensor:
    """x (..., K) -> outputs of all linears of a group side by side (..., sum of N), in x's dtype."""
    return recorded.run(_apply, x, packed)


def _apply(x: Tensor, packed: Packed) -> Tensor:
    """As `apply` of x (M, K), by launches that are decided on now."""
    if x.shape[0] == 1 and hopper(x.device):
        from quant_experts.kernels.gpu_weight_activation import alone_launch

        if alone_launch.takes_alone(packed.group, packed.linear):
            return alone_launch.alone(x.contiguous(), packed.group, packed.linear)
    m, kind = x.shape[0], packed.group.kind
    sorts = prepare_launch.sorts_tokens(kind, m, packed.linear.out_features)
    settled = not _settles(m, packed, sorts)
    return linear(prepare_launch.prepare(x, packed.group, settled, sorts), packed.linear)


def _settles(m: int, packed: Packed, sorts: bool) -> bool:
    """Whether the linear itself chooses experts and finishes the hidden values of m tokens."""
    layout, kind = packed.linear, packed.group.kind
    if not hopper(layout.weight.device) or layout.up is None or sorts or not kind.rows:
        return False
    from quant_experts.kernels.gpu_weight_activation import few_launch, hopper_launch

    ranks = _ranks(kind.factors, kind.experts, kind.rank, m)
    if few_launch.takes_few(m, kind.code_type, layout, ranks):
        return kind.settles_few
    return hopper_launch.settles(kind, m) and (m > LINEAR_FEW or kind.code_type == torch.int8)


def codes(packed: Packed, rows: slice, columns: int) -> Tensor:
    """(N, K) int8 codes of some rows of a stacked layout."""
    stored = unpack_codes(packed.linear.weight[:, rows], columns)
    return unzigzag(stored) if packed.group.activation_format == "fp8" else stored


def prepare(x: Tensor, group: GroupOperands | GroupLayout) -> Tokens:
    """As `reference.prepare`, laid out for `linear`. Rows may be sorted by expert."""
    return prepare_launch.prepare(x, group)


def linear(prepared: Prepared, weight: LinearOperands | LinearLayout) -> Tensor:
    """All rows of a layout in one launch -> (M, N) in the dtype of the input."""
    assert isinstance(prepared, Tokens) and prepared.codes is not None
    fp8 = prepared.codes.dtype == torch.float8_e4m3fn
    layout = weight if isinstance(weight, LinearLayout) else pack_linear([weight], "fp8" if fp8 else "int")
    if layout is not weight:
        complete_writes(layout.weight.device)
    m, device = prepared.codes.shape[0], prepared.codes.device
    y = torch.empty(m, layout.out_features, dtype=prepared.dtype, device=device)
    if not y.numel():
        return y
    few = m <= LINEAR_FEW
    multiply = _linear_few if few else _plain_linear
    if hopper(device):
        from quant_experts.kernels.gpu_weight_activation import few_launch, hopper_launch

        ranks = 0
        if layout.up is not None and prepared.has_experts:
            ranks = _ranks(layout.up.shape[0], prepared.experts, layout.up.shape[2], m)
        if few_launch.takes_few(m, prepared.codes.dtype, layout, ranks):
            multiply = few_launch.linear_few
        elif not (few and fp8):
            multiply = hopper_launch.linear
    multiply(prepared, layout, y)
    return y


def _ranks(factors: int, experts: int, rank: int, m: int) -> int:
    """Of the factors that m tokens use, at most, together; `experts` of them are routed."""
    return (factors - experts + min(experts, m)) * rank


def _linear_few(tokens: Tokens, linear: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_activation.linear_few import linear_few

    assert tokens.codes is not None and (tokens.hidden is not None or not tokens.has_experts)
    (m, padded), n, device = tokens.codes.shape, linear.out_features, y.device
    up = linear.up if tokens.hidden is not None else None
    factors, rank = (0, RANK_MULTIPLE) if up is None else (up.shape[0], up.shape[2])
    experts = 0 if up is None or tokens.expert is None else tokens.experts
    tiles = -(-n // FEW_TILE["BN"])
    stages = ALONE_STAGES if tiles <= programs(device) else FEW_STAGES
    start(
        linear_few, (tiles,),
        linear.weight, tokens.codes, ptr(up, linear.weight), ptr(tokens.hidden, linear.scale),
        ptr(tokens.present, linear.scale), y, linear.scale, tokens.token_scale, ptr(linear.bias, linear.scale),
        m, n, padded, tokens.headroom, 1.0 / tokens.headroom, BM=8, F=factors, E=experts, R=rank,
        BIAS=linear.bias is not None, LATER=tokens.hidden_comes_later, ASSEMBLY=not INTERPRETED,
        PDL=overlapped(device), **FEW_TILE, STAGES=stages, num_warps=FEW_TILE["WAYS"], **options(device),
    )  # fmt: skip


def _plain_linear(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_activation.linear import linear as kernel

    assert tokens.codes is not None and (tokens.hidden is not None or not tokens.has_experts)
    (m, padded), n, device = tokens.codes.shape, layout.out_features, y.device
    bm = min(128, max(16, 1 << (m - 1).bit_length()))
    bn = 64 if bm == 16 else 128
    tiles = -(-n // bn) * -(-m // bm)
    shares = max(1, min(padded // BLOCK // 4, 4 * programs(device) // (tiles * 3)))
    if INTERPRETED:  # small tiles and few programs: each costs the same there
        bm, bn, shares = 16, 32, min(2, padded // BLOCK)
        tiles = -(-n // bn) * -(-m // bm)
    if tokens.codes.dtype != torch.int8:  # float32 sums, whose order would count
        shares = 1
    sums = zeros("linear sums", tiles * bn * bm if shares > 1 else 1, device)
    done = zeros("linear done", tiles if shares > 1 else 1, device)
    factors = layout.up is not None and tokens.hidden is not None
    start(
        kernel, (-(-n // bn), -(-m // bm), shares),
        layout.weight, tokens.codes, ptr(layout.up, layout.weight), ptr(tokens.hidden, layout.weight),
        ptr(tokens.present, done), y, layout.scale, tokens.token_scale, ptr(layout.bias, layout.scale),
        ptr(tokens.order, done), sums, done, m, n, padded, tokens.headroom,
        1.0 / tokens.headroom,
        BN=bn, BM=bm, F=len(layout.up) if factors and layout.up is not None else 0,
        R=layout.up.shape[2] if factors and layout.up is not None else 32, BIAS=layout.bias is not None,
        SORTED=tokens.order is not None, SHARES=shares, STAGES=4, ASSEMBLY=not INTERPRETED, PDL=overlapped(device),
        num_warps=4, **options(device),
    )  # fmt: skip
