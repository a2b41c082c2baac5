"""Refinement trains experts and router, and keeps what tokens left out of the training confirm."""

import pytest
import torch
from torch import Tensor

from quant_experts.artifacts import RoutedExperts, Router
from quant_experts.experts.refinement import CHECK_EVERY, _Problem, refine_routed

N, K, R, E = 13, 10, 2, 3


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(tokens: int) -> tuple[Tensor, Tensor, RoutedExperts, Router]:
    """Tokens of E kinds, each served by an expert of its own, and a blurred version of experts and router."""
    kind = torch.arange(tokens) % E
    x = draw(tokens, K, seed=0) * (0.3 + 3 * (torch.arange(K) % E == kind[:, None]))
    true = RoutedExperts(draw(E, N, R, seed=1), draw(E, R, K, seed=2))
    outputs = torch.einsum("enr,erk,tk->ten", true.up, true.down, x)
    target = outputs[torch.arange(tokens), kind]
    experts = RoutedExperts(true.up + 0.02 * draw(E, N, R, seed=3), true.down + 0.02 * draw(E, R, K, seed=4))
    weight = -(torch.arange(K) % E == torch.arange(E)[:, None]).double() + 0.2 * draw(E, K, seed=5)
    return target, x, experts, Router(weight, torch.zeros(E, dtype=torch.float64))


def error(target: Tensor, x: Tensor, experts: RoutedExperts, router: Router) -> float:
    """Token by token, as the runtime does it."""
    total = 0.0
    for t, token in enumerate(x):
        e = int((router.weight @ token.abs() + router.bias).argmin())
        total += float((target[t] - experts.up[e] @ (experts.down[e] @ token)).square().sum())
    return total


def test_held_out_error_falls_and_repeats_bit_for_bit() -> None:
    target, x, experts, router = problem(1200)
    before = [part.clone() for part in (experts.up, experts.down, router.weight, router.bias)]
    found = [refine_routed(target[:800], x[:800], experts, router, seed=3, epochs=6, iterations=40) for _ in range(2)]
    (refined, refined_router), (again, again_router) = found
    assert error(target[800:], x[800:], refined, refined_router) < 0.9 * error(target[800:], x[800:], experts, router)
    assert torch.equal(refined.up, again.up) and torch.equal(refined.down, again.down)
    assert torch.equal(refined_router.weight, again_router.weight)
    assert refined.up.dtype == experts.up.dtype and refined_router.weight.shape == router.weight.shape
    kept = (experts.up, experts.down, router.weight, router.bias)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_another_seed_gives_another_result() -> None:
    target, x, experts, router = problem(200)
    a, b = (refine_routed(target, x, experts, router, seed=s, epochs=2, iterations=10)[0] for s in (0, 1))
    assert not torch.equal(a.up, b.up)


def test_error_on_the_tokens_left_out_never_rises() -> None:
    """Random targets hold nothing to learn; what overfits is not kept."""
    _, x, experts, router = problem(64)
    target = draw(64, N, seed=9) * 50
    left_out = slice(CHECK_EVERY - 1, None, CHECK_EVERY)
    refined = refine_routed(target, x, experts, router, seed=0, epochs=3, iterations=20)
    assert error(target[left_out], x[left_out], *refined) <= error(target[left_out], x[left_out], experts, router)


def test_losses_equal_a_loop() -> None:
    target, x, experts, router = problem(30)
    held = _Problem(experts, router, x[:10].float(), target[:10].float())
    found = float(held.loss(x[10:].float(), target[10:].float()).detach())

    def residuals(t: int) -> Tensor:
        outputs = torch.stack([experts.up[e] @ (experts.down[e] @ x[t]) for e in range(E)])
        return (target[t] - outputs).norm(dim=1)

    scores = torch.stack([router.weight @ token.abs() + router.bias for token in x])
    first = torch.stack([residuals(t) for t in range(10)])
    spread, scale = first.std(dim=1, correction=0).mean(), first.mean() / scores[:10].abs().mean()
    regression = kl = 0.0
    for t in range(10, 30):
        r = residuals(t)
        regression += float(r[scores[t].argmin()] ** 2) / N / 20
        truth, guess = torch.softmax(-r / spread, 0), torch.softmax(-scores[t] * scale / spread, 0)
        kl += float((truth * (truth / guess).log()).sum()) / 20
    assert found == pytest.approx(regression / float(target[:10].square().mean()) + kl, rel=1e-4)
    assert float(held.check_error()) == pytest.approx(error(target[:10], x[:10], experts, router), rel=1e-4)


def test_odd_cases() -> None:
    target, x, experts, router = problem(5)  # too few tokens to leave any out
    assert refine_routed(target, x, experts, router, seed=0) == (experts, router)
    target, x, experts, router = problem(17)
    zero = RoutedExperts(torch.zeros_like(experts.up), torch.zeros_like(experts.down))
    refined, routed = refine_routed(target * 0, x * 0, zero, router, seed=0, epochs=1, iterations=3)
    assert not refined.up.any() and routed.weight.isfinite().all()
    one = RoutedExperts(experts.up[:1], experts.down[:1])
    alone, _ = refine_routed(target, x, one, Router(router.weight[:1], router.bias[:1]), seed=0, epochs=1)
    assert alone.up.isfinite().all() and alone.up.shape == (1, N, R)
    poisoned = target.clone()
    poisoned[3] = torch.nan
    assert refine_routed(poisoned, x, experts, router, seed=0, epochs=1) == (experts, router)
