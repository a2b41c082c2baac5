"""Times of one decoder block's four input groups on a CPU: fp32, `torch._int_mm` alone, ours without and with experts.

    python benchmarks/kernels/cpu_linear.py [--tokens ...] [--threads 2] [--out benchmarks/results]

writes cpu_linear.json and cpu_linear.md. Shapes are those of Qwen2-VL-2B. A group is run as the modules run it: its
input prepared once, then each of its linears. `_int_mm` has its activation codes already and leaves int32 sums: what is
beside it in our time is quantization, scales, experts and the order of rows. "Factors alone" are the least products
that experts ask for, on float32 factors that are ready, into memory that is ready: `_int_mm / (_int_mm + factors)`
bounds what `_int_mm / experts` can be. All kinds take turns in every round, on weights of their own, and ratios are
taken within a round, so that other work on the machine meets all of them alike.
Spreads are from the 10th to the 90th percentile.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import Tensor

from quant_experts.config import RECIPES
from quant_experts.kernels.dispatch import select
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

GROUPS = {  # output channels of each linear, input channels
    "qkv": ((1536, 256, 256), 1536),
    "o": ((1536,), 1536),
    "gate+up": ((8960, 8960), 1536),
    "down": ((1536,), 8960),
}
TINY = {"two": ((48, 16), 64), "one": ((32,), 128)}
TOKENS = (1, 16, 128, 512)
RANK, EXPERTS = 32, 8
DEFAULT = RECIPES["quant-experts"]
BASELINES = {"fp32": "fp32 `linear`", "int_mm": "`_int_mm` alone"}
FACTORS = {"factors": f"float32 products of rank {RANK} + {RANK} and a router's of {EXPERTS}"}
OURS = {
    "without_experts": "no experts",
    "with_experts": f"{EXPERTS} routed experts and a shared one, rank {RANK} + {RANK}",
    "default": f"default recipe: static expert of rank {DEFAULT.shared_rank} that reads codes, rotation",
}
KINDS = (*BASELINES, *FACTORS, *OURS)
ROUNDS = {1: 200, 16: 100, 128: 40, 512: 15}

Shapes = dict[str, tuple[tuple[int, ...], int]]
Work = Callable[[], object]


def operands(widths: Sequence[int], k: int, kind: str, seed: int) -> tuple[GroupOperands, list[LinearOperands]]:
    """A random W4A8 group with linears (N, K) for each N of widths; kind is one of OURS."""
    experts, default = kind == "with_experts", kind == "default"
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def codes(*shape: int, largest: int) -> Tensor:
        return torch.randint(-largest, largest + 1, shape, generator=generator, dtype=torch.int8)

    def shared(*shape: int) -> Factor | None:
        if default:
            return Factor(codes(*shape, largest=127), normal(shape[0]).abs() * 1e-3)
        return Factor((normal(*shape) / shape[-1] ** 0.5).half(), None) if experts else None

    def routed(*shape: int) -> Factor | None:
        return Factor((normal(EXPERTS, *shape) / shape[-1] ** 0.5).half(), None) if experts else None

    rank = DEFAULT.shared_rank if default else RANK
    router = normal(EXPERTS, k)
    router -= router.mean(dim=1, keepdim=True)  # or one expert would have nearly all tokens
    group = GroupOperands(
        8,
        normal(k).abs() + 0.5,
        DEFAULT.rotation if default else 0,
        shared(rank, k),
        routed(RANK, k),
        router.half() if experts else None,
        torch.zeros(EXPERTS).half() if experts else None,
        default,
    )
    linears = [
        LinearOperands(
            codes(n, k, largest=7), normal(n, 1).abs() * 0.01, None, None, shared(n, rank), routed(n, RANK), None
        )
        for n in widths
    ]
    return group, linears


def work(widths: Sequence[int], k: int, m: int, kind: str) -> Work:
    """One run of a group on m tokens."""
    generator = torch.Generator().manual_seed(m)
    x = torch.randn(m, k, generator=generator)
    if kind == "fp32":
        weights = [torch.randn(n, k, generator=generator) for n in widths]
        return lambda: [torch.nn.functional.linear(x, w) for w in weights]
    if kind == "factors":
        down = torch.randn(k, 2 * RANK + EXPERTS, generator=generator)
        ups = [torch.randn(2 * RANK, n, generator=generator) for n in widths]
        outputs = [torch.zeros(m, n) for n in widths]

        def products() -> list[Tensor]:
            hidden = (x @ down)[:, : 2 * RANK]
            return [torch.mm(hidden, up, out=y) for up, y in zip(ups, outputs, strict=True)]

        return products
    group, linears = operands(widths, k, kind, seed=k)
    if kind == "int_mm":
        x_codes = (x * 30).to(torch.int8)
        return lambda: [torch._int_mm(x_codes, linear.codes.T) for linear in linears]
    backend = select("cpu", 8)

    def run() -> list[Tensor]:
        prepared = backend.prepare(x, group)
        return [backend.linear(prepared, linear) for linear in linears]

    return run


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    tenths = quantiles(values, n=10, method="inclusive")
    return {"median": tenths[4], "low": tenths[0], "high": tenths[8]}


def summary(group: str, m: int, times: dict[str, list[float]]) -> dict[str, Any]:
    """Times in microseconds by kind and round -> one row of the result."""
    row: dict[str, Any] = {"group": group, "tokens": m, "rounds": len(times["fp32"])}
    row["microseconds"] = {kind: spread(values) for kind, values in times.items()}
    integer, factors = times["int_mm"], times["factors"]
    row["bound with experts"] = spread([a / (a + b) for a, b in zip(integer, factors, strict=True)])
    for base in BASELINES:
        row[f"{base} / ours"] = {
            kind: spread([a / b for a, b in zip(times[base], times[kind], strict=True)]) for kind in OURS
        }
    return row


def measure(shapes: Shapes, m: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each group and one for the block, which is all groups one after another."""
    works = {group: {kind: work(*shape, m, kind) for kind in KINDS} for group, shape in shapes.items()}
    times: dict[str, dict[str, list[float]]] = {group: {kind: [] for kind in KINDS} for group in shapes}
    for turn in range(rounds + 2):
        for group, kinds in works.items():
            for kind, run in kinds.items():
                start = time.perf_counter()
                run()
                if turn >= 2:  # the first two warm up
                    times[group][kind].append((time.perf_counter() - start) * 1e6)
    block = {kind: [sum(turn) for turn in zip(*(times[g][kind] for g in shapes), strict=True)] for kind in KINDS}
    return [summary(group, m, times[group]) for group in shapes] + [summary("block", m, block)]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: blocks, then their groups."""
    text = "Microseconds, medians of rounds; ratios (10th to 90th percentile), above 1 where ours is faster\n\n"
    text += "| group | tokens | fp32 | `_int_mm` | factors alone | no experts | experts | default "
    text += "| `_int_mm` / no experts | `_int_mm` / experts | `_int_mm` / default | bound with experts "
    text += "| fp32 / no experts | fp32 / experts | fp32 / default |\n| --- " + "| ---: " * 14 + "|\n"
    for row in sorted(rows, key=lambda row: row["group"] != "block"):
        cells = [f"{row['microseconds'][kind]['median']:.0f}" for kind in KINDS]
        for base in ("int_mm", "fp32"):
            ratios = row[f"{base} / ours"].values()
            cells += [f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})" for r in ratios]
            cells += [f"{row['bound with experts']['median']:.2f}"] if base == "int_mm" else []
        text += f"| {row['group']} | {row['tokens']} | {' | '.join(cells)} |\n"
    return text


def processor() -> str:
    """Its name, and the instructions that matter here."""
    name, flags = platform.processor() or platform.machine(), ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = dict(line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line)
        facts = {key.strip(): value.strip() for key, value in lines.items()}
        name = f"{facts.get('model name', name)}, family {facts.get('cpu family')}, model {facts.get('model')}"
        flags = " ".join(f for f in facts.get("flags", "").split() if "vnni" in f or f.startswith("amx"))
    return f"{name} ({torch.backends.cpu.get_cpu_capability()} {flags})".replace(" )", ")")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: shows that it runs")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    facts = {
        "command": f"python benchmarks/kernels/cpu_linear.py --threads {arguments.threads}",
        "processor": processor(),
        "threads": arguments.threads,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
        "kinds": BASELINES | FACTORS | OURS,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for m in arguments.tokens:
        rows += measure(TINY if arguments.quick else GROUPS, m, 3 if arguments.quick else ROUNDS.get(m, 15))
        block = rows[-1]
        print(json.dumps({"tokens": m} | {k: round(v["median"]) for k, v in block["microseconds"].items()}), flush=True)
        (arguments.out / "cpu_linear.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    (arguments.out / "cpu_linear.md").write_text(table(rows))


if __name__ == "__main__":
    main()
