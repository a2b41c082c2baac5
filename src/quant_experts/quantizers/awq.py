"""AWQ (Lin et al., MLSys 2024): scales up the weights of channels with large activations, by a searched power of them.

The search knows nothing of how an error is measured: it asks for each candidate's loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError

GRID_POINTS = 20
"""Powers tried: 0, 1/20 ... 19/20."""
SMALLEST_SCALE = 1e-4
"""Floor of a scale before it is normalised, as in the authors' code (mit-han-lab/llm-awq)."""


def power_scale(mean_abs: Tensor, power: float) -> Tensor:
    """mean|x|^power, normalised by sqrt(max * min). mean_abs (K,) -> (K,) float32; all ones for power 0."""
    scale = mean_abs.double().pow(power).clamp_min(SMALLEST_SCALE)
    return (scale / (scale.max() * scale.min()).sqrt()).float()


def search_scale(mean_abs: Tensor, evaluate: Callable[[Tensor], float]) -> Tensor:
    """The scale of least loss over 20 powers of mean_abs (K,), the smaller power on ties. -> (K,) float32.

    evaluate: a candidate's loss, the mean squared error of the module that reads the input in AWQ (section 3.2,
    equations 4 and 5). A loss that is NaN never wins; raises `QuantExpertsError` if none is finite.
    """
    best, least = None, math.inf
    for point in range(GRID_POINTS):
        scale = power_scale(mean_abs, point / GRID_POINTS)
        loss = evaluate(scale)
        if loss < least:
            best, least = scale, loss
    if best is None:
        raise QuantExpertsError(
            "The scale search met no finite error: calibrate in float32, or check the samples and the model's weights."
        )
    return best


def token_weights(modality: Tensor) -> Tensor:
    """Every token counts the same. modality (T,) -> (T,) float32."""
    return torch.ones(len(modality), dtype=torch.float32)
