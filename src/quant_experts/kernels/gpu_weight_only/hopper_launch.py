"""Launches of `hopper_linear`: tile sizes by shape, and boxes for the bulk copy engine."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from quant_experts.kernels.gpu.hopper_tiles import Tile, TileTimes
from quant_experts.kernels.gpu.launch import LARGEST_TILE, Boxes, options, programs, ptr, start, zeros
from quant_experts.kernels.gpu_tokens.layout import BLOCK, Tokens
from quant_experts.kernels.gpu_weight_only.hopper_linear import CHUNK, LAUNCH_REGISTERS, WIDTH, Config, kernel
from quant_experts.kernels.gpu_weight_only.layout import PIECE, LinearLayout

WORDS, BYTES, PAIRS, VALUES = (
    gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=bits, rank=rank)
    for width, bits, rank in ((64, 16, 2), (32, 8, 2), (0, 32, 1), (128, 16, 2))
)
"""Of words of codes, third bits, scales, and values."""


RING_BYTES = {2: 227_000, 4: 198_000}
"""Of shared memory, for the rings, by the bytes of an output: outputs are reordered in what is left."""
MOST_STAGES = 8
"""Slots of the ring of weights, at most."""
TIMES = TileTimes(
    steps={
        (256, 128): 1.55, (128, 256): 1.6, (128, 128): 0.9, (256, 64): 1.1, (128, 64): 0.62, (256, 32): 0.95,
        (128, 32): 0.55, (256, 16): 0.9, (128, 16): 0.5,
    },
    finishing=1.4, longer=1.11, sharing=3.2, adding=0.52, last=1.9, last_adding=1.6,
)  # fmt: skip
"""Of tiles with weights of 4 bits."""
TIMES_OF_3_BITS = replace(TIMES, steps={size: time for size, time in TIMES.steps.items() if size[0] * size[1] < 32768})
"""Codes of 3 bits take more registers than the largest tiles leave. What their steps take was not measured."""


@cache
def config(m: int, n: int, steps: int, count: int = 132, output_bytes: int = 2, **flags: Any) -> Config:
    """The tile that is estimated to be fastest for m tokens, n rows and so many blocks of 128 channels; flags are those
    of `Config`."""
    times = TIMES_OF_3_BITS if flags["BITS"] == 3 else TIMES
    return tile(times.best(m, n, steps, count), output_bytes, **flags)


def tile(best: Tile, output_bytes: int = 2, **flags: Any) -> Config:
    """A tile's `Config`: rings as long as fit, that of values for as many steps as that of weights, or more."""
    rows, tokens, shared = best
    weights = rows * (64 + (32 if flags["BITS"] == 3 else 0) + 4 * flags["GROUPS"])
    values, slots = tokens * 128, flags["PIECES"] // 2
    stages = min(MOST_STAGES, RING_BYTES[output_bytes] // (weights + slots * values))
    value_stages = min(slots * MOST_STAGES, (RING_BYTES[output_bytes] - stages * weights) // values)
    return Config(BN=rows, BM=tokens, STAGES=stages, VALUE_STAGES=value_stages, SHARES=shared, **flags)


def boxes(tensor: Tensor, *shape: int, layout: Any) -> Boxes:
    """Of so many rows and columns, or numbers, of a contiguous tensor."""
    return Boxes(tensor, tensor.shape, tensor.stride(), shape, layout)


def linear(tokens: Tokens, layout: LinearLayout, y: Tensor, chosen: Config | None = None) -> None:
    """y (M, N) = values times dequantized weights, experts and bias included."""
    assert tokens.codes is not None
    (m, padded), n, values, device = tokens.codes.shape, layout.out_features, tokens.codes, y.device
    up, hidden, nothing = layout.up, tokens.hidden, layout.scale
    if up is None or hidden is None:
        factors, rank, up, hidden = 0, CHUNK.value, values[:, : CHUNK.value], values[:, : CHUNK.value]
    else:
        (factors, _, rank), up = up.shape, up.view(-1, up.shape[2])
    steps, count = len(layout.low), programs(device)
    flags = dict(
        FACTORS=factors, RANK=rank, SORTED=tokens.order is not None,
        LATER=factors > 0 and tokens.hidden_comes_later, **weight_flags(layout),
    )  # fmt: skip
    c = chosen or config(m, n, padded // BLOCK, count, y.element_size(), **flags)
    bn, bm, pieces = c.BN.value, c.BM.value, c.PIECES.value
    low = boxes(layout.low.view(-1, PIECE), bn, PIECE, layout=WORDS)
    high = low if layout.high is None else boxes(layout.high.view(-1, PIECE), bn, PIECE, layout=BYTES)
    pairs = boxes(layout.pairs.view(-1), bn, layout=PAIRS)
    value, hiddens = boxes(values, bm, WIDTH.value, layout=VALUES), boxes(hidden, bm, CHUNK.value, layout=WORDS)
    sums = zeros("hopper sums", count * LARGEST_TILE, device).view(torch.float32)
    done = zeros("hopper shares", count * 4, device).view(torch.int64)
    tiles = -(-n // bn) * -(-m // bm)
    start(
        kernel, (min(count, tiles * steps if c.SHARES.value else tiles),),
        low, high, pairs, value, boxes(up, bn, CHUNK.value, layout=WORDS), hiddens, ptr(tokens.present, done), y,
        layout.scale, tokens.token_scale, ptr(layout.bias, nothing), ptr(tokens.order, done), sums, done, m, n,
        layout.pairs.shape[1], steps, max(1, layout.pieces // pieces), tokens.headroom, c, num_warps=4,
        maxnreg=LAUNCH_REGISTERS, **options(device),
    )  # fmt: skip


def weight_flags(layout: LinearLayout) -> dict[str, Any]:
    """Of the `Config`: what it takes of weights."""
    pieces = {4: 4, 3: 8}[layout.bits]
    per = min(layout.pieces, pieces)
    return dict(BITS=layout.bits, PIECES=pieces, PER=per, GROUPS=pieces // per, BIAS=layout.bias is not None)
