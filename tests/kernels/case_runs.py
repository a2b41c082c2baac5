"""Cases of GPU kernels, run in Triton's interpreter on the CPU (in a process of its own: it is chosen at import) and on
a GPU. A module of cases lists functions in `CASES` and, run as a program, prints each one's name when it has passed."""

import os
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path


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
