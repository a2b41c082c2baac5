"""Launches of compiled kernels, single ones and those of groups, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("program", ["launched.py", "repeated.py"])
def test_launches_are_those_that_triton_would_make(program: str) -> None:
    """In a process of its own, which has another driver and where kernels are not interpreted."""
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(Path(__file__).parent / program)]
    run = subprocess.run(command, env=compiled, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
