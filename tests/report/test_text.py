"""The comparison in a terminal and as JSON."""

from __future__ import annotations

import dataclasses
import io
import json
import math

from report import made_up
from rich.console import Console

from quant_experts.evaluation.comparison import AnswerExample, Comparison, MethodRow, Score
from quant_experts.report.text import comparison_json, comparison_tables


def printed(comparison: Comparison, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    for table in comparison_tables(comparison):
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_holds_the_figures_and_the_marks() -> None:
    found = [line.split() for line in printed(made_up.comparison(blocks=1)).splitlines() if "W4A6" in line]
    lines, costs = ({line[1]: line for line in part} for part in (found[:7], found[7:14]))
    assert "86.5*" in lines["quant-experts"] and "85.2–87.8" in lines["quant-experts"]
    assert "84.3≈" in lines["gptq"] and "75.2" in lines["rtn"] and "4.02*" in lines["rtn"]
    assert "3.2" in lines["mbq"] and "min" in lines["mbq"]
    assert {"0.390", "0.312", "1.325", "5.85"} <= set(costs["paper"]) and "0.126*" in costs["quant-experts"]


def test_answers_are_shown_without_what_would_steer_a_terminal() -> None:
    example = AnswerExample("[b]What?", "a", None, {"rtn W4A6": "\x1b[31mred"})
    text = printed(Comparison("t", "m", "c", 1, (), answers=(example,)))
    assert "[b]What?" in text and "\x1b" not in text and "[31mred" in text


def test_nothing_is_cut_at_80_columns() -> None:
    full, rtn, paper = (
        MethodRow(
            name, scheme, {"average": Score(0.925, 0.9, 0.95), "color_position": Score(0.871, 0.8, 0.9)}, nll, nll
        )
        for name, scheme in (("full precision", ""), ("rtn", "W4A6"), ("paper", "W4A6"))
        for nll in [Score(0.0123, 0.01, 0.02)]
    )
    costs = dict(layer_error=0.373, oracle_layer_error=0.359, base_flops=9, repair_flops=1, token_bytes=9_990_000)
    costs |= dict(overfit=1.02)  # which has no room
    paper = dataclasses.replace(paper, peak_bytes=999_000_000, **costs)
    text = printed(Comparison("A comparison", "m", "c", 350, (full, rtn, paper)), width=80)
    assert max(map(len, text.splitlines())) <= 80 and "9.99 MB" in text and "999 MB" in text
    titles = next(line for line in text.splitlines() if "FLOPs" in line)
    values = next(line for line in text.splitlines() if "999 MB" in line)
    cells = dict(zip(titles.split("┃"), values.split("│"), strict=True))
    assert {title.strip(): cell.strip() for title, cell in cells.items()}.items() >= {
        ("FLOPs", "1.111"),
        ("error", "0.373"),
    }
    assert "…" not in text and "full precision" in text
    line = next(line.split() for line in text.splitlines() if "color_position" in line)
    assert [entry for entry in line if entry.startswith("87.1")] == ["87.1", "87.1*", "87.1*"]


def test_markup_in_names_is_shown_literally() -> None:
    row = MethodRow(
        "[red]x[/red]", "[b]W4A6", {"average": Score(0.5, math.nan, math.nan), "[i]k": Score(1, 1, 1)}, Score(1, 1, 1)
    )
    text = printed(Comparison("[bold]t", "m", "c", 1, (row,)))
    assert all(part in text for part in ("[red]x[/red]", "[b]W4A6", "[i]k", "[bold]t"))
    assert "nan" not in text


def test_json_is_strict_and_complete_but_for_pictures() -> None:
    comparison = made_up.comparison(blocks=1)
    first = dataclasses.replace(comparison.rows[1], kl=Score(math.nan, math.nan, math.inf))
    comparison = dataclasses.replace(comparison, rows=(comparison.rows[0], first, *comparison.rows[2:]))
    data = comparison_json(comparison)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    assert set(data) == {*(field.name for field in dataclasses.fields(Comparison)), "verdict"}
    assert data["rows"][1]["label"] == "rtn W4A6"
    assert data["rows"][1]["kl"] == {"mean": None, "low": None, "high": None}
    assert data["rows"][2]["accuracy"]["average"]["mean"] == comparison.rows[2].accuracy["average"].mean
    assert data["layers"]["gptq W4A6"][3]["linears"] == ["model.language_model.layers.0.mlp.down_proj"]
    layer = data["layers"]["paper W4A6"][0]
    assert layer["error"] == comparison.layers["paper W4A6"][0].error and layer["shape"] == [448, 320]
    assert len(json.dumps(data["layers"])) < 1000 * sum(map(len, data["layers"].values()))
    assert data["answers"][0]["answers"]["rtn W4A6"] == "7KQ2-ZX91-PLN4" and "image" not in data["answers"][0]
