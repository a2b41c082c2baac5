"""Dense bit packing of integer codes: 32 codes of b bits fill b words of 32 bits, for every b from 2 to 8.

Row by row, code i of a run of 32 occupies bits [i*b, (i+1)*b) of the run's b words, least significant first. For 4 bits
these are the usual little-endian nibbles, eight to a word; for 3 bits, 32 values in 3 words with none wasted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.errors import QuantExpertsError

RUN = 32
WORD_BITS = 32


def packed_width(columns: int, bits: int) -> int:
    """Words of 32 bits that a row of `columns` codes takes; the last run is padded with zeros."""
    return -(-columns // RUN) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes (N, K) int8 in [-2^(bits-1), 2^(bits-1)-1] -> (N, packed_width(K, bits)) int32.

    Raises `QuantExpertsError` if a code does not fit.
    """
    rows, columns = codes.shape
    half = 2 ** (bits - 1)
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise QuantExpertsError(f"Cannot pack codes outside [-{half}, {half - 1}] into {bits} bits.")
    runs = -(-columns // RUN)
    values = torch.zeros(rows, runs * RUN, dtype=torch.int64, device=codes.device)
    values[:, :columns] = codes.long() + half
    values = values.view(rows, runs, RUN)
    words = torch.zeros(rows, runs, bits, dtype=torch.int64, device=codes.device)
    for i in range(RUN):
        word, shift = divmod(i * bits, WORD_BITS)
        words[..., word] |= values[..., i] << shift
        if shift + bits > WORD_BITS:  # the code straddles two words
            words[..., word + 1] |= values[..., i] >> (WORD_BITS - shift)
    words &= 2**WORD_BITS - 1
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(rows, runs * bits)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack`: (N, packed_width(columns, bits)) int32 -> (N, columns) int8."""
    rows = len(packed)
    runs = -(-columns // RUN)
    words = packed.view(rows, runs, bits)
    codes = torch.empty(rows, runs, RUN, dtype=torch.int8, device=packed.device)
    mask, half = 2**bits - 1, 2 ** (bits - 1)
    for i in range(RUN):
        word, shift = divmod(i * bits, WORD_BITS)
        # >> on int32 copies the sign bit down; the mask of at most 8 bits drops it unless the code reaches the word's
        # end, and then the copied bits lie above the code.
        value = words[..., word] >> shift
        if shift + bits > WORD_BITS:
            value = (value & (2 ** (WORD_BITS - shift) - 1)) | (words[..., word + 1] << (WORD_BITS - shift))
        codes[..., i] = ((value & mask) - half).to(torch.int8)
    return codes.view(rows, runs * RUN)[:, :columns].contiguous()
