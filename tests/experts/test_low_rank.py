"""The low-rank fit is optimal: its objective, mean |(E - L) x|^2, equals that of the textbook's whitened SVD."""

import pytest
import torch
from torch import Tensor

from quant_experts.artifacts import LowRankExpert
from quant_experts.errors import QuantExpertsError
from quant_experts.experts import low_rank
from quant_experts.experts.low_rank import fit_low_rank

WIDE, TALL, SQUARE = (9, 24), (24, 9), (15, 15)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, width: int, seed: int = 1) -> Tensor:
    """Correlated inputs (T, K)."""
    mix = normal(width, width, seed=seed + 1) + 2 * torch.eye(width, dtype=torch.float64)
    return normal(count, width, seed=seed) @ mix


def objective(error: Tensor, moment: Tensor, expert: LowRankExpert) -> float:
    left = error - expert.up @ expert.down
    moment = torch.diag(moment) if moment.ndim == 1 else moment
    return float(((left @ moment) * left).sum())


def optimum(error: Tensor, root: Tensor, rank: int) -> float:
    """What no rank-r matrix can undercut (Eckart, Young): the tail of the singular values of E S, S S^T the moment."""
    return float(torch.linalg.svdvals(error @ root)[rank:].square().sum())


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_equals_the_whitened_svd(shape: tuple[int, int], rank: int) -> None:
    error, x = normal(*shape), tokens(100, shape[1])
    moment = x.T @ x / len(x)
    found = fit_low_rank(error, moment, rank)
    assert found.up.shape == (shape[0], rank) and found.down.shape == (rank, shape[1])
    assert found.up.dtype == found.down.dtype == torch.float64
    root = torch.linalg.cholesky(moment)
    assert objective(error, moment, found) == pytest.approx(optimum(error, root, rank), rel=1e-9)
    u, s, v = torch.linalg.svd(error @ root, full_matrices=False)
    whitened = u[:, :rank] * s[:rank] @ torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    torch.testing.assert_close(found.up @ found.down, whitened, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_fewer_tokens_than_channels(shape: tuple[int, int], count: int) -> None:
    error, x = normal(*shape), tokens(count, shape[1])
    moment = x.T @ x / count
    for rank in (1, 2, 6):
        found = fit_low_rank(error, moment, rank)
        assert found.up.isfinite().all() and found.down.isfinite().all()
        best, scale = optimum(error, x.T / count**0.5, rank), optimum(error, x.T / count**0.5, 0)
        assert objective(error, moment, found) == pytest.approx(best, rel=1e-9, abs=1e-11 * scale)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_channels_that_never_fire(shape: tuple[int, int]) -> None:
    error, x = normal(*shape), tokens(60, shape[1])
    x[:, ::2] = 0
    moment = x.T @ x / len(x)
    found = fit_low_rank(error, moment, 3)
    assert objective(error, moment, found) == pytest.approx(optimum(error, x.T / 60**0.5, 3), rel=1e-9)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE])
@pytest.mark.parametrize("zeros", [0, 4])
def test_a_diagonal_moment_is_a_weighted_svd(shape: tuple[int, int], zeros: int) -> None:
    error, weight = normal(*shape), normal(shape[1], seed=5).abs() + 0.1
    weight[:zeros] = 0
    found = fit_low_rank(error, weight.square(), 3)
    assert objective(error, weight.square(), found) == pytest.approx(optimum(error, torch.diag(weight), 3), rel=1e-9)
    full = fit_low_rank(error, torch.diag(weight.square()), 3)
    torch.testing.assert_close(found.up @ found.down, full.up @ full.down, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("shape", [WIDE, TALL, SQUARE, (1, 6), (6, 1), (1, 1)])
def test_the_full_rank_leaves_nothing(shape: tuple[int, int]) -> None:
    error, x = normal(*shape), tokens(50, shape[1])
    found = fit_low_rank(error, x.T @ x / 50, min(shape))
    torch.testing.assert_close(found.up @ found.down, error, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_rank_zero_is_no_correction(shape: tuple[int, int]) -> None:
    found = fit_low_rank(normal(*shape), torch.ones(shape[1], dtype=torch.float64), 0)
    assert (found.up @ found.down).count_nonzero() == 0


@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_no_change_of_the_factors_helps(shape: tuple[int, int]) -> None:
    error, x = normal(*shape), tokens(70, shape[1])
    moment = x.T @ x / 70
    found = fit_low_rank(error, moment, 3)
    best = objective(error, moment, found)
    for seed in range(60):
        step = 10.0 ** -(seed % 5)
        up = found.up + step * normal(*found.up.shape, seed=seed)
        down = found.down + step * normal(*found.down.shape, seed=seed + 99)
        assert objective(error, moment, LowRankExpert(up, down)) >= best * (1 - 1e-12)


def fading(shape: tuple[int, int], decay: float) -> Tensor:
    """A matrix with singular values i^-decay."""
    u, _, v = torch.linalg.svd(normal(*shape), full_matrices=False)
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64) ** -decay
    return (u * values) @ v


LARGE, LARGE_TALL = (130, 150), (150, 130)
"""With EXACT_WIDTH at 16, layers that are large enough for the approximate way."""


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("shape", [LARGE, LARGE_TALL])
def test_beyond_the_exact_width_it_is_near_the_optimum(
    shape: tuple[int, int], decay: float, diagonal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, x = fading(shape, decay), tokens(200, shape[1])
    moment = x.square().mean(dim=0) if diagonal else x.T @ x / 200
    exact = fit_low_rank(error, moment, 4)
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", 16)
    found = fit_low_rank(error, moment, 4)
    best = objective(error, moment, exact)
    root = torch.diag(moment.sqrt()) if diagonal else torch.linalg.cholesky(moment)
    assert best == pytest.approx(optimum(error, root, 4), rel=1e-9)
    assert best * (1 - 1e-9) <= objective(error, moment, found) <= best * 1.005
    assert not torch.equal(found.up, exact.up)  # it went the other way


def test_beyond_the_exact_width_on_a_flat_spectrum(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", 16)
    error, moment = fading((130, 130), 0.0), torch.ones(130, dtype=torch.float64)
    assert objective(error, moment, fit_low_rank(error, moment, 4)) == pytest.approx(126, rel=1e-9)


@pytest.mark.parametrize("shape", [LARGE, LARGE_TALL])
@pytest.mark.parametrize("count", [1, 4, 15, 60])
@pytest.mark.parametrize("few", ["tokens", "directions of the error", "rows of the error"])
def test_beyond_the_exact_width_where_little_is_left(
    few: str, count: int, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """E H E^T of a rank below the size of the search space: directions stay orthonormal, and nothing is made worse."""
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", 16)
    error, x = normal(*shape), tokens(count if few == "tokens" else 200, shape[1])
    if few == "directions of the error":
        error = normal(shape[0], count, seed=3) @ normal(count, shape[1], seed=4)
    elif few == "rows of the error":
        error[count:] = 0
    moment, root = x.T @ x / len(x), x.T / len(x) ** 0.5
    basis = low_rank.leading_directions(error, moment, 4, seed=0)
    torch.testing.assert_close(basis.T @ basis, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    best, scale = optimum(error, root, 4), optimum(error, root, 0)
    assert objective(error, moment, fit_low_rank(error, moment, 4)) <= best * 1.005 + 1e-9 * scale


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("seed", [0, 7])
def test_the_same_call_gives_the_same_bits(width: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", width)
    error, moment = normal(130, 140), tokens(90, 140)
    moment = moment.T @ moment
    torch.manual_seed(1)
    first = fit_low_rank(error, moment, 5, seed=seed)
    torch.manual_seed(2)
    second = fit_low_rank(error, moment, 5, seed=seed)
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)


@pytest.mark.parametrize("width", [16, 1024])
@pytest.mark.parametrize("shape", [(130, 140), (140, 130)])
def test_no_error_needs_no_correction(shape: tuple[int, int], width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_WIDTH", width)
    x = tokens(200, shape[1])
    for error, moment in ((torch.zeros(shape), x.T @ x), (normal(*shape), torch.zeros(shape[1]))):
        found = fit_low_rank(error, moment, 3)
        assert found.up.isfinite().all() and found.down.isfinite().all()
        assert objective(error.double(), moment.double(), found) == 0
    assert (fit_low_rank(torch.zeros(shape), x.T @ x, 3).down == 0).all()


@pytest.mark.parametrize("rank", [10, 1000])
@pytest.mark.parametrize("shape", [WIDE, TALL])
def test_a_rank_beyond_the_layer_is_refused(shape: tuple[int, int], rank: int) -> None:
    with pytest.raises(QuantExpertsError, match=rf"Rank {rank}.*{shape[0]} x {shape[1]}"):
        fit_low_rank(normal(*shape), torch.ones(shape[1]), rank)


@pytest.mark.parametrize("shape", [WIDE, TALL])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_factors_are_balanced_and_ordered(shape: tuple[int, int], scale: float) -> None:
    error, x = normal(*shape) * scale, tokens(70, shape[1])
    found = fit_low_rank(error, x.T @ x / 70, 4)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1))
    parts = [float(((x @ found.down[i])[:, None] * found.up[:, i]).square().sum()) for i in range(4)]
    assert parts == sorted(parts, reverse=True)


def test_single_precision_input_is_computed_in_double() -> None:
    error, x = normal(*WIDE).float(), tokens(70, WIDE[1])
    moment = (x.T @ x / 70).float()
    before = error.clone(), moment.clone()
    found = fit_low_rank(error, moment, 4)
    assert torch.equal(error, before[0]) and torch.equal(moment, before[1])
    best = optimum(error.double(), torch.linalg.cholesky(moment.double()), 4)
    assert objective(error.double(), moment.double(), found) == pytest.approx(best, rel=1e-6)
