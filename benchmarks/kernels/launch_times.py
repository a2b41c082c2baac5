"""What Python takes to launch the kernels of a group, by `launch.start` and by Triton's own way. Needs no GPU.

    python benchmarks/kernels/launch_times.py

Kernels are compiled for Hopper and loaded nowhere: launching one does nothing, so that what is timed is Python alone,
allocations and checks included. Prints microseconds of a group's product (`backend.apply`) by both ways, medians of
rounds in which they take turns, and the ratio within a round with its 10th and 90th percentile.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median, quantiles
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor

from quant_experts.kernels.gpu import hopper_tokens, launch
from quant_experts.kernels.gpu_weight_activation import alone_launch, backend, hopper_launch, hopper_project
from quant_experts.kernels.gpu_weight_activation import prepare_launch as prepare

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "kernels" / "gpu"))
compiled: Any = import_module("compiled")
"""What the tests compile kernels with where there is no GPU."""
MODULES = (launch, backend, hopper_launch, hopper_project, hopper_tokens, alone_launch, prepare)
SIZES = ((1, 3584, 4608), (100, 3584, 4608), (2000, 3584, 4608))
"""Tokens, input and output channels: the 7B's qkv."""
ROUNDS, CALLS = 25, 40


def no_launches() -> Any:
    """A driver that loads nothing, and launches by doing nothing."""
    driver, properties = compiled.NoGpu(90), {"max_shared_mem": 232_448}
    driver.utils = SimpleNamespace(
        get_device_properties=lambda device: properties, load_binary=lambda *_: (0, 1, 0, 0, 1024)
    )
    driver.launcher_cls = lambda source, metadata: lambda *given: None
    return driver


def by_triton(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `launch.start`."""
    kernel[grid](*[arg.checked() if isinstance(arg, launch.Boxes) else arg for arg in args], **constants)


def pretend() -> None:
    """From here on there is a Hopper GPU, whose tensors lie in ordinary memory."""
    triton.runtime.driver.set_active(no_launches())
    for module in MODULES:
        for name, value in compiled.gpu(90).items():
            if name != "zeros" and hasattr(module, name):  # workspaces are made once, as on a GPU
                setattr(module, name, value)


def seconds(work: Callable[[], object]) -> float:
    """Of a call."""
    begin = time.perf_counter()
    for _ in range(CALLS):
        work()
    return (time.perf_counter() - begin) / CALLS


def both(x: Tensor, packed: backend.Packed) -> tuple[list[float], list[float]]:
    """Seconds of rounds by Triton's way, and by `start`."""
    ways: dict[Any, list[float]] = {by_triton: [], launch.start: []}
    for _ in range(ROUNDS + 1):
        for way, found in ways.items():
            for module in MODULES[1:]:
                module.start = way  # type: ignore[attr-defined]
            found.append(seconds(lambda: backend.apply(x, packed)))
    before, after = (found[1:] for found in ways.values())  # the first round compiles
    return before, after


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    pretend()
    print("| experts | tokens | Triton's way, us | start, us | start / Triton's way |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for kind, title in {"none": "none", "experts": "8 routed, one shared", "codes": "default recipe"}.items():
        for m, k, n in SIZES:
            group, linears = compiled.operands(kind, 8, "int", n, k, 0)
            packed = backend.pack(group, linears, torch.bfloat16)
            before, after = both(torch.ones(m, k, dtype=torch.bfloat16), packed)
            ratios = [a / b for a, b in zip(after, before, strict=True)]
            low, *_, high = quantiles(ratios, n=10)
            times = f"{median(before) * 1e6:.0f} | {median(after) * 1e6:.0f}"
            print(f"| {title} | {m} | {times} | {median(ratios):.2f} ({low:.2f}-{high:.2f}) |", flush=True)


if __name__ == "__main__":
    main()
