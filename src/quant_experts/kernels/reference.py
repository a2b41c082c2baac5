"""The oracle: each operation as plainly as PyTorch can say it, on any device. Other backends are tested against it.

`y = s_x s_w (q(z) Wq^T) + up_s (down_s z) + up_e (down_e z) + bias` on z = H (x (1/m)), H a rotation or nothing, e
chosen by the router. A shared expert that reads codes multiplies s_x q(z) in place of z. Products of codes are exact.
A token that holds NaN or infinity gets NaN outputs, and no other token is touched.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from quant_experts.config import ActivationFormat, Scheme
from quant_experts.kernels.operands import Factor, GroupOperands, LinearOperands, Prepared

SMALLEST = 2.0**-100
"""Tokens whose largest magnitude is smaller count as zero: the reciprocal of a scale is always a finite number."""


def is_exact() -> bool:
    """True: float64 products of codes are exact wherever PyTorch runs."""
    return True


FP8_LARGEST = 448
"""Of e4m3fn, which has no infinity."""


def quantize_tokens(x: Tensor, bits: int, activation_format: ActivationFormat = "int") -> tuple[Tensor, Tensor]:
    """Symmetric codes per token: scale = absmax / largest code, codes = round(x (1 / scale)), half to even.

    Integers: the largest code is 2^(bits-1) - 1 (thu-nics/MBQ). fp8: 448, and codes are the nearest numbers of e4m3fn,
    subnormal ones included; none is beyond 448, because x (1 / scale) exceeds it by rounding only.

    x (M, K) float32 -> codes (M, K) int8 or float8_e4m3fn, scale (M, 1) float32. A zero token has scale 1; a non-finite
    one scale NaN, codes 0. Every backend multiplies by the rounded reciprocal, as here, so that codes agree to the bit:
    a division costs a GPU as much as all the rest.
    """
    largest = FP8_LARGEST if activation_format == "fp8" else 2 ** (bits - 1) - 1
    absmax = x.abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(len(x), 1)
    finite = absmax.isfinite()
    quotient = absmax / torch.full_like(absmax, largest)  # by a plain number CUDA would multiply with 1 / largest
    scale = torch.where(finite & (absmax >= SMALLEST), quotient, torch.ones_like(absmax))
    steps = torch.where(finite, x * scale.reciprocal(), torch.zeros_like(x))
    if activation_format == "fp8":
        codes = steps.to(torch.float8_e4m3fn)
    else:
        codes = steps.round_().clamp_(-largest - 1, largest).to(torch.int8)
    return codes, torch.where(finite, scale, torch.full_like(scale, torch.nan))


def round_tokens(x: Tensor, scheme: Scheme) -> Tensor:
    """What a linear of the scheme reads of its transformed input: codes times scale, or x itself where activations keep
    their precision. (M, K) float32 -> (M, K) float32."""
    if scheme.weight_only:
        return x
    codes, token_scale = quantize_tokens(x, scheme.activation_bits, scheme.activation_format)
    return codes.float() * token_scale


def code_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8 or fp8, b (N, K) int8 -> a b^T (M, N) float64, exact.

    Every partial sum is a multiple of 1, with fp8 of 2^-9 and at most 448 * 128 K: float64 holds it while K < 2^28.
    """
    return a.double() @ b.double().T


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8, b (N, K) int8 -> a b^T (M, N) int32, exact."""
    return code_product(a, b).to(torch.int32)


def hidden_of_codes(product: Tensor, token_scale: Tensor, down: Factor) -> Tensor:
    """Hidden values of an expert that reads codes: exact product (M, R) of codes and int8 factors, token_scale (M, 1)
    -> (M, R) float32."""
    assert down.scale is not None, "an expert that reads codes has int8 factors"
    return product.float() * down.scale * token_scale


def route(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The expert of each token, argmin_e (weight |x| + bias)_e, the first on ties (paper, step 5). (M, K) -> (M,)
    int64."""
    return torch.addmm(bias.float(), x.abs(), weight.float().T).argmin(dim=1)


def smooth(x: Tensor, smooth_scale: Tensor | None) -> Tensor:
    """x (1 / m) in float32. Every backend multiplies by the rounded reciprocal."""
    return x.float() if smooth_scale is None else x.float() * smooth_scale.reciprocal()


@cache
def hadamard(size: int, device: torch.device) -> Tensor:
    """Sylvester's (size, size) symmetric orthogonal matrix of +-1 / sqrt(size), float32; size is a power of two."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    normalised: Tensor = matrix / size**0.5
    return normalised


def rotate(x: Tensor, block: int) -> Tensor:
    """Mix each run of `block` input channels by a Hadamard matrix: x (..., K) -> (..., K), x itself if block is 0.

    The rotation is its own inverse and spreads a large channel over its block (QuaRot's online rotation, in blocks).
    The order of its float32 sums is free, so that codes of two backends may differ by one where a value lies on a tie.
    """
    if not block:
        return x
    return (x.reshape(-1, block) @ hadamard(block, x.device).to(x.dtype)).reshape(x.shape)


def transform(x: Tensor, group: GroupOperands) -> Tensor:
    """What all that follows reads: x (1 / m), rotated. (M, K) any float dtype -> float32."""
    return rotate(smooth(x, group.smooth_scale), group.rotation)


def prepare(x: Tensor, group: GroupOperands) -> Prepared:
    """Transform, quantize, route and project down, once per group and input. x (M, K), any float dtype."""
    x = transform(x, group)
    codes = token_scale = None
    if group.activation_bits == 16:
        x = torch.where(x.isfinite().all(dim=1, keepdim=True), x, torch.full_like(x, torch.nan))
    else:
        codes, token_scale = quantize_tokens(x, group.activation_bits, group.activation_format)
    shared_hidden = None
    if group.shared_reads_codes:
        assert codes is not None and token_scale is not None and group.shared_down is not None
        product = code_product(codes, group.shared_down.values)
        shared_hidden = hidden_of_codes(product, token_scale, group.shared_down)
    elif group.shared_down is not None:
        shared_hidden = x @ group.shared_down.float().T
    expert = routed_hidden = None
    if group.routed_down is not None:
        assert group.router_weight is not None and group.router_bias is not None
        expert = route(x, group.router_weight, group.router_bias)
        routed_hidden = x.new_zeros(len(x), group.routed_down.shape[1])
        for e in range(len(group.routed_down)):
            routed_hidden[expert == e] = x[expert == e] @ group.routed_down[e].float().T
    return Prepared(x if codes is None else None, codes, token_scale, shared_hidden, routed_hidden, expert)


def linear(prepared: Prepared, weight: LinearOperands) -> Tensor:
    """One linear of the group -> (M, N) float32."""
    y = _base_product(prepared, weight)
    if weight.shared_up is not None:
        assert prepared.shared_hidden is not None
        y = y + prepared.shared_hidden @ weight.shared_up.float().T
    if weight.routed_up is not None:
        assert prepared.routed_hidden is not None and prepared.expert is not None
        for e in range(len(weight.routed_up)):
            y[prepared.expert == e] += prepared.routed_hidden[prepared.expert == e] @ weight.routed_up[e].float().T
    return y if weight.bias is None else y + weight.bias.float()


def _base_product(prepared: Prepared, weight: LinearOperands) -> Tensor:
    """The quantized weight's part, group by group: scale_g * (x_g codes_g^T - zero_g * sum(x_g)). -> (M, N) float32."""
    left = prepared.codes if prepared.codes is not None else prepared.values
    assert left is not None
    size = weight.group_size or weight.codes.shape[1]
    total = torch.zeros(len(left), len(weight.codes), dtype=torch.float32, device=left.device)
    for g, (x, codes) in enumerate(zip(left.split(size, dim=1), weight.codes.split(size, dim=1), strict=True)):
        if prepared.codes is not None:
            product = code_product(x, codes)
            if weight.zero_point is not None:
                product = product - x.double().sum(dim=1, keepdim=True) * weight.zero_point[:, g].double()
            total += product.float() * weight.scale[:, g]
        else:
            zero = 0 if weight.zero_point is None else weight.zero_point[:, g, None].float()
            total += x @ ((codes.float() - zero) * weight.scale[:, g, None]).T
    return total if prepared.token_scale is None else total * prepared.token_scale
