"""Which routed experts serve which tokens: by kind of token in every group, by place in the sequence in one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from quant_experts.artifacts import GroupRecord
from quant_experts.report.columns import finite
from quant_experts.report.figures import Figure
from quant_experts.report.layers import ALL, TOKEN_KINDS, group_name, place
from quant_experts.report.plots import expert_place_svg, expert_use_svg

Shares = list[list[float]]
"""One list a column of a heat map, one share of the column's tokens an expert; NaN where there are none."""


@dataclass(frozen=True)
class ExpertUse:
    """Expert use of every routed group, ready to be drawn: experts down, groups across."""

    shares: Mapping[str, Shares]
    """By kind of token: a column is a group."""
    blocks: tuple[str, ...]
    """Block number of each group."""
    common: float | None
    """Share of the routing that image and text tokens have in common, averaged over groups."""


def experts(layers: Mapping[str, Sequence[GroupRecord]]) -> list[dict[str, Any]]:
    """One entry for each row with routed experts."""
    entries = []
    for number, (label, records) in enumerate(layers.items()):
        use = expert_use(records)
        if use:
            where, shares = place_use(records)
            entries.append(
                {
                    "label": label,
                    "figures": _use_maps(use, label, f"experts{number}"),
                    "common": use.common,
                    "where": where,
                    "places": _place_maps(shares, f"{where}, {label}", f"places{number}"),
                }
            )
    return entries


def expert_use(records: Sequence[GroupRecord]) -> ExpertUse | None:
    """Experts of each group in order of their preference for image over text tokens; None if nothing was routed."""
    routed = _routed(records)
    if not routed:
        return None
    kinds = [kind for kind in TOKEN_KINDS if any(record.expert_use.get(kind) for record in routed)] or [ALL]
    shares: dict[str, Shares] = {kind: [] for kind in kinds}
    common = []
    for record in routed:
        order, use = _order(record), record.expert_use
        if _tells_kinds(record):
            common.append(sum(map(min, use["image"], use["text"])))
        for kind, column in shares.items():
            values = _padded(use.get(kind), len(order))
            column.append([values[expert] for expert in order])
    blocks = tuple(place(record.linears[0]).block_number for record in routed)
    return ExpertUse(shares, blocks, sum(common) / len(common) if common else None)


def place_use(records: Sequence[GroupRecord]) -> tuple[str, dict[str, Shares]]:
    """The name of the middle one of the groups that recorded places, and by kind of token a column for each part of the
    sequence; empty if none did. Experts stand in the order of `expert_use`."""
    routed = [record for record in _routed(records) if record.expert_positions]
    if not routed:
        return "", {}
    record = routed[len(routed) // 2]
    order = _order(record)
    found = {kind: record.expert_positions[kind] for kind in TOKEN_KINDS if kind in record.expert_positions}
    return group_name(record), {
        kind: [_shares([served[expert] for expert in order]) for served in zip(*rows, strict=True)]
        for kind, rows in found.items()
    }


def _routed(records: Sequence[GroupRecord]) -> list[GroupRecord]:
    return [record for record in records if record.linears and any(record.expert_use.values())]


def _order(record: GroupRecord) -> list[int]:
    """Experts by how much more image tokens use them than text tokens; by use if one of the kinds is missing."""
    use = record.expert_use
    if _tells_kinds(record):
        preference = [a - b for a, b in zip(use["image"], use["text"], strict=True)]
    else:
        preference = list(use.get(ALL) or next(iter(use.values())))
    return sorted(range(len(preference)), key=lambda expert: -preference[expert])


def _tells_kinds(record: GroupRecord) -> bool:
    return bool(record.expert_use.get("image") and record.expert_use.get("text"))


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total if total else math.nan for count in counts]


def _padded(values: Sequence[float] | None, count: int) -> list[float]:
    """`count` shares; NaN where the record has none."""
    given = list(values or [])
    return given + [math.nan] * (count - len(given))


def _use_maps(use: ExpertUse, label: str, name: str) -> list[Figure]:
    """A heat map for each kind of token, all with one scale."""
    highest = _highest(use.shares)
    result = []
    for kind, columns in use.shares.items():
        title = TOKEN_KINDS.get(kind, "all tokens")
        description = f"Share of {title} that each routed expert serves in {len(columns)} groups of linears, {label}."
        svg = expert_use_svg(columns, use.blocks, highest, name=f"{name}-{kind}", description=description)
        result.append(Figure(f"{name}-{kind}", title[0].upper() + title[1:], Markup(svg)))
    return result


def _place_maps(shares: Mapping[str, Shares], where: str, name: str) -> list[Figure]:
    """As the use maps, with a column for each part of the sequence."""
    highest = _highest(shares)
    result = []
    for kind, columns in shares.items():
        title = TOKEN_KINDS[kind]
        description = f"Share of {title} that each routed expert serves by place in the sequence, {where}."
        svg = expert_place_svg(columns, highest, name=f"{name}-{kind}", description=description)
        result.append(Figure(f"{name}-{kind}", title[0].upper() + title[1:], Markup(svg)))
    return result


def _highest(shares: Mapping[str, Shares]) -> float:
    return max((v for columns in shares.values() for column in columns for v in column if finite(v)), default=1) or 1
