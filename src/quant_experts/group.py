"""`quantize_group`: the order of the stages for one input group.

smoothing and rotation of the input -> base quantizer -> shared expert -> routed experts -> router. Which function
serves a stage is a field of the recipe and a row of the stage's table below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quant_experts.artifacts import (
    ChannelClusters,
    Event,
    GroupStatistics,
    LowRankExpert,
    QuantizedGroup,
    QuantizedWeight,
    RoutedExperts,
    Router,
)
from quant_experts.config import Recipe, Scheme
from quant_experts.experts.importance import channel_counts, magnitude_channels, partition_channels, smoothing_scale
from quant_experts.experts.principal import fit_principal_expert
from quant_experts.experts.refinement import refine_routed
from quant_experts.experts.routed import cluster_channels, co_importance, fit_routed_experts, random_clusters
from quant_experts.experts.router import fit_router, fit_router_to_tokens, random_router
from quant_experts.experts.shared import MOMENTS, fit_shared_expert, without_channels
from quant_experts.experts.token_experts import fit_token_experts
from quant_experts.kernels.reference import rotate, round_tokens, smooth
from quant_experts.quantizers.balanced import balanced_scale
from quant_experts.quantizers.gptq import quantize_gptq
from quant_experts.quantizers.grids import dequantize
from quant_experts.quantizers.rtn import quantize_rtn
from quant_experts.quantizers.smoothquant import smoothquant_scale

BALANCE_TOKENS = 1024
"""Tokens on which activation rounding is tried for balanced smoothing."""
ROUTED_TOKENS = 4096
"""Tokens that experts or a router are fitted to one by one."""
MEASURED_TOKENS = 512
"""Tokens that are kept to measure the error on what factors were fitted to, where no stage keeps more."""

Search = Callable[["GroupTask"], Tensor]
"""Finds the smoothing scale of a group by running the modules that read its input (AWQ, MBQ)."""


def fit_tokens_needed(recipe: Recipe) -> int:
    """How many calibration tokens the recipe's stages, and the measurement after them, need as they are."""
    if recipe.routed_rank and (recipe.routed == "tokens" or recipe.router == "fitted" or recipe.refine):
        return ROUTED_TOKENS
    return max(MEASURED_TOKENS, BALANCE_TOKENS if recipe.smoothing == "balanced" else 0)


@dataclass
class GroupTask:
    """One group on its way through the stages."""

    names: tuple[str, ...]
    rows: Sequence[int]
    """Outputs of each linear."""
    weight: Tensor
    """(N, K) float32, stacked; full precision, for x."""
    statistics: GroupStatistics
    scheme: Scheme
    recipe: Recipe
    seed: int
    where: str
    search: Search | None = None
    smooth_scale: Tensor | None = None
    rotation: int = 0
    events: list[Event] = field(default_factory=list)
    clusters: ChannelClusters | None = None

    def to_transformed(self, matrix: Tensor) -> Tensor:
        """What acts on x (..., K), as it acts on the smoothed and rotated input: A x = A' z with A' = A diag(m) H."""
        scaled = matrix if self.smooth_scale is None else matrix * self.smooth_scale.to(matrix.device)
        return rotate(scaled, self.rotation)

    def from_transformed(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_transformed`."""
        rotated = rotate(matrix, self.rotation)
        return rotated if self.smooth_scale is None else rotated / self.smooth_scale.to(matrix.device)

    def moment(self) -> Tensor:
        """(K, K) float64, E[z z^T] of the smoothed and rotated input z; not to be written to."""
        moment = self.statistics.second_moment
        if self.smooth_scale is not None:
            moment = moment / (self.smooth_scale * self.smooth_scale[:, None])
        return rotate(rotate(moment, self.rotation).T, self.rotation)

    def tokens(self) -> Tensor:
        """(F, K) float32, sampled tokens, smoothed and rotated."""
        assert self.statistics.fit_tokens is not None, "see fit_tokens_needed"
        tokens = self.statistics.fit_tokens.to(self.weight.device)
        return rotate(smooth(tokens, self.smooth_scale), self.rotation)


def quantize_group(
    names: tuple[str, ...],
    rows: Sequence[int],
    weight: Tensor,
    statistics: GroupStatistics,
    scheme: Scheme,
    recipe: Recipe,
    *,
    seed: int,
    where: str,
    search: Search | None = None,
) -> tuple[QuantizedGroup, list[Event]]:
    """All stages on one input group: weight (N, K) float32 stacked over linears of `rows` outputs each.

    search: runs the modules that read the input, for smoothing that needs it. Returns the group and events for what
    could not be done as configured.
    """
    task = GroupTask(names, rows, weight, statistics, scheme, recipe, seed, where, search)
    exempt, dependent = _choose_channels(task)
    task.rotation = _rotation_block(recipe.rotation, weight.shape[1])
    task.smooth_scale = _SMOOTHING[recipe.smoothing](task, exempt)
    base, shared, residual = _base_and_shared(task, exempt)
    group = QuantizedGroup(
        names,
        split_rows(base, rows),
        task.smooth_scale,
        task.rotation,
        recipe.factor_bits,
        recipe.shared_reads if shared else "values",
        shared,
    )
    if recipe.routed_rank:
        group.routed, group.router = _routed(task, residual, dependent)
    if recipe.refine and group.routed and group.router:
        group.routed, group.router = _refine(task, base, residual, group.routed, group.router)
    group.clusters = task.clusters
    return group, task.events


def _choose_channels(task: GroupTask) -> tuple[Tensor, Tensor]:
    """C_s, the exempt channels, and C_r, those that routed experts are clustered from."""
    recipe, width = task.recipe, task.weight.shape[1]
    k = min(recipe.important_channels, width)
    exempt, dependent = partition_channels(channel_counts(task.statistics), k, k * recipe.num_experts)
    if recipe.exempt == "none":
        exempt = exempt[:0]
    elif recipe.exempt == "magnitude":
        exempt = magnitude_channels(task.statistics, task.weight.abs().mean(dim=0), k)
    return exempt, dependent


def _rotation_block(largest: int, width: int) -> int:
    """The largest power of two up to `largest` that divides the width; 0 where that is 1."""
    block = min(largest, width & -width)
    return block if block > 1 else 0


def _smooth_exempt(task: GroupTask, exempt: Tensor) -> Tensor | None:
    return None if task.scheme.weight_only else smoothing_scale(task.statistics.mean_abs, exempt)


def _smooth_quant(task: GroupTask, exempt: Tensor) -> Tensor | None:
    """Where activations are not rounded, there is nothing to move into the weights."""
    return None if task.scheme.weight_only else smoothquant_scale(task.statistics.absmax, task.weight)


def _smooth_by_search(task: GroupTask, exempt: Tensor) -> Tensor | None:
    assert task.search is not None, "the caller gives a search where the recipe asks for one"
    return task.search(task)


_SMOOTHING: dict[str, Callable[[GroupTask, Tensor], Tensor | None]] = {
    "none": lambda task, exempt: None,
    "exempt": _smooth_exempt,
    "smoothquant": _smooth_quant,
    "awq": _smooth_by_search,
    "mbq": _smooth_by_search,
    "balanced": lambda task, exempt: balanced_scale(task.statistics, task.weight, task.scheme, task.rotation),
}


def quantize_base(task: GroupTask, weight: Tensor, exempt: Tensor) -> QuantizedWeight:
    """Codes of a transformed weight (N, K), exempt columns left out."""
    recipe, kept = task.recipe, without_channels(weight, exempt)
    if recipe.base == "rtn":
        energy = task.moment().diagonal() if recipe.clip else None
        return quantize_rtn(kept, task.scheme, energy)
    moment = task.moment()
    if len(exempt):  # no error is fed back into columns that the base does not hold
        kept_channels = torch.ones_like(moment[0]).index_fill_(0, exempt.to(moment.device), 0)
        moment = moment * kept_channels * kept_channels[:, None]
    base, events = quantize_gptq(
        kept, moment, task.scheme, act_order=recipe.act_order, clip=recipe.clip, where=task.where
    )
    task.events += events
    return base


def _base_and_shared(task: GroupTask, exempt: Tensor) -> tuple[QuantizedWeight, LowRankExpert | None, Tensor]:
    """Base codes, shared expert, and what they leave of the transformed weight (N, K) float64."""
    recipe, weight = task.recipe, task.to_transformed(task.weight)
    if not recipe.shared_rank:
        base = quantize_base(task, weight, exempt)
        return base, None, (weight - dequantize(base)).double()
    if recipe.shared == "principal":
        shared = fit_principal_expert(
            weight,
            task.moment(),
            recipe.shared_rank,
            lambda part: dequantize(quantize_rtn(part, task.scheme)),
            seed=task.seed,
        )
        base = quantize_base(task, (weight - shared.up @ shared.down).float(), exempt)
        return base, shared, (weight - dequantize(base)).double() - shared.up @ shared.down
    base = quantize_base(task, weight, exempt)
    residual = (weight - dequantize(base)).double()
    moment = MOMENTS[recipe.shared](task.statistics)
    found = fit_shared_expert(task.from_transformed(residual), moment, recipe.shared_rank, seed=task.seed)
    shared = LowRankExpert(found.up, task.to_transformed(found.down))
    return base, shared, residual - shared.up @ shared.down


def _routed(task: GroupTask, residual: Tensor, dependent: Tensor) -> tuple[RoutedExperts | None, Router | None]:
    """Routed experts on the transformed residual (N, K), and what chooses among them."""
    recipe, seed = task.recipe, task.seed
    if recipe.routed == "tokens":
        routed = fit_token_experts(
            residual, task.tokens(), task.moment(), recipe.num_experts, recipe.routed_rank, seed=seed
        )
    else:
        experts = min(recipe.num_experts, len(dependent))
        if experts < recipe.num_experts:
            task.events.append(
                Event(task.where, f"only {len(dependent)} token-dependent channels: {experts} routed experts")
            )
        if not experts:
            return None, None
        if recipe.routed == "random":
            labels = random_clusters(len(dependent), experts, seed=seed)
        else:
            similarity = co_importance(task.statistics, dependent)
            labels, events = cluster_channels(similarity, experts, seed=seed, where=task.where)
            task.events += events
            task.clusters = ChannelClusters(similarity, labels)
        rms = task.statistics.second_moment.diagonal().clamp_min(0).sqrt()
        if task.smooth_scale is not None:
            rms = rms / task.smooth_scale
        routed = fit_routed_experts(residual, rms, dependent, labels, experts, recipe.routed_rank, seed=seed)
    return routed, _ROUTERS[recipe.router](task, residual, routed)


_ROUTERS: dict[str, Callable[[GroupTask, Tensor, RoutedExperts], Router]] = {
    "magnitude": lambda task, residual, routed: fit_router(residual, routed),
    "fitted": lambda task, residual, routed: fit_router_to_tokens(residual, routed, task.tokens(), seed=task.seed),
    "random": lambda task, residual, routed: random_router(routed, seed=task.seed),
}


def _refine(
    task: GroupTask, base: QuantizedWeight, residual: Tensor, routed: RoutedExperts, router: Router
) -> tuple[RoutedExperts, Router]:
    """Routed experts and router trained on what base and shared expert leave of the layer's output: the transformed
    residual's part (N, K) and that of rounded activations."""
    tokens = task.tokens()
    target = tokens @ residual.float().T
    if not task.scheme.weight_only:
        target += (tokens - round_tokens(tokens, task.scheme)) @ dequantize(base).T
    return refine_routed(target, tokens, routed, router, seed=task.seed)


def split_rows(base: QuantizedWeight, rows: Sequence[int]) -> tuple[QuantizedWeight, ...]:
    """A stacked quantized weight, cut into its linears."""
    sizes = list(rows)
    zeros = [None] * len(sizes) if base.zero_point is None else base.zero_point.split(sizes)
    parts = zip(base.codes.split(sizes), base.scale.split(sizes), zeros, strict=True)
    return tuple(replace(base, codes=codes, scale=scale, zero_point=zero) for codes, scale, zero in parts)
