"""Launches of `hopper_few`: which groups and numbers of tokens it takes, and tile sizes by shape."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.kernels.gpu.factors import RANK_MULTIPLE
from quant_experts.kernels.gpu.launch import options, programs, ptr, start
from quant_experts.kernels.gpu_tokens import hopper_settle
from quant_experts.kernels.gpu_tokens.layout import Tokens, padded_experts
from quant_experts.kernels.gpu_weight_activation import hopper_few
from quant_experts.kernels.gpu_weight_activation.layout import LinearLayout

FEW, MOST_FEW = 8, 16
"""Tokens that `linear_few` takes at most of any group, and of groups that are neither wide nor too long."""
MOST_RANKS = 320
"""Ranks that it takes at most, of the factors that tokens use together: up factors wait in registers."""
FEW_RANKS = 64
"""Of experts whose programs do with few registers, at most."""
MOST_BLOCKS, MOST_BLOCKS_OF_EXPERTS = 160, 32
"""Blocks of 128 channels, at most, of groups of which it takes more than FEW tokens, without experts and with them."""
FEW_BLOCKS, SHORT_BLOCKS = 32, 64
"""Blocks of short inputs, and of those that are not long, at most."""
LEAST_ROWS = 32
"""Rows of the largest tile of `linear_few`: a layout has as many."""


def takes_few(m: int, codes: torch.dtype, layout: LinearLayout, ranks: int) -> bool:
    """Whether `linear_few` is the fastest for so many tokens that use experts of so many ranks together, as measured on
    an H200."""
    if codes != torch.int8 or layout.out_features < LEAST_ROWS or ranks > MOST_RANKS:
        return False
    most = MOST_BLOCKS_OF_EXPERTS if ranks else MOST_BLOCKS
    wide = is_wide(layout.out_features, layout.scale.device)
    return m <= FEW or (m <= MOST_FEW and not wide and layout.weight.shape[0] <= most)


def is_wide(n: int, device: torch.device) -> bool:
    """Whether there are many more tiles than multiprocessors."""
    return n >= 128 * programs(device)


def few_tile(m: int, layout: LinearLayout, all_ranks: int, projects: bool) -> tuple[int, int, int, int | None]:
    """Rows and warps of a program, blocks of 128 channels that a warp asks for at a time, and registers of a thread if
    they are limited, as measured on an H200; all_ranks: of all experts; projects: whether programs project codes."""
    blocks, registers = layout.weight.shape[0], None
    if is_wide(layout.out_features, layout.scale.device):
        if all_ranks and not projects:
            uneven = blocks % 2 or blocks // 2 % -(-blocks // 8)  # four blocks a warp, or a little fewer
            rows, ways, most = (32, 2, 2) if m <= 4 and uneven else (16, 2, 4)
        elif blocks <= FEW_BLOCKS:
            rows, ways, most, registers = 16, 2, 1, 56 if all_ranks <= FEW_RANKS else None
        else:
            rows, ways, most = (32, 1, 2) if projects else (16, 2, 8)
    elif blocks > SHORT_BLOCKS:
        eight = not all_ranks or (m == 1 and not projects)
        rows, ways, most, registers = (16, 8, 5, 128) if eight else (16, 4, 10, None)
    else:
        rows, ways, most = 16, 2, 8 if projects or blocks > FEW_BLOCKS else 16
    turns = -(-blocks // ways)
    return rows, ways, -(-turns // -(-turns // most)), registers


def linear_few(tokens: Tokens, layout: LinearLayout, y: Tensor) -> None:
    """As `linear`, for what `takes_few`; `tokens` may be unsettled, if `Kind.settles_few`."""
    assert tokens.codes is not None
    m, n, steps, device = len(tokens.codes), layout.out_features, layout.weight.shape[0], y.device
    nothing, up, sums = layout.scale, layout.up, tokens.sums
    if not tokens.has_experts:
        up = None
    factors, rank = (0, RANK_MULTIPLE) if up is None else (up.shape[0], up.shape[2])
    settles = factors > 0 and sums is not None
    projects = settles and tokens.projection is not None
    slices, _, total = (0, 0, 0) if sums is None else sums.shape
    experts = tokens.experts if factors else 0
    rows, ways, ahead, registers = few_tile(m, layout, factors * rank, projects)
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
