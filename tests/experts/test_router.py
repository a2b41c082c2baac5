"""R|x| estimates what each expert leaves, against a loop over rows (paper, step 5)."""

import pytest
import torch

from quant_experts.artifacts import RoutedExperts
from quant_experts.experts.router import fit_router


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def naive(residual: torch.Tensor, experts: RoutedExperts) -> list[list[float]]:
    """R_e,c = mean over rows of |residual - up_e down_e|."""
    rows, columns = residual.shape
    result = []
    for up, down in zip(experts.up.tolist(), experts.down.tolist(), strict=True):
        rebuilt = [[sum(up[n][r] * down[r][c] for r in range(len(down))) for c in range(columns)] for n in range(rows)]
        left = [[abs(residual[n, c].item() - rebuilt[n][c]) for n in range(rows)] for c in range(columns)]
        result.append([sum(column) / rows for column in left])
    return result


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("shape", [(7, 5), (1, 1), (3, 20)])
def test_weights_are_the_mean_residuals_up_to_one_factor(shape: tuple[int, int], scale: float) -> None:
    residual = normal(*shape) * scale
    experts = RoutedExperts(normal(4, shape[0], 2, seed=1) * scale, normal(4, 2, shape[1], seed=2))
    router = fit_router(residual, experts)
    expected = torch.tensor(naive(residual, experts), dtype=torch.float64)
    torch.testing.assert_close(router.weight, expected / expected.max(), rtol=1e-12, atol=1e-12)
    assert router.weight.max() == 1 and router.bias.tolist() == [0] * 4
    assert router.weight.half().isfinite().all()


def test_the_factor_changes_no_decision() -> None:
    residual = normal(9, 12) * 1e-5
    experts = RoutedExperts(normal(5, 9, 2, seed=1) * 1e-5, normal(5, 2, 12, seed=2))
    router = fit_router(residual, experts)
    x = normal(300, 12, seed=3).abs()
    unscaled = x @ torch.tensor(naive(residual, experts), dtype=torch.float64).T
    assert torch.equal((x @ router.weight.T + router.bias).argmin(dim=1), unscaled.argmin(dim=1))
    assert len(unscaled.argmin(dim=1).unique()) > 1


def test_the_expert_that_rebuilds_a_channel_is_preferred_where_it_fires() -> None:
    residual = torch.eye(3, dtype=torch.float64)
    up = torch.eye(3, dtype=torch.float64)[:, :, None]  # expert e rebuilds channel e exactly
    router = fit_router(residual, RoutedExperts(up, up.transpose(1, 2)))
    x = torch.tensor([[5.0, 1, 1], [1, 5, 1], [1, 1, 5]], dtype=torch.float64)
    assert (x @ router.weight.T).argmin(dim=1).tolist() == [0, 1, 2]


def test_equal_experts_tie_and_the_first_wins() -> None:
    up, down = normal(1, 6, 2).expand(3, 6, 2), normal(1, 2, 4, seed=1).expand(3, 2, 4)
    router = fit_router(normal(6, 4, seed=2), RoutedExperts(up, down))
    assert torch.equal(router.weight[0], router.weight[1]) and torch.equal(router.weight[0], router.weight[2])
    assert ((normal(50, 4, seed=3).abs() @ router.weight.T).argmin(dim=1) == 0).all()


def test_nothing_left_to_rebuild() -> None:
    router = fit_router(torch.zeros(3, 4), RoutedExperts(torch.zeros(2, 3, 1), torch.zeros(2, 1, 4)))
    assert router.weight.tolist() == [[0.0] * 4] * 2
