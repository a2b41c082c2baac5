"""How much the sums of fp8 products lose in Hopper's matrix units, next to the rounding of activations to fp8.

    python benchmarks/kernels/fp8_sums.py

prints a table of errors of random layers with 4-bit weights, each the norm of a token's output error over that of its
output, mean and largest over tokens: of rounding the activations; of the sums, by a model of the units (32 products
and the sum so far are cut 13 bits behind the largest one's first, then added), alone, with float32 sums over equal
parts of at most FP8_CHANNELS channels, as the kernels have them in tiles of 256 rows, and over every TOGETHER channels,
as in other tiles; and, on a GPU, of the kernels' sums themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.gpu_tokens.layout import BLOCK
from quant_experts.kernels.gpu_weight_activation import backend as triton_backend
from quant_experts.kernels.gpu_weight_activation.hopper_codes import FP8_STEPS
from quant_experts.kernels.gpu_weight_activation.hopper_launch import FP8_CHANNELS
from quant_experts.kernels.operands import GroupOperands, LinearOperands

TOKENS, OUTPUTS = 24, 24
KEPT = 13
"""Bits behind the first."""
TOGETHER = BLOCK * FP8_STEPS.value
"""Channels that the units add up alone."""


def exponent(x: Tensor, least: int) -> Tensor:
    """floor(log2 |x|), but at least `least`."""
    return (x.abs().frexp().exponent - 1).masked_fill(x == 0, least).clamp(min=least)


def cut(x: Tensor, place: Tensor) -> Tensor:
    """x without what is smaller than 2^place."""
    return (x.ldexp(-place)).trunc().ldexp(place)


def unit_sums(x: Tensor, weight: Tensor) -> Tensor:
    """x (M, K), weight (N, K) float64, e4m3 numbers, K a multiple of 32 -> x weight^T (M, N) as the units sum it."""
    total = torch.zeros(len(x), len(weight), dtype=torch.float64)
    for left, right in zip(x.split(32, dim=1), weight.split(32, dim=1), strict=True):
        products = left[:, None] * right[None]
        exponents = exponent(left, -6)[:, None] + exponent(right, -6)[None]  # subnormal numbers keep the least
        place = torch.maximum(exponents.amax(dim=2), exponent(total, -100)) - KEPT
        total = cut(total, place) + cut(products, place[..., None]).sum(dim=2)
        total = cut(total, exponent(total, -100) - KEPT)
    return total


def kernel_sums(x: Tensor, weight: Tensor, channels: int) -> Tensor:
    """As `unit_sums`, with float32 sums over every so many channels."""
    total = torch.zeros(len(x), len(weight))
    for left, right in zip(x.split(channels, dim=1), weight.split(channels, dim=1), strict=True):
        total += unit_sums(left, right).float()
    return total.double()


def errors(found: Tensor, expected: Tensor) -> str:
    """Mean and largest relative error of tokens, in percent."""
    each = (found - expected).norm(dim=1) / expected.norm(dim=1) * 100
    return f"{each.mean():.3f} ({each.max():.3f})"


def row(k: int, outlier: float) -> str:
    """One line of the table: layers of k input channels, one of them larger than the others."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(TOKENS, k, generator=generator)
    x[:, 0] *= outlier
    codes = (torch.randn(OUTPUTS, k, generator=generator) * 2).round().clamp(-8, 7).to(torch.int8)
    quantized, scale = reference.quantize_tokens(x, 8, "fp8")
    weight = codes.double()
    exact = reference.code_product(quantized, codes)
    unrounded = (x.double() / scale) @ weight.T
    cells = [str(k), f"{outlier:g}", errors(exact, unrounded)]
    steps = -(-k // BLOCK)
    equal = -(-steps // -(-k // FP8_CHANNELS)) * BLOCK
    for channels in (k, equal, TOGETHER):
        cells.append(errors(kernel_sums(quantized.double(), weight / 256, channels) * 256, exact))
    if torch.cuda.is_available():
        group = GroupOperands(8, None, 0, None, None, None, None, activation_format="fp8")
        linear = LinearOperands(codes.cuda(), torch.ones(OUTPUTS, 1).cuda(), None, None, None, None, None)
        y = triton_backend.apply(x.cuda(), triton_backend.pack(group, [linear])).cpu()
        cells.append(errors(y.double() / scale, exact))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    heads = ["input channels", "outlier", "rounding of activations, %", "the units alone, %"]
    heads += ["tiles of 256 rows, %", "other tiles, %"]
    heads += ["measured, %"] if torch.cuda.is_available() else []
    print(f"| {' | '.join(heads)} |\n{'| ---: ' * len(heads)}|")
    for k in (3584, 8192, 18944, 29568):
        for outlier in (1.0, 1000.0):
            print(row(k, outlier), flush=True)


if __name__ == "__main__":
    main()
