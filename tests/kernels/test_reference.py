"""The oracle itself, against plain Python loops written from the formulas."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from naive_e4m3 import LARGEST as FP8_LARGEST
from naive_e4m3 import POSITIVE, nearest

from quant_experts.config import ActivationFormat, Scheme
from quant_experts.kernels import reference

SUBNORMAL, LARGEST = 1e-42, 3e38


def tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.exp(4 * torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * spread


def naive_codes(row: list[float], bits: int) -> tuple[list[int], float]:
    """One token: scale = absmax / (2^(b-1) - 1) in float32, codes rounded half to even and clamped."""
    largest = 2 ** (bits - 1) - 1
    values = np.array(row, dtype=np.float32)
    scale = np.float32(max(abs(v) for v in values)) / np.float32(largest)
    inverse = np.float32(1) / scale
    return [max(-largest - 1, min(largest, round(float(v * inverse)))) for v in values], float(scale)


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (13, 37)])
def test_quantize_tokens_equals_a_loop(bits: int, shape: tuple[int, int]) -> None:
    x = tokens(*shape, seed=bits)
    x[0, 0] = x[0].abs().max() / (2 ** (bits - 1) - 1) * 0.5  # half a step: a tie, to even
    codes, scale = reference.quantize_tokens(x, bits)
    assert codes.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (shape[0], 1)
    for t, row in enumerate(x.tolist()):
        expected, step = naive_codes(row, bits)
        assert codes[t].tolist() == expected
        assert scale[t].item() == step
    assert ((codes * scale.double() - x.double()).abs() <= scale * 0.5000001).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [SUBNORMAL, 1e-45, 1e-38, 1e30, LARGEST])
def test_extreme_magnitudes_stay_finite(value: float, bits: int) -> None:
    x = torch.tensor([[value, -value, 0.0], [1.0, -0.5, 0.25]])
    codes, scale = reference.quantize_tokens(x, bits)
    assert scale.isfinite().all() and (scale > 0).all()
    assert ((codes * scale.double() - x.double()).abs() <= torch.maximum(scale, torch.tensor(1e-42))).all()
    assert codes[1].tolist() == naive_codes([1.0, -0.5, 0.25], bits)[0]


def naive_fp8(row: list[float]) -> tuple[list[float], float]:
    """One token: scale = absmax / 448 in float32, codes the nearest e4m3 numbers."""
    values = np.array(row, dtype=np.float32)
    scale = np.float32(max(abs(v) for v in values)) / np.float32(FP8_LARGEST)
    inverse = np.float32(1) / scale
    return [nearest(float(v * inverse)) for v in values], float(scale)


@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (13, 37), (7, 301)])
def test_fp8_codes_equal_a_loop(shape: tuple[int, int]) -> None:
    x = tokens(*shape, seed=3)
    x[:, ::3] *= torch.exp(-6 * torch.rand(x[:, ::3].shape, generator=torch.Generator().manual_seed(1)))
    codes, scale = reference.quantize_tokens(x, 8, "fp8")
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == (shape[0], 1)
    for t, row in enumerate(x.tolist()):
        expected, step = naive_fp8(row)
        assert codes[t].float().tolist() == expected
        assert scale[t].item() == step
    error = (codes.double() * scale.double() - x.double()).abs()
    assert (error <= x.double().abs() * (2.0**-4 + 1e-6) + scale.double() * 2.0**-10).all()


def test_fp8_codes_of_every_number_and_of_every_tie_between_two() -> None:
    """A token whose largest value is 448 has scale 1: its codes are its rounded values."""
    numbers = [float(value) for value in POSITIVE]
    ties = [float(a + b) / 2 for a, b in pairwise(POSITIVE)]
    near = [float(np.nextafter(np.float32(tie), np.float32(end))) for tie in ties for end in (0, 1000)]
    x = torch.tensor([numbers + ties + near])
    x = torch.cat([x, -x])
    codes, scale = reference.quantize_tokens(x, 8, "fp8")
    assert scale.tolist() == [[1], [1]] and codes.float().abs().max() == 448
    assert codes.float().tolist() == [[nearest(value) for value in row] for row in x.tolist()]
    assert codes[0, : len(numbers)].float().tolist() == numbers


@pytest.mark.parametrize("value", [SUBNORMAL, 1e-45, 1e-38, 1e-30, 1e-29, 1e30, LARGEST, 448.00003, 447.99997])
def test_fp8_codes_of_extreme_magnitudes_stay_within_448(value: float) -> None:
    x = torch.tensor([[value, -value, value / 3, 0.0], [1.0, -0.5, 0.3, 1e-9]])
    codes, scale = reference.quantize_tokens(x, 8, "fp8")
    assert scale.isfinite().all() and (scale > 0).all() and codes.float().isfinite().all()
    if value < reference.SMALLEST:
        assert scale[0] == 1 and codes[0].float().count_nonzero() == 0
    else:
        assert codes[0, :2].float().tolist() == [448, -448]
    assert codes[1].float().tolist() == naive_fp8(x[1].tolist())[0]


def test_the_largest_value_of_any_token_becomes_448_and_never_nan() -> None:
    """The quotient's reciprocal times the value exceeds 448 by rounding only, far less than to the tie above it."""
    x = torch.exp(40 * torch.rand(20000, 1, generator=torch.Generator().manual_seed(0)) - 20)
    codes, _ = reference.quantize_tokens(x, 8, "fp8")
    assert (codes.float() == 448).all()


@pytest.mark.parametrize("text", ["W4A6", "W4Afp8", "W3A16"])
def test_round_tokens_is_codes_times_scale(text: str) -> None:
    x, scheme = tokens(13, 37), Scheme.parse(text)
    if scheme.weight_only:
        assert reference.round_tokens(x, scheme) is x
        return
    naive = naive_fp8 if text == "W4Afp8" else lambda row: naive_codes(row, 6)
    for row, rounded in zip(x.tolist(), reference.round_tokens(x, scheme), strict=True):
        codes, scale = naive(row)
        assert rounded.tolist() == (np.array(codes, dtype=np.float32) * np.float32(scale)).tolist()


@pytest.mark.parametrize(("activation_format", "largest"), [("int", 127), ("fp8", 448)])
def test_zero_tokens_have_scale_one_and_non_finite_ones_nan(activation_format: ActivationFormat, largest: int) -> None:
    x = torch.zeros(5, 4)
    x[1, 2], x[2, 0], x[3, 3], x[4, 1] = torch.nan, torch.inf, -torch.inf, 2
    codes, scale = reference.quantize_tokens(x, 8, activation_format)
    assert codes[:4].float().count_nonzero() == 0 and codes[4].float().tolist() == [0, largest, 0, 0]
    assert scale[0] == 1 and scale[1:4].isnan().all() and scale[4].isfinite()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
@pytest.mark.parametrize("activation_format", ["int", "fp8"])
def test_empty_tokens(shape: tuple[int, int], activation_format: ActivationFormat) -> None:
    codes, scale = reference.quantize_tokens(torch.zeros(shape), 8, activation_format)
    assert codes.shape == shape and scale.shape == (shape[0], 1)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 65, 2), (0, 3, 2), (2, 3, 0), (2, 0, 3)])
def test_integer_product_equals_a_loop(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m + k + n)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    expected = [[sum(p * q for p, q in zip(row, other, strict=True)) for other in b.tolist()] for row in a.tolist()]
    product = reference.integer_product(a, b)
    assert product.dtype == torch.int32 and product.shape == (m, n)
    assert product.tolist() == expected


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 65, 2), (0, 3, 2), (2, 3, 0), (2, 0, 3)])
def test_products_of_fp8_codes_are_exact(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    generator = torch.Generator().manual_seed(m + k + n)
    a, _ = reference.quantize_tokens(tokens(m, k), 8, "fp8")
    a[:, :1] = torch.tensor(2.0**-9).to(torch.float8_e4m3fn)  # the smallest beside the largest
    b = torch.randint(-128, 128, (n, k), generator=generator, dtype=torch.int8)
    rows = [[Fraction(v) for v in row] for row in a.float().tolist()]
    expected = [[sum(p * q for p, q in zip(row, other, strict=True)) for other in b.tolist()] for row in rows]
    product = reference.code_product(a, b)
    assert product.dtype == torch.float64 and product.shape == (m, n)
    assert [[Fraction(v) for v in row] for row in product.tolist()] == expected


def test_route_is_the_first_smallest_score() -> None:
    x, weight = tokens(40, 9).clamp(-4, 4), tokens(5, 9, seed=1).clamp(-4, 4)
    bias = torch.linspace(-1, 1, 5)
    chosen = reference.route(x, weight, bias).tolist()
    for row, expert in zip(x.tolist(), chosen, strict=True):
        experts = zip(weight.tolist(), bias.tolist(), strict=True)
        scores = [b + sum(w * abs(v) for w, v in zip(r, row, strict=True)) for r, b in experts]
        assert expert == min(range(5), key=scores.__getitem__)
    assert len(set(chosen)) > 1


def test_ties_go_to_the_first_expert_and_every_token_gets_one() -> None:
    x = torch.tensor([[1.0, -2.0], [0.0, 0.0], [torch.nan, 1.0], [torch.inf, 0.0]])
    weight = torch.tensor([[3.0, 3.0], [1.0, 2.0], [2.0, 1.5], [1.0, 2.0]])
    chosen = reference.route(x, weight, torch.zeros(4))
    assert chosen[:2].tolist() == [1, 0]
    assert ((chosen >= 0) & (chosen < 4)).all()
    assert reference.route(x[:0], weight, torch.zeros(4)).shape == (0,)
