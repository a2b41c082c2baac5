"""Times of one decoder block's four input groups on a GPU with weight-only schemes: bf16, and W4A16 and W3A16 in groups
of 128 with zero points, without and with experts.

    python benchmarks/kernels/gpu_weight_only.py [--models ...] [--tokens ...] [--out benchmarks/results]

writes gpu_weight_only.json and gpu_weight_only.md. Groups, experts and method are those of `gpu_linear`: the groups run
one after another in a CUDA graph, each preparing its input anew, on copies of the weights that together exceed the L2
cache; times are medians of replays. The bound of W4A16 with experts is the larger of bytes over the measured copy
bandwidth and operations over the measured rate of a bf16 product, summed over groups.

`--tile ROWS TOKENS WARPS STAGES PROGRAMS` times another tile than `weight_only_backend.tile_for` chooses.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_linear import COLD_BYTES, EXPERTS, RANK, SHAPES, TOKENS, about, median_time

from quant_experts.kernels import weight_only_backend
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

KINDS = {"W4A16": (4, False), "W4A16 with experts": (4, True), "W3A16": (3, False), "W3A16 with experts": (3, True)}
"""Weight bits, whether there are experts."""
GROUP_SIZE = 128


def layer(n: int, k: int, bits: int, experts: bool, seed: int) -> weight_only_backend.Packed:
    """A random group with one stacked linear."""
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def codes(*shape: int) -> torch.Tensor:
        half = 1 << (bits - 1)
        return torch.randint(-half, half, shape, generator=generator, device="cuda", dtype=torch.int8)

    def factor(*shape: int) -> Factor | None:
        return Factor((normal(*shape) / shape[-1] ** 0.5).half(), None) if experts else None

    group = GroupOperands(
        16,
        normal(k).abs() + 0.5,
        0,
        factor(RANK, k),
        factor(EXPERTS, RANK, k),
        normal(EXPERTS, k).half() if experts else None,
        normal(EXPERTS).half() if experts else None,
    )
    groups = -(-k // GROUP_SIZE)
    scale = (normal(n, groups).abs() * 0.01 + 0.001).bfloat16().float()
    up, routed_up = factor(n, RANK), factor(EXPERTS, n, RANK)
    linear = LinearOperands(codes(n, k), scale, codes(n, groups), GROUP_SIZE, up, routed_up, None)
    return weight_only_backend.pack(group, [linear])


def chip_limits() -> dict[str, float]:
    """Measured copy bandwidth (bytes read plus written, TB/s) and bf16 matrix rate (TOP/s)."""
    source = torch.randn(2**30, device="cuda")
    copied = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / median_time(lambda: copied.copy_(source)) * 1e-6
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return {"copy_tb_per_s": bandwidth, "matrix_top_per_s": 2 * 8192**3 / median_time(lambda: a @ b) * 1e-6}


def bound(shapes: tuple[tuple[int, int], ...], m: int, limits: dict[str, float]) -> float:
    """Least microseconds for the groups in W4A16, every expert's factors read once (from 8 tokens on, nearly all)."""
    total = 0.0
    for n, k in shapes:
        factors = min(EXPERTS, m) + 1
        moved = n * k * (0.5 + 4 / GROUP_SIZE) + 2 * RANK * factors * (n + k) + 2 * EXPERTS * k + 2 * m * (n + k)
        operations = 2 * m * n * k + 2 * m * 2 * RANK * (n + k)
        total += max(moved / limits["copy_tb_per_s"], operations / limits["matrix_top_per_s"]) * 1e-6
    return total


def block(model: str, kind: str) -> tuple[int, list[Callable[[torch.Tensor], torch.Tensor]]]:
    """-> copies, and the groups' functions of their input, four a copy: as many copies as the cache demands."""
    shapes = SHAPES[model]
    bits, experts = KINDS.get(kind, (16, False))
    copies = max(1, -(-COLD_BYTES * 8 // (bits * sum(n * k for n, k in shapes))))
    groups: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for i, (n, k) in enumerate(shapes * copies):
        if kind == "bf16":
            groups.append(partial(torch.nn.functional.linear, weight=torch.randn(n, k, device="cuda").bfloat16()))
        else:
            groups.append(partial(weight_only_backend.apply, packed=layer(n, k, bits, experts, i)))
    return copies, groups


def run(groups: list[Callable[[torch.Tensor], torch.Tensor]], xs: list[torch.Tensor]) -> None:
    for i, group in enumerate(groups):
        group(xs[i % len(xs)])


def measure(models: list[str], tokens: list[int], limits: dict[str, float]) -> list[dict[str, Any]]:
    """One row for each model and number of tokens."""
    rows = []
    for model in models:
        mine: list[dict[str, Any]] = [
            {"model": model, "tokens": m, "bound": bound(SHAPES[model], m, limits)} for m in tokens
        ]
        for kind in ("bf16", *KINDS):
            copies, groups = block(model, kind)
            for row in mine:
                xs = [torch.randn(row["tokens"], k, device="cuda").bfloat16() for _, k in SHAPES[model]]
                row[kind] = median_time(partial(run, groups, xs)) / copies
            del groups
            torch.cuda.empty_cache()
        for row in mine:
            print(json.dumps({key: round(v, 1) if isinstance(v, float) else v for key, v in row.items()}), flush=True)
        rows += mine
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table a model."""
    text = ""
    for model in dict.fromkeys(row["model"] for row in rows):
        text += f"\n**{model}**, groups of {GROUP_SIZE}, microseconds for the four groups of a block\n\n"
        text += f"| tokens | bf16 | {' | '.join(KINDS)} | bf16 / W4A16 with experts | bound |\n" + "| ---: " * 8 + "|\n"
        for row in (r for r in rows if r["model"] == model):
            cells = " | ".join(f"{row[kind]:.0f}" for kind in ("bf16", *KINDS))
            ratio = row["bf16"] / row["W4A16 with experts"]
            text += f"| {row['tokens']} | {cells} | {ratio:.2f} | {row['bound']:.0f} |\n"
    return text


def compile_ahead(models: list[str], tokens: list[int], tile: list[int]) -> None:
    """Let processes side by side, one for each number of tokens, fill the compiler's cache."""
    command = [sys.executable, __file__, "--compile-only", "--models", *models]
    command += ["--tile", *map(str, tile)] if tile else []
    for process in [subprocess.Popen([*command, "--tokens", str(m)]) for m in tokens]:
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--tile", nargs=5, type=int, default=[], help="rows, tokens, warps, stages, programs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.tile:
        tile = weight_only_backend.Tile(*arguments.tile)
        weight_only_backend.tile_for = lambda *size: tile
    if arguments.compile_only:
        for n, k in {shape for model in arguments.models for shape in SHAPES[model]}:
            for bits, experts in KINDS.values():
                x = torch.randn(arguments.tokens[0], k, device="cuda").bfloat16()
                weight_only_backend.apply(x, layer(n, k, bits, experts, 0))
        return
    compile_ahead(arguments.models, arguments.tokens, arguments.tile)
    limits = chip_limits()
    rows = measure(arguments.models, arguments.tokens, limits)
    command = f"python benchmarks/kernels/gpu_weight_only.py {' '.join(sys.argv[1:])}".strip()
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = {"about": about(command) | {"limits": limits}, "rows": rows}
    (arguments.out / "gpu_weight_only.json").write_text(json.dumps(result, indent=1) + "\n")
    (arguments.out / "gpu_weight_only.md").write_text(table(rows).lstrip())


if __name__ == "__main__":
    main()
