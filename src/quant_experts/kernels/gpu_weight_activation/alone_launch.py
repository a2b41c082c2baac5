"""Launches of `hopper_alone`: for which groups, and how their work is cut."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from quant_experts.kernels.gpu.launch import options, ptr, start
from quant_experts.kernels.gpu_tokens.layout import BLOCK, GroupLayout, Kind
from quant_experts.kernels.gpu_weight_activation import hopper_alone
from quant_experts.kernels.gpu_weight_activation.few_launch import LEAST_ROWS, SHORT_BLOCKS, is_wide
from quant_experts.kernels.gpu_weight_activation.layout import LinearLayout

MOST_BLOCKS = SHORT_BLOCKS
"""Blocks of 128 input channels, at most: programs hold the whole token in registers."""
SMALLEST_BLOCKS, SMALL_BLOCKS = 16, 32
"""Of the shortest tokens, and of longer ones, at most."""
KEPT = 4096
"""Decisions that are kept: a model calls every group with the same sizes."""


def takes_alone(group: GroupLayout, layout: LinearLayout) -> bool:
    """Whether `alone` computes a group for one token."""
    if group.before is not None or layout.up is not None:
        return False  # PyTorch smooths and rotates first; or there are experts
    return is_fastest(group.kind, layout.out_features, layout.weight.shape[0], layout.scale.device)


@lru_cache(KEPT)
def is_fastest(kind: Kind, n: int, blocks: int, device: torch.device) -> bool:
    """Whether one launch is possible and the fastest for a token of so many blocks of channels, and n outputs, as
    measured on an H200."""
    if kind.code_type != torch.int8 or n < LEAST_ROWS or blocks > MOST_BLOCKS or kind.rows:
        return False
    return not (kind.rotation and is_wide(n, device))  # in each of very many programs it costs more than a launch


def tile(n: int, blocks: int, device: torch.device) -> dict[str, int]:
    """Rows and warps of a program, and turns that a warp asks for at a time, as measured on an H200."""
    if blocks > SMALL_BLOCKS:
        rows, ways, most = 32, 4, 4
    elif blocks > SMALLEST_BLOCKS:
        rows, ways, most = (16, 2, 8) if is_wide(n, device) else (32, 4, 8)
    else:
        rows, ways, most = 32, 2, 8
    turns = -(-blocks // ways)
    return dict(BN=rows, WAYS=ways, AHEAD=-(-turns // -(-turns // most)))


@lru_cache(KEPT)
def constants(kind: Kind, n: int, blocks: int, device: torch.device) -> dict[str, Any]:
    """What the kernel is compiled for, launch options among it."""
    cut = tile(n, blocks, device)
    ways, ahead = cut["WAYS"], cut["AHEAD"]
    turns = -(-blocks // ways)
    parts = -(-blocks * BLOCK // (256 * ways))
    held = max(2 * parts, -(-turns // ahead) * ahead)
    return dict(
        LARGEST=kind.largest_code, SMOOTH=kind.smooths, ROT=kind.rotation, PARTS=parts, TURNS=held + held % 2, **cut,
        EVEN=blocks % (ways * ahead) == 0, ONCE=turns <= ahead, num_warps=ways, enable_fp_fusion=False,
        **options(device),
    )  # fmt: skip


def alone(x: Tensor, group: GroupLayout, layout: LinearLayout) -> Tensor:
    """x (1, K), contiguous -> outputs (1, N), where `takes_alone`."""
    n, blocks, device = layout.out_features, layout.weight.shape[0], x.device
    chosen = constants(group.kind, n, blocks, device)
    y = torch.empty(1, n, dtype=x.dtype, device=device)
    nothing = layout.scale
    start(
        hopper_alone.kernel, (-(-n // chosen["BN"]),),
        layout.weight, x, ptr(group.inverse_smooth, nothing), y, layout.scale, ptr(layout.bias, nothing), n, x.shape[1],
        blocks, BIAS=layout.bias is not None, **chosen,
    )  # fmt: skip
    return y
