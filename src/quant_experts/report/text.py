"""The comparison for a terminal and for programs."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from typing import Any

from rich.table import Table
from rich.text import Text

from quant_experts.artifacts import GroupRecord
from quant_experts.errors import printable
from quant_experts.evaluation.comparison import AnswerExample, Comparison
from quant_experts.report.answers import same_answer
from quant_experts.report.columns import (
    Cell,
    accuracy_column,
    by_scheme,
    cells,
    cost_columns,
    is_full_precision,
    kinds,
    main_columns,
    ordered,
    row_label,
)
from quant_experts.report.verdict import verdict

MANY = 5
"""With more methods than this a table has a line for each of them instead of a column."""
_COSTS = {
    "Layer error": "error",
    "Best routing": "routed best",
    "Operations": "FLOPs",
    "Bytes read": "read",
    "Peak memory": "memory",
}
"""Columns of costs for which 80 characters have room, with short titles."""
_SUFFIX = {"best": "*", "tie": "≈", "": ""}
_PICTURES = {
    *("channel_frequency", "important_tokens", "similarity", "clusters"),
    *("expert_use", "expert_positions"),
}
"""Fields of a group's record that only figures need, by far the most of it."""


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The summary, one line a method; what each costs; by scheme, exact match by kind of question; example answers.

    Each fits 80 columns for a handful of methods. All text is shown literally: names cannot inject rich markup.
    """
    costs = [_costs(comparison)] if any(row.layer_error is not None for row in comparison.rows) else []
    by_kind = [_by_kind(comparison, scheme) for scheme in by_scheme(comparison.rows)]
    return [_summary(comparison), *costs, *by_kind, *map(_answers, comparison.answers)]


def _summary(comparison: Comparison) -> Table:
    average, nll, kl, bits, seconds = main_columns()
    columns = [average, kl, nll, bits, seconds]
    table = Table(
        title=Text(f"{comparison.title} ({comparison.questions} questions)"),
        caption=Text("* best at its scheme   ≈ a tie: the 95% interval does not tell it from the best"),
    )
    table.add_column("method", overflow="fold")
    table.add_column("scheme", no_wrap=True)
    for title in ("exact match %", "KL", "NLL", "bits", "time"):
        table.add_column(Text(title), justify="right")
    rows = ordered(comparison)
    written = [_written(cells(rows, column), column is average) for column in columns]
    previous = None
    for index, row in enumerate(rows):
        if previous is not None and previous != row.scheme:
            table.add_section()
        previous = row.scheme
        table.add_row(Text(row.method), Text(row.scheme or "-"), *(column[index] for column in written))
    return table


def _costs(comparison: Comparison) -> Table:
    columns = [column for column in cost_columns() if column.title in _COSTS]
    table = Table(
        title=Text("Layer errors and what a token costs"),
        caption=Text("error of layers over rtn's; FLOPs over full precision's; bytes read a token"),
    )
    table.add_column("method", overflow="fold", min_width=13)
    table.add_column("scheme", no_wrap=True)
    for column in columns:
        table.add_column(Text(_COSTS[column.title]), justify="right")
    rows = [row for row in ordered(comparison) if not is_full_precision(row)]
    written = [_written(cells(rows, column), False) for column in columns]
    for index, row in enumerate(rows):
        table.add_row(Text(row.method), Text(row.scheme), *(texts[index] for texts in written))
    return table


def _answers(example: AnswerExample) -> Table:
    table = Table("who", "answer", title=Text(printable(example.question)), title_justify="left")
    table.add_row("reference", Text(printable(example.reference)))
    for who, answer in example.answers.items():
        right = same_answer(answer, example.reference)
        table.add_row(Text(printable(who)), Text(printable(answer)), style=None if right else "red")
    return table


def _by_kind(comparison: Comparison, scheme: str) -> Table:
    rows = [row for row in ordered(comparison) if is_full_precision(row) or row.scheme == scheme]
    table = Table(title=Text(f"Exact match % by kind of question, {scheme}"))
    if len(rows) > MANY:
        table.add_column("method", overflow="fold")
        for kind in kinds(comparison):
            table.add_column(Text(kind), justify="right", overflow="fold")
        columns = [_written(cells(rows, accuracy_column(kind, kind)), False) for kind in kinds(comparison)]
        for index, row in enumerate(rows):
            table.add_row(Text(row.method), *(column[index] for column in columns))
        return table
    table.add_column("kind", overflow="fold")
    for row in rows:
        table.add_column(Text(row.method), justify="right", overflow="fold")
    for kind in kinds(comparison):
        table.add_row(Text(kind), *_written(cells(rows, accuracy_column(kind, kind)), False))
    return table


def _written(column: list[Cell], with_interval: bool) -> list[Text]:
    texts = []
    for cell in column:
        text = Text(cell.text + _SUFFIX[cell.mark], style="bold" if cell.mark == "best" else "")
        if with_interval and cell.interval:
            text.append(f" {cell.interval}", style="dim")
        texts.append(text)
    return texts


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but images and what figures alone are drawn from, which each checkpoint's quantization_report.json
    keeps. JSON types: what is no number becomes null, so any JSON reader takes it."""
    result = {
        "title": comparison.title,
        "model": comparison.model,
        "command": comparison.command,
        "questions": comparison.questions,
        "verdict": verdict(comparison),
        "rows": [{"label": row_label(row), **asdict(row)} for row in ordered(comparison)],
        "layers": {label: [_layer(record) for record in records] for label, records in comparison.layers.items()},
        "answers": [_answer(example) for example in comparison.answers],
        "events": {label: [asdict(event) for event in events] for label, events in comparison.events.items()},
        "versions": dict(comparison.versions),
    }
    cleaned: dict[str, Any] = _json_types(result)
    return cleaned


def _layer(record: GroupRecord) -> dict[str, Any]:
    """Shape, errors and costs of a group."""
    return {f.name: getattr(record, f.name) for f in fields(record) if f.name not in _PICTURES}


def _answer(example: AnswerExample) -> dict[str, Any]:
    return {"question": example.question, "reference": example.reference, "answers": dict(example.answers)}


def _json_types(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _json_types(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_types(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
