"""Cases of GPU kernels, run in Triton's interpreter on the CPU (in a process of its own: it is chosen at import) and on
a GPU. A module of cases lists functions in `CASES` and, run as a program, prints each one's name when it has passed."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor


def run_in_the_interpreter(room: str) -> None:
    """`cases.py` of a folder beside this file. Warnings are errors; every case must have been run."""
    assert find_spec("triton") is not None, "the dev extra brings triton"
    run = subprocess.run(
        [sys.executable, "-W", "error", str(Path(__file__).parent / room / "cases.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == [case.__name__ for case in import_module(f"kernels.{room}.cases").CASES]


def run_on_the_gpu(room: str) -> None:
    for case in import_module(f"kernels.{room}.cases").CASES:
        case()


def check_inputs_that_follow_one_another(apply: Callable[[Tensor], Tensor], inputs: list[Tensor]) -> None:
    """Inputs in one buffer, with nothing that waits between them, give what each gives alone; in a graph too."""
    expected = []
    for x in inputs:
        expected.append(apply(x))
        if x.is_cuda:
            torch.cuda.synchronize()
    buffer = torch.empty_like(inputs[0])
    found = [apply(buffer.copy_(x)) for x in inputs]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    if buffer.is_cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ys = [apply(buffer) for _ in range(3)]
        for x, y in zip(inputs * 5, expected * 5, strict=True):
            buffer.copy_(x)
            graph.replay()
            assert all(torch.equal(found, y) for found in ys)


def check_a_stacked_model(backend: str, scheme: str, device: str, tolerance: float) -> None:
    """Three linears of one input in a model: one launch, packed memory, the file's content in the state dict, before
    and after it is loaded again and moved. tolerance: of the norm of a token's output."""
    from runtime.test_modules import K, install, normal

    from quant_experts.kernels import dispatch
    from quant_experts.runtime import modules

    chosen = next(b for b in dispatch.BACKENDS if b.name == backend)
    quantized, _ = install(scheme)
    quantized.to(device)
    linears = list(quantized.attn.values())
    x = normal(2, 3, K, seed=8).to(device)
    with torch.no_grad():
        linears[0].group.backend = "reference"
        expected, stored = quantized(x), {k: v.clone() for k, v in quantized.state_dict().items()}
        select, modules.select = modules.select, lambda *choice: chosen
        try:
            y = quantized(x)
            assert all(linear.weight_codes is None for linear in linears), "int8 codes were not let go"
            assert ((y - expected).norm(dim=-1) <= tolerance * expected.norm(dim=-1)).all()
            assert all(torch.equal(value, stored[key]) for key, value in quantized.state_dict().items())
            quantized.load_state_dict(stored)
            assert torch.equal(quantized(x), y)
            assert torch.equal(pickle.loads(pickle.dumps(quantized))(x), y)
            linears[0].group.backend = None
            assert torch.equal(quantized(x), y), "laid out anew where another backend is asked for"
            quantized.half().float()
            assert all(linear.weight_codes is not None for linear in linears), "a move needs the codes back"
            assert quantized(x).shape == y.shape
            y = quantized(x)
        finally:
            modules.select = select
        linears[0].group.backend = "reference"
        assert ((quantized(x) - y).norm(dim=-1) <= tolerance * y.norm(dim=-1)).all()
        assert all(linear.weight_codes is not None for linear in linears), "another backend needs the codes back"
