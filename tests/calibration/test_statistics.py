"""What calibration keeps of a group's tokens, against a plain pass over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from small_runs import block_stream, small_batches
from torch import Tensor, nn

from quant_experts.artifacts import Modality
from quant_experts.calibration.statistics import collect_statistics, find_groups, token_labels, token_positions


class Readings:
    """A stream whose block is one linear that reads the given samples."""

    device, index = torch.device("cpu"), 0

    def __init__(self, samples: list[Tensor]) -> None:
        self.samples = samples
        self.waiting = range(len(samples))

    def modality(self, sample: int) -> Tensor:
        return torch.zeros(len(self.samples[sample]), dtype=torch.int8)

    def run(self, block: nn.Module) -> Iterator[int]:
        for i, x in enumerate(self.samples):
            block(x)
            yield i


def test_maxima_of_unequal_samples() -> None:
    """A sample without tokens counts for nothing, a held-out one neither."""
    samples = [torch.tensor([[1.0, -8.0, 0.0]]), torch.tensor([[2.0, 1.0, 0.0], [4.0, 1.0, 0.0]]), torch.zeros(0, 3)]
    stream: Any = Readings([*samples, torch.full((1, 3), 99.0)])
    block = nn.Sequential(nn.Linear(3, 2))
    found = collect_statistics(stream, block, [("0",)], important_channels=1, held_out=frozenset({3}), seed=0)
    assert found[("0",)].absmax.tolist() == [4, 8, 0]
    assert found[("0",)].max_mean_abs.tolist() == [3, 8, 0]
    assert found[("0",)].mean_abs.tolist() == [7 / 3, 10 / 3, 0]


def test_sums_and_maxima_leave_held_out_samples_out(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen2_vl")
    seen: list[Tensor] = []
    with block_stream(folder, small_batches("qwen2_vl", folder)) as stream:
        next(stream.blocks())
        block = stream.skeleton.load_block(0, torch.device("cpu"))
        groups, _ = find_groups(stream, block, together=True)
        statistics = collect_statistics(stream, block, groups, important_channels=4, held_out=frozenset({1}), seed=0)
        linear = block.get_submodule(groups[0][0])
        assert isinstance(linear, nn.Linear)
        handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
        list(stream.run(block))
        handle.remove()
    fitted = [x for i, x in enumerate(seen) if i != 1]
    found, x = statistics[groups[0]], torch.cat(fitted)
    torch.testing.assert_close(found.mean_abs, x.abs().mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.second_moment, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.absmax, x.abs().amax(0))
    torch.testing.assert_close(
        found.max_mean_abs, torch.stack([part.abs().mean(0) for part in fitted]).amax(0), rtol=1e-6, atol=0
    )
    assert torch.equal(found.reservoir.double(), seen[1])
    assert found.reservoir_position is not None
    assert torch.equal(found.reservoir_position, torch.arange(len(seen[1])) / len(seen[1]))


def test_labels_and_positions_of_a_layer_that_sees_other_tokens_are_not_known() -> None:
    brought = torch.tensor([Modality.IMAGE, Modality.IMAGE, Modality.TEXT, Modality.ANSWER], dtype=torch.int8)
    assert token_positions(brought, 4).tolist() == [0, 0.25, 0.5, 0.75] and token_positions(brought, 3).isnan().all()
    assert torch.equal(token_labels(brought, 4), brought) and (token_labels(brought, 3) == Modality.TEXT).all()
    assert token_labels(brought[:2], 1).tolist() == [Modality.IMAGE], "several image tokens become one of the image"
    assert token_labels(brought[:0], 1).tolist() == [Modality.TEXT]
