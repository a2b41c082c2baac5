"""Measures what a group's quantization costs, on held-out tokens and through the modules that will run it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quant_experts.artifacts import ChannelClusters, GroupRecord, GroupStatistics, Modality, QuantizedGroup
from quant_experts.checkpoint.costs import token_cost
from quant_experts.checkpoint.schema import group_stored_bits
from quant_experts.checkpoint.tensors import describe_group, group_state
from quant_experts.config import Scheme
from quant_experts.runtime.modules import QuantizedLinear, install_groups

CURVE_POINTS = 512
"""Longest channel-frequency curve that a record keeps."""
SHOWN_SIMILARITIES = 64
"""Clustered channels whose similarities a record keeps."""
SHOWN_TOKENS = 32
"""Tokens of each modality whose important channels a record keeps."""
POSITION_BINS = 16
"""Equal parts of the sequence by which expert use is counted."""


def measure_group(
    group: QuantizedGroup,
    plain: QuantizedGroup,
    weight: Tensor,
    rows: Sequence[int],
    statistics: GroupStatistics,
    scheme: Scheme,
    prefix: str,
) -> GroupRecord:
    """Relative squared output error of a group and of its plain rounding, by modality; expert use; channel frequencies.

    weight (N, K) is the full-precision stack of linears with `rows` outputs each.
    """
    x, modality = statistics.reservoir.to(weight.device), statistics.reservoir_modality
    exact = x @ weight.T
    modules = _modules(group, rows, scheme, weight.device)
    output = torch.cat([module(x) for module in modules], dim=1)
    plain_output = torch.cat([module(x) for module in _modules(plain, rows, scheme, weight.device)], dim=1)
    spec = describe_group(group)
    cost = token_cost(spec, scheme, tuple(rows), weight.shape[1])
    return GroupRecord(
        linears=tuple(f"{prefix}.{name}" for name in group.linears),
        tokens=statistics.tokens,
        shape=(weight.shape[0], weight.shape[1]),
        stored_bits=group_stored_bits(spec, scheme, tuple(rows), weight.shape[1]),
        weights=weight.numel(),
        error=_relative_error(output, exact, modality),
        calibration_error=_calibration_error(modules, weight, statistics.fit_tokens),
        rtn_error=_relative_error(plain_output, exact, modality),
        channel_frequency=_frequency_curves(statistics),
        **(_expert_use(modules[0], x, statistics) if group.routed else {}),
        oracle_error=_oracle_error(modules, x, output, exact, modality) if group.routed else {},
        important_tokens=_important_tokens(statistics),
        **_similarity(group.clusters),
        base_flops=cost.base_flops,
        repair_flops=cost.repair_flops,
        token_bytes=cost.bytes,
    )


def _modules(group: QuantizedGroup, rows: Sequence[int], scheme: Scheme, device: torch.device) -> list[QuantizedLinear]:
    """The group's runtime modules without biases, float32."""
    width = group.weights[0].codes.shape[1]
    holder = nn.Module()
    spec = describe_group(group)
    flat = {name: name.replace(".", "_") for name in group.linears}
    with torch.device("meta"):
        for name, count in zip(group.linears, rows, strict=True):
            holder.add_module(flat[name], nn.Linear(width, count, bias=False))
    renamed = spec.model_copy(update=dict(linears=tuple(flat.values())))
    state = {}
    for key, value in group_state(group).items():
        name = max((n for n in flat if key.startswith(n + ".")), key=len)
        state[flat[name] + key.removeprefix(name)] = value.to(device)
    return list(install_groups(holder, [renamed], scheme, state, oracle=True).values())


def _relative_error(output: Tensor, exact: Tensor, modality: Tensor) -> dict[str, float]:
    """sum |output - exact|^2 / sum |exact|^2 over the tokens of each modality that occurs, and over all."""
    return _shares((output - exact).double().square().sum(dim=1), exact, modality)


def _shares(error: Tensor, exact: Tensor, modality: Tensor) -> dict[str, float]:
    """Squared errors (S,) float64 of the tokens as a share of sum |exact|^2, for each modality that occurs and all."""
    error = error.cpu()
    size = exact.double().square().sum(dim=1).cpu()
    result = {"all": float(error.sum() / size.sum().clamp_min(1e-300))}
    for kind in Modality:
        chosen = modality == kind
        if chosen.any():
            result[kind.name.lower()] = float(error[chosen].sum() / size[chosen].sum().clamp_min(1e-300))
    return result


def _calibration_error(modules: Sequence[QuantizedLinear], weight: Tensor, tokens: Tensor | None) -> float | None:
    """The relative error over all of the tokens (F, K) that factors were fitted to; None where none were kept."""
    if tokens is None:
        return None
    x = tokens.to(weight.device)
    exact = x @ weight.T
    error = (torch.cat([module(x) for module in modules], dim=1) - exact).double().square().sum()
    return float(error / exact.double().square().sum().clamp_min(1e-300))


def _oracle_error(
    modules: Sequence[QuantizedLinear], x: Tensor, output: Tensor, exact: Tensor, modality: Tensor
) -> dict[str, float]:
    """The error if each token were routed to the expert that serves it best: what a perfect router could reach.

    output (S, N) is what the modules give for x (S, K) with the router's choice, which is taken out first.
    """
    from quant_experts.kernels.reference import route, transform

    operands, ups = modules[0].group.operands(), [module.operands().routed_up for module in modules]
    assert operands.routed_down is not None and operands.router_weight is not None and operands.router_bias is not None
    downs, z = operands.routed_down, transform(x, operands)

    def correction(expert: int) -> Tensor:
        up = torch.cat([factor[expert].float() for factor in ups if factor is not None])
        return z @ downs[expert].float().T @ up.T

    chosen = route(z, operands.router_weight, operands.router_bias)
    left = output - exact
    for e in range(len(downs)):
        left[chosen == e] -= correction(e)[chosen == e]
    best = torch.full((len(x),), torch.inf, dtype=torch.float64, device=x.device)
    for e in range(len(downs)):
        best = torch.minimum(best, (left + correction(e)).double().square().sum(dim=1))
    return _shares(best, exact, modality)


def _similarity(clusters: ChannelClusters | None) -> dict[str, Any]:
    """`similarity` and `clusters` of a record: evenly spaced channels, sorted by cluster."""
    if clusters is None:
        return {}
    count = len(clusters.labels)
    picked = torch.linspace(0, count - 1, min(count, SHOWN_SIMILARITIES)).long()
    picked = picked[clusters.labels[picked].argsort(stable=True)]
    shares = clusters.similarity[picked][:, picked].mul(100).round().int()
    return dict(similarity=shares.tolist(), clusters=clusters.labels[picked].tolist())


def _frequency_order(statistics: GroupStatistics) -> tuple[Tensor, Tensor]:
    """How many tokens each channel is important for (K,), and the channels by that, most often first (K,)."""
    counts = torch.bincount(statistics.important.flatten().long(), minlength=len(statistics.mean_abs))
    return counts, counts.argsort(descending=True, stable=True)


def _important_tokens(statistics: GroupStatistics) -> dict[str, list[list[int]]]:
    """Important channels of up to SHOWN_TOKENS tokens of each modality, evenly spaced, as places in the frequency
    order; those past CURVE_POINTS are left out."""
    _, order = _frequency_order(statistics)
    place = order.argsort()
    result = {}
    for kind in Modality:
        tokens = (statistics.modality == kind).nonzero()[:, 0]
        if len(tokens):
            picked = tokens[torch.linspace(0, len(tokens) - 1, min(SHOWN_TOKENS, len(tokens))).long()]
            places = place[statistics.important[picked].long()].sort(dim=1).values
            result[kind.name.lower()] = [[p for p in row if p < CURVE_POINTS] for row in places.tolist()]
    return result


def _frequency_curves(statistics: GroupStatistics) -> dict[str, list[float]]:
    """Share of the tokens of each modality for which a channel is important; channels by their share over all
    tokens."""
    width = len(statistics.mean_abs)
    counts, order = _frequency_order(statistics)
    order = order[:CURVE_POINTS]
    curves = {"all": (counts[order] / max(1, statistics.tokens)).tolist()}
    for kind in Modality:
        chosen = statistics.modality == kind
        if chosen.any():
            part = torch.bincount(statistics.important[chosen].flatten().long(), minlength=width)
            curves[kind.name.lower()] = (part[order] / int(chosen.sum())).tolist()
    return {name: [round(value, 6) for value in curve] for name, curve in curves.items()}


def _expert_use(module: QuantizedLinear, x: Tensor, statistics: GroupStatistics) -> dict[str, Any]:
    """`expert_use` and `expert_positions` of a record, of the tokens x (S, K) of the reservoir."""
    from quant_experts.kernels.reference import route, transform

    operands = module.group.operands()
    assert operands.router_weight is not None and operands.router_bias is not None
    experts, modality = len(operands.router_weight), statistics.reservoir_modality
    chosen = route(transform(x, operands), operands.router_weight, operands.router_bias).cpu()
    kinds = {kind.name.lower(): modality == kind for kind in Modality if (modality == kind).any()}
    return dict(
        expert_use={"all": _use(chosen, experts)} | {name: _use(chosen[mask], experts) for name, mask in kinds.items()},
        expert_positions=_use_by_position(chosen, experts, statistics.reservoir_position, kinds),
    )


def _use(chosen: Tensor, experts: int) -> list[float]:
    """chosen (S,) expert of each token -> share of the tokens that each expert serves."""
    return [round(float(v), 6) for v in torch.bincount(chosen, minlength=experts) / len(chosen)]


def _use_by_position(
    chosen: Tensor, experts: int, position: Tensor | None, kinds: Mapping[str, Tensor]
) -> dict[str, list[list[int]]]:
    """How many tokens of each kind each expert serves in each part of the sequence.

    chosen (S,) int64, position (S,) float32 in [0, 1), kinds: name -> (S,) bool. Tokens whose position is not known are
    left out, and kinds of which none is left.
    """
    if position is None:
        return {}
    known = position.isfinite()
    cell = chosen * POSITION_BINS + (position * POSITION_BINS).nan_to_num().long()
    return {
        name: torch.bincount(cell[mask & known], minlength=experts * POSITION_BINS).reshape(experts, -1).tolist()
        for name, mask in kinds.items()
        if (mask & known).any()
    }
