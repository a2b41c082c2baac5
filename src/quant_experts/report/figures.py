"""Which figures the page holds: picks the records, the common scales and the words for those who cannot see them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

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
    TOKEN_KINDS,
    ExpertUse,
    Place,
    errors_by,
    group_name,
    overall_error,
    place,
)
from quant_experts.report.palette import RTN_STYLE, Style
from quant_experts.report.plots import accuracy_svg, channel_curve_svg, expert_use_svg, layer_error_svg

Records = tuple[GroupRecord, ...]
RTN_LEGEND = ("plain rounding, for reference", RTN_STYLE)


@dataclass(frozen=True)
class Figure:
    """A drawing with its heading."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class ErrorPanel:
    """One scheme's layer errors."""

    scheme: str
    figure: Figure
    methods: list[str]
    table: list[tuple[str, list[tuple[str, list[str]]]]]
    """Heading -> lines of a name and a figure for each method."""
    left_out: int = field(default=0)
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
        svg = accuracy_svg(points, full, styles, limits, name=f"accuracy{number}", description=description)
        result.append(Figure(scheme or "Quantized", Markup(svg)))
    return result


def layer_errors(layers: Mapping[str, Mapping[str, Records]], styles: Mapping[str, Style]) -> list[ErrorPanel]:
    """Relative output error by block, one panel a scheme, all with one y axis."""
    panels = {scheme: _with_reference(methods) for scheme, methods in layers.items()}
    drawn = [v for lines in panels.values() for line in lines.values() for v in line.values() if v is not None]
    if not drawn:
        return []
    limits = (min(drawn) / 1.4, max(drawn) * 1.4)
    result = []
    for number, (scheme, lines) in enumerate(panels.items()):
        methods = layers[scheme]
        blocks = list(dict.fromkeys(block for line in lines.values() for block in line))
        values = {name: [line.get(block) for block in blocks] for name, line in lines.items()}
        overall = [f"{name} {_shown(overall_error(records))}" for name, records in methods.items()]
        description = (
            f"Relative output error of {len(blocks)} blocks, {scheme}. Geometric means over all linears: "
            + "; ".join(overall)
        )
        svg = layer_error_svg(
            values,
            [Place(block, "").block_number for block in blocks],
            {RTN_LEGEND[0]: RTN_STYLE, **styles},
            limits,
            name=f"errors{number}",
            description=description,
        )
        result.append(
            ErrorPanel(
                scheme,
                Figure(scheme or "Layers", Markup(svg)),
                [*methods, *([] if PLAIN_ROUNDING in methods else [RTN_LEGEND[0]])],
                _error_table(methods),
                _left_out(methods.values()),
            )
        )
    return result


def _with_reference(methods: Mapping[str, Records]) -> dict[str, dict[str, float | None]]:
    """Method -> block -> error; plain rounding as the first method's records measured it, unless it is a row itself."""
    lines = {name: errors_by(records, "block") for name, records in methods.items()}
    if PLAIN_ROUNDING not in methods:
        lines = {RTN_LEGEND[0]: errors_by(next(iter(methods.values())), "block", plain=True), **lines}
    return lines


def _error_table(methods: Mapping[str, Records]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Geometric means over all linears, by type of linear and by kind of token."""
    sources = [(records, False) for records in methods.values()]
    if PLAIN_ROUNDING not in methods:
        sources.append((next(iter(methods.values())), True))
    by_kind = [errors_by(records, "kind", plain) for records, plain in sources]
    names = dict.fromkeys(place(linear).kind for records, _ in sources for r in records for linear in r.linears)
    tokens = [
        (title, [_shown(overall_error(records, plain, kind)) for records, plain in sources])
        for kind, title in TOKEN_KINDS.items()
    ]
    return [
        ("All linears", [("all tokens", [_shown(overall_error(records, plain)) for records, plain in sources])]),
        ("By kind of token", [(title, line) for title, line in tokens if set(line) != {MISSING}]),
        ("By type of linear", [(name, [_shown(means.get(name)) for means in by_kind]) for name in names]),
    ]


def _left_out(records: Iterable[Records]) -> int:
    errors = [record.error.get("all") for group in records for record in group]
    return sum(1 for error in errors if error is None or not finite(error) or error <= 0)


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
        svg = channel_curve_svg(curves, _interesting(curves), name=f"channels{number}", description=description)
        result.append(Figure(title, Markup(svg)))
    return result


def _interesting(curves: Mapping[str, Sequence[float]]) -> int:
    """Channels to draw: up to the last that matters for one token in fifty of any kind."""
    longest = max(len(curve) for curve in curves.values())
    last = max((i for curve in curves.values() for i, share in enumerate(curve) if share >= 0.02), default=longest - 1)
    return min(longest, max(16, last + 2))


def expert_maps(use: ExpertUse, label: str, name: str) -> list[Figure]:
    """A heat map for each kind of token, all with one scale."""
    highest = max((v for columns in use.shares.values() for column in columns for v in column if finite(v)), default=1)
    result = []
    for kind, columns in use.shares.items():
        title = TOKEN_KINDS.get(kind, "all tokens")
        description = f"Share of {title} that each routed expert serves in {len(columns)} groups of linears, {label}."
        svg = expert_use_svg(columns, use.blocks, highest or 1, name=f"{name}-{kind}", description=description)
        result.append(Figure(title[0].upper() + title[1:], Markup(svg)))
    return result
