"""Rounding to nearest against loops in float64, written from the field's grids.

Symmetric: scale = absmax / (2^(b-1) - 1). Asymmetric: scale = (max - min) / (2^b - 1),
zero = clamp(round(-min / scale)). The scale of a weight group is rounded to bfloat16 first. A float32 quotient may fall
on the other side of a tie: codes may differ where the exact quotient is within `TIE` of one half.
"""

import pytest
import torch

from quant_experts.config import Scheme
from quant_experts.quantizers.grids import dequantize
from quant_experts.quantizers.rtn import quantize_rtn

TIE = 1e-4
SHAPES = [(1, 1), (5, 1), (1, 7), (4, 128), (3, 300), (2, 129)]


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).exp()).to(dtype)


def clamp(value: float, low: int, high: int) -> float:
    return max(low, min(high, value))


def check(weight: torch.Tensor, scheme: Scheme) -> None:
    """Every scale, zero point and code of the library against the formulas, value by value."""
    found = quantize_rtn(weight, scheme)
    rows, columns = weight.shape
    bits, size = scheme.weight_bits, scheme.group_size or columns
    half, groups = 2 ** (bits - 1), -(-columns // size)
    assert (found.bits, found.group_size) == (bits, scheme.group_size)
    assert (found.codes.dtype, found.codes.shape) == (torch.int8, (rows, columns))
    assert (found.scale.dtype, found.scale.shape) == (torch.float32, (rows, groups))
    assert (found.zero_point is None) == scheme.symmetric
    assert int(found.codes.min()) >= -half and int(found.codes.max()) < half
    if scheme.group_size is not None:
        assert torch.equal(found.scale, found.scale.bfloat16().float())
    restored = dequantize(found)
    for n, row in enumerate(weight.double().tolist()):
        for g in range(groups):
            part = row[g * size : (g + 1) * size]
            if scheme.symmetric:
                exact, zero = max(abs(v) for v in part) / (half - 1), 0.0
            else:
                exact = (max(part) - min(part)) / (2**bits - 1)
            scale = found.scale[n, g].item()
            assert scale == pytest.approx(exact, rel=1e-6 if scheme.group_size is None else 2**-8 + 1e-6)
            if not scheme.symmetric:
                zero = found.zero_point[n, g].item()
                assert abs(zero + half - clamp(-min(part) / scale, 0, 2**bits - 1)) <= 0.5 + TIE
            for i, value in enumerate(part):
                code = found.codes[n, g * size + i].item()
                assert abs(code - clamp(value / scale + zero, -half, half - 1)) <= 0.5 + TIE
                assert abs(restored[n, g * size + i].item() - (code - zero) * scale) <= 1e-5 * abs(code - zero) * scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_symmetric_per_channel(shape: tuple[int, int], bits: int) -> None:
    check(weights(*shape), Scheme.parse(f"W{bits}A8"))


@pytest.mark.parametrize(
    "scheme", ["W3A16", "W4A16g32", "W2A16g7", "W8A16pc", "W4A6g128", "W4A6g298-asym", "W4A16g1000"]
)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] > 2 and s[1] % 128 != 1])
def test_groups(shape: tuple[int, int], scheme: str) -> None:
    check(weights(*shape, seed=1), Scheme.parse(scheme))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scheme", ["W4A6", "W3A16"])
def test_any_float_dtype_is_read_and_left_alone(scheme: str, dtype: torch.dtype) -> None:
    weight, grid = weights(3, 200, dtype), Scheme.parse(scheme)
    before = weight.clone()
    check(weight.float(), grid)
    assert torch.equal(quantize_rtn(weight, grid).codes, quantize_rtn(weight.float(), grid).codes)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("low", [0.5, -2.0])
def test_a_group_of_one_sign_keeps_its_zero_point_on_the_grid(low: float) -> None:
    """zero is clamped to the grid, so that codes saturate: the field's rule, not ours."""
    check(low + weights(4, 128, seed=2).abs() * 0.5, Scheme.parse("W4A16"))


@pytest.mark.parametrize("scheme", ["W4A6", "W3A16", "W2A8g32-asym", "W8A8g32"])
def test_zero_rows_and_groups_come_back_as_zeros(scheme: str) -> None:
    weight = weights(3, 160)
    weight[1], weight[2, 128:] = 0, 0
    found = quantize_rtn(weight, Scheme.parse(scheme))
    assert (found.scale > 0).all() and found.scale.isfinite().all()
    restored = dequantize(found)
    assert restored[1].count_nonzero() == 0 and restored[2, 128:].count_nonzero() == 0
    assert (found.scale[1] == 1).all()
    assert torch.equal(found.codes[0], quantize_rtn(weight[:1], Scheme.parse(scheme)).codes[0])


@pytest.mark.parametrize("value", [3.0, 0.3, -0.02, 1e-3, 250.0])
@pytest.mark.parametrize("scheme", ["W4A6", "W3A16", "W4A16g64", "W4A16g64-sym"])
def test_a_constant_group_is_not_lost(scheme: str, value: float) -> None:
    """max = min leaves the asymmetric rule without a step; the value must survive (also as a last group of one)."""
    for columns in (1, 128, 129):
        weight = torch.full((2, columns), value)
        error = (dequantize(quantize_rtn(weight, Scheme.parse(scheme))) - weight).abs().max()
        assert error <= 0.1 * abs(value)


def test_ties_go_to_the_even_code() -> None:
    weight = torch.tensor([[7.0, 0.5, 1.5, -0.5, -1.5, 2.5, -7.0]])
    found = quantize_rtn(weight, Scheme.parse("W4A8"))
    assert found.codes.tolist() == [[7, 0, 2, 0, -2, 2, -7]]
    assert found.scale.tolist() == [[1.0]]


def test_smallest_and_largest_weights() -> None:
    for scheme in ("W4A6", "W4A16g2", "W4A16g2-sym"):
        weight = torch.tensor([[1e-45, -1e-45], [1e-40, -1e-40], [1e-30, -1e-30], [1e30, -1e30], [1e38, -1e38]])
        found = quantize_rtn(weight, Scheme.parse(scheme))
        assert (found.scale > 0).all() and found.scale.isfinite().all()
        error = (dequantize(found).double() - weight.double()).abs()
        # A scale that bfloat16 rounds down by 2^-8 leaves the ends of a range of 15 steps 0.03 steps more outside.
        assert (error <= 0.54 * found.scale.double().amax(dim=1, keepdim=True) + 1e-40).all()
        assert (error[2:] <= 0.1 * weight[2:].double().abs()).all()


def test_dequantize_leaves_its_input_alone() -> None:
    found = quantize_rtn(weights(2, 130), Scheme.parse("W3A16"))
    codes, scale, zero = found.codes.clone(), found.scale.clone(), found.zero_point.clone()
    assert torch.equal(dequantize(found), dequantize(found))
    assert torch.equal(found.codes, codes) and torch.equal(found.scale, scale) and torch.equal(found.zero_point, zero)
