"""AWQ's and MBQ's searches in whole runs: better than plain rounding where they look, and the same when resumed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import block_stream, contents, small_batches, small_samples

from quant_experts import QuantizationConfig, Recipe, Scheme, quantize
from quant_experts.artifacts import Sample
from quant_experts.calibration.search import reader_trials
from quant_experts.calibration.statistics import collect_statistics, find_groups
from quant_experts.errors import QuantExpertsError
from quant_experts.group import GroupTask, quantize_group
from quant_experts.quantizers import awq
from quant_experts.scale_search import scale_error, scale_search


def uneven(folder: Path) -> Path:
    """Norms whose channels differ as those of trained models do, so that a search has something to find."""
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(folder, folder.with_name(folder.name + "-uneven"), dirs_exist_ok=True))
    tensors = load_file(copy / "model.safetensors")
    for name, tensor in tensors.items():
        if "layers" in name and name.endswith("layernorm.weight"):
            tensor[::7] *= 30
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return uneven(tiny("qwen2_vl", layers=3))


def in_front_of_a_block(folder: Path, use: Callable[..., None]) -> None:
    with block_stream(folder, small_batches("qwen2_vl", folder)) as stream:
        next(stream.blocks())
        block = stream.skeleton.load_block(0, torch.device("cpu"))
        groups, _ = find_groups(stream, block, together=True)
        held_out = frozenset({3})
        statistics = collect_statistics(stream, block, groups, important_channels=4, held_out=held_out, seed=0)
        for names in groups:
            linears = [block.get_submodule(name) for name in names]
            weight = torch.cat([linear.weight for linear in linears])
            rows = [len(linear.weight) for linear in linears]
            use(stream, block, groups, held_out, names, rows, weight, statistics[names])


@pytest.mark.parametrize("text", ["W4A6", "W4Afp8", "W3A16g16"])
@pytest.mark.parametrize("image_weights", [None, {"self_attn": 0.3, "mlp": 2.0}])
def test_the_search_takes_the_best_of_its_grid(folder: Path, text: str, image_weights: dict[str, float] | None) -> None:
    scheme, gains = Scheme.parse(text), []

    def use(stream, block, groups, held_out, names, rows, weight, statistics) -> None:  # type: ignore[no-untyped-def]
        search = scale_search(stream, block, groups, held_out, image_weights)
        recipe = Recipe(name="x", smoothing="awq")
        group, _ = quantize_group(names, rows, weight, statistics, scheme, recipe, seed=0, where="x", search=search)
        assert group.smooth_scale is not None
        task = GroupTask(names, rows, weight, statistics, scheme, recipe, seed=0, where="x")
        in_order = [name for names in groups for name in names]
        trials = reader_trials(
            stream, block, names, in_order, held_out=held_out, token_weights=awq.token_weights, power=2
        )
        if image_weights is None:
            grid = [scale_error(task, trials, awq.power_scale(statistics.mean_abs, i / 20)) for i in range(20)]
            assert scale_error(task, trials, group.smooth_scale) == min(grid)
        gains.append(scale_error(task, trials, group.smooth_scale) / scale_error(task, trials, torch.ones(1)))

    in_front_of_a_block(folder, use)
    assert len(gains) == 4 and min(gains) < 0.8


@pytest.mark.parametrize("text", ["W4A6", "W3A16g16"])
def test_a_trial_is_what_the_runtime_computes(folder: Path, text: str) -> None:
    """The error of a single linear's trial, against the quantized module that the run would install."""
    from quant_experts.calibration.measurement import _modules

    scheme, seen = Scheme.parse(text), []

    def use(stream, block, groups, held_out, names, rows, weight, statistics) -> None:  # type: ignore[no-untyped-def]
        if len(names) > 1:
            return
        scale = awq.power_scale(statistics.mean_abs, 0.4)
        recipe = Recipe(name="x", smoothing="awq")
        task = GroupTask(names, rows, weight, statistics, scheme, recipe, seed=0, where="x", search=lambda _: scale)
        group, _ = quantize_group(
            names, rows, weight, statistics, scheme, recipe, seed=0, where="x", search=task.search
        )
        [module] = _modules(group, rows, scheme, weight.device)
        in_order = [name for names in groups for name in names]
        trials = reader_trials(
            stream, block, names, in_order, held_out=held_out, token_weights=awq.token_weights, power=2
        )
        inputs = [call.args[0][0] for call in trials.calls]
        bias = trials.linears[0].bias
        assert bias is None
        errors = torch.cat([(module(x) - x @ weight.T).square().flatten() for x in inputs]).double()
        assert scale_error(task, trials, scale) == pytest.approx(float(errors.mean()), rel=1e-4)
        seen.append(names)

    in_front_of_a_block(folder, use)
    assert len(seen) == 2


@pytest.mark.parametrize("smoothing", ["awq", "mbq"])
def test_a_run_repeats_and_resumes_bit_for_bit(folder: Path, tmp_path: Path, smoothing: Any) -> None:
    config = QuantizationConfig.of("W4A6", Recipe(name="x", smoothing=smoothing))
    samples = small_samples("qwen2_vl")
    quantize(folder, samples, tmp_path / "whole", config, device="cpu")

    def stop(done: int, blocks: int, what: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, samples, tmp_path / "resumed", config, device="cpu", progress=stop)
    remembered = tmp_path / "resumed.partial" / ".run" / "image_weights.json"
    assert remembered.exists() == (smoothing == "mbq")
    result = quantize(folder, samples, tmp_path / "resumed", config, device="cpu")
    assert result.resumed_blocks == 2
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")


def test_samples_without_answers_are_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    samples = [Sample(sample.question, "", sample.images) for sample in small_samples("qwen2_vl")]
    with pytest.raises(QuantExpertsError, match="no sample has an answer"):
        quantize(folder, samples, tmp_path / "out", QuantizationConfig.of("W4A6", "mbq"), device="cpu")
    assert not list(tmp_path.iterdir())
