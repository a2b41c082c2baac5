"""Compiles every GPU kernel, as the backends would launch it, on a machine without a GPU.

`python compiled.py [80|86|89|90|100|120 [PART PARTS]]`, a compute capability (90, Hopper, by default), prints a line
for each kernel compiled, of all kinds of cases or of every PARTS-th from PART on; *unfinished* says that one starts
products which may run on into the next iteration of a loop, as some should on Hopper. It fails where one needs more
shared memory than such a GPU has, where on Hopper, for which they are tuned, it keeps much in memory for want of
registers, or where `overwritten` finds one.

The interpreter checks neither types in branches that it does not take, nor layouts, nor what the compiler makes of a
loop.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from quant_experts.config import ActivationFormat
from quant_experts.kernels.gpu import launch
from quant_experts.kernels.gpu_tokens import layout, prepare_launch
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_activation import few_launch, hopper_launch
from quant_experts.kernels.gpu_weight_only import backend as weight_only_backend
from quant_experts.kernels.gpu_weight_only import hopper_launch as weight_only_launch
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

SHARED_MEMORY = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
"""Bytes that a program may use, by compute capability."""


def gpu(capability: int) -> dict[str, Callable[..., Any]]:
    """What the backends ask of a GPU."""
    overlapped = capability >= 90
    return dict(
        overlapped=lambda device: overlapped,
        hopper=lambda device: capability == 90,
        programs=lambda device: 132,
        shared_memory=lambda device: SHARED_MEMORY[capability],
        options=lambda device: {"launch_pdl": True} if overlapped else {},
        reserve=lambda device, fp8: None,
        zeros=lambda name, size, device: torch.zeros(size, dtype=torch.int32),
    )


MOST_STACK = 512
"""Bytes of memory that a thread may use instead of registers. Some that hold much use a few; where the compiler gives
up it is thousands."""


def stack(kernel: CompiledKernel) -> int:
    """Bytes of memory that a thread of a compiled kernel uses instead of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return max(int(found) for found in re.findall(r"STACK:(\d+)", usage))


class NoGpu:
    """A driver that knows its target and launches nothing."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def overwritten(ir: str) -> list[str]:
    """Buffers of pipelined loops that a loop reads both as values and as operands of matrix products that may be
    unfinished when the iteration ends: Triton 3.6 gives them one buffer too few, and the next copy overwrites what is
    still multiplied. A use of the sums in the loop, by inline assembly, makes it wait."""
    found = []
    for function in ir.split("tt.func ")[1:]:
        views = dict(re.findall(r"(%\S+) = ttg\.memdesc_\w+ (%\w+)", function))

        def buffer(name: str, views: dict[str, str] = views) -> str:
            while name in views:
                name = views[name]
            return name

        for loop in loops(function):
            waits = [int(count) for count in re.findall(r"warp_group_dot_wait.*pendings = (\d+)", loop)]
            values = {buffer(name) for name in re.findall(r"ttg\.local_load (%\w+)", loop)}
            operands = re.findall(r"warp_group_dot (%\w+), (%\w+).*isAsync = true", loop)
            multiplied = {buffer(name) for pair in operands for name in pair if name in views}
            if waits and waits[-1] > 0:
                found += sorted(values & multiplied)
    return found


def loops(function: str) -> list[str]:
    """Bodies of the innermost loops, by indentation."""
    lines, found = function.splitlines(), []
    for i, line in enumerate(lines):
        if "scf.for" in line:
            depth = len(line) - len(line.lstrip())
            end = next(j for j in range(i + 1, len(lines)) if lines[j].startswith(" " * depth + "}"))
            body = "\n".join(lines[i + 1 : end])
            if "scf.for" not in body:
                found.append(body)
    return found


def compile_launches(capability: int) -> dict[str, CompiledKernel]:
    """From here on launches compile, and what they compile is in the dictionary that is returned."""
    compiled: dict[str, CompiledKernel] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        module = ".".join(self.fn.__module__.split(".")[-2:])
        compiled[f"{module}.{self.fn.__name__} {kernel.hash[:8]}"] = kernel
        return kernel

    triton.runtime.driver.set_active(NoGpu(capability))
    CompiledKernel._init_handles = lambda self: None
    JITFunction.run = compile_only
    modules = (launch, triton_backend, weight_only_backend, few_launch, hopper_launch, weight_only_launch, layout)
    for module in (*modules, prepare_launch):
        for name, value in gpu(capability).items():
            if hasattr(module, name):
                setattr(module, name, value)
    return compiled


def operands(
    kind: str, bits: int, activation_format: ActivationFormat, n: int, k: int, code: int
) -> tuple[GroupOperands, list[LinearOperands]]:
    """A group and a linear of ones and one code. kind: "none", "codes", as the default recipe, "shared", an expert that
    reads values, or one of ROUTED."""
    experts, rank = ROUTED.get(kind, (0, 32))

    def factor(*shape: int) -> Factor | None:
        if kind == "none" or 0 in shape:
            return None
        if kind.startswith("codes"):
            return Factor(torch.ones(shape, dtype=torch.int8), torch.ones(shape[:-1]))
        return Factor(torch.ones(shape).half(), None)

    router = (torch.ones(experts, k), torch.ones(experts)) if experts else (None, None)
    group = GroupOperands(
        bits, torch.ones(k), 64 if kind.startswith("codes") else 0, factor(rank, k), factor(experts, rank, k), *router,
        kind.startswith("codes") and bits < 16, activation_format,
    )  # fmt: skip
    size = None if bits < 16 else 128
    scale = torch.ones(n, 1 if size is None else k // size)
    codes = torch.full((n, k), code, dtype=torch.int8)
    bias = torch.ones(n) if kind == "experts" else None
    return group, [LinearOperands(codes, scale, None, size, factor(n, rank), factor(experts, n, rank), bias)]


ROUTED = {"experts": (8, 32), "wide experts": (8, 64), "many experts": (16, 32)}
ROUTED |= {"high rank": (0, 256), "codes of a high rank": (0, 256)}
"""Routed experts, beside a shared one, and the rank of each."""
KINDS = ("none", "experts", "codes")
CASES: list[tuple[Any, int, ActivationFormat, torch.dtype, int, int, int, tuple[int, ...], tuple[str, ...]]] = [
    (triton_backend, 8, "int", torch.bfloat16, 4608, 8192, 0, (1, 12, 100, 600), KINDS),
    (triton_backend, 8, "int", torch.bfloat16, 512, 3584, 0, (1, 4, 12), KINDS),
    (triton_backend, 8, "int", torch.bfloat16, 1024, 8960, 0, (1, 16), KINDS),
    (triton_backend, 8, "int", torch.bfloat16, 17920, 1536, 0, (3, 8), KINDS),
    (triton_backend, 8, "int", torch.bfloat16, 512, 3584, 0, (8, 16), ("high rank",)),
    (triton_backend, 8, "int", torch.bfloat16, 64, 8960, 0, (2,), KINDS[1:]),
    (triton_backend, 8, "int", torch.float32, 64, 300, 0, (3,), KINDS[1:]),
    (triton_backend, 8, "int", torch.float32, 64, 256, 0, (5000,), KINDS[1:2]),
    (triton_backend, 8, "int", torch.bfloat16, 64, 256, 0, (5000,), KINDS[1:2]),
    (triton_backend, 8, "int", torch.bfloat16, 64, 1000, 0, (64, 4096), ("shared", "wide experts", "many experts")),
    (triton_backend, 8, "int", torch.bfloat16, 512, 3584, 0, (40,), ("high rank", "codes of a high rank")),
    (triton_backend, 8, "int", torch.bfloat16, 64, 18944, 0, (64, 2048), KINDS[1:2]),
    (triton_backend, 8, "int", torch.bfloat16, 64, 20480, 0, (20,), KINDS[2:]),
    (triton_backend, 8, "int", torch.bfloat16, 64, 29568, 0, (20,), KINDS[:1]),
    (triton_backend, 8, "fp8", torch.float16, 512, 3584, 0, (5, 40, 300), KINDS[1:]),
    (triton_backend, 8, "fp8", torch.bfloat16, 64, 8192, 0, (4,), KINDS[1:2]),
    (triton_backend, 8, "fp8", torch.bfloat16, 64, 8192, 0, (600,), KINDS[:2]),
    (triton_backend, 8, "fp8", torch.bfloat16, 2304, 10368, 0, (4096,), KINDS),  # keeps sums in memory
    (triton_backend, 8, "fp8", torch.bfloat16, 8192, 512, 0, (2048,), KINDS[1:2]),
    (triton_backend, 8, "fp8", torch.bfloat16, 8192, 512, 0, (12, 2048), KINDS[2:]),
    (weight_only_backend, 16, "int", torch.bfloat16, 512, 3584, 0, (1, 40, 600), KINDS[1:2]),  # codes of 3 bits
    (weight_only_backend, 16, "int", torch.bfloat16, 17920, 512, 0, (8,), KINDS[1:]),
    (weight_only_backend, 16, "int", torch.bfloat16, 64, 9216, 0, (8,), KINDS[2:]),
    (weight_only_backend, 16, "int", torch.bfloat16, 512, 1024, 0, (8,), ("wide experts",)),  # more than registers hold
    (weight_only_backend, 16, "int", torch.float32, 37888, 512, 0, (300,), KINDS[:1]),  # their largest tile
    (weight_only_backend, 16, "int", torch.float32, 8192, 512, -8, (3000,), KINDS[2:]),
    (weight_only_backend, 16, "int", torch.bfloat16, 512, 3584, -8, (8,), KINDS[1:]),
    (weight_only_backend, 16, "int", torch.bfloat16, 8192, 512, -8, (3000,), KINDS[1:2]),
    (weight_only_backend, 16, "int", torch.bfloat16, 17920, 512, -8, (8,), KINDS),
]
"""Backend, bits and format of activations, type of inputs, output and input channels, codes, tokens, kinds."""


def main(capability: int, part: int = 0, parts: int = 1) -> None:
    compiled = compile_launches(capability)
    each = [(*case, kind) for *case, kinds in CASES for kind in kinds]
    for backend, bits, activation_format, dtype, n, k, code, sizes, kind in each[part::parts]:
        if activation_format == "fp8" and capability < 90:  # runs on the reference
            continue
        packed = backend.pack(*operands(kind, bits, activation_format, n, k, code), dtype)
        for m in sizes:
            backend.apply(torch.ones(m, k, dtype=dtype), packed)
            if backend is triton_backend:  # `prepare` alone sorts tokens whatever the number of outputs
                backend.linear(backend.prepare(torch.ones(m, k, dtype=dtype), packed.group), packed.linear)
    unfinished = re.compile(r"warp_group_dot_wait.*pendings = [1-9]")
    problems = {name: overwritten(kernel.asm["ttgir"]) for name, kernel in compiled.items()}
    for name, kernel in compiled.items():
        if kernel.metadata.shared > SHARED_MEMORY[capability]:
            problems[name].append(f"needs {kernel.metadata.shared} bytes of shared memory")
        if capability == 90 and (used := stack(kernel)) > MOST_STACK:
            problems[name].append(f"keeps {used} bytes of a thread in memory")
        print(name, *["unfinished"] * bool(unfinished.search(kernel.asm["ttgir"])), *problems[name])
    sys.exit(any(problems.values()))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or [90]))
