"""The router (paper step 5): estimates from |x| what each expert would leave unrepaired, and picks the least.

x is the input as the experts read it, smoothed and rotated where the recipe says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import RoutedExperts, Router

FIT_STEPS = 300
FIT_RATE = 0.05
FIT_DECAY = 1e-3


def fit_router(residual: Tensor, experts: RoutedExperts) -> Router:
    """R_e = mean over rows of |residual - up_e down_e|, residual (N, K). -> weight (E, K), bias zero.

    Ours: the paper does not say how R is made. The whole matrix is divided by its largest entry, which changes no
    decision and lets half precision hold it.
    """
    weight = torch.stack(
        [(residual - up @ down).abs().mean(dim=0) for up, down in zip(experts.up, experts.down, strict=True)]
    )
    return _scaled(weight)


def fit_router_to_tokens(residual: Tensor, experts: RoutedExperts, tokens: Tensor, *, seed: int) -> Router:
    """The R of least expected error on tokens (F, K), if expert e were drawn with probability softmax(-R |x|)_e. Ours.

    Adam from zero, with weight decay; tokens count with their unit length, so that a token's scale, which changes no
    decision, has no say.
    """
    error = token_errors(residual, experts, tokens)
    error = error / error.mean(dim=1, keepdim=True).clamp_min(torch.finfo(error.dtype).tiny)
    magnitude = tokens.abs().double()
    magnitude = magnitude / torch.linalg.vector_norm(magnitude, dim=1, keepdim=True).clamp_min(1e-30)
    spread = magnitude.std(dim=0, correction=0)
    features = magnitude / spread.clamp_min(spread.mean() * 1e-3).clamp_min(1e-30)
    with torch.inference_mode(False), torch.enable_grad():
        inputs, targets = features.clone(), error.clone()
        weight = torch.zeros(inputs.shape[1], len(experts.down), dtype=torch.float64, device=inputs.device)
        weight.requires_grad_()
        optimizer = torch.optim.AdamW([weight], lr=FIT_RATE / inputs.shape[1] ** 0.5, weight_decay=FIT_DECAY)
        for _ in range(FIT_STEPS):
            optimizer.zero_grad()
            loss = ((-(inputs @ weight)).softmax(dim=1) * targets).sum(dim=1).mean()
            loss.backward()
            optimizer.step()
    fitted = weight.detach().T / spread.clamp_min(spread.mean() * 1e-3).clamp_min(1e-30)
    return _scaled(fitted)


def random_router(experts: RoutedExperts, *, seed: int) -> Router:
    """Weights drawn at random: experts are chosen by the token, but not by what it needs. A control."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(len(experts.down), experts.down.shape[2], generator=generator, dtype=torch.float64)
    return _scaled(weight.to(experts.down.device))


def token_errors(residual: Tensor, experts: RoutedExperts, tokens: Tensor) -> Tensor:
    """(F, E) float64: |residual x - up_e down_e x|^2 for each token (F, K) and expert, residual (N, K)."""
    x = tokens.to(residual.dtype)
    target = x @ residual.T
    energy = target.square().sum(dim=1)
    errors = []
    for up, down in zip(experts.up, experts.down, strict=True):
        hidden = x @ down.T
        # |a - b|^2 with b in the expert's small space: no second (F, N) matrix
        errors.append(energy - 2 * ((target @ up) * hidden).sum(dim=1) + ((hidden @ (up.T @ up)) * hidden).sum(dim=1))
    return torch.stack(errors, dim=1).clamp_min(0)


def _scaled(weight: Tensor) -> Router:
    largest = weight.abs().max()
    weight = weight / torch.where(largest > 0, largest, torch.ones_like(largest))
    return Router(weight, torch.zeros(len(weight), dtype=weight.dtype, device=weight.device))
