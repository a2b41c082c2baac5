"""What Hopper's matrix units reach on operands as the linear has them, with no memory read and nothing waited for.

    python benchmarks/kernels/gpu_rates.py [--out benchmarks/results]

writes gpu_rates.json: TOP/s of int8 and of fp8 products of tiles of 128 or 256 rows by 64 or 128 tokens, 128 channels
at a time, two warp groups a multiprocessor. The weights come from shared memory as operands ("shared"), from registers
("registers"), or from shared memory packed, and are unpacked in registers for each product, as in the linear
("unpacked"). On random numbers and on zeros, which need less power.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_linear import about, require_gpu
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from quant_experts.kernels.gpu.hopper_work import barrier
from quant_experts.kernels.gpu_weight_activation.hopper_codes import unpack_fp8, unpack_int8

TILES = ((128, 64), (128, 128), (256, 128))
WAYS = ("shared", "registers", "unpacked")
STEPS = 2000
"""Of 128 channels, of a tile of 128 x 128; more of smaller ones."""
ROUNDS = 9


@gluon.jit
def weights(packed, FP8: gl.constexpr, LAYOUT: gl.constexpr):
    """Packed codes as two operands."""
    codes = packed.load(LAYOUT)
    if FP8:
        low, high = unpack_fp8(codes)
    else:
        low, high = unpack_int8(codes)
    return low, high


@gluon.jit
def kernel(
    weight_ptr, token_ptr, y_ptr, steps, FP8: gl.constexpr, ROWS: gl.constexpr, TOKENS: gl.constexpr, WAY: gl.constexpr
):
    """One tile's products, over and over."""
    TYPE: gl.constexpr = gl.float8e4nv if FP8 else gl.int8
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, TOKENS, 32])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 4)
    WIDE: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [8, 1], [1, 0])
    column = gl.arange(0, 128, gl.SliceLayout(0, WIDE))[None, :]
    row = gl.arange(0, TOKENS, gl.SliceLayout(1, WIDE))[:, None]
    tokens = gl.allocate_shared_memory(TYPE, [TOKENS, 128], gl.NVMMASharedLayout(128, 8, rank=2))
    tokens.store(gl.load(token_ptr + row * 128 + column).to(TYPE, bitcast=True))
    row = gl.arange(0, ROWS, gl.SliceLayout(1, WIDE))[:, None]
    whole = gl.allocate_shared_memory(TYPE, [ROWS, 128], gl.NVMMASharedLayout(128, 8, rank=2))
    whole.store(gl.load(weight_ptr + row * 128 + column).to(TYPE, bitcast=True))
    NARROW: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [8, 1], [1, 0])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, NARROW))[:, None]
    column = gl.arange(0, 64, gl.SliceLayout(0, NARROW))[None, :]
    packed = gl.allocate_shared_memory(gl.int8, [ROWS, 64], gl.NVMMASharedLayout(64, 8, rank=2))
    packed.store(gl.load(weight_ptr + row * 128 + column))
    fence_async_shared()
    barrier()
    tokens = tokens.permute([1, 0])
    sums = gl.zeros([ROWS, TOKENS], gl.float32 if FP8 else gl.int32, SUMS)
    low, high = weights(packed, FP8, LEFT)
    for _ in range(steps):
        if WAY == "shared":
            token = warpgroup_mma(whole, tokens, sums, is_async=True)
        else:
            if WAY == "unpacked":
                low, high = weights(packed, FP8, LEFT)
            token = warpgroup_mma(low, tokens.slice(0, 64, dim=0), sums, is_async=True)
            token = warpgroup_mma(high, tokens.slice(64, 64, dim=0), token, is_async=True)
        sums = warpgroup_mma_wait(0, deps=[token])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))[:, None]
    column = gl.arange(0, TOKENS, gl.SliceLayout(0, SUMS))[None, :]
    gl.store(y_ptr + row * TOKENS + column, sums)


def milliseconds(**constants: Any) -> Iterator[float]:
    """Of kernels, one after another, by the data: first random, then zeros."""
    fp8, rows, tokens, steps = (constants[key] for key in ("FP8", "ROWS", "TOKENS", "steps"))
    y = torch.empty(rows, tokens, dtype=torch.float32 if fp8 else torch.int32, device="cuda")
    for random in (True, False):
        operands = torch.randint(-128, 128, (2, 256, 128), dtype=torch.int8, device="cuda")
        if fp8:  # no NaN among them; packed codes may be any bytes
            operands[1] = torch.randn(256, 128, device="cuda").to(torch.float8_e4m3fn).view(torch.int8)
            if constants["WAY"] == "shared":
                operands[0] = operands[1]
        weight, token = operands if random else torch.zeros_like(operands)
        times = []
        for _ in range(ROUNDS + 1):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            kernel[(multiprocessors(),)](
                weight, token, y, steps, FP8=fp8, ROWS=rows, TOKENS=tokens, WAY=constants["WAY"], num_warps=8
            )
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        yield median(times[1:])  # the first compiles


def multiprocessors() -> int:
    count: int = torch.cuda.get_device_properties(0).multi_processor_count
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    require_gpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for (tile_rows, tokens), way, fp8 in product(TILES, WAYS, (False, True)):
        steps = STEPS * 128 * 128 // (tile_rows * tokens)
        operations = 2 * tile_rows * tokens * 128 * steps * multiprocessors()
        times = milliseconds(FP8=fp8, ROWS=tile_rows, TOKENS=tokens, WAY=way, steps=steps)
        random, zeros = (round(operations / time / 1e9) for time in times)
        tile = dict(format="fp8" if fp8 else "int8", rows=tile_rows, tokens=tokens, weights=way)
        rows.append(tile | dict(random=random, zeros=zeros))
        print(json.dumps(rows[-1]), flush=True)
    facts = about("python " + " ".join(["benchmarks/kernels/gpu_rates.py", *sys.argv[1:]]))
    (arguments.out / "gpu_rates.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
