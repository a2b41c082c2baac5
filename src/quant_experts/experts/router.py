"""The router (paper step 5): estimates from |x| what each expert would leave unrepaired, and picks the least."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import RoutedExperts, Router


def fit_router(residual: Tensor, experts: RoutedExperts) -> Router:
    """R_e = mean over rows of |residual - up_e down_e|, residual (N, K). -> weight (E, K), bias zero.

    Ours: the paper does not say how R is made. The whole matrix is divided by its largest entry, which changes no
    decision and lets half precision hold it.
    """
    weight = torch.stack(
        [(residual - up @ down).abs().mean(dim=0) for up, down in zip(experts.up, experts.down, strict=True)]
    )
    largest = weight.max()
    weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))
    return Router(weight, torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
