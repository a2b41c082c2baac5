"""Times of one decoder block's four input groups on a GPU: bf16, cuBLAS int8 and fp8, ours without and with experts.

    python benchmarks/kernels/gpu_linear.py [--models ...] [--tokens ...] [--kinds ...] [--out benchmarks/results]

writes gpu_linear.json, gpu_linear.md (tables) and gpu_linear.png, with --docs docs/performance.md that page's tables
too; `linear_tables.py` makes all but the first of files that were kept. The groups (qkv, o, gate+up, down) run one
after another in a CUDA graph, each preparing its input anew (smoothing, quantization, routing, projection), on copies
of the weights that together exceed the L2 cache, of several blocks where tokens are few, so that the start of the graph
counts little. Times are medians of replays. "Reading" is a kernel that reads packed weights and does nothing else: what
memory allows at such sizes. The bound is the larger of bytes over the measured copy bandwidth and operations over the
measured rate of `torch._scaled_mm`, summed over groups, with the factors that so many tokens use at most. Ours with fp8
activations are timed from FP8_TOKENS tokens on.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from kinds import BASELINES, EXPERTS, KINDS, OURS, RANK, RECIPE, SHAPES
from linear_tables import write

from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

TOKENS = (1, 4, 16, 64, 128, 512, 2048, 8192)
COLD_BYTES = 200_000_000
FEW_TOKENS, FEW_BLOCKS = 128, 4
"""Up to so many tokens a graph has at least so many blocks."""
ROUNDS = 9
WARM_SECONDS = 0.5
"""Of work before a model is timed: a chip that was idle is slower at first."""
FP8_TOKENS = 512
"""Below, products wait for memory, and kinds of activations differ little."""


def layer(n: int, k: int, bits: int, kind: str, seed: int) -> triton_backend.Packed:
    """A random group with one stacked linear; kind is one of OURS; bits are those of integer activations."""
    fp8, kind = kind.startswith("fp8_"), kind.removeprefix("fp8_")
    experts, default = kind == "with_experts", kind == "default"
    rank = RECIPE.shared_rank if default else RANK
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    def factor(*shape: int) -> Factor | None:
        return Factor((normal(*shape) / shape[-1] ** 0.5).half(), None) if experts else None

    def integer_factor(*shape: int) -> Factor:
        codes = torch.randint(-127, 128, shape, generator=generator, device="cuda", dtype=torch.int8)
        return Factor(codes, normal(shape[0]).abs() * 1e-3)

    group = GroupOperands(
        8 if fp8 else bits,
        normal(k).abs() + 0.5,
        RECIPE.rotation if default else 0,
        integer_factor(rank, k) if default else factor(rank, k),
        factor(EXPERTS, RANK, k),
        normal(EXPERTS, k).half() if experts else None,
        normal(EXPERTS).half() if experts else None,
        default,
        "fp8" if fp8 else "int",
    )
    codes = torch.randint(-8, 8, (n, k), generator=generator, device="cuda", dtype=torch.int8)
    up, routed_up = integer_factor(n, rank) if default else factor(n, rank), factor(EXPERTS, n, RANK)
    linear = LinearOperands(codes, normal(n, 1).abs() * 0.01 + 0.001, None, None, up, routed_up, None)
    return triton_backend.pack(group, [linear], torch.bfloat16)


class Captured:
    """Work as a CUDA graph. Holds the work too, and so the tensors that it reads: capturing the next graph gives freed
    memory back to the driver."""

    def __init__(self, work: Callable[[], object]) -> None:
        work()
        torch.cuda.synchronize()
        self.work, self.graph = work, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            work()
        self.graph.replay()

    def time(self) -> float:
        """Microseconds of one replay."""
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.graph.replay()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) * 1000


def median_time(work: Callable[[], object], replays: int = ROUNDS) -> float:
    """Microseconds of one call inside a CUDA graph."""
    captured = Captured(work)
    return median(captured.time() for _ in range(replays))


def require_gpu() -> None:
    """End the program with a sentence, and status 2, where there is no GPU to time."""
    if not torch.cuda.is_available():
        print("There is no NVIDIA GPU that this PyTorch can use: run this where there is one.", file=sys.stderr)
        sys.exit(2)


def chip_limits() -> dict[str, float]:
    """Measured copy bandwidth (bytes read plus written, TB/s) and 8-bit matrix rate (TOP/s)."""
    source = torch.randn(2**30, device="cuda")  # 4 GiB
    copied = torch.empty_like(source)
    # A kernel: in a graph `copy_` is left to the copy engines, which are slower.
    bandwidth = 2 * source.nbytes / median_time(lambda: torch.neg(source, out=copied)) * 1e-6
    a, b = (torch.randn(8192, 8192, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones(8192, 1, device="cuda")
    work = lambda: torch._scaled_mm(a, b.T, one, one.T, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
    return {"copy_tb_per_s": bandwidth, "matrix_top_per_s": 2 * 8192**3 / median_time(work) * 1e-6}


def bound(shapes: tuple[tuple[int, int], ...], m: int, limits: dict[str, float]) -> float:
    """Least microseconds for the groups, every expert's factors read once (from 8 tokens on, nearly all are)."""
    total = 0.0
    for n, k in shapes:
        factors = min(EXPERTS, m) + 1
        moved = n * k / 2 + 2 * RANK * factors * (n + k) + 2 * EXPERTS * k + 2 * m * (n + k)
        operations = 2 * m * n * k + 4 * m * 2 * RANK * (n + k)
        total += max(moved / limits["copy_tb_per_s"], operations / limits["matrix_top_per_s"]) * 1e-6
    return total


@triton.jit  # type: ignore[untyped-decorator]
def read_weights(weight_ptr, sum_ptr, size, words: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read int32 words; a sum that is never met keeps the compiler from leaving them out."""
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    at = tl.program_id(0).to(tl.int64) * words + tl.arange(0, words)
    total = tl.sum(tl.load(weight_ptr + at, mask=at < size, other=0))
    if total == 0x12345678:
        tl.store(sum_ptr, total)


def read(weight: torch.Tensor) -> torch.Tensor:
    """-> the weight. As an overlapped launch, like ours."""
    size = weight.numel()
    read_weights[(-(-size // 4096),)](weight, weight, size, words=4096, num_warps=4, launch_pdl=True)
    return weight


def blocks(shapes: tuple[tuple[int, int], ...], m: int) -> int:
    """Blocks in a graph of any kind: more packed weights than the cache holds."""
    stored = sum(n * k for n, k in shapes) // 2
    return max(FEW_BLOCKS if m <= FEW_TOKENS else 1, -(-COLD_BYTES // stored))


def weights(shapes: tuple[tuple[int, int], ...], count: int, bits: int, kind: str) -> list[Any]:
    """Random weights of all groups of so many blocks, as a kind wants them."""
    groups = [(i, n, k) for _ in range(count) for i, (n, k) in enumerate(shapes)]
    if kind in OURS:
        return [layer(n, k, bits, kind, i) for i, n, k in groups]
    if kind == "reading":
        return [torch.randint(0, 100, (n * k // 8,), dtype=torch.int32, device="cuda") for _, n, k in groups]
    types = {"bf16": torch.bfloat16, "cublas_int8": torch.int8, "cublas_fp8": torch.float8_e4m3fn}
    scale = 30 if kind == "cublas_int8" else 1
    return [(torch.randn(n, k, device="cuda") * scale).to(types[kind]) for _, n, k in groups]


def timed(kind: str, m: int) -> bool:
    """Whether a kind is timed at a size."""
    if kind in OURS:
        return not kind.startswith("fp8_") or m >= FP8_TOKENS
    return kind == "bf16" or (m <= FEW_TOKENS if kind == "reading" else m > 16)


def work(shapes: tuple[tuple[int, int], ...], m: int, kind: str, made: list[Any]) -> Callable[[], object]:
    """All groups of the blocks made, one after another."""
    xs = [torch.randn(m, k, device="cuda").bfloat16() for _, k in shapes]
    if kind in OURS:
        return lambda: [triton_backend.apply(xs[i % 4], p) for i, p in enumerate(made)]
    if kind == "reading":
        return lambda: [read(w) for w in made]
    if kind == "bf16":
        return lambda: [torch.nn.functional.linear(xs[i % 4], w) for i, w in enumerate(made)]
    if kind == "cublas_int8":
        xi = [(x * 30).to(torch.int8) for x in xs]
        return lambda: [torch._int_mm(xi[i % 4], w.T) for i, w in enumerate(made)]
    x8, sx = [x.to(torch.float8_e4m3fn) for x in xs], torch.ones(m, 1, device="cuda")
    sw = [torch.ones(1, n, device="cuda") for n, _ in shapes]
    product = torch._scaled_mm
    return lambda: [
        product(x8[i % 4], w.T, sx, sw[i % 4], out_dtype=torch.bfloat16, use_fast_accum=True)
        for i, w in enumerate(made)
    ]


def measure(
    model: str, tokens: list[int], bits: int, limits: dict[str, float], kinds: list[str]
) -> list[dict[str, Any]]:
    """One row for each number of tokens."""
    shapes = SHAPES[model]
    rows: list[dict[str, Any]] = [
        {"model": model, "tokens": m, "bits": bits, "bound": bound(shapes, m, limits)} for m in tokens
    ]
    most = max(blocks(shapes, m) for m in tokens)
    made = {kind: weights(shapes, most, bits, kind) for kind in kinds}
    warm_up(work(shapes, tokens[0], "bf16", made["bf16"]))
    for row in rows[:1] + rows:  # the first twice: what comes first is slower
        # Kinds take turns, so that a chip that grows slower or faster meets all alike.
        m, count = row["tokens"], blocks(shapes, row["tokens"])
        graphs: dict[str, Captured] = {}  # those of the size before give their memory back
        graphs = {k: Captured(work(shapes, m, k, made[k][: 4 * count])) for k in kinds if timed(k, m)}
        rounds = [{kind: graph.time() / count for kind, graph in graphs.items()} for _ in range(ROUNDS)]
        row |= {kind: median(times[kind] for times in rounds) for kind in graphs}
        row["rounds"] = [{kind: round(time, 1) for kind, time in times.items()} for times in rounds]
        shown = {key: round(v, 1) if isinstance(v, float) else v for key, v in row.items() if key != "rounds"}
        print(json.dumps(shown), flush=True)
    return rows


def warm_up(busy: Callable[[], object]) -> None:
    """Work until the chip runs at its full clock."""
    end = time.perf_counter() + WARM_SECONDS
    while time.perf_counter() < end:
        busy()
        torch.cuda.synchronize()


def compile_ahead(tokens: list[int], models: list[str], kinds: Iterable[str] = OURS) -> None:
    """Let processes side by side fill the compiler's cache."""
    command = [sys.executable, __file__, "--compile-only", "--models", *models, "--kinds", *kinds, "--tokens"]
    for process in [subprocess.Popen([*command, str(m)], stdout=subprocess.DEVNULL) for m in tokens]:
        process.wait()


def about(command: str) -> dict[str, Any]:
    """What a result needs to be repeated."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "command": command,
        "chip": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()},
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=list(TOKENS))
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), help="bf16 is always timed")
    parser.add_argument("--bits", type=int, default=8, help="activation bits")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="a page whose tables are made anew")
    parser.add_argument("--compile-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    require_gpu()
    kinds = [kind for kind in KINDS if kind == "bf16" or kind in arguments.kinds]
    if arguments.compile_only:
        for model in arguments.models:
            for i, (n, k) in enumerate(SHAPES[model]):
                for kind in kinds:
                    if kind in BASELINES or not timed(kind, arguments.tokens[0]):
                        continue
                    x = torch.randn(arguments.tokens[0], k, device="cuda").bfloat16()
                    triton_backend.apply(x, layer(n, k, arguments.bits, kind, i))
        return
    compile_ahead(arguments.tokens, arguments.models, kinds)
    limits = chip_limits()
    facts = about(shlex.join(["python", "benchmarks/kernels/gpu_linear.py", *sys.argv[1:]])) | {"limits": limits}
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        rows += measure(model, arguments.tokens, arguments.bits, limits, kinds)
        (arguments.out / "gpu_linear.json").write_text(json.dumps({"about": facts, "rows": rows}, indent=1) + "\n")
    write(rows, arguments.out, arguments.docs)


if __name__ == "__main__":
    main()
