"""Launches of compiled kernels, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parent / "launched.py"


def test_kept_kernels_are_those_that_triton_would_choose() -> None:
    """In a process of its own, which has another driver and where kernels are not interpreted."""
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(PROGRAM)]
    run = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
