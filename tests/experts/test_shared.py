"""The shared expert: exempt columns leave the base, and the correction is the best one for smoothed inputs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_experts.experts.shared import MOMENTS, fit_shared_expert, without_channels


def objective(difference: Tensor, moment: Tensor) -> float:
    return float(torch.einsum("nk,kl,nl->", difference, moment, difference))


def best(error: Tensor, moment: Tensor, rank: int) -> float:
    """The least objective of any rank-r correction: the tail of the singular values of error @ cholesky(moment)."""
    values = torch.linalg.svdvals(error @ torch.linalg.cholesky(moment))
    return float(values[rank:].square().sum())


def test_exempt_columns_are_zero_and_the_weight_is_left_alone() -> None:
    weight = torch.randn(3, 5)
    before = weight.clone()
    kept = without_channels(weight, torch.tensor([4, 1]))
    assert kept[:, [1, 4]].eq(0).all() and torch.equal(kept[:, [0, 2, 3]], weight[:, [0, 2, 3]])
    assert torch.equal(weight, before)
    assert torch.equal(without_channels(weight, torch.tensor([], dtype=torch.long)), weight)


def test_exempt_channels_are_rebuilt() -> None:
    """Paper step 3: with as much rank as exempt channels and no rounding error, the shared expert restores them."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(20, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(60, 12, generator=generator, dtype=torch.float64)
    base = without_channels(weight, torch.tensor([7, 2]))
    expert = fit_shared_expert(weight - base, x.T @ x / 60, 2, seed=0)
    torch.testing.assert_close(expert.up @ expert.down + base, weight, rtol=1e-8, atol=1e-8)


def statistics(samples: list[Tensor]) -> Any:
    """The two fields that the moments are made of."""
    x = torch.cat(samples)
    means = torch.stack([part.abs().mean(0) for part in samples])
    return SimpleNamespace(second_moment=x.T @ x / len(x), max_mean_abs=means.amax(0))


def published_scale(kind: str, samples: list[Tensor]) -> Tensor:
    """S of QERA exact (a symmetric root), QERA approx, and L2QER with its normalisation."""
    x = torch.cat(samples)
    if kind == "moment":
        values, vectors = torch.linalg.eigh(x.T @ x / len(x))
        return vectors @ values.sqrt().diag() @ vectors.T
    if kind == "rms":
        return x.square().mean(0).sqrt().diag()
    s = torch.zeros(x.shape[1], dtype=torch.float64)
    for part in samples:
        s = torch.maximum(s, part.abs().mean(0))
    return (s / (s.min() * s.max()).sqrt()).diag()


@pytest.mark.parametrize("kind", ["moment", "rms", "mean_abs"])
@pytest.mark.parametrize(("rows", "columns"), [(12, 20), (31, 9), (5, 5)])
def test_equals_the_published_svd(kind: str, rows: int, columns: int) -> None:
    """LQER, QERA approx, QERA exact: the truncated SVD of error @ S, times the inverse of S."""
    generator = torch.Generator().manual_seed(rows + columns)
    spread = torch.randn(columns, generator=generator, dtype=torch.float64).exp()
    samples = [torch.randn(t, columns, generator=generator, dtype=torch.float64) * spread for t in (40, 7, 90)]
    error = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    scale = published_scale(kind, samples)
    u, s, v = torch.linalg.svd(error @ scale, full_matrices=False)
    expected = u[:, :3] @ s[:3].diag() @ v[:3] @ torch.linalg.inv(scale)
    found = fit_shared_expert(error, MOMENTS[kind](statistics(samples)), 3, seed=0)
    torch.testing.assert_close(found.up @ found.down, expected, rtol=1e-8, atol=1e-8)


def test_a_channel_without_tokens_does_not_stop_a_diagonal_fit() -> None:
    x = torch.randn(30, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[:, 2] = 0  # the published inverse does not exist
    for kind in ("rms", "mean_abs", "moment"):
        expert = fit_shared_expert(torch.ones(4, 6), MOMENTS[kind](statistics([x])), 2, seed=0)
        assert (expert.up @ expert.down).isfinite().all()
