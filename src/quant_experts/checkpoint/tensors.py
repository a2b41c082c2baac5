"""From a quantized group to the tensors of the format: packing, half-precision factors, names."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import QuantizedGroup
from quant_experts.checkpoint.packing import pack
from quant_experts.checkpoint.schema import FACTOR_DTYPE, GROUP_CHILD, GroupSpec
from quant_experts.errors import QuantExpertsError


def describe_group(group: QuantizedGroup) -> GroupSpec:
    """The group's entry in `config.json`, names as the group has them."""
    return GroupSpec(
        linears=group.linears,
        smooth=group.smooth_scale is not None,
        shared_rank=group.shared.down.shape[0] if group.shared else 0,
        routed_rank=group.routed.down.shape[1] if group.routed else 0,
        experts=group.routed.down.shape[0] if group.routed else 0,
    )


def group_state(group: QuantizedGroup) -> dict[str, Tensor]:
    """Every tensor of the group on the CPU, by its name within the block.

    Raises `QuantExpertsError` if a factor does not fit half precision.
    """
    state: dict[str, Tensor] = {}
    rows = [len(weight.codes) for weight in group.weights]
    shared_ups = group.shared.up.split(rows) if group.shared else [None] * len(rows)
    routed_ups = group.routed.up.split(rows, dim=1) if group.routed else [None] * len(rows)
    for name, weight, shared_up, routed_up in zip(group.linears, group.weights, shared_ups, routed_ups, strict=True):
        tensors = {
            "weight_packed": pack(weight.codes, weight.bits),
            "weight_scale": weight.scale,
            "weight_zero_point": weight.zero_point,
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int32),
            "shared_up": _half(shared_up, name),
            "routed_up": _half(routed_up, name),
        }
        state |= {f"{name}.{key}": value for key, value in tensors.items() if value is not None}
    owned = {
        "smooth_scale": group.smooth_scale,
        "shared_down": _half(group.shared.down if group.shared else None, group.linears[0]),
        "routed_down": _half(group.routed.down if group.routed else None, group.linears[0]),
        "router_weight": _half(group.router.weight if group.router else None, group.linears[0]),
        "router_bias": _half(group.router.bias if group.router else None, group.linears[0]),
    }
    prefix = f"{group.linears[0]}.{GROUP_CHILD}"
    state |= {f"{prefix}.{key}": value for key, value in owned.items() if value is not None}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _half(factor: Tensor | None, name: str) -> Tensor | None:
    """The factor in the format's half precision."""
    if factor is None:
        return None
    half = factor.to(FACTOR_DTYPE)
    if not half.isfinite().all():
        raise QuantExpertsError(
            f"Expert factors of '{name}' do not fit half precision: its weights or activations are out of range."
        )
    return half
