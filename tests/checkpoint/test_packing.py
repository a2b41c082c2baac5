"""Bit packing against a packer that writes one bit at a time, and against vectors frozen with the format."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quant_experts.checkpoint.packing import pack, packed_width, unpack
from quant_experts.errors import QuantExpertsError

BITS = range(2, 9)


def naive_row(row: list[int], bits: int) -> list[int]:
    """Bit j of code i (offset to be positive) is bit i * b + j of the row; 32-bit words in two's complement."""
    words = [0] * (-(-len(row) // 32) * bits)
    for i, code in enumerate(row):
        for j in range(bits):
            position = i * bits + j
            words[position // 32] |= ((code + 2 ** (bits - 1)) >> j & 1) << (position % 32)
    return [word - 2**32 if word >= 2**31 else word for word in words]


@st.composite
def rows_of_codes(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    bits, columns = draw(st.sampled_from(BITS)), draw(st.integers(1, 100))
    code = st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    rows = draw(st.lists(st.lists(code, min_size=columns, max_size=columns), min_size=1, max_size=3))
    return bits, torch.tensor(rows, dtype=torch.int8)


@given(rows_of_codes())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_equals_a_bit_by_bit_packer_and_comes_back(drawn: tuple[int, torch.Tensor]) -> None:
    bits, codes = drawn
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32 and packed.shape == (len(codes), packed_width(codes.shape[1], bits))
    assert packed.tolist() == [naive_row(row, bits) for row in codes.tolist()]
    back = unpack(packed, bits, codes.shape[1])
    assert back.dtype == torch.int8 and back.is_contiguous() and torch.equal(back, codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("columns", [1, 31, 32, 33, 65])
def test_extremes(columns: int, bits: int) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = torch.tensor([[low] * columns, [high] * columns, ([low, high] * columns)[:columns]])
    packed = pack(codes.to(torch.int8), bits)
    assert packed.tolist() == [naive_row(row, bits) for row in codes.tolist()]
    assert packed[0].count_nonzero() == 0
    assert torch.equal(unpack(packed, bits, columns), codes.to(torch.int8))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0, 40), (3, 0), (0, 0)])
def test_empty(shape: tuple[int, int], bits: int) -> None:
    packed = pack(torch.zeros(shape, dtype=torch.int8), bits)
    assert packed.shape == (shape[0], packed_width(shape[1], bits))
    assert unpack(packed, bits, shape[1]).shape == shape


@pytest.mark.parametrize("bits", range(2, 8))
@pytest.mark.parametrize("beyond", [-1, 0])
def test_codes_that_do_not_fit_are_refused(bits: int, beyond: int) -> None:
    codes = torch.zeros(2, 5, dtype=torch.int8)
    codes[1, 3] = 2 ** (bits - 1) if beyond == 0 else -(2 ** (bits - 1)) - 1
    with pytest.raises(QuantExpertsError, match=f"{bits} bits"):
        pack(codes, bits)


def test_four_bits_are_little_endian_nibbles() -> None:
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-8, 8, (5, 64), generator=generator, dtype=torch.int8)
    octets = pack(codes, 4).numpy().astype("<i4").tobytes()
    nibbles = [half - 8 for octet in octets for half in (octet & 15, octet >> 4)]
    assert nibbles == codes.flatten().tolist()


def test_eight_bits_are_bytes() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    assert pack(codes, 8).numpy().astype("<i4").tobytes() == bytes(range(256))


@pytest.mark.parametrize("bits", BITS)
def test_no_bit_is_wasted_in_a_full_run(bits: int) -> None:
    assert packed_width(32, bits) == bits and packed_width(33, bits) == packed_width(64, bits) == 2 * bits
    assert packed_width(1536, bits) * 32 == 1536 * bits
    assert packed_width(0, bits) == 0


def test_columns_of_a_strided_matrix() -> None:
    codes = torch.arange(-8, 8, dtype=torch.int8).repeat(3, 8)[:, ::2]
    assert torch.equal(pack(codes, 4), pack(codes.contiguous(), 4))
    packed = pack(torch.cat([codes, codes]), 4)[::2]
    assert torch.equal(unpack(packed, 4, codes.shape[1]), torch.cat([codes, codes])[::2])


GOLDEN = {
    2: "1b1b1b1b1b1b1b1b1b03",
    3: "5370975370975370975370975370",
    4: "a3816f4d2b09e7c5a3816f4d2b09e7c5a3810f",
    5: "4345fc4da35b24787d615307f46c274b66705ce54345fc01",
    6: "8312619fd9d2bb90409757b2b31e208fd591ab9c03875371a31ae33f",
    7: "034504f331b5683b61127af596d9737d00f1b074482b590e787456b963751cff07",
    8: "030a11181f262d343b424950575e656c737a81888f969da4abb2b9c0c7ced5dce3eaf1f8ff",
}
"""Codes (7 i + 3) mod 2^b - 2^(b-1) for i < 37, one row, as little-endian bytes; zeros at the end are left off.

Never change: files hold this."""


@pytest.mark.parametrize("bits", BITS)
def test_golden_vector(bits: int) -> None:
    codes = torch.tensor([[(7 * i + 3) % 2**bits - 2 ** (bits - 1) for i in range(37)]], dtype=torch.int8)
    packed = pack(codes, bits)
    assert packed.numpy().astype("<i4").tobytes().hex() == GOLDEN[bits].ljust(16 * bits, "0")
    assert torch.equal(unpack(packed, bits, 37), codes)
