"""The GPU backend: checks, allocations and launches around the Triton kernels, and the choice among them by size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import reference
from quant_experts.kernels.gpu.factors import RANK_MULTIPLE
from quant_experts.kernels.gpu.launch import (
    INTERPRETED,
    MAX_BLOCKS,
    hopper,
    options,
    overlapped,
    programs,
    ptr,
    reserve,
    shared_memory,
    zeros,
)
from quant_experts.kernels.gpu_weight_activation.layout import (
    BLOCK,
    MASK_TOKENS,
    GroupLayout,
    LinearLayout,
    Tokens,
    pack_group,
    pack_linear,
    padded_experts,
    unpack_codes,
    unzigzag,
)
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared

FEW_TOKENS, LONG_TOKENS = (17, 17) if INTERPRETED else (512, 256)
"""Up to here `prepare` prepares, above `prepare_many`; the second for tokens of more than LONG channels, whose
projection reads so much more than the factors of one expert that sorting pays earlier."""
LONG = 8192
LINEAR_FEW = 8
"""Up to here `linear_few` multiplies."""
UNSETTLED = 4
"""Up to here, and up to so many weights, the linear for Hopper GPUs settles experts itself. Every program of it does,
so that with more of either a launch of its own costs less."""
UNSETTLED_WEIGHTS = 1 << 25
UNSETTLED_SLICES = 8
"""Programs that share the input channels then, at most."""
FEW_TILE = dict(BN=32, WAYS=4)
"""Its tile."""
FEW_STAGES, ALONE_STAGES = 4, 6
"""Steps that it copies ahead, and where a multiprocessor has one tile at most, so that nothing else is under way."""
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
class Packed:
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
    reserve(device)
    return Packed(pack_group(group, dtype, device), pack_linear(linears, group.activation_format))


def apply(x: Tensor, packed: Packed) -> Tensor:
    """x (M, K) -> outputs of all linears of a group side by side (M, sum of N), in x's dtype."""
    return linear(_prepare(x, packed.group, settled=not _settles(len(x), packed)), packed.linear)


def _settles(m: int, packed: Packed) -> bool:
    """Whether the linear itself chooses experts and finishes the hidden values of m tokens."""
    weight = packed.linear.weight
    if not hopper(weight.device) or m > UNSETTLED or 2 * weight.numel() > UNSETTLED_WEIGHTS:
        return False
    from quant_experts.kernels.gpu_weight_activation import hopper_launch

    return hopper_launch.takes_few(m, packed.group.code_type, packed.linear, hidden=True)


def codes(packed: Packed, rows: slice, columns: int) -> Tensor:
    """(N, K) int8 codes of some rows of a stacked layout."""
    stored = unpack_codes(packed.linear.weight[:, rows], columns)
    return unzigzag(stored) if packed.group.activation_format == "fp8" else stored


def prepare(x: Tensor, group: GroupOperands | GroupLayout) -> Tokens:
    """As `reference.prepare`, laid out for `linear`. Rows may be sorted by expert."""
    return _prepare(x, group if isinstance(group, GroupLayout) else pack_group(group, x.dtype, x.device))


def _prepare(x: Tensor, layout: GroupLayout, settled: bool = True) -> Tokens:
    """As `prepare`; not settled, with sums instead of hidden values where tokens are few."""
    dtype = x.dtype
    if layout.before is not None:
        x = reference.transform(x, layout.before)
    x = x.contiguous()
    if not len(x):
        return replace(_allocate(x, layout), dtype=dtype)
    if len(x) <= (FEW_TOKENS if x.shape[1] <= LONG else LONG_TOKENS):
        tokens = _prepare_few(x, layout, settled)
    else:
        tokens = _prepare_many(x, layout)
    return tokens if dtype == x.dtype else replace(tokens, dtype=dtype)


def linear(prepared: Prepared, weight: LinearOperands | LinearLayout) -> Tensor:
    """All rows of a layout in one launch -> (M, N) in the dtype of the input."""
    assert isinstance(prepared, Tokens) and prepared.codes is not None
    fp8 = prepared.codes.dtype == torch.float8_e4m3fn
    layout = weight if isinstance(weight, LinearLayout) else pack_linear([weight], "fp8" if fp8 else "int")
    y = torch.empty(len(prepared.codes), layout.out_features, dtype=prepared.dtype, device=prepared.codes.device)
    if not y.numel():
        return y
    few = len(y) <= LINEAR_FEW
    multiply = _linear_few if few else _plain_linear
    if hopper(y.device):
        from quant_experts.kernels.gpu_weight_activation import hopper_launch

        hidden = prepared.hidden is not None or prepared.sums is not None
        if hopper_launch.takes_few(len(y), prepared.codes.dtype, layout, hidden):
            multiply = hopper_launch.linear_few
        elif not few:
            multiply = hopper_launch.linear
    multiply(prepared, layout, y)
    return y


def _allocate(x: Tensor, layout: GroupLayout) -> Tokens:
    """Tokens with what all of them have allocated and not written."""
    (m, k), device = x.shape, x.device
    padded = max(1, -(-k // BLOCK)) * BLOCK
    return Tokens(
        values=None,
        codes=torch.empty(m, padded, dtype=layout.code_type, device=device),
        token_scale=torch.empty(m, 1, device=device),
        shared_hidden=None,
        routed_hidden=None,
        expert=None,
        headroom=layout.headroom,
        dtype=x.dtype,
    )


def _inputs(x: Tensor, layout: GroupLayout) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Arguments that all `prepare` kernels begin with, and the constants that go with them."""
    flags = dict(SMOOTH=layout.inverse_smooth is not None, ROT=layout.rotation, PDL=overlapped(x.device))
    return (x, ptr(layout.inverse_smooth, x), ptr(layout.signs, x)), flags


@dataclass(frozen=True)
class _Projection:
    """How `prepare` cuts the projection of some tokens over programs."""

    slices: int
    programs: int
    sums: Tensor
    """(slices, M, TOTAL)"""
    constants: dict[str, Any]

    @classmethod
    def none(cls, x: Tensor) -> _Projection:
        return cls(0, 0, x, dict(FACTOR_ROWS=0, TOTAL=0, RC=16, BM=8, WAYS=1, STAGES=1))

    @classmethod
    def of(cls, x: Tensor, layout: GroupLayout, steps: int, most: int) -> _Projection:
        """steps: blocks of 128 input channels. most: slices."""
        if layout.projection is None:
            return cls.none(x)
        total = layout.projection.shape[1]
        tile, most_slices = next((tile, slices) for limit, tile, slices in PROJECT_TILES if len(x) <= limit)
        tiles = -(-len(x) // tile["BM"]) * (total // tile["RC"])
        slices = min(-(-steps // tile["WAYS"]), most, most_slices, max(1, 3 * programs(x.device) // tiles))
        exact = layout.code_scale is not None and layout.code_type == torch.int8
        sums = torch.empty(slices, len(x), total, dtype=torch.int32 if exact else torch.float32, device=x.device)
        stages = _stages(x, layout, tile["RC"], 3 if tile["WAYS"] == 1 else 1, tile["BM"])
        constants = dict(FACTOR_ROWS=layout.factors * layout.rank, TOTAL=total, **tile, STAGES=stages)
        return cls(slices, tiles * slices, sums, constants)


def _prepare_few(x: Tensor, layout: GroupLayout, settled: bool) -> Tokens:
    few = _Few.of(x, layout, settled)
    few.begin()
    if few.reads_codes:
        if few.long:
            few.end(quantize=True, settle=False)
        few.project()
    settle = settled and few.cut.programs > 0
    quantize = few.long and not few.reads_codes
    if settle or quantize:
        few.end(quantize, settle)
    return few.tokens


@dataclass(frozen=True)
class _Few:
    """Launches of `prepare` for some tokens, if they are few."""

    tokens: Tokens
    """What they write."""
    layout: GroupLayout
    cut: _Projection
    nothing: _Projection
    most: Tensor
    """(M, parts) largest magnitudes"""
    inputs: tuple[Any, ...]
    """The first arguments of `begin` and `end`."""
    sizes: tuple[int, ...]
    """M, K, Kp, parts"""
    constants: dict[str, Any]
    """Of `begin` and `end`, launch options among them."""
    launch: dict[str, Any]
    """Options of any launch."""

    @classmethod
    def of(cls, x: Tensor, layout: GroupLayout, settled: bool) -> _Few:
        """Cut the work and allocate what it writes."""
        tokens = _allocate(x, layout)
        assert tokens.codes is not None
        (m, k), padded = x.shape, tokens.codes.shape[1]
        chunk = min(CHUNK, 1 << (padded - 1).bit_length())
        parts = -(-padded // chunk)
        cut = _Projection.of(x, layout, padded // BLOCK, MAX_SLICES if settled else UNSETTLED_SLICES)
        if not cut.programs:
            pass
        elif settled:
            later = layout.code_scale is not None or parts == 1
            tokens = replace(_with_hidden(tokens, layout), hidden_comes_later=later)
        else:
            bias, scale = layout.router_bias, layout.code_scale
            tokens = replace(tokens, experts=layout.experts, sums=cut.sums, router_bias=bias, code_scale=scale)
        most = torch.empty(m, parts, device=x.device)
        inputs, flags = _inputs(x, layout)
        launch = dict(PDL=flags["PDL"], num_warps=4, **options(x.device))
        constants = dict(LARGEST=layout.largest_code, CHUNK=chunk, PARTS=1 << (parts - 1).bit_length())
        constants |= dict(enable_fp_fusion=False) | flags | launch
        first = (*inputs, most, tokens.codes, tokens.token_scale)
        return cls(tokens, layout, cut, _Projection.none(x), most, first, (m, k, padded, parts), constants, launch)

    @property
    def long(self) -> bool:
        """Whether a token has several parts."""
        return self.sizes[3] > 1

    @property
    def reads_codes(self) -> bool:
        """Whether the expert does."""
        return self.layout.code_scale is not None

    def begin(self) -> None:
        from quant_experts.kernels.gpu_weight_activation.prepare import begin

        m, _, _, parts = self.sizes
        beside = self.nothing if self.reads_codes else self.cut
        projection = ptr(self.layout.projection, self.most)
        begin[(m * parts + beside.programs,)](
            *self.inputs, projection, beside.sums, *self.sizes, beside.slices, **beside.constants, **self.constants
        )

    def project(self) -> None:
        from quant_experts.kernels.gpu_weight_activation.prepare import project

        (m, _, padded, _), cut = self.sizes, self.cut
        project[(cut.programs,)](
            self.tokens.codes, self.layout.projection, cut.sums, cut.slices, m, padded, **cut.constants, **self.launch
        )

    def end(self, quantize: bool, settle: bool) -> None:
        from quant_experts.kernels.gpu_weight_activation.prepare import end

        (m, _, _, parts), layout, tokens = self.sizes, self.layout, self.tokens
        cut, other = self.cut if settle else self.nothing, self.most
        settling = layout.factors * -(-m // MASK_TOKENS) if settle else 0
        end[(m * parts * quantize + settling,)](
            *self.inputs, cut.sums, ptr(layout.router_bias, other), ptr(layout.code_scale, other),
            ptr(tokens.hidden, other), ptr(tokens.present, other), ptr(tokens.expert, other), *self.sizes, cut.slices,
            1.0 / layout.headroom, QUANTIZE=quantize, F=layout.factors, E=layout.experts,
            EP=padded_experts(layout.experts), R=layout.rank, TOTAL=cut.constants["TOTAL"],
            SLICES=1 << max(0, cut.slices - 1).bit_length(), CODES=self.reads_codes and settle, **self.constants,
        )  # fmt: skip


def _stages(x: Tensor, layout: GroupLayout, rows: int, most: int, tokens: int = BLOCK_TOKENS) -> int:
    """How many steps of 128 channels, of so many tokens and rows of the projection, fit shared memory.

    Raises `QuantExpertsError` where none does.
    """
    size = 0 if layout.projection is None else layout.projection.element_size()
    step = BLOCK * (tokens * x.element_size() + rows * size)
    fitting = shared_memory(x.device) * 9 // 10 // step
    if not fitting:
        raise QuantExpertsError(
            f"{layout.experts or 'No'} routed experts of rank {layout.rank} with {x.dtype} inputs are too large for "
            "this GPU's shared memory: load the model with backend='reference'."
        )
    return min(most, fitting)


def _with_hidden(tokens: Tokens, layout: GroupLayout) -> Tokens:
    """Tokens with what experts need allocated and not written."""
    assert tokens.codes is not None
    m, device = len(tokens.codes), tokens.codes.device
    return replace(
        tokens,
        experts=layout.experts,
        expert=torch.empty(m, dtype=torch.int32, device=device) if layout.experts else None,
        hidden=torch.empty(m, layout.factors * layout.rank, dtype=torch.float16, device=device),
        present=torch.empty(-(-m // MASK_TOKENS), dtype=torch.int32, device=device),
    )


def _prepare_many(x: Tensor, layout: GroupLayout) -> Tokens:
    from quant_experts.kernels.gpu_weight_activation.prepare_many import convert, measure, place

    tokens = _allocate(x, layout)
    assert tokens.codes is not None
    (m, k), padded, device, rank = x.shape, tokens.codes.shape[1], x.device, layout.rank
    factors, experts, width = layout.factors, layout.experts, padded_experts(layout.experts)
    inputs, flags = _inputs(x, layout)
    total = 0 if layout.projection is None else layout.projection.shape[1]
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
        m, k, padded, slices, FACTOR_ROWS=factors * rank, TOTAL=total, E=experts, EP=width, ROWS=rows, **flags,
        STAGES=_stages(x, layout, 4 * width if experts else 0, 4), num_warps=4, **options(device),
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
        LARGEST=layout.largest_code, TOTAL=total, F=factors, E=experts, R=rank, CODES=layout.code_scale is not None,
        ROWS=rows, **flags, STAGES=_stages(x, layout, read * rank, 3), num_warps=4, enable_fp_fusion=False,
        **options(device),
    )  # fmt: skip
    return tokens


def _linear_few(tokens: Tokens, linear: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_activation.linear_few import linear_few

    assert tokens.codes is not None
    (m, padded), n, device = tokens.codes.shape, linear.out_features, y.device
    up = linear.up if tokens.hidden is not None else None
    factors, rank = (0, RANK_MULTIPLE) if up is None else (up.shape[0], up.shape[2])
    experts = 0 if up is None or tokens.expert is None else tokens.experts
    tiles = -(-n // FEW_TILE["BN"])
    stages = ALONE_STAGES if tiles <= programs(device) else FEW_STAGES
    linear_few[(tiles,)](
        linear.weight, tokens.codes, ptr(up, linear.weight), ptr(tokens.hidden, linear.scale),
        ptr(tokens.present, linear.scale), y, linear.scale, tokens.token_scale, ptr(linear.bias, linear.scale),
        m, n, padded, tokens.headroom, 1.0 / tokens.headroom, BM=8, F=factors, E=experts, R=rank,
        BIAS=linear.bias is not None, LATER=tokens.hidden_comes_later, ASSEMBLY=not INTERPRETED,
        PDL=overlapped(device), **FEW_TILE, STAGES=stages, num_warps=FEW_TILE["WAYS"], **options(device),
    )  # fmt: skip


def _plain_linear(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    from quant_experts.kernels.gpu_weight_activation.linear import linear as kernel

    assert tokens.codes is not None
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
    kernel[(-(-n // bn), -(-m // bm), shares)](
        layout.weight, tokens.codes, ptr(layout.up, layout.weight), ptr(tokens.hidden, layout.weight),
        ptr(tokens.present, done), y, layout.scale, tokens.token_scale, ptr(layout.bias, layout.scale),
        ptr(tokens.order, done), sums, done, m, n, padded, tokens.headroom,
        1.0 / tokens.headroom,
        BN=bn, BM=bm, F=len(layout.up) if factors and layout.up is not None else 0,
        R=layout.up.shape[2] if factors and layout.up is not None else 32, BIAS=layout.bias is not None,
        SORTED=tokens.order is not None, SHARES=shares, STAGES=4, ASSEMBLY=not INTERPRETED, PDL=overlapped(device),
        num_warps=4, **options(device),
    )  # fmt: skip
