"""What every Triton launch shares: kernels that are kept once compiled, the interpreter switch, programmatic launches,
and workspaces."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import local
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, element by element: what continuous integration tests."""


KEPT = 8192
"""Keys by which compiled kernels are kept for launches. Each number of tokens makes new ones."""
KNOWN = ("3.6.", "3.7.")
"""Versions of Triton whose launchers take what `start` gives them; with others every launch goes Triton's way."""


class Boxes(NamedTuple):
    """A tensor as the copy engine reads it, in boxes: what launches read of Gluon's `TensorDescriptor`, whose checks
    take as long as one. They depend on what a key of `start` holds, but for alignment: one of each key is checked."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any
    padding: str = "zero"
    round_f32_to_tf32: bool = False
    """Read by launches of Triton 3.7, unknown to 3.6: always False."""

    def checked(self) -> Any:
        """Gluon's own. Raises `AssertionError` for what the copy engine does not take."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        shape, strides, block_shape = list(self.shape), list(self.strides), list(self.block_shape)
        return TensorDescriptor(self.base, shape, strides, block_shape, self.layout, self.padding)


class _Loaded(NamedTuple):
    """A compiled kernel, on the GPU, and the arguments that it is compiled for."""

    kernel: Any
    """Triton's function. A key holds its `id`, which no other has while it is kept here: hashing its source is slow."""
    compiled: Any
    """What Triton made of it."""
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]
    """Those after the positional ones."""


_loaded: dict[Any, _Loaded] = {}


class Noted(NamedTuple):
    """A launch that was made."""

    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]


class _Notes(local):
    """Of a thread."""

    launches: list[Noted | None] | None = None


_notes = _Notes()


@contextmanager
def noted() -> Iterator[list[Noted | None]]:
    """The launches that `start` makes meanwhile; None for one that went Triton's way."""
    _notes.launches = []
    try:
        yield _notes.launches
    finally:
        _notes.launches = None


def repeatable(device: torch.device) -> bool:
    """Whether launches may be repeated without Triton: its version is known, and nobody watches."""
    if device.type != "cuda":
        return False
    knobs, _, known = _triton()
    return known and not _watched(knobs)


def current_stream(device: torch.device) -> int:
    """Its address, or whatever else the CUDA driver knows it by."""
    stream: int = _triton()[1].active.get_current_stream(device.index)
    return stream


def start(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """As `kernel[grid](*args, **constants)`, in a third of the time: Triton takes longer to find the compiled kernel
    again than to launch it, a group of linears has up to five launches, and a short prefill waits for them.

    args: tensors, `Boxes`, and what hashes by value. constants: what hashes by value. The key is finer than what Triton
    compiles for: numbers themselves instead of whether they are 1 or multiples of 16. Of addresses it knows nothing, so
    tensors that do not begin at a multiple of 16 bytes go Triton's way, as do launches that someone watches. Whether
    globals that a kernel was compiled with have changed since, Triton asks at the first launch of each key only.
    """
    if INTERPRETED:
        kernel[grid](*args, **constants)
        return
    knobs, drivers, known = _triton()
    parts, addresses = _described(args)
    driver = drivers.active
    device = driver.get_current_device()
    key = (id(kernel), device, tuple(parts), tuple(constants), tuple(constants.values()))
    ordinary = not known or addresses % 16 != 0 or kernel.pre_run_hooks or _watched(knobs)
    loaded = None if ordinary else _loaded.get(key)
    if loaded is None:
        compiled = kernel[grid](*[arg.checked() if type(arg) is Boxes else arg for arg in args], **constants)
        if not ordinary:
            loaded = _keep(key, kernel, compiled, len(args), constants)
    else:
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.get_current_stream(device)
        _, _, run, function, metadata, rest = loaded
        run(x, y, z, stream, function, metadata, None, None, None, *args, *rest)
    if _notes.launches is not None:
        _notes.launches.append(None if loaded is None else Noted(loaded.compiled, grid, args))


def _described(args: tuple[Any, ...]) -> tuple[list[Any], int]:
    """What Triton compiles for, or finer, but for addresses; and all addresses, their bits in one."""
    parts: list[Any] = []
    addresses = 0
    for arg in args:
        kind = type(arg)
        if kind is int or kind is float:
            parts.append(kind)  # equal numbers of two types hash alike
            parts.append(arg)
        elif isinstance(arg, Tensor):
            addresses |= arg.data_ptr()
            parts.append(arg.dtype)
        elif kind is Boxes:
            addresses |= arg.base.data_ptr()
            parts += arg.base.dtype, arg[1:]
        else:
            parts += kind, arg
    return parts, addresses


def _keep(key: Any, kernel: Any, compiled: Any, given: int, constants: dict[str, Any]) -> _Loaded | None:
    """For the next launch with that key; unless nothing was loaded, or for a GPU whose kernels depend on more, or a
    keyword names what the kernel is not compiled for. Of too many the oldest half go."""
    if getattr(compiled, "function", None) is None or compiled.metadata.target.backend != "cuda":
        return None
    rest = kernel.params[given:]
    if not all(param.is_constexpr for param in rest):
        return None
    if len(_loaded) >= KEPT:
        for old in list(_loaded)[: KEPT // 2]:
            _loaded.pop(old, None)
    values = tuple(constants.get(param.name, param.default) for param in rest)
    _loaded[key] = _Loaded(kernel, compiled, compiled.run, compiled.function, compiled.packed_metadata, values)
    return _loaded[key]


def _watched(knobs: Any) -> bool:
    """Whether Triton is told to do more at a launch than to launch: a profiler's hooks, or debugging."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    hooked = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return bool(hooked or runtime.debug or knobs.compilation.instrumentation_mode)


@cache
def _triton() -> tuple[Any, Any, bool]:
    """Its settings, its drivers, and whether its version is known. Imported late: where it is not installed, other
    backends run."""
    from triton import __version__, knobs
    from triton.runtime import driver

    return knobs, driver, __version__.startswith(KNOWN)


def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: on Hopper a kernel's prologue overlaps the end of the one before it."""
    return {"launch_pdl": True} if overlapped(device) else {}


def complete_writes(device: torch.device) -> None:
    """Before a programmatic launch whose kernel reads, before it waits, what PyTorch wrote just now: a kernel that is
    launched as usual begins when all that was written is in memory."""
    if overlapped(device):
        torch.zeros(1, device=device)


@cache
def overlapped(device: torch.device) -> bool:
    """Whether programmatic launches exist there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_zeros: dict[tuple[str, torch.device], Tensor] = {}
_outgrown: list[Tensor] = []
"""Workspaces that were replaced by larger ones: CUDA graphs and recorded calls from before still write to them."""


def zeros(name: str, size: int, device: torch.device) -> Tensor:
    """An int32 workspace that is zero between launches, each of which leaves it so, if it needs that.

    One a device, so quantized layers must not run on two streams of one GPU at the same time. `reserve` makes those
    that kernels always need before a CUDA graph may be captured: inside, clearing would be part of that graph alone.
    """
    kept = _zeros.get((name, device))
    if kept is None or kept.numel() < size:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise QuantExpertsError("A CUDA graph is captured with an input of a new size: run the model on it before.")
        if kept is not None:
            _outgrown.append(kept)
        kept = _zeros[name, device] = torch.zeros(size, dtype=torch.int32, device=device)
    return kept


def workspaces(device: torch.device) -> list[Tensor]:
    """All that there are on a GPU, the outgrown ones too: none of them is ever given back."""
    return [kept for kept in (*_zeros.values(), *_outgrown) if kept.device == device]


def reserve(device: torch.device, fp8: bool) -> None:
    """Make the workspaces of a GPU whose sizes are known when a layer is laid out for it; fp8: whether its tokens are
    fp8 numbers, whose sums are kept too."""
    if hopper(device):
        zeros("hopper sums", (1 + fp8) * MAX_PROGRAMS * LARGEST_TILE, device)
        zeros("hopper shares", MAX_PROGRAMS * 4, device)
        zeros("hopper tokens", TOKEN_COUNTS, device)


MAX_PROGRAMS = 160
"""Programs of the Hopper kernel, at most the multiprocessors of a GPU of that generation."""
TOKEN_COUNTS = 8192
"""Counts of half tiles of tokens for which there is room from the start: those of more than 100,000 tokens."""
LARGEST_TILE = 256 * 128
"""Sums in a tile of the Hopper kernel."""


@cache
def hopper(device: torch.device) -> bool:
    """Whether the Gluon kernel for Hopper applies: its instructions exist on that generation alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def programs(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may use; plenty in the interpreter."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))


def ptr(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor for a pointer argument that the kernel does not read where there is none."""
    return other if tensor is None else tensor
