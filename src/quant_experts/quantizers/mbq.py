"""MBQ (Li et al., CVPR 2025): AWQ's search, with the errors of image and answer tokens balanced by how much the
loss depends on each.

A layer's sensitivity to a modality is the mean |gradient| of the answer's loss with respect to the outputs of its
attention and its MLP, over that modality's tokens. Tokens of neither kind (system, user text, padding) do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import torch
from torch import Tensor

from quant_experts.artifacts import Modality
from quant_experts.errors import QuantExpertsError

Sensitivities = Mapping[str, Mapping[Modality, float]]
"""Per branch of one block (attention, MLP): mean |gradient| of its output by modality."""


def image_weights(layers: Sequence[Sensitivities]) -> list[dict[str, float]]:
    """rho = image / answer sensitivity of each branch of each layer, floored at the branch's median over layers
    (thu-nics/MBQ). -> per layer, by branch.

    Ours: without image tokens rho is 1, which weighs nothing. Raises `QuantExpertsError` if a branch's gradients over
    answer tokens are all zero, absent or not finite.
    """
    ratios = [{name: _ratio(name, by_modality) for name, by_modality in layer.items()} for layer in layers]
    floors = {name: median(layer[name] for layer in ratios if name in layer) for layer in ratios for name in layer}
    return [{name: max(ratio, floors[name]) for name, ratio in layer.items()} for layer in ratios]


def _ratio(branch: str, sensitivity: Mapping[Modality, float]) -> float:
    answer = sensitivity.get(Modality.ANSWER, 0.0)
    ratio = sensitivity.get(Modality.IMAGE, answer) / answer if answer else float("nan")
    if not 0 <= ratio < float("inf"):
        raise QuantExpertsError(
            f"MBQ cannot weigh image against answer tokens at '{branch}' (gradients {dict(sensitivity)}): give samples "
            "with answers, and calibrate in float32."
        )
    return ratio


def token_weights(modality: Tensor, image_weight: float) -> Tensor:
    """How much each token's error counts in the search: 1 for answers, rho for images, 0 else. (T,) -> (T,) float32.

    The paper's loss is the sum of |error| with these weights over a count that is the same for every candidate.
    """
    weights = torch.zeros(len(modality), dtype=torch.float32)
    weights[modality == Modality.ANSWER] = 1
    weights[modality == Modality.IMAGE] = image_weight
    return weights
