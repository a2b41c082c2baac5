"""Tables and a picture of times that were stored, and that the page shows what the files in the repository hold."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "kernels" / "linear_tables.py"
RESULTS = ROOT / "benchmarks" / "results"
ROW = {"model": "Qwen2-VL-7B", "bits": 8, "bound": 1.0, "bf16": 4.0}


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    return import_module("linear_tables")


def test_what_was_not_timed_has_no_column_and_no_panel(made: Any, tmp_path: Path) -> None:
    rows = [ROW | {"tokens": 2048, "fp8_default": 2.0}, ROW | {"tokens": 8192, "fp8_default": 3.0}]
    assert made.tables(rows).splitlines() == [
        "**fp8 activations**, W4Afp8",
        "",
        "| model | tokens | bf16 | fp8 default | bound | bf16 / fp8 default |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| Qwen2-VL-7B | 2048 | 4 | 2 | 1 | 2.00 |",
        "| Qwen2-VL-7B | 8192 | 4 | 3 | 1 | 1.33 |",
    ]
    made.picture(rows, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert "fp8" not in made.tables([ROW | {"tokens": 1, "default": 2.0}])
    made.write([ROW | {"tokens": 1}], tmp_path / "baselines")
    assert "| 1 | 4 | 1 |" in (tmp_path / "baselines" / "gpu_linear.md").read_text()
    assert "| 4 | 4 | - | 2 | 1 | - | 2.00 |" in made.tables(
        [ROW | {"tokens": 1, "without_experts": 2.0}, ROW | {"tokens": 4, "default": 2.0}]
    )


def test_of_a_model_and_size_the_last_file_counts(tmp_path: Path) -> None:
    """In the order of models and sizes; as a program, on any machine."""
    row = ROW | {"default": 2.0}
    first = [row | {"tokens": 16}, row | {"tokens": 1}, row | {"tokens": 1, "model": "Qwen2-VL-2B"}]
    second = [row | {"tokens": 16, "default": 1.0}]
    files = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, rows in zip(files, (first, second), strict=True):
        path.write_text(json.dumps({"about": {}, "rows": rows}))
    run = program(*files, "--out", tmp_path / "new")
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "new" / "gpu_linear.md").read_text()
    assert [line for line in text.splitlines() if line.startswith(("**", "| 1"))] == [
        "**Qwen2-VL-7B**, W4A8",
        "| 1 | 4 | 2 | 1 | 2.00 |",
        "| 16 | 4 | 1 | 1 | 4.00 |",
        "**Qwen2-VL-2B**, W4A8",
        "| 1 | 4 | 2 | 1 | 2.00 |",
    ]
    assert (tmp_path / "new" / "gpu_linear.png").read_bytes().startswith(b"\x89PNG")


def test_goals_that_are_reached_are_bold_and_costs_are_of_the_same_format(made: Any) -> None:
    times = {"without_experts": 1.0, "with_experts": 1.6, "default": 1.25}
    times |= {f"fp8_{kind}": 2 * time for kind, time in times.items()}
    rows = [
        ROW | times | {"model": model, "tokens": m} for model in made.SHAPES for m in (1, 4, 16, 128, 512, 2048, 8192)
    ]
    goals = made.goals(rows).splitlines()
    assert goals[2:4] == [
        "| 1 | 2.5 | **2.50** | 4.00 | 3.20 | **2.50** |",
        "| 16 | 2.5 | **2.50** | 4.00 | 3.20 | **2.50** |",
    ]
    assert goals[-1] == "| 8,192, fp8 | 1.4 | 1.25 | 2.00 | 1.60 | 1.25 |"
    costs = made.costs(rows).splitlines()
    assert costs[2] == "| 1 | 20% | 60% | 25% | 60% | 25% | 60% | 25% |" and costs[5].startswith("| 128 | - | 60% |")
    assert made.summary(rows).splitlines()[2] == "| linears of a block, 1 token | 3.20 | 2.50 | 4.00 |"


def test_ratios_are_taken_within_a_round(made: Any) -> None:
    """The chip was slower in two rounds of three for one kind's median, and in one for the other's."""
    rounds = [{"bf16": 4.0, "without_experts": 2.0, "default": 3.0}] * 2
    rounds += [{"bf16": 8.0, "without_experts": 4.0, "default": 6.0}] * 3
    row = ROW | {"tokens": 1, "bf16": 4.0, "default": 6.0, "without_experts": 4.0, "rounds": rounds}
    assert made.ratio(row, "default") == 4 / 3 and made.cost(row, "default") == "50%"
    assert made.tables([row]).endswith("| 1 | 4 | 4 | 6 | 1 | 2.00 | 1.33 |\n")


def test_the_page_shows_what_the_files_hold(made: Any, tmp_path: Path) -> None:
    files = [RESULTS / "gpu_linear_many.json", RESULTS / "gpu_linear_decode.json"]
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.count("<!-- linears: end -->") == len(made.PARTS)
    made.write(made.stored(files), tmp_path, shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "page.md"))
    assert (tmp_path / "page.md").read_text() == page
    assert (tmp_path / "gpu_linear.md").read_text() == (RESULTS / "gpu_linear.md").read_text()


def test_files_that_are_not_there_or_too_few(made: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- linears: summary -->\n<!-- linears: end -->")
    rows = [ROW | {"tokens": 1, "default": 1.0, "with_experts": 1.0, "without_experts": 1.0}]
    with pytest.raises(SystemExit, match="not have no experts, experts, default of Qwen2-VL-7B on 4 tokens"):
        made.write(rows, tmp_path / "new", page)
    assert not (tmp_path / "new").exists(), "nothing is written where the page cannot be filled"
    with pytest.raises(SystemExit, match="not have no experts, experts, default of Qwen2-VL-7B on 1 token,"):
        made.summary([ROW | {"tokens": 1, "default": 1.0}])
    run = program(tmp_path / "none.json")
    assert run.returncode == 2 and "none.json is not there" in run.stderr


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True)
