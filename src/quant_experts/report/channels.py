"""Figures of channels: how often they matter, for which tokens, and which matter together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from quant_experts.artifacts import GroupRecord
from quant_experts.report.figures import Figure, channel_curves
from quant_experts.report.layers import ALL, TOKEN_KINDS, early_middle_late, group_name
from quant_experts.report.palette import TOKEN_STYLES
from quant_experts.report.plots import channel_map_svg

SHOWN_CHANNELS = 160


def channels(layers: Mapping[str, Sequence[GroupRecord]]) -> dict[str, Any]:
    """Of the first row that has them: importance is measured on inputs and hardly depends on the method."""
    for label, records in layers.items():
        chosen = early_middle_late(records)
        if chosen:
            drawn = {kind for record in chosen.values() for kind, curve in record.channel_frequency.items() if curve}
            return {
                "label": label,
                "maps": _maps(list(chosen.values())[len(chosen) // 2]),
                "figures": channel_curves(chosen),
                "legend": [
                    ("all tokens" if kind == ALL else f"{kind} tokens", style)
                    for kind, style in TOKEN_STYLES.items()
                    if kind in drawn
                ],
                "has_image": "image" in drawn,
            }
    return {}


def _maps(record: GroupRecord) -> list[Figure]:
    """The important channels of some tokens of each kind, in one layer."""
    figures = []
    for kind, tokens in record.important_tokens.items():
        if any(tokens):
            where = group_name(record)
            description = f"Important channels of {len(tokens)} {TOKEN_KINDS[kind]} in {where}, one row a token."
            color = TOKEN_STYLES[kind].color
            svg = channel_map_svg(tokens, SHOWN_CHANNELS, color, name=f"map-{kind}", description=description)
            figures.append(Figure(f"{kind.capitalize()} tokens ({where})", Markup(svg)))
    return figures
