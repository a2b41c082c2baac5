"""What a long product costs once the chip is at its limit of power: times, clocks and watts.

    python benchmarks/kernels/gpu_power.py [--seconds 1.2] [--out benchmarks/results]

writes gpu_power.json: the linear of Qwen2-VL-7B's gate+up alone, 8,192 tokens, int8 and fp8, on random tokens, on zeros
and on ones, and `torch._scaled_mm` on random numbers, each for as long: microseconds of the second replay, the median
and the last, and what `nvidia-smi` reported meanwhile (its watts are means over some time before). Random numbers
switch more transistors than zeros: where zeros are faster, power is the limit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_linear import Captured, about, layer, require_gpu
from kinds import SHAPES

from quant_experts.kernels.gpu_weight_activation import backend

TOKENS, REPEATS = 8192, 4
QUERY = ["nvidia-smi", "-i", "0", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]


def works() -> dict[str, Callable[[], object]]:
    """By kind and data."""
    n, k = SHAPES["Qwen2-VL-7B"][2]
    random = torch.randn(TOKENS, k, device="cuda").bfloat16()
    data = {"random": random, "zeros": torch.zeros_like(random), "ones": torch.ones_like(random)}
    found: dict[str, Callable[[], object]] = {}
    for kind, prefix in (("int8", ""), ("fp8", "fp8_")):
        packed = layer(n, k, 8, f"{prefix}without_experts", 0)
        for values, x in data.items():
            tokens = backend.prepare(x, packed.group)
            found[f"{kind}, {values}"] = lambda tokens=tokens, packed=packed: [  # type: ignore[misc]
                backend.linear(tokens, packed.linear) for _ in range(REPEATS)
            ]
    a, b = random.to(torch.float8_e4m3fn), torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    rows, columns = torch.ones(TOKENS, 1, device="cuda"), torch.ones(1, n, device="cuda")
    found["_scaled_mm, random"] = lambda: [
        torch._scaled_mm(a, b.T, rows, columns, out_dtype=torch.bfloat16, use_fast_accum=True) for _ in range(REPEATS)
    ]
    return found


def measure(name: str, work: Callable[[], object], seconds: float) -> dict[str, Any]:
    """One row."""
    graph, samples, done = Captured(work), list[list[float]](), threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            answer = subprocess.run(QUERY, capture_output=True, text=True, check=True).stdout.splitlines()[0]
            samples.append([float(number) for number in answer.split(",")])

    thread = threading.Thread(target=sample)
    thread.start()
    end, times = time.monotonic() + seconds, list[float]()
    while time.monotonic() < end:
        times.append(graph.time() / REPEATS)
    done.set()
    thread.join()
    if not samples:
        sys.exit("nvidia-smi gave no clock and power: is it installed, and was there time for a sample?")
    late = samples[len(samples) // 2 :]
    return {
        "work": name,
        "second": round(times[1]),
        "median": round(median(times)),
        "last": round(times[-1]),
        "mhz": [min(s[0] for s in late), max(s[0] for s in late)],
        "watts": max(s[1] for s in late),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    require_gpu()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, work in works().items():
        rows.append(measure(name, work, arguments.seconds))
        print(json.dumps(rows[-1]), flush=True)
    facts = about("python " + " ".join(["benchmarks/kernels/gpu_power.py", *sys.argv[1:]]))
    (arguments.out / "gpu_power.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
