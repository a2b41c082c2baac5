"""Says before a run how much memory it will take, and afterwards how much it did."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from quant_experts.calibration.search import SEARCH_SAMPLES
from quant_experts.calibration.sensitivity import SENSITIVITY_SAMPLES
from quant_experts.calibration.streaming import BlockStream
from quant_experts.config import Recipe


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what holds them."""

    resident: int
    """Embeddings, vision encoder, head: everything but the blocks (host)."""
    inputs: int
    """Token ids and pixels of all samples (host)."""
    hidden: int
    """Hidden states of all samples in front of one block (host)."""
    block: int
    """The largest block in the compute dtype (device)."""
    statistics: int
    """Second moments of the block's groups in float64 (device)."""
    working: int
    """float64 copies of the largest group while it is quantized and its experts are fitted (device)."""
    search: int = 0
    """What AWQ's and MBQ's trials run on, or MBQ's gradients pass through (host)."""

    @property
    def total(self) -> int:
        """All of it, as on a machine where host and device are one."""
        return self.resident + self.inputs + self.hidden + self.search + self.gpu

    @property
    def gpu(self) -> int:
        """What a GPU holds."""
        return self.block + self.statistics + self.working

    def on(self, device: torch.device) -> int:
        """What `PeakMemory` measures on a device: the GPU's part, or all of it."""
        return self.gpu if device.type == "cuda" else self.total


WORKING_COPIES = 6
"""float64 matrices of a group's size that are alive at once while experts are fitted: weight and base (float32),
residual, low-rank product, and two temporaries."""
MOMENT_COPIES = 4
"""float64 matrices of a second moment's size that are alive beside it while error feedback (GPTQ) or a rotation uses
it: the transformed moment, the same in order of rounding, its Cholesky factor, and the inverse."""


def estimate_memory(stream: BlockStream, recipe: Recipe) -> MemoryEstimate:
    """From the shapes of the skeleton and the calibration batches alone."""
    skeleton = stream.skeleton
    block = skeleton.meta_block(0)
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    # Linears of one submodule with one input width most likely read the same tensor.
    readers: dict[tuple[str, int], int] = {}
    for name, linear in linears.items():
        key = (name.rpartition(".")[0] if recipe.group_inputs else name, linear.in_features)
        readers[key] = readers.get(key, 0) + linear.out_features
    moments = sum(8 * width * width for _, width in readers)
    largest = max((width * rows for (_, width), rows in readers.items()), default=0)
    widest = max((width for _, width in readers), default=0)
    squares = MOMENT_COPIES * widest**2 if recipe.base == "gptq" or recipe.rotation else 0
    tokens = sum(batch.inputs["input_ids"].shape[1] for batch in stream.batches)
    item = stream.dtype.itemsize
    return MemoryEstimate(
        resident=sum(p.numel() * p.element_size() for p in skeleton.model.parameters()),
        inputs=sum(t.numel() * t.element_size() for batch in stream.batches for t in batch.inputs.values()),
        hidden=2 * tokens * stream.width * item,
        block=skeleton.block_bytes(),
        statistics=moments,
        working=8 * max(WORKING_COPIES * largest, squares),
        search=_search_bytes(stream, recipe, widest),
    )


def _search_bytes(stream: BlockStream, recipe: Recipe, widest: int) -> int:
    """Inputs and outputs of the widest linear for trials; for gradients, the hidden state in front of every block, the
    logits of one sample and their gradient."""
    if recipe.smoothing not in ("awq", "mbq"):
        return 0
    lengths = [batch.inputs["input_ids"].shape[1] for batch in stream.batches]
    trials = sum(lengths[:SEARCH_SAMPLES]) * (widest + stream.width)
    if recipe.smoothing == "awq":
        return trials * stream.dtype.itemsize
    states = sum(lengths[:SENSITIVITY_SAMPLES]) * stream.width * len(stream.skeleton.block_names)
    return max(trials, states + 2 * max(lengths) * stream.vocabulary) * stream.dtype.itemsize


class PeakMemory:
    """The most memory used since this object was made: a GPU's allocations, or the process's resident set above its
    start."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_high_water_mark()
            self._before = resident_bytes("VmRSS")

    def bytes(self) -> int:
        """Peak so far in bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, resident_bytes("VmHWM") - self._before)


def resident_bytes(field: str) -> int:
    """Physical memory of this process: "VmRSS" now, "VmHWM" at its highest. Elsewhere than on Linux both are the
    highest."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_high_water_mark() -> None:
    """Forget earlier peaks of this process, where the kernel allows it; otherwise a peak may be an older one.

    Memory that was freed but that the C library keeps is given back first: reused, it would not show as growth.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
