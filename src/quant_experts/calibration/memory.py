"""Says before a run how much memory it will take, and afterwards how much it did."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from quant_experts.calibration.search import SEARCH_SAMPLES
from quant_experts.calibration.sensitivity import SENSITIVITY_SAMPLES
from quant_experts.calibration.statistics import block_linears
from quant_experts.calibration.streaming import BlockStream
from quant_experts.config import Recipe, Scope


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes, by what holds them."""

    resident: int
    """Embeddings, head, vision encoder without blocks that are streamed: everything but the blocks (host)."""
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
    shapes = [_block_shapes(block.module, recipe) for block in skeleton.blocks]
    widest = max(shape.widest for shape in shapes)
    tokens = {scope: _tokens(stream, scope) for scope in {block.scope for block in skeleton.blocks}}
    squares = MOMENT_COPIES * widest**2 if recipe.base == "gptq" or recipe.rotation else 0
    # Where image tokens become the language model's, the ones are freed as the others come.
    hidden = max(sum(counts) * _width(stream, scope) for scope, counts in tokens.items())
    return MemoryEstimate(
        resident=sum(p.numel() * p.element_size() for p in skeleton.model.parameters()),
        inputs=sum(t.numel() * t.element_size() for batch in stream.batches for t in batch.inputs.values()),
        hidden=2 * hidden * stream.dtype.itemsize,
        block=skeleton.block_bytes(),
        statistics=max(8 * shape.moments for shape in shapes),
        working=8 * max(WORKING_COPIES * max(shape.largest for shape in shapes), squares),
        search=_search_bytes(stream, recipe, tokens, widest),
    )


@dataclass(frozen=True)
class _BlockShapes:
    """Numbers of elements."""

    moments: int
    """In the second moments of the block's groups."""
    largest: int
    """In the largest group's stacked weight."""
    widest: int
    """Input channels of the widest group."""


def _block_shapes(block: nn.Module, recipe: Recipe) -> _BlockShapes:
    # Linears of one submodule with one input width most likely read the same tensor.
    readers: dict[tuple[str, int], int] = {}
    for name, linear in block_linears(block).items():
        key = (name.rpartition(".")[0] if recipe.group_inputs else name, linear.in_features)
        readers[key] = readers.get(key, 0) + linear.out_features
    return _BlockShapes(
        moments=sum(width * width for _, width in readers),
        largest=max((width * rows for (_, width), rows in readers.items()), default=0),
        widest=max((width for _, width in readers), default=0),
    )


def _tokens(stream: BlockStream, scope: Scope) -> list[int]:
    """What each sample brings to a scope's blocks: its sequence, or its patches."""
    if scope == "language":
        return [batch.inputs["input_ids"].shape[1] for batch in stream.batches]
    patch = _patch_embedding(stream)[0].numel()
    pixels = [[t.numel() for t in batch.inputs.values() if t.is_floating_point()] for batch in stream.batches]
    return [sum(sizes) // patch for sizes in pixels]


def _width(stream: BlockStream, scope: Scope) -> int:
    """Channels of these tokens. A merger reads the patches, or several at once, of as many fewer tokens."""
    return stream.width if scope == "language" else len(_patch_embedding(stream))


def _patch_embedding(stream: BlockStream) -> Tensor:
    """(channels, ...), the weight of the first convolution, which makes a token of each patch of pixels. Some models
    have a linear one: (channels, 3, 1, 1) stands for it, which estimates too much."""
    for module in stream.skeleton.model.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            return module.weight
    return torch.empty(stream.width, 3, 1, 1, device="meta")


def _search_bytes(stream: BlockStream, recipe: Recipe, tokens: Mapping[Scope, list[int]], widest: int) -> int:
    """Inputs and outputs of the widest linear for trials; for gradients, the hidden state in front of every block of
    the language model, the logits of one sample and their gradient."""
    if recipe.smoothing not in ("awq", "mbq"):
        return 0
    trials = max(sum(counts[:SEARCH_SAMPLES]) for counts in tokens.values()) * (widest + stream.width)
    if recipe.smoothing == "awq" or "language" not in tokens:
        return trials * stream.dtype.itemsize
    lengths = tokens["language"]
    states = sum(lengths[:SENSITIVITY_SAMPLES]) * stream.width * len(stream.skeleton.names_of("language"))
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
