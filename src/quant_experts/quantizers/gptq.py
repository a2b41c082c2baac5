"""GPTQ (Frantar et al., ICLR 2023): round one input channel after the other, and let those still to come make up
for the error of each."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_experts.artifacts import Event, QuantizedWeight
from quant_experts.config import Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.quantizers.grids import clipped_grid, from_grid, group_grid, round_to_grid

DAMPING = 0.01
"""Share of the mean diagonal that is added to the second moment's diagonal."""
BLOCK = 128
"""Columns whose error is carried on to all later ones in one product."""


def quantize_gptq(
    weight: Tensor, moment: Tensor, scheme: Scheme, *, act_order: bool = False, clip: bool = False, where: str = ""
) -> tuple[QuantizedWeight, list[Event]]:
    """weight (N, K) float, moment (K, K) = E[x x^T] -> codes, and events where the moment needed more damping.

    act_order: channels in descending order of their energy. Grids are then found from the original weights, because a
    group's channels are not rounded one after the other; otherwise from the weights as they are when a group's turn
    comes. clip: search the range of each grid. The codes come back in the original order of channels.
    """
    columns = weight.shape[1]
    order = torch.arange(columns, device=weight.device)
    if act_order:
        order = torch.sort(moment.diagonal(), descending=True, stable=True).indices
    factor, events = _inverse_factor(moment[order][:, order].double(), where)
    grids = _Grids(weight.float(), moment.diagonal(), scheme, clip)
    if act_order:
        for start in range(0, columns, grids.size):
            grids.find(start)
    values = weight.float()[:, order]
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    positions = order.tolist()
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        # Column by column means row by row of the transposed block, which lies together in memory.
        block = values[:, start:end].T.contiguous()
        errors = torch.empty_like(block)
        for i, k in enumerate(positions[start:end]):
            if not act_order and k % grids.size == 0:
                ahead = torch.cat([block[i:].T, values[:, end:]], dim=1)[:, : grids.size]
                grids.find(k, ahead)
            scale, zero = grids.at(k)
            code = round_to_grid(block[i], scale, zero, scheme.weight_bits)
            codes[:, k] = code
            errors[i] = (block[i] - from_grid(code, scale, zero)) / factor[start + i, start + i]
            block[i + 1 :].addr_(factor[start + i, start + i + 1 : end], errors[i], alpha=-1)
        values[:, end:].addmm_(errors.T, factor[start:end, end:], alpha=-1)
    zero_point = None if scheme.symmetric else grids.zeros.to(torch.int8)
    return QuantizedWeight(codes, grids.scales, zero_point, scheme.weight_bits, scheme.group_size), events


class _Grids:
    """Scale and zero point of each row and group, found group by group."""

    def __init__(self, weight: Tensor, energy: Tensor, scheme: Scheme, clip: bool) -> None:
        rows, columns = weight.shape
        self.weight, self.energy, self.scheme, self.clip = weight, energy.float(), scheme, clip
        self.size = scheme.group_size or columns
        self.scales = weight.new_ones(rows, -(-columns // self.size))
        self.zeros = torch.zeros_like(self.scales)

    def find(self, start: int, part: Tensor | None = None) -> None:
        """The grid of the group that starts at a channel, from its weights (N, <= size)."""
        part = self.weight[:, start : start + self.size] if part is None else part
        if self.clip:
            scale, zero = clipped_grid(part, self.energy[start : start + part.shape[1]], self.scheme)
        else:
            scale, zero = group_grid(part, self.scheme)
        self.scales[:, start // self.size], self.zeros[:, start // self.size] = scale[:, 0], zero[:, 0]

    def at(self, channel: int) -> tuple[Tensor, Tensor]:
        """(N,) scale and zero point of a channel."""
        return self.scales[:, channel // self.size], self.zeros[:, channel // self.size]


def _inverse_factor(moment: Tensor, where: str) -> tuple[Tensor, list[Event]]:
    """Upper Cholesky factor of the damped moment's inverse, float32 (K, K). The moment is used up.

    Where the damped moment is not positive definite, ten times more damping is tried, with an event; raises
    `QuantExpertsError` if that never helps.
    """
    mean = moment.diagonal().mean()
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))
    events: list[Event] = []
    before = 0.0
    for damping in (DAMPING, 10 * DAMPING, 100 * DAMPING):
        moment.diagonal().add_((damping - before) * unit)
        before = damping
        # One name for each step's result: the widest layers have moments of gigabytes.
        factor, failed = torch.linalg.cholesky_ex(moment)
        if not failed:
            factor = torch.cholesky_inverse(factor)
            factor, failed = torch.linalg.cholesky_ex(factor, upper=True)
            if not failed:
                return factor.float(), events
        events.append(Event(where, f"GPTQ: the second moment is singular with damping {damping:g}; ten times more"))
    raise QuantExpertsError(f"The inputs of '{where}' have no usable second moment: calibrate in float32.")
