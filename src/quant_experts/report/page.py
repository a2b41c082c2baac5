"""Builds the page: gathers what each section shows and fills the template. Needs the optional libraries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from quant_experts.artifacts import GroupRecord
from quant_experts.evaluation.comparison import FULL_PRECISION, Comparison, MethodRow
from quant_experts.report import figures
from quant_experts.report.answers import shown
from quant_experts.report.channels import channels, cluster_figures
from quant_experts.report.columns import (
    Cell,
    Column,
    accuracy_column,
    as_score,
    by_scheme,
    cells,
    cost_columns,
    gain_columns,
    is_full_precision,
    kinds,
    main_columns,
    ordered,
    row_label,
)
from quant_experts.report.experts import experts
from quant_experts.report.fronts import fronts
from quant_experts.report.layers import TOKEN_KINDS
from quant_experts.report.palette import FULL_PRECISION_STYLE, RTN_STYLE, TOKEN_STYLES, Style, method_styles
from quant_experts.report.verdict import verdict

Legend = list[tuple[str, Style]]


def render(comparison: Comparison) -> str:
    """The report as one HTML document."""
    return fill("report.html", sections(comparison))


def fill(template: str, content: dict[str, Any]) -> str:
    """One of our templates with its content, as which text stays text."""
    environment = Environment(
        loader=PackageLoader("quant_experts.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filled: str = environment.get_template(template).render(content)
    return filled


def sections(comparison: Comparison) -> dict[str, Any]:
    """What the page shows: tables, figures, legends, texts, by the names that its template has for them."""
    styles = method_styles(row.method for row in comparison.rows if not is_full_precision(row))
    layers = _layers_by_scheme(comparison)
    styles |= method_styles(name for panel in layers.values() for name in panel if name not in styles)
    errors = figures.layer_errors(layers, styles)
    styles[figures.REFERENCE] = RTN_STYLE
    return {
        "comparison": comparison,
        "verdict": verdict(comparison),
        "main_table": _table(comparison, main_columns()),
        "costs_table": _table(comparison, _measured(comparison, cost_columns()), full=False),
        "gains_table": _table(comparison, _measured(comparison, gain_columns()), full=False),
        "fronts": fronts(comparison, styles),
        "front_legend": [
            (name, style) for name, style in _accuracy_legend(comparison, styles) if name != FULL_PRECISION
        ],
        "kinds_table": _table(comparison, [accuracy_column(kind, kind) for kind in kinds(comparison)]),
        "accuracy": figures.accuracy(comparison, styles),
        "accuracy_legend": _accuracy_legend(comparison, styles),
        "errors": errors,
        "error_legend": [(name, styles[name]) for name in errors.methods] if errors else [],
        "modality_errors": figures.modality_errors(layers),
        "modality_legend": [(TOKEN_KINDS[kind], replace(TOKEN_STYLES[kind], line=True)) for kind in TOKEN_KINDS],
        "channels": channels(comparison.layers),
        "clusters": cluster_figures(comparison.layers),
        "experts": experts(comparison.layers),
        "answers": [shown(example) for example in comparison.answers],
        "events": _events(comparison),
        "machine": comparison.versions.get("machine"),
        "versions": {name: version for name, version in comparison.versions.items() if name != "machine"},
    }


@dataclass(frozen=True)
class Table:
    """Columns, and groups of rows with one cell a column."""

    columns: Sequence[Column]
    groups: list[tuple[str, list[tuple[MethodRow, list[Cell]]]]]
    """Scheme -> rows; full precision under ""."""


def _measured(comparison: Comparison, columns: list[Column]) -> list[Column]:
    """The columns for which some row has a figure."""
    return [column for column in columns if any(as_score(column.value(row)) for row in comparison.rows)]


def _table(comparison: Comparison, columns: list[Column], *, full: bool = True) -> Table:
    """full: whether full precision has a row."""
    rows = [row for row in ordered(comparison) if full or not is_full_precision(row)]
    lines = zip(*(cells(rows, column) for column in columns), strict=True) if columns else ([] for _ in rows)
    groups: dict[str, list[tuple[MethodRow, list[Cell]]]] = {}
    for row, line in zip(rows, lines, strict=True):
        groups.setdefault("" if is_full_precision(row) else row.scheme, []).append((row, list(line)))
    return Table(columns, list(groups.items()))


def _layers_by_scheme(comparison: Comparison) -> dict[str, dict[str, tuple[GroupRecord, ...]]]:
    """Scheme -> method -> records, in the order of the rows; records under a label that no row has come last."""
    left = {label: records for label, records in comparison.layers.items() if records}
    panels: dict[str, dict[str, tuple[GroupRecord, ...]]] = {}
    for scheme, rows in by_scheme(comparison.rows).items():
        for row in rows:
            if row_label(row) in left:
                panels.setdefault(scheme, {})[row.method] = left.pop(row_label(row))
    for label, records in left.items():
        panels.setdefault("", {})[label] = records
    return panels


def _accuracy_legend(comparison: Comparison, styles: dict[str, Style]) -> Legend:
    drawn = [row.method for row in comparison.rows if not is_full_precision(row) and figures.point(row)]
    legend = [(name, replace(styles[name], line=False)) for name in dict.fromkeys(drawn)]
    has_full = any(is_full_precision(row) for row in comparison.rows)
    return [*legend, (FULL_PRECISION, FULL_PRECISION_STYLE)] if has_full else legend


def _events(comparison: Comparison) -> list[dict[str, Any]]:
    """By row, equal events of several places together."""
    result = []
    for label, events in comparison.events.items():
        if events:
            places: dict[str, list[str]] = {}
            for event in events:
                places.setdefault(event.what, []).append(event.where)
            result.append({"label": label, "count": len(events), "places": places})
    return result
