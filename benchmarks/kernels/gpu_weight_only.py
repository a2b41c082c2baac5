"""Times of one decoder block's four input groups on a GPU with weight-only schemes, next to bf16: groups of 128 with
zero points.

    python benchmarks/kernels/gpu_weight_only.py [--models ...] [--tokens ...] [--out benchmarks/results]

writes gpu_weight_only.json and gpu_weight_only.md. Shapes, routed experts and method are those of `gpu_linear`: the
groups run one after another in a CUDA graph, each preparing its input anew, on copies of the weights that together
exceed the L2 cache.

`--set NAME=VALUE ...` times other constants of `weight_only_backend`, such as MANY_TOKENS.

`--device cpu --tiny` with TRITON_INTERPRET=1 checks the benchmark where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_linear import COLD_BYTES, TOKENS, require_gpu
from kinds import EXPERTS, RANK, SHAPES
from random_blocks import about, replay_times, spread, write
from torch import Tensor

from quant_experts.config import RECIPES
from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

TINY = ((40, 128), (24, 128), (56, 128), (24, 256))
GROUP_SIZE = 128
REPLAYS = 21
Group = Callable[[Tensor], Tensor]
"""(M, K) -> (M, N)"""


class Kind(NamedTuple):
    """How a group is quantized."""

    bits: int
    rotation: int = 0
    shared_rank: int = 0
    experts: int = 0


_RECIPE = RECIPES["quant-experts"]
_DEFAULT = dict(rotation=_RECIPE.rotation, shared_rank=_RECIPE.shared_rank)
KINDS = {
    "W4A16 no experts": Kind(4),
    "W4A16 default": Kind(4, **_DEFAULT),
    "W4A16 experts": Kind(4, shared_rank=RANK, experts=EXPERTS),
    "W3A16 default": Kind(3, **_DEFAULT),
}
TITLES = {
    "no experts": "smoothing alone",
    "default": f"the default recipe, rotation {_RECIPE.rotation} and a static expert of rank {_RECIPE.shared_rank}",
    "experts": f"{EXPERTS} routed experts and a shared one, rank {RANK} + {RANK}",
}


def layer(n: int, k: int, kind: Kind, seed: int, device: torch.device) -> weight_only_backend.Packed:
    """A random group with one stacked linear."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    def codes(*shape: int) -> Tensor:
        half = 1 << (kind.bits - 1)
        return torch.randint(-half, half, shape, generator=generator, device=device, dtype=torch.int8)

    def factor(count: int, *shape: int) -> Factor | None:
        return Factor((normal(*shape) / shape[-1] ** 0.5).half(), None) if count else None

    rank, experts = kind.shared_rank, kind.experts
    group = GroupOperands(
        16,
        normal(k).abs() + 0.5,
        kind.rotation,
        factor(rank, rank, k),
        factor(experts, experts, RANK, k),
        normal(experts, k).half() if experts else None,
        normal(experts).half() if experts else None,
    )
    groups = -(-k // GROUP_SIZE)
    scale = (normal(n, groups).abs() * 0.01 + 0.001).bfloat16().float()
    ups = factor(rank, n, rank), factor(experts, experts, n, RANK)
    linear = LinearOperands(codes(n, k), scale, codes(n, groups), GROUP_SIZE, *ups, None)
    return weight_only_backend.pack(group, [linear], torch.bfloat16)


def block(shapes: tuple[tuple[int, int], ...], kind: str, device: torch.device) -> tuple[int, list[Group]]:
    """-> copies, and the groups' functions of their input, four a copy: as many copies as the cache demands."""
    bits = KINDS[kind].bits if kind in KINDS else 16
    copies = max(1, -(-COLD_BYTES * 8 // (bits * sum(n * k for n, k in shapes)))) if device.type == "cuda" else 1
    groups: list[Group] = []
    for i, (n, k) in enumerate(shapes * copies):
        if kind == "bf16":
            weight = torch.randn(n, k, device=device).bfloat16()
            groups.append(partial(torch.nn.functional.linear, weight=weight))
        else:
            groups.append(partial(weight_only_backend.apply, packed=layer(n, k, KINDS[kind], i, device)))
    return copies, groups


def measure(
    model: str, shapes: tuple[tuple[int, int], ...], tokens: list[int], device: torch.device
) -> list[dict[str, Any]]:
    """One row for each number of tokens: microseconds of a block's four groups by kind."""
    rows: list[dict[str, Any]] = [{"model": model, "tokens": m, "finite": True} for m in tokens]
    for kind in ("bf16", *KINDS):
        copies, groups = block(shapes, kind, device)
        for row in rows:
            xs = [torch.randn(row["tokens"], k, device=device).bfloat16() for _, k in shapes]

            def run(groups: list[Group] = groups, xs: list[Tensor] = xs) -> None:
                for i, group in enumerate(groups):
                    group(xs[i % len(xs)])

            row["finite"] &= all(bool(group(x).isfinite().all()) for group, x in zip(groups, xs, strict=False))
            replays = REPLAYS if device.type == "cuda" else 1
            row[kind] = spread([time / copies for time in replay_times(run, replays, device)])
        del groups, run
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: one table a model."""
    text = "Microseconds (medians) for the four groups of a block. "
    text += "; ".join(f"*{kind}*: {title}" for kind, title in TITLES.items()) + ".\n"
    for model in dict.fromkeys(row["model"] for row in rows):
        text += f"\n**{model}**, groups of {GROUP_SIZE}\n\n"
        text += f"| tokens | bf16 | {' | '.join(KINDS)} | {' | '.join(f'bf16 / {kind}' for kind in KINDS)} |\n"
        text += "| ---: " * (2 + 2 * len(KINDS)) + "|\n"
        for row in (r for r in rows if r["model"] == model):
            times = [row[kind]["median"] for kind in ("bf16", *KINDS)]
            cells = [f"{time:.0f}" for time in times] + [f"{times[0] / time:.2f}" for time in times[1:]]
            text += f"| {row['tokens']} | {' | '.join(cells)} |\n"
    return text


def compile_only(models: list[str], m: int) -> None:
    """Run everything once with m tokens."""
    device = torch.device("cuda")
    for n, k in {shape for model in models for shape in SHAPES[model]}:
        for kind in KINDS.values():
            weight_only_backend.apply(torch.randn(m, k, device=device).bfloat16(), layer(n, k, kind, 0, device))


def compile_ahead(models: list[str], tokens: list[int], constants: list[str]) -> None:
    """Let processes side by side, one for each number of tokens, fill the compiler's cache."""
    command = [sys.executable, __file__, "--compile-only", "--models", *models, "--set", *constants, "--tokens"]
    for process in [subprocess.Popen([*command, str(m)]) for m in tokens]:
        process.wait()


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["Qwen2-VL-7B"], choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--tiny", action="store_true", help="small shapes, to check the benchmark itself")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="constants of the backend")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device, tokens = arguments.device, arguments.tokens
    if device.type == "cuda":
        require_gpu()
    for name, _, value in (constant.partition("=") for constant in arguments.set):
        getattr(weight_only_backend, name)  # an unknown one is an error
        setattr(weight_only_backend, name, int(value))
    if arguments.compile_only:
        return compile_only(arguments.models, tokens[0])
    shapes = {"tiny": TINY} if arguments.tiny else {model: SHAPES[model] for model in arguments.models}
    if device.type == "cuda":
        compile_ahead(arguments.models, tokens, arguments.set)
    facts = about(f"python benchmarks/kernels/gpu_weight_only.py {' '.join(sys.argv[1:])}".strip(), device)
    rows: list[dict[str, Any]] = []
    for model in shapes:
        rows += measure(model, shapes[model], tokens, device)
    problems = [f"{row['model']}, {row['tokens']} tokens: NaN or infinity." for row in rows if not row["finite"]]
    write(arguments.out, "gpu_weight_only", facts | {"replays": REPLAYS}, rows, table(rows), problems)


if __name__ == "__main__":
    main()
