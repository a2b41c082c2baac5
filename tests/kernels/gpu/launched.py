"""Launches by `launch.start`, and the same ones by Triton, on a machine without a GPU: both must launch the same
kernels with the same arguments. Kernels are compiled for Hopper, loaded nowhere, and their launches written down.

A program of its own, as it has another driver, and kernels must not be interpreted.
"""

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from compiled import NoGpu
from triton import knobs
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.runtime.jit import JITFunction

from quant_experts.kernels.gpu import launch
from quant_experts.kernels.gpu.launch import Boxes, start

BYTES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=8, rank=2)
WIDER = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
HALVES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=2)


@triton.jit
def number(x_ptr, y_ptr, n, factor, c: tl.constexpr, d: tl.constexpr = 3):
    tl.store(y_ptr, (tl.load(x_ptr) * factor + n + c * d).to(y_ptr.dtype.element_ty))


@triton.jit
def other(x_ptr, y_ptr, n, factor, c: tl.constexpr, d: tl.constexpr = 3):
    tl.store(y_ptr, (tl.load(x_ptr) - factor * c + n + d).to(y_ptr.dtype.element_ty))


@gluon.jit
def boxes(x_desc, y_ptr, n):
    gl.store(y_ptr, x_desc.block_shape[0] + n)


class Utils:
    """What Triton's driver is asked for when a kernel is loaded: each gets a number of its own."""

    def __init__(self) -> None:
        self.numbers = count(1)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 232_448}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, ...]:
        return 0, next(self.numbers), 0, 0, 1024


class WritesDown(NoGpu):
    """A driver whose launches are lists of what they were given, of one of two GPUs and its stream."""

    def __init__(self) -> None:
        super().__init__(90)
        self.utils, self.device, self.launches = Utils(), 0, list[Any]()
        self.launcher_cls = lambda source, metadata: self.write_down

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: object = None) -> int:
        return 100 + self.device

    def write_down(self, *given: Any) -> None:
        x, y, z, stream, function, metadata, _, _, _, *args = given
        self.launches.append([x, y, z, stream, function, metadata, *map(comparable, args)])

    def only(self) -> Any:
        """The one launch since the last call."""
        (launched,) = self.launches
        self.launches.clear()
        return launched


def comparable(arg: Any) -> Any:
    """What a kernel is given of an argument."""
    if hasattr(arg, "block_shape"):
        return [arg.base.data_ptr(), *arg.shape, *arg.strides, arg.padding, getattr(arg, "round_f32_to_tf32", False)]
    return arg.data_ptr() if isinstance(arg, torch.Tensor) else arg


class Case(NamedTuple):
    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    grid: tuple[int, ...] = (1,)
    device: int = 0
    kept: bool = True
    """Whether its second launch is expected to take the short way."""


def cases() -> Iterator[Case]:
    """Each differs from another in one thing, mostly one that Triton compiles for."""
    x, y = torch.zeros(64), torch.zeros(64)
    plain: dict[str, Any] = dict(c=2)
    for n in (0, 1, 16, 17, 32, -16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63, True, False, 1.0, 16.0):
        yield Case(number, (x, y, n, 0.5), plain)
    for factor in (1, 1.0, 2.0, float("inf"), True):
        yield Case(number, (x, y, 17, factor), plain)
    for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.int32, torch.float8_e4m3fn):
        yield Case(number, (x, y.to(dtype), 17, 0.5), plain)
    for view in (x[4:], x[8:], torch.nn.Parameter(x)):
        yield Case(number, (view, y, 17, 0.5), plain)
    for view in (x[1:], x[2:], x[3:]):
        yield Case(number, (view, y, 17, 0.5), plain, kept=False)
        yield Case(number, (y, view, 17, 0.5), plain, kept=False)
    options: tuple[dict[str, Any], ...] = (
        dict(num_warps=8), dict(maxnreg=128), dict(launch_pdl=True), dict(enable_fp_fusion=False), dict(d=1), dict(d=3),
        dict(c=1), dict(c=True), dict(c=2.0), dict(num_warps=1, d=1), dict(d=1, num_warps=1),
    )  # fmt: skip
    for changed in options:
        yield Case(number, (x, y, 17, 0.5), plain | changed)
    yield Case(number, (x, y, 17, 0.5, 2), {})
    yield Case(number, (x, y, 17, 0.5, 2, 1), {})
    yield Case(number, (x, y, 17, 0.5, True), {})
    yield Case(number, (x, y, 17, 0.5, False), {})
    yield Case(number, (x, y, 17), dict(factor=0.5, c=2), kept=False)  # by name, though not compiled for
    yield Case(other, (x, y, 17, 0.5), plain)
    yield Case(number, (x, y, 17, 0.5), plain, grid=(2, 3))
    yield Case(number, (x, y, 17, 0.5), plain, grid=(2, 3, 4))
    yield Case(number, (x, y, 17, 0.5), plain, device=1)
    codes, halves = torch.zeros(256, 128, dtype=torch.int8), torch.zeros(256, 64, dtype=torch.float16)
    for tensor, box, layout in (
        (codes, (64, 64), BYTES), (codes, (128, 64), BYTES), (codes, (64, 128), WIDER), (codes[:100], (64, 64), BYTES),
        (codes[:, :64], (64, 64), BYTES), (codes[16:], (64, 64), BYTES), (halves, (64, 32), HALVES),
        (codes.view(torch.uint8), (64, 64), BYTES),
    ):  # fmt: skip
        yield Case(boxes, (Boxes(tensor, tensor.shape, tensor.stride(), box, layout), y, 17), {})


def by_triton(case: Case) -> None:
    args = [arg.checked() if isinstance(arg, Boxes) else arg for arg in case.args]
    case.kernel[case.grid](*args, **case.constants)


def by_start(case: Case) -> None:
    start(case.kernel, case.grid, *case.args, **case.constants)


def launched(driver: WritesDown, case: Case, by: Callable[[Case], None]) -> Any:
    driver.device = case.device
    by(case)
    return driver.only()


def check_same_launches(driver: WritesDown, ways: list[Any]) -> None:
    """First, second and third launches of all cases, the second and third of which Triton sees only where it must."""
    every = list(cases())
    first = [launched(driver, case, by_start) for case in every]
    expected = [launched(driver, case, by_triton) for case in every]
    assert first == expected
    for _ in range(2):
        for case, triton_s in zip(every, expected, strict=True):
            ways.clear()
            assert launched(driver, case, by_start) == triton_s, case
            assert len(ways) == (not case.kept), case


def check_watched(driver: WritesDown, ways: list[Any]) -> None:
    """Hooks see each launch, and what was compiled for debugging is not kept."""
    x = torch.zeros(64)
    case, seen = Case(number, (x, x, 17, 0.5), dict(c=2)), []
    expected = launched(driver, case, by_start)
    for chain in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
        chain.add(seen.append)
        ways.clear()
        assert launched(driver, case, by_start) == expected
        assert len(ways) == 1
        chain.remove(seen.append)
    new = Case(number, (x, x, 18, 0.5), dict(c=2))
    knobs.runtime.debug = True
    for_debugging = launched(driver, new, by_start)
    knobs.runtime.debug = False
    assert launched(driver, new, by_start) == launched(driver, new, by_triton) != for_debugging


def check_limits(driver: WritesDown) -> None:
    """What is kept has an end, and what came last is kept."""
    x = torch.zeros(64)
    launch.KEPT = 10
    launch._loaded.clear()
    for n in range(100, 150):
        case = Case(number, (x, x, n, 0.5), dict(c=2))
        assert launched(driver, case, by_start) == launched(driver, case, by_triton)
        assert len(launch._loaded) <= 10
        assert launched(driver, case, by_start) == launched(driver, case, by_triton)
        assert any(n in part for key in launch._loaded for part in key if isinstance(part, tuple))


def check_refusals() -> None:
    """What the copy engine does not take is refused with the first launch and with a later one."""
    x = torch.zeros(256 * 128 + 1, dtype=torch.int8)
    for start_at in (0, 1, 0, 1):
        view = x[start_at:][: 256 * 128].view(256, 128)
        try:
            start(boxes, (1,), Boxes(view, view.shape, view.stride(), (64, 64), BYTES), x, 17)
        except AssertionError:
            assert start_at
        else:
            assert not start_at


def main() -> None:
    driver, ways = WritesDown(), list[Any]()
    triton.runtime.driver.set_active(driver)
    run = JITFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ways.append(self)
        return run(self, *args, **kwargs)

    JITFunction.run = counted
    check_same_launches(driver, ways)
    check_watched(driver, ways)
    check_limits(driver)
    check_refusals()


if __name__ == "__main__":
    main()
