"""Times of the Hopper linear by tile: what `hopper_launch.config` estimates from.

    python benchmarks/kernels/gpu_tiles.py [--weight-only] [--models ...] [--tokens ...] [--out benchmarks/results]

writes gpu_tiles.json, or gpu_tiles_weight_only.json: microseconds of the product alone (tokens prepared before, no
experts) for every tile that could be chosen, shared or whole, on cold weights in a CUDA graph; medians of rounds in
which all tiles take turns.

    python benchmarks/kernels/gpu_tiles.py --stored [--weight-only]

needs no GPU: it says how much longer the tiles that are chosen take than the best ones, by the times in that file. The
estimate was fitted to an earlier run of the same shapes and sizes.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib import import_module
from itertools import product
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

RESULTS = Path("benchmarks/results")
TOKENS = {False: (32, 64, 128, 256, 512), True: (16, 32, 64, 128, 256, 512, 1024)}
"""By whether they are those of weight-only schemes."""
ROUNDS = 5


def name(rows: int, tokens: int, shared: bool) -> str:
    """Of a tile."""
    return f"{rows}x{tokens}{' shared' if shared else ''}"


def launches(weight_only: bool) -> Any:
    """The module whose tiles they are."""
    kernels = "gpu_weight_only" if weight_only else "gpu_weight_activation"
    return import_module(f"quant_experts.kernels.{kernels}.hopper_launch")


def made_layers(n: int, k: int, weight_only: bool) -> tuple[Any, list[Any], dict[str, Any]]:
    """-> the backend, as many layers as the cache demands, and what else `tile` takes."""
    import gpu_linear
    import gpu_weight_only
    import torch

    from quant_experts.kernels.gpu_weight_activation import backend as weight_activation
    from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend

    seeds = range(max(4, -(-gpu_linear.COLD_BYTES // (n * k // 2))))
    if not weight_only:
        layers = [gpu_linear.layer(n, k, 8, "without_experts", i) for i in seeds]
        fixed = dict(GROUP_M=8, FACTORS=0, RANK=32, BIAS=False, SORTED=False)
        return weight_activation, layers, dict(k=k, fixed=fixed)
    kind, device = gpu_weight_only.KINDS["W4A16 no experts"], torch.device("cuda")
    made = [gpu_weight_only.layer(n, k, kind, i, device) for i in seeds]
    return weight_only_backend, made, dict(FACTORS=0, RANK=32, **launches(True).weight_flags(made[0].linear))


def measure(n: int, k: int, tokens: list[int], weight_only: bool) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    import torch
    from gpu_linear import Captured

    from quant_experts.kernels.gpu.launch import programs

    backend, made, fixed = made_layers(n, k, weight_only)
    launch, rows = launches(weight_only), []
    for m in tokens:
        prepared = backend.prepare(torch.randn(m, k, device="cuda").bfloat16(), made[0].group)
        y = torch.empty(m, n, dtype=torch.bfloat16, device="cuda")

        def captured(choice: Any, prepared: Any = prepared, y: Any = y) -> Captured:
            config = launch.tile(choice, **fixed)

            def work() -> None:
                for packed in made:
                    launch.linear(prepared, packed.linear, y, config)

            return Captured(work)

        graphs = {name(*choice): captured(choice) for choice in launch.TIMES.choices(m, n, programs(y.device))}
        rounds = [{tile: graph.time() / len(made) for tile, graph in graphs.items()} for _ in range(ROUNDS)]
        times = {tile: round(median(times[tile] for times in rounds), 1) for tile in graphs}
        rows.append({"n": n, "k": k, "tokens": m, "times": times})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def losses(rows: list[dict[str, Any]], estimate: Any, multiprocessors: int = 132) -> list[float]:
    """How much longer the tiles that an estimate (`TileTimes`) chooses take than the best ones, in logarithms. Only of
    what was timed."""
    found = []
    for row in rows:
        m, n, steps = row["tokens"], row["n"], row["k"] // 128
        timed = [choice for choice in estimate.choices(m, n, multiprocessors) if name(*choice) in row["times"]]
        chosen = min(timed, key=lambda choice: estimate.estimated(choice, m, n, steps, multiprocessors))
        found.append(log(row["times"][name(*chosen)] / min(row["times"].values())))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="those of gpu_linear.py; all by default")
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--weight-only", action="store_true", help="tiles of W4A16 instead of W4A8")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--stored", action="store_true", help="look at the times in the file instead of taking new ones"
    )
    arguments = parser.parse_args()
    weight_only = arguments.weight_only
    path = arguments.out / ("gpu_tiles_weight_only.json" if weight_only else "gpu_tiles.json")
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
            rows += measure(*SHAPES[model][group], arguments.tokens or list(TOKENS[weight_only]), weight_only)
        facts = about(shlex.join(["python", "benchmarks/kernels/gpu_tiles.py", *sys.argv[1:]]))
        path.write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    if not path.exists():
        sys.exit(f"{path} is not there: leave out --stored on a GPU to make it.")
    rows = json.loads(path.read_text())["rows"]
    found = losses(rows, launches(weight_only).TIMES)
    worst = rows[found.index(max(found))]
    print(
        f"Tiles that are chosen take {exp(mean(found)) - 1:.1%} longer than the best ones, in the mean of {len(rows)} "
        f"shapes and sizes; at most {exp(max(found)) - 1:.0%}, {worst['n']} x {worst['k']} on {worst['tokens']} tokens."
    )


if __name__ == "__main__":
    main()
