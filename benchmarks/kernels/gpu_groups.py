"""Times of each input group of a decoder block on a GPU, alone.

    python benchmarks/kernels/gpu_groups.py [--model ...] [--tokens ...] [--kinds ...] [--out benchmarks/results]

writes gpu_groups.json and gpu_groups.md: microseconds of a group (qkv, o, gate+up, down), its input prepared anew, in a
CUDA graph of as many copies of it as exceed the L2 cache; medians of replays. Groups of one kind overlap here, so their
sum is not quite the time of a block (`gpu_linear.py`).
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_linear import COLD_BYTES, about, compile_ahead, layer, median_time, require_gpu
from kinds import GROUPS, HEADS, LAYERS, OURS, SHAPES
from torch import Tensor

from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_activation.backend import Packed

LEAST_COPIES = 6


def copies(n: int, k: int) -> int:
    """Of a group, whose packed weights together exceed the cache."""
    return max(LEAST_COPIES, -(-COLD_BYTES // (n * k // 2)))


def each(x: Tensor, packed: list[Packed]) -> Callable[[], object]:
    return lambda: [triton_backend.apply(x, p) for p in packed]


def measure(model: str, tokens: list[int], kinds: list[str], bits: int) -> list[dict[str, Any]]:
    """One row for each kind and number of tokens."""
    rows: list[dict[str, Any]] = [{"model": model, "kind": kind, "tokens": m} for kind in kinds for m in tokens]
    for kind in kinds:
        for name, (n, k) in zip(GROUPS, SHAPES[model], strict=True):
            packed = [layer(n, k, bits, kind, i) for i in range(copies(n, k))]
            for row in rows:
                if row["kind"] == kind:
                    x = torch.randn(row["tokens"], k, device="cuda").bfloat16()
                    row[name] = round(median_time(each(x, packed)) / len(packed), 1)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = f"| tokens | kind | {' | '.join(GROUPS)} | sum |\n| ---: | --- |{' ---: |' * (len(GROUPS) + 1)}\n"
    for row in sorted(rows, key=lambda row: row["tokens"]):
        times = [row[name] for name in GROUPS]
        cells = " | ".join(f"{time:.1f}" for time in [*times, sum(times)])
        text += f"| {row['tokens']} | {HEADS[row['kind']]} | {cells} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2-VL-7B", choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 128, 512, 2048])
    parser.add_argument("--kinds", nargs="+", default=list(LAYERS), choices=list(OURS))
    parser.add_argument("--bits", type=int, default=8, help="activation bits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    require_gpu()
    compile_ahead(arguments.tokens, [arguments.model], arguments.kinds)
    rows = measure(arguments.model, arguments.tokens, arguments.kinds, arguments.bits)
    facts = about(shlex.join(["python", "benchmarks/kernels/gpu_groups.py", *sys.argv[1:]]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "gpu_groups.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    (arguments.out / "gpu_groups.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
