"""The benchmark of linears on a CPU: it runs, sums the groups of a block, and writes ratios that are its times'."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"


def test_tables_and_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    options = ["--quick", "--tokens", "1", "5", "--threads", str(torch.get_num_threads()), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cpu_linear", *options])
    cpu_linear = import_module("cpu_linear")
    cpu_linear.main()
    result = json.loads((tmp_path / "cpu_linear.json").read_text())
    assert {"processor", "threads", "commit", "command", "versions"} <= set(result["about"])
    rows = {(row["group"], row["tokens"]): row for row in result["rows"]}
    assert set(rows) == {(group, m) for group in ("one", "two", "block") for m in (1, 5)}
    for row in rows.values():
        assert set(row["microseconds"]) == set(cpu_linear.KINDS)
        for timed in [*row["microseconds"].values(), *row["int_mm / ours"].values(), *row["fp32 / ours"].values()]:
            assert 0 < timed["low"] <= timed["median"] <= timed["high"]
    assert (tmp_path / "cpu_linear.md").read_text().count("\n|") == 2 + len(rows)


def test_a_summary_takes_ratios_within_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    cpu_linear = import_module("cpu_linear")
    times = {"fp32": [8.0, 80.0, 8.0], "int_mm": [2.0, 20.0, 2.0], "factors": [0.5, 5.0, 0.5]}
    times |= {kind: [4.0, 40.0, 4.0] for kind in cpu_linear.OURS}
    row = cpu_linear.summary("one", 1, times)
    assert row["bound with experts"]["median"] == 0.8
    for kind in cpu_linear.OURS:
        assert row["int_mm / ours"][kind] == {"median": 0.5, "low": 0.5, "high": 0.5}
        assert row["fp32 / ours"][kind]["median"] == 2
        assert row["microseconds"][kind]["median"] == 4
