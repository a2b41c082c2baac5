"""GPU kernels as the compiler leaves them, without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PARTS = 2
PROGRAM = Path(__file__).parent / "compiled.py"
KERNELS = {  # by module
    "gpu_weight_activation.linear": {"linear"},
    "gpu_weight_activation.linear_few": {"linear_few"},
    "gpu_tokens.prepare": {"begin", "quantize", "project", "end"},
    "gpu_tokens.prepare_many": {"place", "route", "settle"},
    "gpu_weight_only.linear": {"linear"},
    "gpu_weight_only.many": {"dequantize_rows", "rescale"},
}
HOPPER_KERNELS = {
    "gpu_tokens.hopper_tokens": {"kernel"},
    "gpu_weight_activation.hopper_alone": {"kernel"},
    "gpu_weight_activation.hopper_few": {"kernel"},
    "gpu_weight_activation.hopper_linear": {"kernel"},
    "gpu_tokens.hopper_begin": {"kernel"},
    "gpu_tokens.hopper_project": {"kernel"},
    "gpu_weight_activation.linear_few": {"linear_few"},
    "gpu_tokens.prepare": {"begin", "project", "end"},
    "gpu_tokens.prepare_many": {"place", "route", "settle"},
    "gpu_weight_only.hopper_few": {"kernel"},
    "gpu_weight_only.hopper_linear": {"kernel"},
    "gpu_weight_only.many": {"dequantize_rows", "rescale"},
    "gpu_weight_only.linear": {"linear"},
}
LOOP = """
  tt.func public @some() {
    %a = ttg.local_alloc : () -> !ttg.memdesc<2x64x128xbf16>
    %b = ttg.local_alloc : () -> !ttg.memdesc<3x128x32xbf16>
    %r:2 = scf.for %i = %c0 to %c8 step %c1 iter_args(%sum = %zero) -> (tensor<64x32xf32>) {
      %left = ttg.memdesc_index %a[%i] : !ttg.memdesc<2x64x128xbf16> -> !ttg.memdesc<64x128xbf16>
      READ
      %right = ttg.memdesc_index %b[%i] : !ttg.memdesc<3x128x32xbf16> -> !ttg.memdesc<128x32xbf16>
      %next = ttng.warp_group_dot %left, %right, %sum {isAsync = true} : !ttg.memdesc<64x128xbf16>
      %done = ttng.warp_group_dot_wait %next {pendings = PENDING : i32} : tensor<64x32xf32>
    }
    %last = ttng.warp_group_dot_wait %r {pendings = 0 : i32} : tensor<64x32xf32>
  }
"""


@pytest.mark.parametrize(("capability", "kernels"), [(90, HOPPER_KERNELS), (80, KERNELS)])
def test_every_kernel_compiles_and_overwrites_nothing(capability: int, kernels: dict[str, set[str]]) -> None:
    """In processes of their own, which have another driver and where kernels are not interpreted: one for each core, as
    this is last to end of all tests."""
    compiled = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", str(PROGRAM), str(capability)]
    runs = [
        subprocess.Popen(
            [*command, str(part), str(PARTS)], env=compiled, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for part in range(PARTS)
    ]
    lines: list[str] = []
    for run in runs:
        said = run.communicate()[0]
        assert run.returncode == 0, said
        lines += said.splitlines()
    assert (capability == 90) == any("unfinished" in line for line in lines), "nothing to look at"
    found = {line.split()[0] for line in lines}
    assert found == {f"{module}.{kernel}" for module, names in kernels.items() for kernel in names}


@pytest.mark.parametrize(
    ("read", "pending", "found"),
    [("%x = ttg.local_load %left : tensor", 1, ["%a"]), ("%x = ttg.local_load %left : tensor", 0, []), ("", 1, [])],
)
def test_a_buffer_that_is_overwritten_is_found(read: str, pending: int, found: list[str]) -> None:
    from kernels.gpu.compiled import overwritten

    assert overwritten(LOOP.replace("READ", read).replace("PENDING", str(pending))) == found
