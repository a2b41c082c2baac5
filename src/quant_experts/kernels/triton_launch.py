"""What every Triton launch shares: the interpreter switch, programmatic launches, and per-stream workspaces."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Kernels run on the CPU, element by element: what continuous integration tests."""


def options(device: torch.device) -> dict[str, Any]:
    """Keyword arguments of a launch: on Hopper a kernel's prologue overlaps the end of the one before it."""
    return {"launch_pdl": True} if overlapped(device) else {}


@cache
def overlapped(device: torch.device) -> bool:
    """Whether programmatic launches exist there."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


_zeros: dict[tuple[str, torch.device, int], Tensor] = {}


def zeros(name: str, size: int, device: torch.device, dtype: torch.dtype = torch.int32) -> Tensor:
    """A workspace that is zero between launches, each of which leaves it so. One a stream: launches of one stream do
    not overlap in what they write."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (name, device, stream)
    if key not in _zeros or _zeros[key].numel() < size:
        _zeros[key] = torch.zeros(size, dtype=dtype, device=device)
    return _zeros[key]


@cache
def hopper(device: torch.device) -> bool:
    """Whether the Gluon kernel for Hopper applies: its instructions exist on that generation alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@cache
def programs(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
