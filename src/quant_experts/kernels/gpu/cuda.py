"""The CUDA driver, as far as launches need it: its structures, tensor maps, and what it knows of kernels."""

from __future__ import annotations

import ctypes
from functools import cache
from threading import local
from typing import Any

import torch

from quant_experts.errors import QuantExpertsError

MAP_BYTES, MAP_ALIGNED = 128, 64
"""Size and alignment of a tensor map, by which the copy engine reads boxes."""
OVERLAPPED = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION"""
MAP_TYPES = {
    torch.int8: 0,
    torch.float8_e4m3fn: 0,
    torch.int16: 1,
    torch.int32: 3,
    torch.float16: 6,
    torch.float32: 7,
    torch.bfloat16: 9,
}
"""CUtensorMapDataType"""
SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}
"""CUtensorMapSwizzle of rows of so many bytes."""
PROMOTION = 2
"""CU_TENSOR_MAP_L2_PROMOTION_L2_128B, as Triton's launches have it."""


class Attribute(ctypes.Structure):
    """CUlaunchAttribute"""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class Config(ctypes.Structure):
    """CUlaunchConfig"""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(Attribute)),
        ("count", ctypes.c_uint),
    )


@cache
def driver() -> Any:
    """The library; None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


class _Entered(local):
    """What a thread remembers."""

    def __init__(self) -> None:
        self.devices: set[torch.device] = set()


_entered = _Entered()


def enter(device: torch.device) -> None:
    """Give this thread the GPU's context, once, which it lacks until PyTorch computes something there: neither the
    driver nor Triton makes tensor maps without one. What takes it away again, outside of PyTorch, must give it back."""
    if device not in _entered.devices:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        _entered.devices.add(device)


def config(grid: tuple[int, ...], threads: int, shared: int, overlapped: bool) -> Config:
    """Of a launch on the default stream. shared: bytes of shared memory; overlapped: whether it may begin while the
    kernel before it ends."""
    made = Config((*grid, 1, 1)[:3], (threads, 1, 1), shared, 0, None, 0)
    if overlapped:
        made.attributes = ctypes.pointer(Attribute(OVERLAPPED, 0, (ctypes.c_int * 16)(1)))
        made.count = 1
    return made


def sizes_of_arguments(function: int) -> list[int] | None:
    """Bytes of each argument of a loaded kernel; None where the driver does not tell."""
    sizes: list[int] = []
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    try:
        ask = driver().cuFuncGetParamInfo
    except AttributeError:  # before CUDA 12.4
        return None
    while not ask(ctypes.c_void_p(function), ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)):
        sizes.append(size.value)
    return sizes


def tensor_map(
    address: int, kind: int, shape: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> bytes:
    """By which the copy engine reads boxes of a tensor. kind: one of MAP_TYPES; strides in bytes, without the last one;
    swizzle: one of SWIZZLES.

    Raises `QuantExpertsError` if the driver does not take it.
    """
    memory = ctypes.create_string_buffer(MAP_BYTES + MAP_ALIGNED)
    aligned = ctypes.addressof(memory) + -ctypes.addressof(memory) % MAP_ALIGNED
    rank = len(shape)
    status = driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(aligned), kind, rank, ctypes.c_void_p(address), (ctypes.c_uint64 * rank)(*shape[::-1]),
        (ctypes.c_uint64 * max(1, rank - 1))(*strides[::-1]), (ctypes.c_uint32 * rank)(*box[::-1]),
        (ctypes.c_uint32 * rank)(*[1] * rank), 0, swizzle, PROMOTION, 0,
    )  # fmt: skip
    if status:
        raise refusal("a tensor map", status)
    return ctypes.string_at(aligned, MAP_BYTES)


def refusal(what: str, status: int) -> QuantExpertsError:
    """The error to raise where a call of the driver gave such a status."""
    name = ctypes.c_char_p()
    known = driver().cuGetErrorName(status, ctypes.byref(name)) == 0 and name.value is not None
    told = name.value.decode() if known and name.value is not None else "an unknown error"
    return QuantExpertsError(
        f"The CUDA driver refused {what}: {told} ({status}). If an earlier kernel failed, run with "
        "CUDA_LAUNCH_BLOCKING=1 to see which; load with backend='reference' to do without these kernels."
    )
