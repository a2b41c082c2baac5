"""Trials of a group's weights in the module that reads its input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from small_runs import block_stream, small_batches
from torch import Tensor, nn

from quant_experts.artifacts import Modality
from quant_experts.calibration.search import find_reader, reader_trials
from quant_experts.calibration.statistics import find_groups
from quant_experts.calibration.streaming import BlockStream

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
IN_ORDER = [*ATTENTION, "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize(
    ("names", "reader"),
    [
        (ATTENTION, "self_attn"),
        (["self_attn.q_proj"], "self_attn"),
        (["self_attn.v_proj"], "self_attn.v_proj"),
        (["self_attn.o_proj"], "self_attn.o_proj"),
        (["mlp.gate_proj", "mlp.up_proj"], "mlp"),
        (["mlp.down_proj"], "mlp.down_proj"),
        ([*ATTENTION, "mlp.gate_proj"], ""),
    ],
)
def test_the_reader_is_found_by_structure(names: list[str], reader: str) -> None:
    assert find_reader(names, IN_ORDER) == reader


def test_nested_parents_share_their_ancestor() -> None:
    in_order = ["attn.a.left", "attn.ab.right", "fc1", "fc2"]
    assert find_reader(in_order[:2], in_order) == "attn"
    assert [find_reader([name], in_order) for name in in_order] == ["attn.a", "attn.ab", "", "fc2"]


@pytest.fixture
def paused(tiny: Callable[..., Path]) -> Iterator[tuple[BlockStream, nn.Module, list[tuple[str, ...]]]]:
    """A stream in front of the first block, the block, and its groups."""
    folder = tiny("qwen2_vl")
    with block_stream(folder, small_batches("qwen2_vl", folder)) as stream:
        next(stream.blocks())
        block = stream.skeleton.load_block(0, torch.device("cpu"))
        yield stream, block, find_groups(stream, block, together=True)[0]


def weigh(modality: Tensor) -> Tensor:
    return (modality == Modality.IMAGE).float() * 0.5 + (modality == Modality.ANSWER).float()


def outputs(stream: BlockStream, block: nn.Module, name: str) -> list[Tensor]:
    """The module's output for each sample."""
    found: list[Tensor] = []

    def watch(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
        found.append((output[0] if isinstance(output, tuple) else output)[0].double())

    handle = block.get_submodule(name).register_forward_hook(watch)
    list(stream.run(block))
    handle.remove()
    return found


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("number", range(4))
def test_error_equals_a_changed_block(paused: tuple, number: int, power: int) -> None:
    """The same change made by hand, the reader's output taken from whole passes of the block."""
    stream, block, groups = paused
    names, in_order = groups[number], [name for group in groups for name in group]
    reader = find_reader(names, in_order)
    trials = reader_trials(stream, block, names, in_order, held_out=frozenset({1}), token_weights=weigh, power=power)
    linears = [block.get_submodule(name) for name in names]
    kept = [linear.weight for linear in linears]
    changed = [linear.weight.detach() * (0.9 + 0.01 * i) for i, linear in enumerate(linears)]
    found = trials.error(changed, lambda x: x * 0.5)
    assert all(linear.weight is weight for linear, weight in zip(linears, kept, strict=True))

    exact = outputs(stream, block, reader)
    for linear, weight in zip(linears, changed, strict=True):
        linear.weight = nn.Parameter(weight * 0.5, requires_grad=False)
    total, count = 0.0, 0
    for i, (a, b) in enumerate(zip(exact, outputs(stream, block, reader), strict=True)):
        if i != 1:
            weights = weigh(stream.batches[i].modality).double()
            total += float((weights[:, None] * (a - b).abs() ** power).sum())
            count += int((weights > 0).sum()) * a.shape[1]
    for linear, weight in zip(linears, kept, strict=True):
        linear.weight = weight
    assert found == pytest.approx(total / count, rel=1e-4) and found > 0
    assert trials.error([linear.weight for linear in linears], lambda x: x) == 0


def test_a_failing_trial_leaves_the_block_as_it_was(paused: tuple) -> None:
    stream, block, groups = paused
    trials = reader_trials(stream, block, groups[0], groups[0], held_out=frozenset(), token_weights=weigh, power=2)
    before = {name: value for name, value in block.named_parameters()}

    def fail(x: Tensor) -> Tensor:
        raise ValueError("in the middle of a pass")

    with pytest.raises(ValueError, match="in the middle"):
        trials.error([linear.weight for linear in trials.linears], fail)
    with pytest.raises(ValueError, match="argument"):
        trials.error([trials.linears[0].weight], lambda x: x)
    assert all(value is before[name] for name, value in block.named_parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in block.modules())


def test_trials_of_tokens_that_do_not_count_are_recognised(paused: tuple) -> None:
    stream, block, groups = paused
    for weights, expected in ((weigh, True), (lambda modality: torch.zeros(len(modality)), False)):
        trials = reader_trials(
            stream, block, groups[0], groups[0], held_out=frozenset(), token_weights=weights, power=2
        )
        assert trials.counts == expected
        assert (trials.error([linear.weight * 2 for linear in trials.linears], lambda x: x) > 0) == expected


def test_nan_errors_are_nan(paused: tuple) -> None:
    stream, block, groups = paused
    trials = reader_trials(stream, block, groups[0], groups[0], held_out=frozenset(), token_weights=weigh, power=2)
    error = trials.error([linear.weight * torch.nan for linear in trials.linears], lambda x: x)
    assert error != error
