"""GPTQ against the optimal-brain-surgeon update written column by column in float64, with explicit inverses."""

import pytest
import torch
from torch import Tensor

from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.quantizers.gptq import DAMPING, quantize_gptq
from quant_experts.quantizers.grids import clipped_grid, dequantize, from_grid, group_grid, round_to_grid
from quant_experts.quantizers.rtn import quantize_rtn


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated_moment(columns: int, tokens: int = 500, seed: int = 1) -> Tensor:
    x = normal(tokens, columns, seed=seed) @ normal(columns, columns, seed=seed + 1)
    return x.T @ x / tokens


def surgeon(weight: Tensor, moment: Tensor, scheme: Scheme, act_order: bool, clip: bool = False) -> Tensor:
    """Round a column, then move all columns that are left by the minimiser of the output error: the definition."""
    columns = weight.shape[1]
    size = scheme.group_size or columns

    def grid(part: Tensor, start: int) -> tuple[Tensor, Tensor]:
        if clip:
            return clipped_grid(part.float(), moment.diagonal()[start : start + part.shape[1]].float(), scheme)
        return group_grid(part.float(), scheme)

    grids = {s: grid(weight[:, s : s + size], s) for s in range(0, columns, size)}
    order = list(range(columns))
    if act_order:
        order.sort(key=lambda k: -float(moment[k, k]))
    damped = moment + DAMPING * moment.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    values, result = weight.clone(), torch.empty_like(weight)
    for position, k in enumerate(order):
        start = k // size * size
        if not act_order and k == start:
            grids[start] = grid(values[:, start : start + size], start)
        scale, zero = grids[start]
        code = round_to_grid(values[:, k : k + 1].float(), scale, zero, scheme.weight_bits)
        result[:, k] = from_grid(code, scale, zero)[:, 0].double()
        left = order[position + 1 :]
        if left:
            # minimise |(w + d) - w0|_H over d on the columns left, given the error on column k
            error = result[:, k] - values[:, k]
            shift = -torch.linalg.solve(damped[left][:, left], damped[left, k])
            values[:, left] += error[:, None] * shift
    return result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 1), (3, 20), (7, 150), (4, 257)])
@pytest.mark.parametrize("text", ["W4A6", "W3A16g16", "W2A16pc"])
def test_equals_the_definition(text: str, rows: int, columns: int, clip: bool, act_order: bool) -> None:
    scheme, weight, moment = Scheme.parse(text), normal(rows, columns), correlated_moment(columns)
    found, events = quantize_gptq(weight.float(), moment, scheme, act_order=act_order, clip=clip)
    assert not events and found.codes.shape == weight.shape and found.bits == scheme.weight_bits
    expected = surgeon(weight.float().double(), moment, scheme, act_order, clip)

    def loss(values: Tensor) -> float:
        return float(torch.einsum("nk,kl,nl->", values - weight, moment, values - weight))

    # A value near a tie may round the other way in float32, and all later columns follow it: most codes are equal, and
    # the loss is.
    same = (dequantize(found).double() - expected).abs() < 1e-4 * expected.abs().max()
    assert same.double().mean() > 0.9
    assert loss(dequantize(found).double()) == pytest.approx(loss(expected), rel=0.05, abs=1e-6)


def test_without_correlation_it_rounds_to_nearest() -> None:
    weight, scheme = normal(9, 40).float(), Scheme.parse("W4A8")
    found, _ = quantize_gptq(weight, torch.eye(40, dtype=torch.float64), scheme)
    assert torch.equal(found.codes, quantize_rtn(weight, scheme).codes)


@pytest.mark.parametrize("text", ["W4A6", "W3A16g16"])
def test_is_better_than_rounding_to_nearest(text: str) -> None:
    weight, moment, scheme = normal(30, 64), correlated_moment(64), Scheme.parse(text)

    def loss(values: Tensor) -> float:
        return float(torch.einsum("nk,kl,nl->", values.double() - weight, moment, values.double() - weight))

    plain = loss(dequantize(quantize_rtn(weight.float(), scheme)))
    found, _ = quantize_gptq(weight.float(), moment, scheme)
    better, _ = quantize_gptq(weight.float(), moment, scheme, act_order=True, clip=True)
    assert loss(dequantize(better)) < loss(dequantize(found)) < plain


def test_zero_rows_of_the_moment_keep_zero_columns_zero() -> None:
    """Exempt columns: no error is fed back into them."""
    weight, moment = normal(6, 32), correlated_moment(32)
    for k in (3, 17):
        weight[:, k] = 0
        moment[k] = moment[:, k] = 0
    found, _ = quantize_gptq(weight.float(), moment, Scheme.parse("W4A6"), act_order=True)
    assert not found.codes[:, [3, 17]].any()


def test_tokens_of_a_few_directions_and_none_at_all_are_fine() -> None:
    few = normal(2, 30)
    for moment in (few.T @ few / 2, torch.zeros(30, 30, dtype=torch.float64)):
        found, events = quantize_gptq(normal(5, 30).float(), moment, Scheme.parse("W4A6"))
        assert not events and (dequantize(found) - normal(5, 30)).abs().max() < 1


def test_a_moment_that_is_not_positive_is_an_event_and_then_an_error() -> None:
    moment = correlated_moment(8)
    moment /= moment.diagonal().mean()
    slightly = moment - (torch.linalg.eigvalsh(moment)[0] + 0.05) * torch.eye(8, dtype=torch.float64)
    _, events = quantize_gptq(normal(3, 8).float(), slightly, Scheme.parse("W4A6"), where="layer")
    assert [event.where for event in events] == ["layer"] and "damping 0.01" in events[0].what
    with pytest.raises(QuantExpertsError, match=r"layer.*second moment"):
        quantize_gptq(normal(3, 8).float(), torch.full((8, 8), torch.nan), Scheme.parse("W4A6"), where="layer")


@pytest.mark.parametrize("text", ["W4A6", "W3A16g16"])
def test_a_clipped_grid_is_never_worse(text: str) -> None:
    scheme, energy = Scheme.parse(text), normal(16).square().float()
    part = normal(50, 16, seed=3).float()
    part[:, 5] *= 9  # an outlier whose channel carries little

    def loss(grid: tuple[Tensor, Tensor]) -> Tensor:
        values = from_grid(round_to_grid(part, *grid, scheme.weight_bits), *grid)
        return (values - part).square() @ energy

    energy[5] = 1e-3
    full, clipped = loss(group_grid(part, scheme)), loss(clipped_grid(part, energy, scheme))
    assert (clipped <= full).all() and clipped.mean() < 0.7 * full.mean()
    zero = clipped_grid(torch.zeros(2, 4), torch.ones(4), scheme)
    assert all(t.isfinite().all() for t in zero)
