"""Routed experts fitted to tokens instead of channels: each token goes to the expert that serves it best. Ours.

Lloyd's iterations, with low-rank corrections in the place of means: give each token to the expert that leaves it the
least error, fit each expert to its tokens again, repeat. Each step can only lower the sum of errors, but for the share
of the common second moment that keeps experts of few tokens from learning these by heart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import RoutedExperts
from quant_experts.experts.low_rank import fit_low_rank, leading_directions
from quant_experts.experts.router import token_errors

ROUNDS = 8
PRIOR_TOKENS = 64
"""Weight of the common second moment in each expert's own, in tokens."""
OUTPUT_DIRECTIONS = 128
"""Experts are sought among this many leading output directions of the residual, or two for each rank."""


def fit_token_experts(
    residual: Tensor, tokens: Tensor, moment: Tensor, experts: int, rank: int, *, seed: int
) -> RoutedExperts:
    """residual (N, K), tokens (F, K), moment (K, K), all for one input -> `experts` corrections of that rank, float64.

    Raises `QuantExpertsError` if the rank is larger than the layer.
    """
    residual, moment, tokens = residual.double(), moment.double(), tokens.double()
    directions = min(*residual.shape, max(OUTPUT_DIRECTIONS, 2 * experts * rank))
    basis = leading_directions(residual, moment, directions, seed=seed)
    small = basis.T @ residual
    labels = _first_labels(tokens @ small.T, experts, seed)
    for _ in range(ROUNDS):
        fitted = _fit(small, tokens, moment, labels, experts, rank, seed)
        moved = token_errors(small, fitted, tokens).argmin(dim=1)
        if torch.equal(moved, labels):
            break
        labels = moved
    fitted = _fit(small, tokens, moment, labels, experts, rank, seed)
    return RoutedExperts(basis @ fitted.up, fitted.down)


def _first_labels(outputs: Tensor, experts: int, seed: int) -> Tensor:
    """(F,): tokens by the direction of their residual output (F, P), around `experts` tokens drawn at random."""
    if not len(outputs):
        return torch.zeros(0, dtype=torch.long, device=outputs.device)
    unit = outputs / torch.linalg.vector_norm(outputs, dim=1, keepdim=True).clamp_min(1e-30)
    chosen = torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))[:experts].to(unit.device)
    # A correction serves x and -x alike, hence the absolute cosine.
    labels: Tensor = (unit @ unit[chosen].T).abs().argmax(dim=1)
    return labels


def _fit(
    residual: Tensor, tokens: Tensor, moment: Tensor, labels: Tensor, experts: int, rank: int, seed: int
) -> RoutedExperts:
    fitted = []
    for e in range(experts):
        own = tokens[labels == e]
        shared = (own.T @ own + PRIOR_TOKENS * moment) / (len(own) + PRIOR_TOKENS)
        fitted.append(fit_low_rank(residual, shared, rank, seed=seed + e))
    return RoutedExperts(torch.stack([f.up for f in fitted]), torch.stack([f.down for f in fitted]))
