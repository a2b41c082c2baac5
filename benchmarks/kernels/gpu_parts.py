"""Where the time of a decoder block's quantized linears goes on a GPU, kernel by kernel.

    python benchmarks/kernels/gpu_parts.py [--model ...] [--tokens ...] [--kinds ...] [--out benchmarks/results]

writes gpu_parts.json and gpu_parts.md: for each group (qkv, o, gate+up, down) the kernels in order, when each started
after the group's first and how long it ran, from the profiler, in a CUDA graph on cold weights. With programmatic
launches kernels overlap, and a kernel's time holds its waiting for the one before.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_linear import COLD_BYTES, about, compile_ahead, layer, require_gpu
from kinds import GROUPS, LAYERS, OURS, SHAPES

from quant_experts.kernels.gpu_weight_activation import backend as triton_backend

REPLAYS = 15


def timeline(model: str, m: int, bits: int, kind: str) -> list[dict[str, Any]]:
    """One row for each kernel of each group: microseconds since the group began, and of its own (medians)."""
    shapes = SHAPES[model]
    copies = max(1, -(-COLD_BYTES // (sum(n * k for n, k in shapes) // 2)))
    packed = [layer(n, k, bits, kind, i) for _ in range(copies) for i, (n, k) in enumerate(shapes)]
    xs = [torch.randn(m, k, device="cuda").bfloat16() for _, k in shapes]
    counts = []
    for i, group in enumerate(packed):  # how many kernels each group launches
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as one:
            triton_backend.apply(xs[i % 4], group)
            torch.cuda.synchronize()
        counts.append(len(kernels(one)))
        if i >= 4:
            counts[-1] = counts[i % 4]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i, group in enumerate(packed):
            triton_backend.apply(xs[i % 4], group)
    graph.replay()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(REPLAYS):
            graph.replay()
            torch.cuda.synchronize()
    return summary(kernels(profile), counts)


def summary(found: list[tuple[str, int, int]], counts: list[int]) -> list[dict[str, Any]]:
    """Kernels of all replays in order of start, and how many each group of a replay launches, four groups a copy of the
    block -> the rows of `timeline`."""
    seen, at = defaultdict(list), 0
    for _ in range(len(found) // sum(counts)):
        for i, count in enumerate(counts):
            part = found[at : at + count]
            at += count
            began = part[0][1]
            following = found[at][1] - began if i + 1 < len(counts) else 0
            for j, (name, start, length) in enumerate(part):
                seen[i % 4, j, name].append(((start - began) / 1e3, length / 1e3, following / 1e3))
    return [
        {
            "group": GROUPS[group],
            "kernel": name,
            "start": median(t[0] for t in times),
            "length": median(t[1] for t in times),
            "next_group": median([t[2] for t in times if t[2]] or [0]),
        }
        for (group, _, name), times in sorted(seen.items(), key=lambda item: item[0][:2])
    ]


def kernels(profile: torch.profiler.profile) -> list[tuple[str, int, int]]:
    """(name, start, length) in nanoseconds of every kernel, in order of start."""
    results = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    found = [
        (event.name(), event.start_ns(), event.duration_ns())
        for event in results
        if "CUDA" in str(event.device_type()) and not event.name().startswith(("Mem", "gpu_"))
    ]
    return sorted(found, key=lambda event: event[1])


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    text = "| tokens | kind | group | kernel | starts | runs | next group starts |\n"
    text += "| ---: | --- | --- | --- | ---: | ---: | ---: |\n"
    for row in rows:
        text += f"| {row['tokens']} | {row['kind']} | {row['group']} | `{row['kernel']}` "
        text += f"| {row['start']:.1f} | {row['length']:.1f} | {row['next_group']:.1f} |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="Qwen2-VL-7B", choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 128, 2048, 8192])
    parser.add_argument("--kinds", nargs="+", default=list(LAYERS), choices=list(OURS))
    parser.add_argument("--bits", type=int, default=8, help="activation bits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    require_gpu()
    compile_ahead(arguments.tokens, [arguments.model], arguments.kinds)
    rows = [
        {"tokens": m, "kind": kind} | row
        for m in arguments.tokens
        for kind in arguments.kinds
        for row in timeline(arguments.model, m, arguments.bits, kind)
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    text = {"about": about(f"python benchmarks/kernels/gpu_parts.py --model {arguments.model}"), "rows": rows}
    (arguments.out / "gpu_parts.json").write_text(json.dumps(text, indent=1) + "\n")
    (arguments.out / "gpu_parts.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
