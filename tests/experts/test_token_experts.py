"""Experts fitted to tokens, and the router fitted to what they leave."""

import pytest
import torch
from torch import Tensor

from quant_experts.artifacts import RoutedExperts
from quant_experts.errors import QuantExpertsError
from quant_experts.experts.low_rank import fit_low_rank
from quant_experts.experts.router import fit_router_to_tokens, random_router, token_errors
from quant_experts.experts.token_experts import fit_token_experts


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clustered(kinds: int, each: int, columns: int, rank: int) -> tuple[Tensor, Tensor]:
    """Tokens that live in `kinds` subspaces of `rank` coordinates, and the kind of each."""
    parts = []
    for kind in range(kinds):
        x = 0.01 * normal(each, columns, seed=kind)
        x[:, kind * rank : (kind + 1) * rank] += normal(each, rank, seed=kind + 50)
        parts.append(x)
    return torch.cat(parts), torch.arange(kinds).repeat_interleave(each)


def moment(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def test_token_errors_equal_a_loop() -> None:
    residual, x = normal(5, 7), normal(9, 7, seed=1)
    experts = RoutedExperts(normal(3, 5, 2, seed=2), normal(3, 2, 7, seed=3))
    found = token_errors(residual, experts, x)
    for t in range(9):
        for e in range(3):
            left = residual @ x[t] - experts.up[e] @ (experts.down[e] @ x[t])
            assert found[t, e].item() == pytest.approx(float(left @ left), rel=1e-9)


def test_experts_find_the_kinds_of_tokens() -> None:
    x, _ = clustered(4, 200, 32, 3)
    residual = normal(20, 32, seed=9)
    routed = fit_token_experts(residual, x, moment(x), 4, 3, seed=0)
    assert routed.up.shape == (4, 20, 3) and routed.down.shape == (4, 3, 32)
    static = fit_low_rank(residual, moment(x), 3)
    alone = token_errors(residual, RoutedExperts(static.up[None], static.down[None]), x).mean()
    assert token_errors(residual, routed, x).amin(dim=1).mean() < 0.2 * alone


def test_one_expert_is_the_static_one() -> None:
    x, residual = normal(300, 12), normal(8, 12, seed=2)
    routed = fit_token_experts(residual, x, moment(x), 1, 3, seed=0)
    static = fit_low_rank(residual, moment(x), 3)
    torch.testing.assert_close(routed.up[0] @ routed.down[0], static.up @ static.down, rtol=1e-8, atol=1e-8)


def test_the_fitted_router_comes_near_the_best_choice_whatever_the_scale_of_a_token() -> None:
    x, _ = clustered(4, 200, 32, 3)
    x = x * normal(len(x), 1, seed=4).exp()
    residual = normal(20, 32, seed=9)
    routed = fit_token_experts(residual, x, moment(x), 4, 3, seed=0)
    router = fit_router_to_tokens(residual, routed, x, seed=0)
    chosen = (x.abs() @ router.weight.T + router.bias).argmin(dim=1)
    errors = token_errors(residual, routed, x)
    relative = errors / errors.mean(dim=1, keepdim=True)
    found = relative.gather(1, chosen[:, None]).mean()
    drawn = (x.abs() @ random_router(routed, seed=0).weight.T).argmin(dim=1)
    assert found < relative.amin(dim=1).mean() + 0.1 * (relative.mean() - relative.amin(dim=1).mean())
    assert found < 0.5 * relative.gather(1, drawn[:, None]).mean()
    assert router.weight.abs().max().item() == pytest.approx(1)


@pytest.mark.parametrize(("tokens", "experts"), [(0, 3), (1, 4), (3, 8)])
def test_fewer_tokens_than_experts(tokens: int, experts: int) -> None:
    x, residual = normal(tokens, 10), normal(6, 10, seed=1)
    routed = fit_token_experts(residual, x, torch.eye(10, dtype=torch.float64), experts, 2, seed=0)
    assert routed.up.shape == (experts, 6, 2) and routed.up.isfinite().all()


def test_a_rank_larger_than_the_layer_is_refused() -> None:
    with pytest.raises(QuantExpertsError, match="Rank 9"):
        fit_token_experts(normal(6, 10), normal(30, 10), torch.eye(10, dtype=torch.float64), 2, 9, seed=0)


def test_a_seed_repeats_the_fit() -> None:
    x, _ = clustered(3, 50, 16, 2)
    first, second = (fit_token_experts(normal(7, 16), x, moment(x), 3, 2, seed=5) for _ in range(2))
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
