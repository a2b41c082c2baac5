"""SVDQuant's branch: the principal part first, then rounds as long as the output error falls."""

import pytest
import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError
from quant_experts.experts.principal import ROUNDS, fit_principal_expert


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def coarse(weight: Tensor) -> Tensor:
    """A 3-bit grid per row."""
    scale = (weight.abs().amax(dim=1, keepdim=True) / 3).clamp_min(1e-30)
    return (weight / scale).round() * scale


def output_error(weight: Tensor, low_rank: Tensor, x: Tensor) -> float:
    rest = weight - low_rank
    return float(((rest - coarse(rest.float()).double()) @ x.T).square().sum() / len(x))


def best_of_rounds(weight: Tensor, x: Tensor, rank: int) -> Tensor:
    """The method by explicit SVDs: keep the last branch before the error stops falling."""
    target, best, least = weight, None, float("inf")
    for _ in range(ROUNDS):
        u, s, v = torch.linalg.svd(target, full_matrices=False)
        branch = u[:, :rank] * s[:rank] @ v[:rank]
        error = output_error(weight, branch, x)
        if error >= least:
            break
        best, least = branch, error
        target = weight - coarse((weight - branch).float()).double()
    assert best is not None
    return best


@pytest.mark.parametrize(("rows", "columns"), [(24, 17), (9, 40), (1, 5)])
def test_equals_the_method_by_explicit_svd(rows: int, columns: int) -> None:
    weight, x = draw(rows, columns, seed=rows), draw(60, columns, seed=1).exp()
    weight[:, 0] *= 20
    rank = min(3, rows)
    expert = fit_principal_expert(weight, x.T @ x / len(x), rank, coarse, seed=0)
    torch.testing.assert_close(expert.up @ expert.down, best_of_rounds(weight, x, rank), rtol=1e-8, atol=1e-8)


def test_never_worse_than_one_round_and_better_than_no_branch() -> None:
    weight, x = draw(32, 32), draw(200, 32, seed=1)
    weight[3] *= 30
    weight[:, 5] *= 30
    u, s, v = torch.linalg.svd(weight)
    expert = fit_principal_expert(weight, x.T @ x / len(x), 4, coarse, seed=0)
    found = output_error(weight, expert.up @ expert.down, x)
    assert found <= output_error(weight, u[:, :4] * s[:4] @ v[:4], x) * (1 + 1e-9)
    assert found < 0.9 * output_error(weight, torch.zeros_like(weight), x)


def test_zero_weights_and_a_rank_beyond_the_layer() -> None:
    expert = fit_principal_expert(torch.zeros(6, 4), torch.eye(4).double(), 2, coarse, seed=0)
    assert not (expert.up @ expert.down).any()
    with pytest.raises(QuantExpertsError, match="Rank 5"):
        fit_principal_expert(torch.ones(6, 4), torch.eye(4).double(), 5, coarse, seed=0)


def test_nan_weights_give_nan_not_silence() -> None:
    weight = draw(5, 6)
    weight[0, 0] = torch.nan
    with pytest.raises((torch.linalg.LinAlgError, QuantExpertsError)):
        fit_principal_expert(weight, torch.eye(6).double(), 2, coarse, seed=0)
