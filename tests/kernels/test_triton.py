"""The Triton kernels against the oracle, in Triton's interpreter on the CPU, and on a GPU where there is one."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def test_in_the_interpreter() -> None:
    assert find_spec("triton") is not None, "the dev extra brings triton"
    run = subprocess.run(
        [sys.executable, "-W", "error", str(HERE / "triton_cases.py")],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    from kernels.triton_cases import CASES

    assert run.stdout.split() == [case.__name__ for case in CASES]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_gpu() -> None:
    from kernels.triton_cases import CASES

    for case in CASES:
        case()
