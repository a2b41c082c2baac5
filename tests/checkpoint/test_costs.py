"""Operations and bytes of a token, against counts written out by hand."""

import pytest

from quant_experts.checkpoint.costs import token_cost
from quant_experts.checkpoint.schema import GroupSpec, group_stored_bits
from quant_experts.config import Scheme

W4A6 = Scheme.parse("W4A6")
ROWS, N, K = (16, 8), 24, 64


def test_a_plain_group_costs_its_base_alone() -> None:
    cost = token_cost(GroupSpec(linears=("q", "k")), W4A6, ROWS, K)
    assert cost.base_flops == 2 * N * K and cost.repair_flops == 0
    assert cost.bytes == N * K // 2 + 4 * N + 8 * 2  # codes, scales, two shapes


def test_one_expert_of_all_counts_and_the_whole_router() -> None:
    spec = GroupSpec(linears=("q", "k"), smooth=True, shared_rank=4, routed_rank=2, experts=8)
    cost = token_cost(spec, W4A6, ROWS, K)
    assert cost.repair_flops == 2 * (4 + 2) * (N + K) + 2 * 8 * K + K
    plain = token_cost(GroupSpec(linears=("q", "k")), W4A6, ROWS, K)
    factors = 2 * (4 + 2) * (N + K)
    router = 2 * 8 * (K + 1)
    assert cost.bytes == plain.bytes + factors + router + 4 * K
    unused = 7 * 2 * 2 * (N + K)
    assert cost.bytes + unused == group_stored_bits(spec, W4A6, ROWS, K) // 8


@pytest.mark.parametrize(("block", "additions"), [(0, 0), (2, K), (16, 4 * K)])
def test_a_rotation_costs_the_additions_of_the_fast_transform(block: int, additions: int) -> None:
    assert token_cost(GroupSpec(linears=("o",), rotation=block), W4A6, (8,), K).repair_flops == additions


def test_int8_factors_are_half_as_many_bytes_and_their_scales() -> None:
    half, byte = (GroupSpec(linears=("o",), shared_rank=4, routed_rank=4, experts=2, factor_bits=b) for b in (16, 8))
    costs = [token_cost(spec, W4A6, (N,), K) for spec in (half, byte)]
    assert costs[0].repair_flops == costs[1].repair_flops
    saved = 2 * 4 * (N + K)  # two experts of rank 4, a byte less each value
    assert costs[0].bytes - costs[1].bytes == saved - 4 * 2 * (4 + N)
