"""Sums of the errors of layers: by block, by type of linear, by kind of token."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quant_experts.artifacts import GroupRecord
from quant_experts.report.columns import finite

ALL = "all"
TOKEN_KINDS = {"text": "text tokens", "image": "image tokens", "answer": "answer tokens"}
_BLOCK = re.compile(r"^(?P<block>(?:.*?\.)?\d+)\.")


@dataclass(frozen=True)
class Place:
    """Where a linear sits."""

    block: str
    """"model.layers.3"; the linear's own name if it is in no numbered block."""
    kind: str
    """"q_proj": what linears of all blocks have in common."""

    @property
    def block_number(self) -> str:
        """ "3", or the last part of the block's name."""
        return self.block.rsplit(".", 1)[-1]


def place(linear: str) -> Place:
    """Split a module name into block and type."""
    parts = linear.split(".")
    # Members of a torch Sequential are called by number, which alone says nothing.
    kind = ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]
    match = _BLOCK.match(linear)
    return Place(match["block"] if match else linear, kind)


def group_name(record: GroupRecord) -> str:
    """ "layers.3: q_proj, k_proj, v_proj"."""
    places = [place(linear) for linear in record.linears]
    if not places:
        return "unnamed group"
    block = ".".join(places[0].block.split(".")[-2:])
    return f"{block}: {', '.join(p.kind for p in places)}"


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of the finite positive values; None if there is none."""
    logs = [math.log(value) for value in values if value is not None and finite(value) and value > 0]
    return math.exp(sum(logs) / len(logs)) if logs else None


def errors_by(
    records: Sequence[GroupRecord], part: str, plain: bool = False, tokens: str = ALL
) -> dict[str, float | None]:
    """Geometric means of the relative output error, by "block" or "kind", in order of first appearance.

    A group counts once for each of its linears, so that methods which group linears differently are weighted alike.
    """
    found: dict[str, list[float | None]] = {}
    for record in records:
        error = record.rtn_error if plain else record.error
        for linear in record.linears:
            found.setdefault(getattr(place(linear), part), []).append(error.get(tokens))
    return {key: geometric_mean(values) for key, values in found.items()}


def overall_error(records: Sequence[GroupRecord], plain: bool = False, tokens: str = ALL) -> float | None:
    """The geometric mean over all linears."""
    errors = [(record.rtn_error if plain else record.error).get(tokens) for record in records for _ in record.linears]
    return geometric_mean(errors)


def early_middle_late(records: Sequence[GroupRecord]) -> dict[str, GroupRecord]:
    """Up to three records with channel curves, of one type of linear so that they can be compared."""
    usable = [record for record in records if record.linears and any(record.channel_frequency.values())]
    same = [record for record in usable if place(record.linears[0]).kind == place(usable[0].linears[0]).kind]
    names = {1: ["Only layer"], 2: ["Early layer", "Late layer"]}.get(
        len(same), ["Early layer", "Middle layer", "Late layer"]
    )
    picked = {1: [0], 2: [0, 1]}.get(len(same), [0, len(same) // 2, len(same) - 1]) if same else []
    return {name: same[index] for name, index in zip(names, picked, strict=False)}
