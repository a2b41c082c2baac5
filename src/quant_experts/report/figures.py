"""Which figures the page holds: picks the records, the common scales and the words for those who cannot see them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from quant_experts.artifacts import GroupRecord
from quant_experts.evaluation.comparison import Comparison, MethodRow, Score
from quant_experts.report.columns import (
    AVERAGE,
    MISSING,
    PLAIN_ROUNDING,
    as_score,
    by_scheme,
    finite,
    is_full_precision,
    percent,
    small_number,
)
from quant_experts.report.layers import (
    ALL,
    TOKEN_KINDS,
    Place,
    errors_by,
    group_name,
    overall_error,
    place,
)
from quant_experts.report.palette import RTN_STYLE, TOKEN_STYLES, Style
from quant_experts.report.plots import accuracy_svg, channel_curve_svg, layer_error_svg

Records = tuple[GroupRecord, ...]
REFERENCE = "plain rounding, for reference"


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading."""

    name: str
    """Begins the ids within the drawing; no other drawing of the report has it."""
    title: str
    svg: Markup


Heading = tuple[str, list[str]]
ErrorGroup = tuple[str, list[tuple[str, list[str]]]]


@dataclass(frozen=True)
class LayerErrors:
    """The layer errors as figures and as a table."""

    figures: list[Figure]
    methods: list[str]
    """Every name that a figure holds."""
    headings: list[Heading]
    """Columns of the table under their common headings."""
    groups: list[ErrorGroup]
    """Scheme -> rows of a method and its figures."""
    left_out: int
    """Errors that are no positive number and so have no place on a log scale."""


def point(row: MethodRow) -> tuple[float, Score] | None:
    """Bits and accuracy of a row, if both were measured."""
    bits, score = as_score(row.bits_per_weight), as_score(row.accuracy.get(AVERAGE))
    return (bits.mean, score) if bits and score else None


def accuracy(comparison: Comparison, styles: Mapping[str, Style]) -> list[Figure]:
    """Accuracy over bits, one figure a scheme, all with one y axis."""
    full = next((as_score(row.accuracy.get(AVERAGE)) for row in comparison.rows if is_full_precision(row)), None)
    panels = {
        scheme: {row.method: found for row in rows if (found := point(row))}
        for scheme, rows in by_scheme(comparison.rows).items()
    }
    panels = {scheme: points for scheme, points in panels.items() if points}
    scores = [score for points in panels.values() for _, score in points.values()] + ([full] if full else [])
    edges = [edge for score in scores for edge in (score.mean, score.low, score.high) if finite(edge)]
    if not panels:
        return []
    room = 0.08 * (max(edges) - min(edges)) or 0.05
    limits = (min(edges) - room, max(edges) + room)
    result = []
    for number, (scheme, points) in enumerate(panels.items()):
        listed = [f"{name} {percent(score.mean)}% at {bits:.2f} bits" for name, (bits, score) in points.items()]
        description = f"Average exact match over stored bits per weight, {scheme}: {'; '.join(listed)}."
        name = f"accuracy{number}"
        svg = accuracy_svg(points, full, styles, limits, name=name, description=description)
        result.append(Figure(name, scheme or "Quantized", Markup(svg)))
    return result


def layer_errors(layers: Mapping[str, Mapping[str, Records]], styles: Mapping[str, Style]) -> LayerErrors | None:
    """Relative output error by block, one figure a scheme, all with one y axis; None if no error was recorded."""
    panels = {scheme: _with_reference(methods) for scheme, methods in layers.items()}
    lines = {
        scheme: {name: errors_by(records, "block", plain) for name, (records, plain) in panel.items()}
        for scheme, panel in panels.items()
    }
    found = [v for panel in lines.values() for line in panel.values() for v in line.values() if v is not None]
    if not found:
        return None
    limits = (min(found) / 1.4, max(found) * 1.4)
    figures = []
    for number, (scheme, panel) in enumerate(lines.items()):
        blocks = list(dict.fromkeys(block for line in panel.values() for block in line))
        overall = [f"{name} {_shown(overall_error(*source))}" for name, source in panels[scheme].items()]
        description = f"Relative output error by block, {scheme}. Geometric means: {'; '.join(overall)}."
        svg = layer_error_svg(
            {name: [line.get(block) for block in blocks] for name, line in panel.items()},
            [Place(block, "").block_number for block in blocks],
            {REFERENCE: RTN_STYLE, **styles},
            limits,
            name=f"errors{number}",
            description=description,
        )
        figures.append(Figure(f"errors{number}", scheme or "Layers", Markup(svg)))
    headings, groups = _error_table(panels)
    errors = [record.error.get(ALL) for panel in layers.values() for records in panel.values() for record in records]
    left_out = sum(1 for error in errors if error is None or not finite(error) or error <= 0)
    methods = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    return LayerErrors(figures, methods, headings, groups, left_out)


def modality_errors(
    layers: Mapping[str, Mapping[str, Records]],
) -> list[Figure]:
    """Error by block for each kind of token, one figure a method and scheme, all with one y axis."""
    drawn = {
        f"{method} {scheme}".strip(): {kind: errors_by(records, "block", tokens=kind) for kind in TOKEN_KINDS}
        for scheme, methods in layers.items()
        for method, records in methods.items()
    }
    drawn = {
        label: {kind: line for kind, line in lines.items() if any(v is not None for v in line.values())}
        for label, lines in drawn.items()
    }
    found = [v for lines in drawn.values() for line in lines.values() for v in line.values() if v is not None]
    figures = []
    for number, (label, lines) in enumerate(drawn.items()):
        if len(lines) > 1:
            blocks = list(next(iter(lines.values())))
            svg = layer_error_svg(
                {kind: [line.get(block) for block in blocks] for kind, line in lines.items()},
                [Place(block, "").block_number for block in blocks],
                {kind: replace(TOKEN_STYLES[kind], line=True) for kind in lines},
                (min(found) / 1.4, max(found) * 1.4),
                name=f"kinds{number}",
                description=f"Relative output error by block and kind of token, {label}.",
            )
            figures.append(Figure(f"kinds{number}", label, Markup(svg)))
    return figures


def _with_reference(methods: Mapping[str, Records]) -> dict[str, tuple[Records, bool]]:
    """Method -> records, and whether to read their error of plain rounding.

    Where plain rounding is no row of its own it comes first, as the first method's records measured it.
    """
    rows = {name: (records, False) for name, records in methods.items()}
    return rows if PLAIN_ROUNDING in methods else {REFERENCE: (next(iter(methods.values())), True), **rows}


def _error_table(panels: Mapping[str, Mapping[str, tuple[Records, bool]]]) -> tuple[list[Heading], list[ErrorGroup]]:
    """Geometric means over all linears, by kind of token and by type of linear."""
    everything = [record for panel in panels.values() for records, _ in panel.values() for record in records]
    tokens = [kind for kind in TOKEN_KINDS if any(kind in record.error for record in everything)]
    types = list(dict.fromkeys(place(linear).kind for record in everything for linear in record.linears))
    groups = []
    for scheme, panel in panels.items():
        rows = []
        for name, (records, plain) in panel.items():
            means = [overall_error(records, plain, kind) for kind in (ALL, *tokens)]
            by_type = errors_by(records, "kind", plain)
            rows.append((name, [_shown(value) for value in (*means, *map(by_type.get, types))]))
        groups.append((scheme, rows))
    headings = [("All linears, by kind of token", [ALL, *tokens]), ("All tokens, by type of linear", types)]
    return headings, groups


def _shown(value: float | None) -> str:
    return MISSING if value is None else small_number(value)


def channel_curves(chosen: Mapping[str, GroupRecord]) -> list[Figure]:
    """How often channels are important, for each chosen layer."""
    result = []
    for number, (depth, record) in enumerate(chosen.items()):
        curves = {kind: curve for kind, curve in record.channel_frequency.items() if curve}
        shares = ", ".join(f"{kind} {percent(curve[0])}%" for kind, curve in curves.items())
        title = f"{depth}: {group_name(record)}"
        description = f"{title}. Share of tokens for which the most often important channel is important: {shares}."
        name = f"channels{number}"
        svg = channel_curve_svg(curves, _interesting(curves), name=name, description=description)
        result.append(Figure(name, title, Markup(svg)))
    return result


def _interesting(curves: Mapping[str, Sequence[float]]) -> int:
    """Channels to draw: up to the last that matters for one token in fifty of any kind."""
    longest = max(len(curve) for curve in curves.values())
    last = max((i for curve in curves.values() for i, share in enumerate(curve) if share >= 0.02), default=longest - 1)
    return min(longest, max(16, last + 2))
