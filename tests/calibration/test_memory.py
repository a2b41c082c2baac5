"""The estimate is made of the shapes; the peak is what was used."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from quant_experts.artifacts import CalibrationBatch
from quant_experts.calibration.memory import MemoryEstimate, PeakMemory, estimate_memory, resident_bytes
from quant_experts.calibration.skeleton import Block
from quant_experts.config import Recipe

MIB = 2**20


def stream() -> Any:
    """A block of three linears of 64 inputs, one of 32, and two samples of 10 tokens."""
    block = nn.ModuleDict(
        {
            "attention": nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(64, 16)}),
            "mlp": nn.ModuleDict({"up": nn.Linear(64, 32), "down": nn.Linear(32, 64)}),
        }
    )
    blocks = [Block(str(i), "language", block) for i in range(3)]
    model = nn.Linear(5, 7, bias=False)
    skeleton = SimpleNamespace(blocks=blocks, block_bytes=lambda: 1234, model=model, names_of=lambda _: ["0", "1", "2"])
    batch = CalibrationBatch({"input_ids": torch.zeros(1, 10, dtype=torch.long)}, torch.zeros(10, dtype=torch.int8))
    return SimpleNamespace(skeleton=skeleton, batches=[batch, batch], dtype=torch.bfloat16, width=64)


@pytest.mark.parametrize(
    ("together", "statistics", "largest"),
    [(True, 64 * 64 * 2 + 32 * 32, 64 * 80), (False, 64 * 64 * 3 + 32 * 32, 64 * 64)],
)
def test_the_parts_are_counted_from_shapes(together: bool, statistics: int, largest: int) -> None:
    estimate = estimate_memory(stream(), Recipe(name="x", group_inputs=together))
    assert estimate == MemoryEstimate(
        resident=5 * 7 * 4,
        inputs=2 * 10 * 8,
        hidden=2 * 20 * 64 * 2,
        block=1234,
        statistics=8 * statistics,
        working=6 * 8 * largest,
    )
    feedback = estimate_memory(stream(), Recipe(name="x", group_inputs=together, base="gptq"))
    assert feedback.working == 8 * max(6 * largest, 4 * 64 * 64)
    searched = stream()
    searched.vocabulary = 100
    trials = estimate_memory(searched, Recipe(name="x", group_inputs=together, smoothing="awq")).search
    assert trials == 20 * (64 + 64) * 2
    gradients = estimate_memory(searched, Recipe(name="x", group_inputs=together, smoothing="mbq"))
    assert gradients.search == (20 * 64 * 3 + 2 * 10 * 100) * 2
    assert gradients.total == sum(vars(gradients).values()) > gradients.on(torch.device("cuda"))
    assert estimate.total == sum(vars(estimate).values())
    assert estimate.on(torch.device("cpu")) == estimate.total
    assert estimate.on(torch.device("cuda")) == estimate.block + estimate.statistics + estimate.working


def test_the_peak_is_what_was_held_meanwhile_not_before() -> None:
    del_me = torch.ones(200 * MIB, dtype=torch.int8)
    del del_me  # an earlier, higher peak
    peak = PeakMemory(torch.device("cpu"))
    used = torch.ones(64 * MIB, dtype=torch.int8)
    del used
    assert 60 * MIB < peak.bytes() < 120 * MIB
    assert resident_bytes("VmRSS") <= resident_bytes("VmHWM")
