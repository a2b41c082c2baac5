"""Times of what `hopper_linear` copies, without its products: how much of a product is the copy engine's.

    python benchmarks/kernels/gpu_copies.py [--out benchmarks/results]

writes gpu_copies.json: microseconds in which weights and tokens of a product come to shared memory through a ring, tile
by tile as the linear takes them, in boxes whose rows are 64 or 128 bytes wide; weights alone; tokens alone. Weights are
cold, in a CUDA graph; medians.
"""

# mypy: disable-error-code="untyped-decorator, no-untyped-def"

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_linear import COLD_BYTES, Captured, about, require_gpu
from kinds import GROUPS, SHAPES
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

TILES = (
    ("down", 16, 128, 16),
    ("qkv", 128, 128, 64),
    ("gate+up", 128, 256, 128),
    ("gate+up", 128, 128, 128),
    ("down", 128, 128, 64),
    ("down", 512, 128, 128),
)
"""Groups of the 7B, tokens, rows and tokens of a tile."""
RING_BYTES = 200 << 10
ROUNDS = 7


@gluon.jit
def take(ready, empty, steps, STAGES: gl.constexpr):
    """Give each slot of the ring back as soon as it is full."""
    for i in range(steps):
        mbarrier.wait(ready.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(empty.index(i % STAGES))


@gluon.jit
def copy(
    w_desc, x_desc, rings, sizes, BN: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr, WEIGHTS: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A tile's blocks of 128 channels: 64 bytes of each row of weights, 128 of each token."""
    w_ring, x_ring, ready, empty = rings
    steps, N, tiles_n = sizes
    row, token = gl.program_id(0) % tiles_n * BN, gl.program_id(0) // tiles_n * BM
    for i in range(steps):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(ready.index(slot), (BN * 64 if WEIGHTS else 0) + (BM * 128 if TOKENS else 0))
        if WEIGHTS:
            at = [(i * N + row) * 64 // WIDTH, 0]
            tma.async_copy_global_to_shared(w_desc, at, ready.index(slot), w_ring.index(slot))
        if TOKENS:
            for part in gl.static_range(128 // WIDTH):
                box = x_ring.index(slot * (128 // WIDTH) + part)
                tma.async_copy_global_to_shared(x_desc, [token, i * 128 + part * WIDTH], ready.index(slot), box)


@gluon.jit
def kernel(
    w_desc, x_desc, steps, N, tiles_n, BN: gl.constexpr, BM: gl.constexpr, WIDTH: gl.constexpr, WEIGHTS: gl.constexpr,
    TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Programs: tiles."""
    w_ring = gl.allocate_shared_memory(gl.int8, [STAGES, BN * 64 // WIDTH, WIDTH], w_desc.layout)
    x_ring = gl.allocate_shared_memory(gl.int8, [STAGES * (128 // WIDTH), BM, WIDTH], x_desc.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    rings = (w_ring, x_ring, ready, empty)
    sizes = (steps, N, tiles_n)
    gl.warp_specialize(
        [
            (take, (ready, empty, steps, STAGES)),
            (copy, (w_desc, x_desc, rings, sizes, BN, BM, WIDTH, WEIGHTS, TOKENS, STAGES)),
        ],
        [1],
        [24],
    )


def boxes(tensor: Tensor, rows: int, width: int) -> TensorDescriptor:
    """A view of a matrix of bytes in boxes of so many rows and bytes."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=width, element_bitwidth=8, rank=2)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, width], layout)


def copies(weights: list[Tensor], tokens: Tensor, n: int, tile: tuple[int, int], **what: Any) -> Callable[[], None]:
    """One pass over each of the weights, each (K / 128 * N * 64) int8."""
    (rows, columns), width, (m, k) = tile, what["WIDTH"], tokens.shape
    descriptors = [boxes(weight.view(-1, width), rows * 64 // width, width) for weight in weights]
    x = boxes(tokens, columns, width)
    across = -(-n // rows)
    stages = min(16, RING_BYTES // (rows * 64 + columns * 128))

    def work() -> None:
        for w in descriptors:
            kernel[(across * -(-m // columns),)](
                w, x, k // 128, n, across, BN=rows, BM=columns, STAGES=stages, num_warps=4, **what
            )

    return work


def measure(group: str, m: int, rows: int, columns: int) -> dict[str, Any]:
    """Microseconds of a product's copies, by what is copied and the width of boxes."""
    n, k = dict(zip(GROUPS, SHAPES["Qwen2-VL-7B"], strict=True))[group]
    count = max(4, -(-COLD_BYTES // (n * k // 2)))
    weights = [torch.zeros(k // 128 * n * 64, dtype=torch.int8, device="cuda") for _ in range(count)]
    tokens = torch.zeros(m, k, dtype=torch.int8, device="cuda")
    graphs = {
        f"{name}, {width} bytes": Captured(copies(weights, tokens, n, (rows, columns), WIDTH=width, **what))
        for width in (64, 128)
        for name, what in {
            "both": dict(WEIGHTS=True, TOKENS=True),
            "weights": dict(WEIGHTS=True, TOKENS=False),
            "tokens": dict(WEIGHTS=False, TOKENS=True),
        }.items()
    }
    times = {name: round(median(graph.time() for _ in range(ROUNDS)) / count, 1) for name, graph in graphs.items()}
    return {"group": group, "tokens": m, "tile": f"{rows}x{columns}", "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    require_gpu()
    rows = []
    for case in TILES:
        rows.append(measure(*case))
        print(json.dumps(rows[-1]), flush=True)
    facts = about(shlex.join(["python", "benchmarks/kernels/gpu_copies.py", *sys.argv[1:]]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_copies.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
