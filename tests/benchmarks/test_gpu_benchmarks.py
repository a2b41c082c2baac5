"""The benchmarks of blocks and of whole models, tiny and on the CPU: they run, and decode the tokens that `generate`
gives."""

import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "kernels"
KINDS = ("bf16", "no-experts", "default", "experts")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[dict[str, Any]]]:
    """run(name) -> the rows that the benchmark of that name writes."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def main(name: str) -> list[dict[str, Any]]:
        options = ["--device", "cpu", "--tiny", "--kinds", *KINDS, "W4A16", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *options])
        import_module(name).main()
        assert (tmp_path / f"{name}.md").read_text().count("\n|") > 2 * len(KINDS)
        rows: list[dict[str, Any]] = json.loads((tmp_path / f"{name}.json").read_text())["rows"]
        return rows

    return main


def test_a_block(run: Callable[[str], list[dict[str, Any]]]) -> None:
    rows = run("gpu_block")
    assert len(rows) == 3 * len(KINDS) and all(row["finite"] for row in rows)
    assert {row["kind"]: row["backend"] for row in rows} == {
        kind: "PyTorch" if kind == "bf16" else "cpu-int8" for kind in KINDS
    }, "what only the reference computes on this device is left out"


def test_a_decoder_from_python(run: Callable[[str], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(import_module("gpu_eager"), "ROUNDS", 3)
    rows = run("gpu_eager")
    assert [row["kind"] for row in rows] == 2 * list(KINDS)
    for row in rows:
        assert row["milliseconds"]["p10"] > 0 and row["bf16_over_this"]["p10"] > 0
        assert row["kind"] != "bf16" or set(row["bf16_over_this"].values()) == {1.0}


def test_constants_are_set_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_experts.kernels.gpu_weight_activation import alone_launch

    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(alone_launch, "MOST_BLOCKS", alone_launch.MOST_BLOCKS)
    set_constants = import_module("random_blocks").set_constants
    set_constants(["MOST_BLOCKS=3"])
    assert alone_launch.MOST_BLOCKS == 3
    for wrong in ("NONE=1", "is_fastest=1", "MOST_BLOCKS=x", "MOST_BLOCKS"):
        with pytest.raises(SystemExit, match=f"--set {wrong}.*no such constant, or this is no number"):
            set_constants([wrong])


def test_each_kind_can_have_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    in_a_process = import_module("gpu_generate").in_a_process
    processes = {in_a_process(os.getpid) for _ in range(2)}
    assert len(processes | {os.getpid()}) == 3


def test_a_model(run: Callable[[str], list[dict[str, Any]]]) -> None:
    rows = run("gpu_generate")
    assert len(rows) == 2 * len(KINDS)
    ways = ("compiled", "static", "plain")
    assert all(row["repeats_its_first_steps"] for row in rows)
    assert all(row[f"{way}_equal_tokens"] == 1 for row in rows for way in ways)
    assert all(row[key] > 0 for row in rows for _, key in import_module("gpu_generate").RATES)
    assert all(row["distinct_tokens"] > 1 for row in rows), "an answer that repeats itself shows nothing"
