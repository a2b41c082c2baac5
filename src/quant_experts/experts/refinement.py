"""Refinement (paper step 7): trains a group's routed experts and its router on the layer's output; all else stays.

The paper names the losses, a regression and a weighted classification by Kullback-Leibler divergence, and the
optimiser. Ours: what exactly is regressed and classified, the tokens, and that the best epoch on tokens left out of
the training is what counts, so that refinement never makes those worse.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from quant_experts.artifacts import RoutedExperts, Router

LEARNING_RATE = 1e-4
EPOCHS = 16
ITERATIONS = 100
"""Optimiser steps of an epoch; the tokens are cut into as many batches."""
CHECK_EVERY = 8
"""One token in so many is left out of the training and decides which epoch is kept."""


def refine_routed(
    target: Tensor,
    tokens: Tensor,
    routed: RoutedExperts,
    router: Router,
    *,
    seed: int,
    epochs: int = EPOCHS,
    iterations: int = ITERATIONS,
) -> tuple[RoutedExperts, Router]:
    """AdamW with a cosine schedule on two losses. Same dtypes and shapes as given; the same seed gives the same bits.

    target (F, N) is what the layer's output lacks without routed experts, tokens (F, K) what experts read. Regression:
    the squared difference between target and the expert that the router chooses, over target's square.
    Classification: KL of softmax(-scores) from softmax(-|target - expert output|) over experts, both in units of the
    residuals' spread. The first reaches only the experts and the second only the router, so that their weights do not
    matter to AdamW.
    """
    tokens, target = tokens.float(), target.float()
    check = torch.arange(len(tokens), device=tokens.device) % CHECK_EVERY == CHECK_EVERY - 1
    if not check.any():
        return routed, router
    problem = _Problem(routed, router, tokens[check], target[check])
    tokens, target = tokens[~check], target[~check]
    size = -(-len(tokens) // iterations)
    optimizer = torch.optim.AdamW(problem.parameters, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(tokens) // size))
    generator = torch.Generator().manual_seed(seed)
    best, least = None, problem.check_error()
    for _ in range(epochs):
        for rows in torch.randperm(len(tokens), generator=generator).to(tokens.device).split(size):
            optimizer.zero_grad()
            with torch.enable_grad():
                problem.loss(tokens[rows], target[rows]).backward()
            optimizer.step()
            schedule.step()
        error = problem.check_error()
        if error < least:
            best, least = [parameter.detach().clone() for parameter in problem.parameters], error
    if best is None:
        return routed, router
    up, down, weight, bias = best
    return (
        RoutedExperts(up.to(routed.up), down.to(routed.down)),
        Router(weight.to(router.weight), bias.to(router.bias)),
    )


class _Problem:
    """Float32 copies of what is trained, the losses, and the error on tokens left out."""

    def __init__(self, routed: RoutedExperts, router: Router, tokens: Tensor, target: Tensor) -> None:
        self.up, self.down, self.weight, self.bias = self.parameters = [
            part.detach().float().clone().requires_grad_()
            for part in (routed.up, routed.down, router.weight, router.bias)
        ]
        self.check = tokens, target
        self.energy = target.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        with torch.no_grad():
            residuals = torch.linalg.vector_norm(target[:, None] - self.outputs(tokens), dim=2)
            spread = residuals.std(dim=1, correction=0).mean()
            self.spread = torch.where(spread > 0, spread, torch.ones_like(spread))
            # A router's scale decides nothing; here scores and residuals must be of one size.
            ratio = residuals.mean() / self.scores(tokens).abs().mean().clamp_min(torch.finfo(torch.float32).tiny)
            self.scale = torch.where(ratio > 0, ratio, torch.ones_like(ratio))

    def outputs(self, tokens: Tensor) -> Tensor:
        """What each expert adds: (B, K) -> (B, E, N)."""
        return torch.einsum("enr,ber->ben", self.up, torch.einsum("erk,bk->ber", self.down, tokens))

    def scores(self, tokens: Tensor) -> Tensor:
        """(B, K) -> (B, E); the least wins."""
        return torch.addmm(self.bias, tokens.abs(), self.weight.T)

    def loss(self, tokens: Tensor, target: Tensor) -> Tensor:
        """Both losses of a batch: a scalar."""
        difference = target[:, None] - self.outputs(tokens)
        scores = self.scores(tokens)
        chosen = difference[torch.arange(len(tokens), device=tokens.device), scores.argmin(dim=1)]
        residuals = torch.linalg.vector_norm(difference.detach(), dim=2)
        guess = torch.log_softmax(-scores * self.scale / self.spread, dim=1)
        truth = torch.softmax(-residuals / self.spread, dim=1)
        return chosen.square().mean() / self.energy + kl_div(guess, truth, reduction="batchmean")

    @torch.no_grad()
    def check_error(self) -> float:
        """Squared error on the tokens left out, with the router's choices."""
        tokens, target = self.check
        total = 0.0
        for x, y in zip(tokens.split(64), target.split(64), strict=True):
            rows = torch.arange(len(x), device=x.device)
            chosen = self.outputs(x)[rows, self.scores(x).argmin(dim=1)]
            total += float((y - chosen).square().sum(dtype=torch.float64))
        return total
