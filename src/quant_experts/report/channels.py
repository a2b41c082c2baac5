"""Figures of channels: how often they matter, for which tokens, and which matter together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from quant_experts.artifacts import GroupRecord
from quant_experts.report.figures import Figure, channel_curves
from quant_experts.report.layers import ALL, TOKEN_KINDS, early_middle_late, group_name
from quant_experts.report.palette import TOKEN_STYLES, method_styles
from quant_experts.report.plots import channel_map_svg, embedding_svg, similarity_svg

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


def cluster_figures(layers: Mapping[str, Sequence[GroupRecord]]) -> dict[str, Any]:
    """Similarity and embedding of the clustered channels of a middle layer, of the first row that clustered any."""
    for label, records in layers.items():
        clustered = [record for record in records if len(record.clusters) > 2]
        if clustered:
            record = clustered[len(clustered) // 2]
            where, count = group_name(record), len(set(record.clusters))
            text = f"of {len(record.clusters)} channels in {count} clusters, {where}."
            matrix = similarity_svg(
                record.similarity, record.clusters, name="similarity", description=f"Similarity {text}"
            )
            styles = list(method_styles(str(cluster) for cluster in range(max(record.clusters) + 1)).values())
            points = embedding_svg(
                embed(record.similarity), record.clusters, styles, name="embedding", description=f"Embedding {text}"
            )
            return {
                "label": label,
                "where": where,
                "figures": [
                    Figure("similarity", "Similarity", Markup(matrix)),
                    Figure("embedding", "The same channels in a plane", Markup(points)),
                ],
            }
    return {}


def embed(similarity: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """(C, C) similarities -> C points: the second and third eigenvectors of the normalised graph, as spectral
    clustering sees it. Signs are fixed, so that the same records give the same picture."""
    matrix = np.asarray(similarity, dtype=np.float64)
    scale = 1 / np.sqrt(matrix.sum(axis=1).clip(min=1e-12))
    vectors = np.linalg.eigh(matrix * scale * scale[:, None])[1][:, -3:-1] * scale[:, None]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), [0, 1]])
    return [(float(x), float(y)) for y, x in vectors]


def _maps(record: GroupRecord) -> list[Figure]:
    """The important channels of some tokens of each kind, in one layer."""
    figures = []
    for kind, tokens in record.important_tokens.items():
        if any(tokens):
            where = group_name(record)
            description = f"Important channels of {len(tokens)} {TOKEN_KINDS[kind]} in {where}, one row a token."
            color = TOKEN_STYLES[kind].color
            name = f"map-{kind}"
            svg = channel_map_svg(tokens, SHOWN_CHANNELS, color, name=name, description=description)
            figures.append(Figure(name, f"{kind.capitalize()} tokens ({where})", Markup(svg)))
    return figures
