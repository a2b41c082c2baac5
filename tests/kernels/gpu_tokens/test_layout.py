"""How operands are laid out for a GPU, against float64: what kernels then compute is in `cases`."""

import pytest
import torch

from quant_experts.errors import QuantExpertsError
from quant_experts.kernels import reference
from quant_experts.kernels.gpu_tokens.layout import MAX_FACTORS, in_e4m3, pack_group, padded_experts, router_rows
from quant_experts.kernels.operands import Factor, GroupOperands

CPU = torch.device("cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def group(k: int, experts: int, rotation: int = 0, bits: int = 8) -> GroupOperands:
    routed = experts > 0
    return GroupOperands(
        bits,
        normal(k, seed=1).abs() + 0.1,
        rotation,
        Factor(normal(5, k, seed=2).half(), None),
        Factor(normal(experts, 3, k, seed=3).half(), None) if routed else None,
        normal(experts, k, seed=4).half() if routed else None,
        normal(experts, seed=5).half() if routed else None,
    )


@pytest.mark.parametrize("experts", [1, 3, 8, 9])
def test_parts_of_router_weights_add_up_to_24_bits(experts: int) -> None:
    weight = normal(experts, 70).double() * torch.logspace(-6, 6, 70, dtype=torch.float64)
    rows = router_rows(weight, torch.bfloat16)
    padded = padded_experts(experts)
    assert rows.shape == (4 * padded, 70) and torch.equal(rows, rows.bfloat16().float())
    parts = rows.unflatten(0, (4, padded)).double()
    torch.testing.assert_close(parts.sum(dim=0)[:experts], weight, rtol=2.0**-23, atol=0)
    assert not parts[:, experts:].any() and not parts[3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "rotation", "experts"), [(45, 0, 4), (300, 0, 1), (192, 64, 0), (128, 16, 0)])
def test_smoothing_and_rotation_are_folded_into_what_reads_the_input(
    k: int, rotation: int, experts: int, dtype: torch.dtype
) -> None:
    operands = group(k, experts, rotation)
    layout = pack_group(operands, dtype, CPU)
    assert layout.before is None and layout.projection is not None and layout.projection.dtype == dtype
    x = normal(6, k, seed=6)
    z = reference.transform(x, operands).double()
    rows = layout.projection.double().transpose(0, 1).flatten(1)[:, :k]
    hidden = x.double() @ rows[: layout.factors * layout.rank].T
    rounding = torch.finfo(dtype).eps
    for i, factor in enumerate([operands.shared_down, *([] if operands.routed_down is None else operands.routed_down)]):
        assert factor is not None
        expected = z @ factor.float().double().T
        ours = hidden[:, i * layout.rank :][:, : len(factor)]
        scale = (x.double().abs() @ rows[i * layout.rank :][: len(factor)].abs().T).max()
        assert (ours - expected).abs().max() <= (rounding + 1e-6) * scale
    assert layout.projection.shape == (-(-k // 128), len(rows), 128)


def test_int8_as_two_fp8_numbers() -> None:
    values = torch.arange(-128, 128, dtype=torch.int8).view(2, 1, 128)
    pair = in_e4m3(values)
    assert pair.shape == (2, 1, 256) and pair.dtype == torch.float8_e4m3fn
    assert torch.equal(pair.float().view(2, 1, 2, 128).sum(dim=2), values.float())


def test_a_router_of_rotated_values_has_them_rotated_before() -> None:
    operands = group(128, 4, rotation=64)
    layout = pack_group(operands, torch.bfloat16, CPU)
    assert layout.before is operands and layout.rotation == 0 and layout.inverse_smooth is None and layout.signs is None


@pytest.mark.parametrize("bits", [4, 6, 8, 16])
def test_hidden_values_of_any_token_fit_float16(bits: int) -> None:
    """Of the worst token there is: every value at the largest code, with the sign of the factor's; of values below two
    units."""
    operands = group(3000, 3, bits=bits)
    layout = pack_group(operands, torch.float32, CPU)
    assert operands.shared_down is not None and operands.routed_down is not None
    largest = 2 if bits == 16 else 2 ** (bits - 1) - 1
    for factor in (operands.shared_down, *operands.routed_down):
        worst = factor.float().abs().sum(dim=1).max() * largest  # in units of the token's scale
        assert 2.0**10 <= worst / layout.headroom <= 2.0**15 * 1.001


@pytest.mark.parametrize("bits", [8, 16])
def test_more_experts_than_a_mask_holds_are_refused(bits: int) -> None:
    assert pack_group(group(16, MAX_FACTORS - 1, bits=bits), torch.float32, CPU).factors == MAX_FACTORS
    with pytest.raises(
        QuantExpertsError, match=f"up to {MAX_FACTORS} experts .*here are {MAX_FACTORS + 1}: .*reference"
    ):
        pack_group(group(16, MAX_FACTORS, bits=bits), torch.float32, CPU)


def test_values_are_float16_in_blocks_of_256_channels() -> None:
    layout = pack_group(group(300, 3, bits=16), torch.float32, CPU)
    kind = layout.kind
    assert (kind.largest_code, kind.code_type, kind.block) == (0, torch.float16, 256)
    assert layout.projection is not None and layout.projection.shape == (4, kind.rows, 128)
    assert pack_group(group(300, 3), torch.float32, CPU).kind.block == 128
