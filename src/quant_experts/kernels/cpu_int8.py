"""Integer products on the CPU through `torch._int_mm` where it uses instructions for them (VNNI or AMX), and elsewhere,
where it is a plain loop, in float32.

Tokens are sorted by expert in `prepare`, so that each expert works on one contiguous slice of rows and adds its part in
place; one gather at the end of `linear` restores the order. Rejected: masking per expert as the reference does (each
mask costs a gather and a scatter of M x N values), and one dense product over the factors of all experts (E times the
multiplications).

A pass that writes fresh memory spends most of its time on page faults, so passes over M x K or M x N values work in
place or on blocks of rows. Rejected: the output in blocks of columns that stay in cache (the integer product and the
experts' become slower than the passes become faster).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from time import perf_counter

import torch
from torch import Tensor

from quant_experts.kernels import reference
from quant_experts.kernels.operands import GroupOperands, LinearOperands, Prepared

BLOCK = 2**19
"""Float32 values in a block of rows: two megabytes, which memory that was freed before can hold."""


@cache
def is_exact() -> bool:
    """Whether this processor's int8 product is exact, extreme values included.

    Instructions older than VNNI add pairs of 8-bit products in saturating 16-bit registers; where a build uses them,
    sums of extreme codes come out wrong and this backend must not be chosen.
    """
    try:
        generator = torch.Generator().manual_seed(0)
        a = torch.randint(-128, 128, (33, 257), generator=generator, dtype=torch.int8)
        b = torch.randint(-128, 128, (31, 257), generator=generator, dtype=torch.int8)
        a[0], b[0] = 127, -128
        a[1], b[1] = -128, -128
        expected = reference.integer_product(a, b)
        return torch.equal(integer_product(a, b), expected) and torch.equal(integer_product(a[:1], b), expected[:1])
    except RuntimeError:  # a build without the operator
        return False


@cache
def has_fast_integers() -> bool:
    """Whether `_int_mm` is faster than a product in float32, several times as it should be: on processors without VNNI
    it is tens of times slower. Timed, once, because PyTorch does not tell."""
    a, b = torch.ones(32, 512, dtype=torch.int8), torch.ones(512, 512, dtype=torch.int8)
    times, ways = [], (lambda: torch._int_mm(a, b.T), lambda: float_product(a, b))
    product: Callable[[], Tensor]
    for product in ways:
        runs = []
        for _ in range(4):
            begin = perf_counter()
            product()
            runs.append(perf_counter() - begin)
        times.append(min(runs))
    return times[0] <= times[1]


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a (M, K) int8, b (N, K) int8 -> a b^T (M, N) int32, exact."""
    if 0 in (*a.shape, *b.shape):
        return torch.zeros(len(a), len(b), dtype=torch.int32)
    if a.shape[1] == 1:  # strides of (1, 1) mislead oneDNN into reading past the operand
        return a.int() * b.int().T
    if not has_fast_integers():
        return float_product(a, b)
    return torch._int_mm(a, b.T)


def float_product(a: Tensor, b: Tensor) -> Tensor:
    """As `integer_product`, none of whose operands may be empty, by float32: as many channels at a time as any order of
    their sums is exact for, and rows of b in blocks, because writing fresh memory takes long."""
    largest = _largest(a) * _largest(b)
    product: Tensor | None = None
    for left, right in zip(*(part.split(max(1, 2**24 // max(1, largest)), dim=1) for part in (a, b)), strict=True):
        left, part = left.float(), a.new_empty(len(a), len(b), dtype=torch.int32)
        for rows in _row_blocks(*right.shape):
            part[:, rows] = left @ right[rows].float().T
        product = part if product is None else product.add_(part)
    assert product is not None
    return product


def _largest(codes: Tensor) -> int:
    """Magnitude."""
    least, most = codes.aminmax()
    return max(-int(least), int(most))


def quantize_tokens(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `reference.quantize_tokens`, in fewer passes over memory where every token is ordinary (finite, not near
    zero)."""
    largest = 2 ** (bits - 1) - 1
    if not x.numel():
        return reference.quantize_tokens(x, bits)
    absmax = torch.maximum(x.amax(dim=1, keepdim=True), -x.amin(dim=1, keepdim=True))
    scale = absmax / largest
    low, high = (bound.item() for bound in absmax.aminmax())  # NaN where there is one
    if not (low >= reference.SMALLEST and high < torch.inf):
        return reference.quantize_tokens(x, bits)
    # No clamp: |x| / (absmax / largest) exceeds `largest` by rounding only, far less than one half.
    codes, steps = torch.empty(x.shape, dtype=torch.int8), scale.reciprocal()
    for rows in _row_blocks(*x.shape):
        codes[rows] = (x[rows] * steps[rows]).round_()
    return codes, scale


def prepare(x: Tensor, group: GroupOperands) -> Prepared:
    """As `reference.prepare`, rows sorted by expert where there are several."""
    x = reference.transform(x, group)
    restore = expert = routed_hidden = None
    if group.routed_down is not None:
        assert group.router_weight is not None and group.router_bias is not None
        weight, bias = group.router_weight.float(), group.router_bias.float()
        expert = torch.cat([reference.route(x[rows], weight, bias) for rows in _row_blocks(*x.shape)])
        if len(x) > 1:
            expert, order = torch.sort(expert, stable=True)
            restore = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
            x = x.index_select(0, order)  # several times faster than x[order]
        routed_hidden = x.new_empty(len(x), group.routed_down.shape[1])
        for e, rows in _slices(expert, len(group.routed_down)):
            routed_hidden[rows] = x[rows] @ group.routed_down[e].float().T
    codes, token_scale = quantize_tokens(x, group.activation_bits)
    shared_hidden = None
    if group.shared_reads_codes:
        assert group.shared_down is not None
        product = integer_product(codes, group.shared_down.values)
        shared_hidden = reference.hidden_of_codes(product, token_scale, group.shared_down)
    elif group.shared_down is not None:
        shared_hidden = x @ group.shared_down.float().T
    return Prepared(None, codes, token_scale, shared_hidden, routed_hidden, expert, restore)


def linear(prepared: Prepared, weight: LinearOperands) -> Tensor:
    """As `reference.linear`, for integer activations."""
    y = _base_product(prepared, weight)
    if weight.bias is not None:
        y += weight.bias
    if weight.shared_up is not None:
        assert prepared.shared_hidden is not None
        y.addmm_(prepared.shared_hidden, weight.shared_up.float().T)
    if weight.routed_up is not None:
        assert prepared.routed_hidden is not None and prepared.expert is not None
        for e, rows in _slices(prepared.expert, len(weight.routed_up)):
            y[rows].addmm_(prepared.routed_hidden[rows], weight.routed_up[e].float().T)
    return y if prepared.restore is None else y.index_select(0, prepared.restore)


def _row_blocks(m: int, k: int) -> list[slice]:
    """Slices of rows of a matrix (M, K), one at least."""
    size = max(1, BLOCK // max(1, k))
    return [slice(start, start + size) for start in range(0, max(1, m), size)]


def _slices(sorted_expert: Tensor, experts: int) -> list[tuple[int, slice]]:
    """(expert, its rows) for each expert that has any, given expert indices in ascending order."""
    if len(sorted_expert) == 1:
        return [(int(sorted_expert), slice(0, 1))]
    ends = torch.bincount(sorted_expert, minlength=experts).cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [(e, slice(start, end)) for e, (start, end) in enumerate(zip(starts, ends, strict=True)) if end > start]


def _base_product(prepared: Prepared, weight: LinearOperands) -> Tensor:
    """scale_x * sum over groups of scale_g * (codes_x codes_g^T - zero_g * sum(codes_x)) -> (M, N) float32."""
    assert prepared.codes is not None and prepared.token_scale is not None
    size = weight.group_size or weight.codes.shape[1]
    total: Tensor | None = None
    for g, (x, codes) in enumerate(zip(prepared.codes.split(size, 1), weight.codes.split(size, 1), strict=True)):
        product = integer_product(x.contiguous(), codes)
        if weight.zero_point is not None:
            product -= x.sum(dim=1, dtype=torch.int32)[:, None] * weight.zero_point[:, g].int()
        # In the product's own memory; one pass more than int32 * float32, and still faster.
        part = product.view(torch.float32).copy_(product).mul_(weight.scale[:, g])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.mul_(prepared.token_scale)
