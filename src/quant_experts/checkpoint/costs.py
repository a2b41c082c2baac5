"""What one token costs a quantized group at run time, by the format alone: operations, and bytes read in decoding.

Counted per token and group, with N the stacked outputs, K the inputs, r_s and r_r the ranks and E the experts:

- base: 2 N K (a multiply-add counts as 2, whether of integers or not);
- repair: 2 (r_s + r_r) (N + K) for the shared and the one routed expert, 2 E K for the router, K for smoothing, and
  K log2(B) for a Hadamard rotation in blocks of B (the additions of the fast transform);
- bytes: every stored tensor but those of the E - 1 experts that the token does not use.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from quant_experts.checkpoint.schema import GroupSpec, group_tensors, linear_tensors
from quant_experts.config import Scheme


@dataclass(frozen=True)
class TokenCost:
    """The cost of one token in one group."""

    base_flops: int
    repair_flops: int
    bytes: int


def token_cost(spec: GroupSpec, scheme: Scheme, out_features: tuple[int, ...], in_features: int) -> TokenCost:
    """The cost of one token for linears of `out_features` outputs each, biases left out."""
    outputs = sum(out_features)
    transform = in_features * (int(spec.smooth) + max(0, spec.rotation.bit_length() - 1))
    experts = 2 * (spec.shared_rank + spec.routed_rank) * (outputs + in_features)
    router = 2 * spec.experts * in_features
    tensors = [group_tensors(spec, in_features)]
    tensors += [linear_tensors(spec, scheme, count, in_features) for count in out_features]
    read = sum(
        prod(shape) * dtype.itemsize // (spec.experts if name.startswith("routed_") else 1)
        for part in tensors
        for name, (shape, dtype) in part.items()
    )
    return TokenCost(2 * outputs * in_features, transform + experts + router, read)
