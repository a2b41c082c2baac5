"""What every Triton launch shares: the interpreter switch, programmatic launches, and workspaces."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, element by element: what continuous integration tests."""


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
"""Workspaces that were replaced by larger ones: a CUDA graph that was captured before still writes to them."""


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


def reserve(device: torch.device) -> None:
    """Make the workspaces of a GPU whose sizes are known, once, when the first layer is laid out for it."""
    if hopper(device):
        zeros("hopper sums", MAX_PROGRAMS * LARGEST_TILE, device)
        zeros("hopper shares", MAX_PROGRAMS * 2, device)
        zeros("alone counts", ALONE_COUNTS, device)
        zeros("alone sums", ALONE_SUMS, device)


MAX_PROGRAMS = 160
"""Programs of the Hopper kernel, at most the multiprocessors of a GPU of that generation."""
ALONE_COUNTS, ALONE_SUMS = 1 << 10, MAX_PROGRAMS * 16
"""Counts of the Hopper kernel for one token, and sums: 16 of each program that projects."""
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
