"""Controls: what a recipe's gain must be compared with before it is called one.

Each is derived from a recipe that was compared (its parent) and becomes a row like any other. The oracle router is no
row: every row with routed experts records the layer error that the best choice of experts would leave.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, Final

from quant_experts.checkpoint.schema import GroupSpec, group_stored_bits
from quant_experts.config import DEFAULT_SCOPES, MOST_WEIGHT_BITS, RECIPES, QuantizationConfig, Recipe, Scheme
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.bench import Contender, Outcome

ALL = "all"


def derive(name: str, parent: Contender, outcome: Outcome, width: int) -> Contender | None:
    """A control of a parent whose row is made; width is the model's hidden size. None if the parent's bits or
    scopes do not suffice for it.

    Raises `QuantExpertsError` for a name that does not exist.
    """
    config, control = parent.config, _find(name)
    config = config.model_copy(update=dict(recipe=config.recipe.at_width(width)))
    return control(Contender(parent.method, config, parent.scheme), outcome)


def applicable(name: str, recipe: Recipe) -> bool:
    """Whether a recipe has what the control takes away. Raises `QuantExpertsError` for a name that does not exist."""
    _find(name)
    if name in ("random-router", "random-clusters", "static-bytes", "static-rank"):
        return recipe.routed_rank > 0 and (name != "random-clusters" or recipe.routed == "co_importance")
    return name == "text-only" or recipe.shared_rank + recipe.routed_rank > 0


def _find(name: str) -> Callable[[Contender, Outcome], Contender | None]:
    if name not in CONTROLS:
        raise QuantExpertsError(f"Unknown control '{name}': choose from {', '.join(CONTROLS)}, or {ALL}.")
    return CONTROLS[name]


def _static_at_equal_bytes(parent: Contender, outcome: Outcome) -> Contender | None:
    """The routed experts' bytes, spent on a larger shared expert."""
    recipe, scheme = parent.config.recipe, parent.config.scheme
    sizes = [(record.shape, spec) for record, spec in zip(outcome.records, outcome.groups, strict=True)]

    def bits(rank: int) -> int:
        change = dict(shared_rank=rank, routed_rank=0, experts=0)
        return sum(group_stored_bits(_changed(spec, change), scheme, (n,), k) for (n, k), spec in sizes)

    ranks = range(recipe.shared_rank, min(min(shape) for shape, _ in sizes) + 1)
    fitting = bisect_right(ranks, _stored(outcome), key=bits)
    return _static(parent, ranks[fitting - 1], "static at equal bytes") if fitting else None


def _static_at_equal_rank(parent: Contender, _: Outcome) -> Contender:
    """The same active rank, all of it in the shared expert."""
    recipe = parent.config.recipe
    return _static(parent, recipe.shared_rank + recipe.routed_rank, "static at equal active rank")


def _small_groups(parent: Contender, outcome: Outcome) -> Contender | None:
    """Plain rounding with the smallest weight groups that take no more bytes."""
    widest = max(record.shape[1] for record in outcome.records)
    schemes = [parent.config.scheme.model_copy(update=dict(group_size=size)) for size in range(2, widest + 1)]
    place = bisect_left(schemes, -_stored(outcome), key=lambda scheme: -_plain_bits(scheme, outcome))
    if place == len(schemes):
        return None
    return _plain(parent, schemes[place], f"rtn, groups of {schemes[place].group_size} ({parent.method}'s bytes)")


def _more_bits(parent: Contender, outcome: Outcome) -> Contender | None:
    """Plain rounding with the most weight bits that take no more bytes and that the activations' format allows."""
    scheme = parent.config.scheme
    widths = range(scheme.weight_bits + 1, MOST_WEIGHT_BITS[scheme.activation_format] + 1)
    wider = [scheme.model_copy(update=dict(weight_bits=bits)) for bits in widths]
    fitting = [each for each in wider if _plain_bits(each, outcome) <= _stored(outcome)]
    if not fitting:
        return None
    return _plain(parent, fitting[-1], f"rtn, {fitting[-1].weight_bits}-bit weights ({parent.method}'s bytes)")


def _random_router(parent: Contender, _: Outcome) -> Contender:
    """The same experts, chosen at random."""
    return _with(parent, "random router", router="random")


def _random_clusters(parent: Contender, _: Outcome) -> Contender:
    """Experts of random clusters of channels."""
    return _with(parent, "random clusters", routed="random")


def _text_only(parent: Contender, _: Outcome) -> Contender | None:
    """Calibrated on the samples' text alone: another distribution than the questions'. Other scopes than language need
    images."""
    config = parent.config
    if config.scopes != DEFAULT_SCOPES:
        return None
    return Contender(f"{parent.method}, text-only calibration", config, parent.scheme, text_only=True)


CONTROLS: Final[dict[str, Callable[[Contender, Outcome], Contender | None]]] = {
    "static-bytes": _static_at_equal_bytes,
    "static-rank": _static_at_equal_rank,
    "small-groups": _small_groups,
    "more-bits": _more_bits,
    "random-router": _random_router,
    "random-clusters": _random_clusters,
    "text-only": _text_only,
}


def _static(parent: Contender, rank: int, title: str) -> Contender:
    return _with(parent, title, shared_rank=rank, routed_rank=0)


def _with(parent: Contender, title: str, **changes: Any) -> Contender:
    """The parent with a changed recipe, under a name that says so."""
    recipe = parent.config.recipe.model_copy(update=changes)
    config = parent.config.model_copy(update=dict(recipe=recipe))
    return Contender(f"{parent.method}, {title}", config, parent.scheme)


def _plain(parent: Contender, scheme: Scheme, title: str) -> Contender:
    config: QuantizationConfig = parent.config.model_copy(update=dict(recipe=RECIPES["rtn"], scheme=scheme))
    return Contender(title, config, parent.scheme)


def _changed(spec: GroupSpec, change: dict[str, Any]) -> GroupSpec:
    return spec.model_copy(update=change)


def _stored(outcome: Outcome) -> int:
    return sum(record.stored_bits for record in outcome.records)


def _plain_bits(scheme: Scheme, outcome: Outcome) -> int:
    """Bits of all groups under plain rounding."""
    pairs = zip(outcome.records, outcome.groups, strict=True)
    return sum(
        group_stored_bits(GroupSpec(linears=spec.linears), scheme, (record.shape[0],), record.shape[1])
        for record, spec in pairs
    )
