"""The CPU backend against the reference: the same integers, the same experts, rows in the same order."""

from collections.abc import Iterator

import pytest
import torch

from quant_experts.kernels import cpu_int8, reference
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands

SIZES = [(1, 1, 1), (1, 7, 3), (1, 2048, 5), (2, 1, 3), (17, 33, 9), (16, 64, 64), (31, 257, 129)]
EMPTY = [(0, 5, 3), (3, 5, 0), (3, 0, 2)]


@pytest.fixture(autouse=True, params=["by instructions for integers", "in float32"])
def exact(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu_int8, "has_fast_integers", lambda: request.param == "by instructions for integers")
    assert cpu_int8.is_exact.__wrapped__(), "its product is not exact here: these tests would say nothing"
    yield


def codes(*shape: int, seed: int, extreme: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
    return torch.where(drawn < 0, -128, 127).to(torch.int8) if extreme else drawn


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("size", SIZES + EMPTY)
def test_sums_are_bit_equal(size: tuple[int, int, int], extreme: bool) -> None:
    m, k, n = size
    a, b = codes(m, k, seed=1, extreme=extreme), codes(n, k, seed=2, extreme=extreme)
    product = cpu_int8.integer_product(a, b)
    assert product.dtype == torch.int32 and product.shape == (m, n)
    assert torch.equal(product, a.long().mm(b.long().T).int())
    assert torch.equal(product, reference.integer_product(a, b))


def test_the_faster_product_is_found_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever takes longer by a clock that only the slow one moves is not chosen, whatever this processor has."""
    monkeypatch.undo()
    for slow in ("_int_mm", "float_product"):
        with monkeypatch.context() as patched:
            clock = [0.0]
            patched.setattr(cpu_int8, "perf_counter", lambda clock=clock: clock[0])
            module = torch if slow == "_int_mm" else cpu_int8
            patched.setattr(module, slow, lambda *operands, clock=clock: clock.append(clock.pop() + 1))
            assert cpu_int8.has_fast_integers.__wrapped__() == (slow == "float_product")


def test_sums_of_a_slice_of_columns_are_bit_equal() -> None:
    a, b = codes(5, 90, seed=1, extreme=False), codes(7, 90, seed=2, extreme=False)
    for part in (slice(0, 32), slice(64, 90), slice(89, 90)):
        expected = a[:, part].long().mm(b[:, part].long().T).int()
        assert torch.equal(cpu_int8.integer_product(a[:, part].contiguous(), b[:, part]), expected)


@pytest.mark.parametrize("product", [cpu_int8.integer_product, reference.integer_product])
def test_sums_near_the_end_of_int32(product) -> None:
    k = 2**17 - 1  # (-128)^2 k = 2^31 - 2^14
    a = torch.full((2, k), -128, dtype=torch.int8)
    b = torch.stack([torch.full((k,), value, dtype=torch.int8) for value in (-128, 127, 0)])
    assert product(a, b).tolist() == [[k * 2**14, -128 * 127 * k, 0]] * 2


def test_saturating_or_missing_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        pairs = (a.int()[:, None, :] * b.int()[None]).clamp(-(2**14) + 1, 2**14 - 1)
        return pairs.sum(dim=2, dtype=torch.int32)

    def missing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such operator")

    is_exact = cpu_int8.is_exact.__wrapped__
    assert is_exact()
    for broken in (saturating, missing):
        monkeypatch.setattr(cpu_int8, "integer_product", broken)
        assert not is_exact()


def group_operands(k: int, experts: int, rank: int, bits: int, seed: int) -> GroupOperands:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).half()

    smooth, router = 1 + normal(k).abs().float(), normal(experts, k).abs()
    shared, routed = Factor(normal(rank, k), None), Factor(normal(experts, rank, k), None)
    return GroupOperands(bits, smooth, 0, shared, routed, router, normal(experts))


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("block", [cpu_int8.BLOCK, 100])
@pytest.mark.parametrize(("rows", "experts"), [(0, 3), (1, 3), (50, 1), (50, 4), (3, 9)])
def test_prepared_rows_are_the_references_sorted_by_expert(
    rows: int, experts: int, bits: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_int8, "BLOCK", block)  # 100: blocks of four rows
    group = group_operands(21, experts, 3, bits, seed=rows + experts)
    x = torch.randn(rows, 21, generator=torch.Generator().manual_seed(bits))
    ours, plain = cpu_int8.prepare(x, group), reference.prepare(x, group)
    restore = torch.arange(rows) if ours.restore is None else ours.restore
    assert sorted(restore.tolist()) == list(range(rows))
    assert ours.expert.tolist() == sorted(plain.expert.tolist())
    for key in ("codes", "token_scale", "expert"):
        assert torch.equal(getattr(ours, key)[restore], getattr(plain, key)), key
    for key in ("shared_hidden", "routed_hidden"):
        torch.testing.assert_close(getattr(ours, key)[restore], getattr(plain, key), rtol=1e-5, atol=1e-5)


def test_hidden_values_of_codes_are_the_references_and_the_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    down = Factor(codes(5, 64, seed=1, extreme=False), torch.rand(5, generator=generator) + 0.1)
    smooth = torch.rand(64, generator=generator) + 0.5
    group = GroupOperands(6, smooth, 64, down, None, None, None, shared_reads_codes=True)
    x = torch.randn(30, 64, generator=generator)
    x[3], x[4, 7] = 0, torch.inf
    ours, plain = cpu_int8.prepare(x, group), reference.prepare(x, group)
    assert torch.equal(ours.codes, plain.codes)
    torch.testing.assert_close(ours.shared_hidden, plain.shared_hidden, rtol=0, atol=0, equal_nan=True)
    rounded = plain.codes.double() * plain.token_scale.double()
    expected = rounded @ down.float().double().T
    torch.testing.assert_close(plain.shared_hidden.double(), expected, rtol=1e-6, atol=0, equal_nan=True)
    assert plain.shared_hidden[4].isnan().all() and plain.shared_hidden[:4].isfinite().all()


@pytest.mark.parametrize("bits", range(4, 9))
@pytest.mark.parametrize("step", [1.0, 1e30, 1e-30, 2.0**-149])
def test_codes_of_tokens_are_the_references(step: float, bits: int) -> None:
    """Per token and in a batch, down to subnormal numbers, where absmax / largest is rounded to a few bits."""
    x = torch.tensor([[float(a), -a, a / 2, 1.0, 0.0] for a in range(1, 400)], dtype=torch.float64).mul(step).float()
    for rows in (x, *x[::9].split(1)):
        codes, scale = cpu_int8.quantize_tokens(rows, bits)
        expected, expected_scale = reference.quantize_tokens(rows, bits)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes, expected)


def test_codes_of_zero_and_non_finite_tokens_are_the_references() -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    x[1], x[2, 2], x[3, 0], x[4, 4] = 0, torch.nan, torch.inf, -torch.inf
    for ours, plain in zip(cpu_int8.quantize_tokens(x, 8), reference.quantize_tokens(x, 8), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("rows", "outputs"), [(1, 1), (0, 4), (3, 0), (67, 1031), (300, 2000)])
def test_outputs_are_the_sums_scaled(rows: int, outputs: int) -> None:
    """To the bit: sums become floats in their own memory, and none may be read after it was overwritten."""
    generator = torch.Generator().manual_seed(rows)
    scale = torch.rand(outputs, 1, generator=generator) + 0.1
    weight = LinearOperands(codes(outputs, 24, seed=3, extreme=False), scale, None, None, None, None, None)
    group = GroupOperands(8, None, 0, None, None, None, None)
    prepared = cpu_int8.prepare(torch.randn(rows, 24, generator=generator), group)
    sums = reference.integer_product(prepared.codes, weight.codes)
    assert torch.equal(cpu_int8.linear(prepared, weight), sums.float() * scale.T * prepared.token_scale)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_token_among_experts_leaves_the_others_alone(bad: float) -> None:
    group = group_operands(21, 4, 3, 8, seed=1)
    generator = torch.Generator().manual_seed(2)
    up, routed_up = (Factor(torch.randn(*shape, generator=generator).half(), None) for shape in ((9, 3), (4, 9, 3)))
    scale = torch.rand(9, 1, generator=generator)
    weight = LinearOperands(codes(9, 21, seed=4, extreme=False), scale, None, None, up, routed_up, None)
    x = torch.randn(40, 21, generator=generator)
    for rows in (slice(0, 40), slice(7, 8)):
        spoiled = x.clone()
        spoiled[7, 5] = bad
        y = cpu_int8.linear(cpu_int8.prepare(spoiled[rows], group), weight)
        expected = cpu_int8.linear(cpu_int8.prepare(x[rows], group), weight)
        kept = torch.arange(40)[rows] != 7
        assert y[~kept].isnan().all()
        torch.testing.assert_close(y[kept], expected[kept], rtol=1e-5, atol=1e-5)
