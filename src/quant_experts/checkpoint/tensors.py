"""From a quantized group to the tensors of the format: packing, half precision, names."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import QuantizedGroup
from quant_experts.checkpoint.packing import pack
from quant_experts.checkpoint.schema import FACTOR_DTYPE, GROUP_CHILD, GroupSpec, scale_dtype
from quant_experts.errors import QuantExpertsError


def describe_group(group: QuantizedGroup) -> GroupSpec:
    """The group's entry in `config.json`, names as the group has them."""
    return GroupSpec(
        linears=group.linears,
        smooth=group.smooth_scale is not None,
        rotation=group.rotation,
        shared_rank=group.shared.down.shape[0] if group.shared else 0,
        routed_rank=group.routed.down.shape[1] if group.routed else 0,
        experts=group.routed.down.shape[0] if group.routed else 0,
        factor_bits=group.factor_bits,
        shared_reads=group.shared_reads,
    )


def group_state(group: QuantizedGroup) -> dict[str, Tensor]:
    """Every tensor of the group on the CPU, by its name within the block.

    Raises `QuantExpertsError` if a factor does not fit half precision.
    """
    state: dict[str, Tensor] = {}
    rows = [len(weight.codes) for weight in group.weights]
    shared_ups = group.shared.up.split(rows) if group.shared else [None] * len(rows)
    routed_ups = group.routed.up.split(rows, dim=1) if group.routed else [None] * len(rows)
    bits = group.factor_bits
    for name, weight, shared_up, routed_up in zip(group.linears, group.weights, shared_ups, routed_ups, strict=True):
        tensors = {
            "weight_packed": pack(weight.codes, weight.bits),
            "weight_scale": weight.scale.to(scale_dtype(weight.group_size)),
            "weight_zero_point": None if weight.zero_point is None else pack(weight.zero_point.T, weight.bits),
            "weight_shape": torch.tensor(weight.codes.shape, dtype=torch.int32),
            **_factor("shared_up", shared_up, bits, name),
            **_factor("routed_up", routed_up, bits, name),
        }
        state |= {f"{name}.{key}": value for key, value in tensors.items() if value is not None}
    owner = group.linears[0]
    owned = {
        "smooth_scale": group.smooth_scale,
        **_factor("shared_down", group.shared.down if group.shared else None, bits, owner),
        **_factor("routed_down", group.routed.down if group.routed else None, bits, owner),
        "router_weight": _half(group.router.weight, owner) if group.router else None,
        "router_bias": _half(group.router.bias, owner) if group.router else None,
    }
    state |= {f"{owner}.{GROUP_CHILD}.{key}": value for key, value in owned.items() if value is not None}
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def _factor(name: str, factor: Tensor | None, bits: int, owner: str) -> dict[str, Tensor | None]:
    """A factor (..., rows, columns) as the format stores it: half precision, or int8 with a float32 scale a row."""
    if factor is None:
        return {}
    if bits == 16:
        return {name: _half(factor, owner)}
    scale = (factor.abs().amax(dim=-1) / 127).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    codes = (factor / scale[..., None]).round().clamp(-127, 127).to(torch.int8)
    if not scale.isfinite().all():
        raise QuantExpertsError(f"Expert factors of '{owner}' are NaN or infinite: check its weights and activations.")
    return {name: codes, f"{name}_scale": scale}


def _half(factor: Tensor, name: str) -> Tensor:
    """The factor in the format's half precision."""
    half = factor.to(FACTOR_DTYPE)
    if not half.isfinite().all():
        raise QuantExpertsError(
            f"Expert factors of '{name}' do not fit half precision: its weights or activations are out of range."
        )
    return half
