"""The comparison for a terminal and for programs."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from quant_experts.evaluation.comparison import AnswerExample, Comparison
from quant_experts.report.columns import Cell, accuracy_column, cells, kinds, main_columns, ordered, row_label
from quant_experts.report.verdict import verdict

_SUFFIX = {"best": "*", "tie": "≈", "": ""}


def comparison_table(comparison: Comparison) -> Table:
    """One line a method. All text is shown literally: names cannot inject rich markup."""
    average, nll, kl, bits, seconds, _ = main_columns()
    columns = [average, *(accuracy_column(kind, kind) for kind in kinds(comparison)), kl, nll, bits, seconds]
    titles = ["avg %", *kinds(comparison), "KL", "NLL", "bits", "time"]
    table = Table(
        title=Text(f"{comparison.title} ({comparison.questions} questions)"),
        caption=Text("* best at its scheme   ≈ a tie with the best: the 95% intervals overlap"),
    )
    table.add_column("method", overflow="fold")
    table.add_column("scheme", no_wrap=True)
    for title in titles:
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


def _written(column: list[Cell], with_interval: bool) -> list[Text]:
    texts = []
    for cell in column:
        text = Text(cell.text + _SUFFIX[cell.mark], style="bold" if cell.mark == "best" else "")
        if with_interval and cell.interval:
            text.append(f" {cell.interval}", style="dim")
        texts.append(text)
    return texts


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Everything but the images, as JSON types: what is no number becomes null, so any JSON reader takes it."""
    result = {
        "title": comparison.title,
        "model": comparison.model,
        "command": comparison.command,
        "questions": comparison.questions,
        "verdict": verdict(comparison),
        "rows": [{"label": row_label(row), **asdict(row)} for row in ordered(comparison)],
        "layers": {label: [asdict(record) for record in records] for label, records in comparison.layers.items()},
        "answers": [_answer(example) for example in comparison.answers],
        "events": {label: [asdict(event) for event in events] for label, events in comparison.events.items()},
        "versions": dict(comparison.versions),
    }
    cleaned: dict[str, Any] = _json_types(result)
    return cleaned


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
