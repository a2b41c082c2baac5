"""Launches of `hopper_alone`: for which groups, and how their work is cut."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_experts.kernels.gpu.launch import ALONE_COUNTS, ALONE_SUMS, options, programs, ptr, start, zeros
from quant_experts.kernels.gpu_weight_activation import hopper_alone
from quant_experts.kernels.gpu_weight_activation.hopper_launch import LEAST_ROWS, is_wide
from quant_experts.kernels.gpu_weight_activation.layout import BLOCK, GroupLayout, Kind, LinearLayout, padded_experts

MOST_SLICES = 8
"""Slices of a projection, whose sums each program adds up."""
MOST_BLOCKS = 160
"""Blocks of 128 input channels, at most: programs hold the whole token in registers."""
MOST_WEIGHTS = 1 << 25
"""Weights beside an expert that reads codes, at most, where tokens are not long."""
MOST_RANK = 64
"""Of experts: their up factors wait in registers."""
SHORT_BLOCKS, MEDIUM_BLOCKS, LONG_BLOCKS = 16, 32, 64
"""Blocks of a short token at most, of a medium one at most, and of one that is not long at most."""
KEPT = 4096
"""Decisions that are kept: a model calls every group with the same sizes."""


def takes_alone(group: GroupLayout, layout: LinearLayout, dtype: torch.dtype) -> bool:
    """Whether `alone` computes a group for one token of a type."""
    if group.before is not None or (layout.up is not None) != (group.kind.rows > 0):
        return False  # PyTorch smooths and rotates first; or linears of the group differ in having experts
    return is_fastest(group.kind, layout.out_features, layout.weight.shape[0], dtype, layout.scale.device)


@lru_cache(KEPT)
def is_fastest(kind: Kind, n: int, blocks: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether one launch is possible and the fastest for a token of a type and so many blocks of channels, and n
    outputs, as measured on an H200."""
    if kind.code_type != torch.int8 or n < LEAST_ROWS or blocks > MOST_BLOCKS:
        return False
    if not kind.rows:  # a rotation in each of very many programs costs more than a launch
        return not (kind.rotation and is_wide(n, device))
    if kind.rank > MOST_RANK or not slices(kind, n, blocks, device):
        return False
    if blocks > LONG_BLOCKS:  # what `prepare` does takes long
        return kind.reads_codes or (dtype == torch.bfloat16 and kind.row_bytes == dtype.itemsize)
    return kind.reads_codes and n * blocks * BLOCK <= MOST_WEIGHTS


def tile(n: int, blocks: int, device: torch.device) -> dict[str, int]:
    """Rows and warps of a program, and turns that a warp asks for at a time, as measured on an H200."""
    if blocks > LONG_BLOCKS:
        rows, ways, most = 16 if n <= 16 * programs(device) else 32, 8, 10
        most = most if blocks <= most * ways else 5
    elif blocks > MEDIUM_BLOCKS:
        rows, ways, most = 32, 4, 4
    elif blocks > SHORT_BLOCKS:
        rows, ways, most = (16, 2, 8) if is_wide(n, device) else (32, 4, 8)
    else:
        rows, ways, most = 32, 2, 8
    turns = -(-blocks // ways)
    return dict(BN=rows, WAYS=ways, AHEAD=-(-turns // -(-turns // most)))


def slices(kind: Kind, n: int, blocks: int, device: torch.device) -> int:
    """How many slices of the input channels the projection is cut into; 0 where it has too many rows for the programs
    that surely run at once."""
    cut = tile(n, blocks, device)
    tiles, turns = -(-n // cut["BN"]), -(-blocks // cut["WAYS"])
    projecting = kind.rows // int(hopper_alone.ROWS.value)
    return min(min(tiles, programs(device)) // projecting, MOST_SLICES, turns)


@lru_cache(KEPT)
def constants(kind: Kind, n: int, blocks: int, device: torch.device) -> dict[str, Any]:
    """What the kernel is compiled for, launch options among it."""
    cut = tile(n, blocks, device)
    ways, ahead = cut["WAYS"], cut["AHEAD"]
    turns = -(-blocks // ways)
    count = slice_turns = 0
    if kind.rows:
        slice_turns = -(-turns // slices(kind, n, blocks, device))
        count = -(-turns // slice_turns)
    parts = -(-blocks * BLOCK // (256 * ways))
    held = max(2 * parts, -(-turns // ahead) * ahead, count * slice_turns)
    return dict(
        LARGEST=kind.largest_code, SMOOTH=kind.smooths, ROT=kind.rotation, PARTS=parts, TURNS=held + held % 2, **cut,
        EVEN=blocks % (ways * ahead) == 0, ONCE=turns <= ahead, F=kind.factors, E=kind.experts,
        EP=padded_experts(kind.experts), R=kind.rank, TOTAL=kind.rows, SLICES=count,
        PADDED=1 << max(0, count - 1).bit_length(), SLICE_TURNS=slice_turns, CODES=kind.reads_codes, num_warps=ways,
        enable_fp_fusion=False, **options(device),
    )  # fmt: skip


def alone(x: Tensor, group: GroupLayout, layout: LinearLayout) -> Tensor:
    """x (1, K), contiguous -> outputs (1, N), where `takes_alone`."""
    kind, n, blocks, device = group.kind, layout.out_features, layout.weight.shape[0], x.device
    chosen = constants(kind, n, blocks, device)
    y = torch.empty(1, n, dtype=x.dtype, device=device)
    counts = zeros("alone counts", ALONE_COUNTS, device)
    sums = zeros("alone sums", ALONE_SUMS, device)  # written before it is read: need not stay zero
    nothing = layout.scale
    start(
        hopper_alone.kernel, (-(-n // chosen["BN"]),),
        layout.weight, x, ptr(group.inverse_smooth, nothing), ptr(group.projection, nothing), ptr(layout.up, nothing),
        ptr(group.router_bias, nothing), ptr(group.code_scale, nothing), y, layout.scale, ptr(layout.bias, nothing),
        sums if kind.reads_codes else sums.view(torch.float32), counts, n, x.shape[1], blocks, group.headroom,
        1.0 / group.headroom, BIAS=layout.bias is not None, **chosen,
    )  # fmt: skip
    return y
