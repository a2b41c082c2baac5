"""What Python takes to launch the kernels of a group: recorded launches repeated, single ones by `launch.start`, and
Triton's own way. Needs no GPU.

    python benchmarks/kernels/launch_times.py

Kernels are compiled for Hopper and loaded nowhere: launching one does nothing, so that what is timed is Python alone,
allocations and checks included. Prints how many launches a group takes, microseconds of its product by all ways,
medians of rounds in which they take turns, and the ratio to Triton's way within a round with its 10th and 90th
percentile.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor

from quant_experts.kernels.gpu import cuda, launch, recorded
from quant_experts.kernels.gpu_weight_activation import backend

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels" / "gpu"))
compiled: Any = import_module("compiled")
"""What the tests compile kernels with where there is no GPU."""
repeated: Any = import_module("repeated")
"""What they pretend a GPU with."""
SIZES = ((1, 3584, 4608), (100, 3584, 4608), (2000, 3584, 4608))
"""Tokens, input and output channels: the 7B's qkv."""
ROUNDS, CALLS = 25, 40


def by_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `launch.start`."""
    kernel[grid](*[arg.checked() if isinstance(arg, launch.Boxes) else arg for arg in args], **constants)


def pretend() -> Any:
    """From here on there is a Hopper GPU, whose tensors lie in ordinary memory and which does nothing. -> the library
    that stands for its driver, which calls a function of C to launch."""
    driver, _ = repeated.pretend()
    driver.launcher_cls = lambda source, metadata: lambda *given: None
    library = cuda.driver()
    library.cuLaunchKernelEx = ctypes.CDLL(None).labs
    library.cuLaunchKernelEx.restype = None
    return library


def seconds(work: Callable[[], object]) -> float:
    """Of a call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - begin) / CALLS


def times(x: Tensor, packed: backend.Packed) -> list[list[float]]:
    """Seconds of rounds by Triton's way, by `start`, and repeated."""
    ways: dict[tuple[Any, Any], list[float]] = {
        (by_triton, backend._apply): [],
        (launch.start, backend._apply): [],
        (launch.start, backend.apply): [],
    }
    for _ in range(ROUNDS + 1):
        for (start, apply), found in ways.items():
            for module in repeated.MODULES:
                if hasattr(module, "start"):
                    module.start = start
            found.append(seconds(lambda apply=apply: apply(x, packed)))  # type: ignore[misc]
    return [found[1:] for found in ways.values()]  # the first round compiles and records


def launches() -> int:
    """Of the group that was recorded."""
    (program,) = recorded._programs.values()
    assert isinstance(program, recorded.Program)
    return len(program.launches)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pretend()
    print(
        "| experts | tokens | launches | Triton's way, us | start, us | repeated, us | start / Triton's "
        "| repeated / Triton's |"
    )
    print("| --- |" + " ---: |" * 7)
    for kind, title in {"none": "none", "experts": "8 routed, one shared", "codes": "default recipe"}.items():
        for m, k, n in SIZES:
            group, linears = compiled.operands(kind, 8, "int", n, k, 0)
            packed = backend.pack(group, linears, torch.bfloat16)
            recorded._programs.clear()
            before, *after = times(torch.ones(m, k, dtype=torch.bfloat16), packed)
            cells = [str(launches()), *(f"{median(found) * 1e6:.0f}" for found in (before, *after))]
            for found in after:
                ratios = [a / b for a, b in zip(found, before, strict=True)]
                low, *_, high = quantiles(ratios, n=10)
                cells.append(f"{median(ratios):.2f} ({low:.2f}-{high:.2f})")
            print(f"| {title} | {m} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
