"""Times of the Hopper linear by tile: what `hopper_launch.config` estimates from.

    python benchmarks/kernels/gpu_tiles.py [--models ...] [--tokens ...] [--out benchmarks/results]

writes gpu_tiles.json: microseconds of the product alone (tokens quantized before, no experts) for every tile that could
be chosen, shared or whole, on cold weights in a CUDA graph; medians of rounds in which all tiles take turns.

    python benchmarks/kernels/gpu_tiles.py --stored

needs no GPU: it says how much longer the tiles that are chosen take than the best ones, by the times in that file. The
estimate was fitted to an earlier run of the same shapes and sizes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path("benchmarks/results")
TOKENS = (32, 64, 128, 256, 512)
ROUNDS = 5


def name(rows: int, tokens: int, shared: bool) -> str:
    """Of a tile."""
    return f"{rows}x{tokens}{' shared' if shared else ''}"


def measure(n: int, k: int, tokens: list[int]) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    import torch
    from gpu_linear import COLD_BYTES, Captured, layer

    from quant_experts.kernels.gpu.launch import programs
    from quant_experts.kernels.gpu_weight_activation import backend, hopper_launch

    made = [layer(n, k, 8, "without_experts", i) for i in range(max(4, -(-COLD_BYTES // (n * k // 2))))]
    fixed: dict[str, Any] = dict(GROUP_M=8, FACTORS=0, RANK=32, BIAS=False, SORTED=False)
    rows = []
    for m in tokens:
        prepared = backend.prepare(torch.randn(m, k, device="cuda").bfloat16(), made[0].group)
        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

        def captured(choice: tuple[int, int, bool], prepared: Any = prepared, y: Any = y) -> Captured:
            config = hopper_launch.tile(*choice, k, fixed)

            def work() -> None:
                for packed in made:
                    hopper_launch.linear(prepared, packed.linear, y, config)

            return Captured(work)

        choices = hopper_launch.choices(m, n, programs(y.device))
        graphs = {name(*choice): captured(choice) for choice in choices}
        rounds = [{tile: graph.time() / len(made) for tile, graph in graphs.items()} for _ in range(ROUNDS)]
        times = {tile: round(median(times[tile] for times in rounds), 1) for tile in graphs}
        rows.append({"n": n, "k": k, "tokens": m, "times": times})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def losses(rows: list[dict[str, Any]], multiprocessors: int = 132) -> list[float]:
    """How much longer the tiles that are chosen take than the best ones, in logarithms. Only of what was timed."""
    from quant_experts.kernels.gpu_weight_activation.hopper_launch import choices, estimated

    found = []
    for row in rows:
        m, n, steps = row["tokens"], row["n"], row["k"] // 128
        timed = [choice for choice in choices(m, n, multiprocessors) if name(*choice) in row["times"]]
        chosen = min(timed, key=lambda choice: estimated(choice, m, n, steps, multiprocessors))
        found.append(log(row["times"][name(*chosen)] / min(row["times"].values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="those of gpu_linear.py; all by default")
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--stored", action="store_true", help="look at the times in the file instead of taking new ones"
    )
    arguments = parser.parse_args()
    path = arguments.out / "gpu_tiles.json"
    if not arguments.stored:
        from gpu_linear import about, require_gpu
        from kinds import SHAPES

        models = arguments.models or list(SHAPES)
        if unknown := set(models) - set(SHAPES):
            sys.exit(f"{', '.join(sorted(unknown))}: no such model, choose from {', '.join(SHAPES)}.")
        require_gpu()
        arguments.out.mkdir(parents=True, exist_ok=True)
        rows = []
        for model, group in product(models, range(4)):
            rows += measure(*SHAPES[model][group], arguments.tokens)
        facts = about(shlex.join(["python", "benchmarks/kernels/gpu_tiles.py", *sys.argv[1:]]))
        path.write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    if not path.exists():
        sys.exit(f"{path} is not there: leave out --stored on a GPU to make it.")
    rows = json.loads(path.read_text())["rows"]
    found = losses(rows)
    worst = rows[found.index(max(found))]
    print(
        f"Tiles that are chosen take {exp(mean(found)) - 1:.1%} longer than the best ones, in the mean of {len(rows)} "
        f"shapes and sizes; at most {exp(max(found)) - 1:.0%}, {worst['n']} x {worst['k']} on {worst['tokens']} tokens."
    )


if __name__ == "__main__":
    main()
