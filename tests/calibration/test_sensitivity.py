"""Gradients taken block by block, against plain autograd through the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import small_batches
from torch import Tensor

from quant_experts.artifacts import CalibrationBatch, Modality
from quant_experts.calibration.scopes import decoder_blocks
from quant_experts.calibration.sensitivity import branch_sensitivities, sensitivity_batches
from quant_experts.calibration.streaming import BlockStream
from quant_experts.errors import QuantExpertsError
from quant_experts.runtime.loading import model_class, read_config

LAYERS = 3


def streamed(folder: Path, batches: list[CalibrationBatch]) -> list[dict[str, dict[Modality, float]]]:
    config = read_config(folder)
    cpu = torch.device("cpu")
    stream = BlockStream(folder, model_class(config), config, batches, cpu, torch.float32, differentiable=True)
    return branch_sensitivities(stream)


def whole_model(folder: Path, batches: list[CalibrationBatch]) -> list[dict[str, dict[Modality, float]]]:
    """The model in memory at once, its branches' gradients kept by autograd, the loss by the model from labels."""
    model = model_class(read_config(folder)).from_pretrained(folder, dtype=torch.float32).eval()
    blocks = model.get_submodule(decoder_blocks(model))
    kept: dict[tuple[int, str], Tensor] = {}
    collected: dict[tuple[int, str, Modality], list[Tensor]] = {}
    for index, block in enumerate(blocks):
        for name in ("self_attn", "mlp"):

            def keep(module: Any, args: Any, output: Any, key: tuple[int, str] = (index, name)) -> None:
                kept[key] = output[0] if isinstance(output, tuple) else output
                kept[key].retain_grad()

            getattr(block, name).register_forward_hook(keep)
    for batch in batches:
        labels = batch.inputs["input_ids"].clone()
        labels[0, batch.modality != Modality.ANSWER] = -100
        model(**batch.inputs, labels=labels, use_cache=False).loss.backward()
        for (index, name), output in kept.items():
            assert output.grad is not None
            for kind in Modality:
                part = output.grad[0, batch.modality == kind].double().abs().flatten()
                collected.setdefault((index, name, kind), []).append(part)
    means = {key: torch.cat(parts) for key, parts in collected.items()}
    return [
        {
            name: {kind: float(means[i, name, kind].mean()) for kind in Modality if len(means[i, name, kind])}
            for name in ("self_attn", "mlp")
        }
        for i in range(len(blocks))
    ]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "internvl", "qwen2"])
def test_streamed_gradients_equal_autograd(tiny: Callable[..., Path], family: str) -> None:
    """Qwen3-VL adds image features between its blocks; they must not cut the path."""
    folder = tiny(family, layers=LAYERS)
    batches = small_batches(family, folder)
    found, expected = streamed(folder, batches), whole_model(folder, batches)
    assert len(found) == LAYERS
    for layer, oracle in zip(found, expected, strict=True):
        assert layer.keys() == oracle.keys()
        for name in layer:
            assert layer[name] == pytest.approx(oracle[name], rel=1e-4)
    assert streamed(folder, batches) == found  # bit for bit


def test_samples_without_answers_are_not_asked(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen2_vl")
    batches = small_batches("qwen2_vl", folder)
    mute = CalibrationBatch(batches[0].inputs, torch.zeros_like(batches[0].modality))
    assert sensitivity_batches([mute, *batches], frozenset({2})) == [batches[0], *batches[2:]]
    assert sensitivity_batches(batches[:1], frozenset({0})) == batches[:1]
    with pytest.raises(QuantExpertsError, match="no sample has an answer"):
        sensitivity_batches([mute], frozenset())
