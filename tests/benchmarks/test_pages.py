"""Parts of pages that are made of stored results, and that the page shows what the files of blocks hold."""

import json
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "kernels"


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    return import_module("pages")


def test_only_what_lies_between_the_marks_changes(pages: Any) -> None:
    page = "a\n<!-- x: one -->\nold\n<!-- x: end -->\nb <!-- y: one -->\n<!-- x: two -->\n<!-- x: end -->\n"
    parts = {"one": lambda: "1\n", "two": lambda: "2\\1\n"}  # no pattern of replacements
    expected = "a\n<!-- x: one -->\n1\n<!-- x: end -->\nb <!-- y: one -->\n<!-- x: two -->\n2\\1\n<!-- x: end -->\n"
    assert pages.filled(page, "x", parts) == expected
    assert pages.filled(expected, "x", parts) == expected


def test_pages_that_cannot_be_filled(pages: Any) -> None:
    with pytest.raises(SystemExit, match="No part of the page begins with"):
        pages.filled("a page", "x", {})
    with pytest.raises(SystemExit, match="x: tow -->: no such part, choose from one, two"):
        pages.filled("<!-- x: tow -->\n<!-- x: end -->", "x", {"one": str, "two": str})
    for page in (
        "<!-- x: one -->\nkept\n<!-- x: two -->\n<!-- x: end -->",
        "<!-- x: one -->\n<!-- x: end -->\n<!-- x: two --> \nstale\n<!-- x: end -->",
    ):
        with pytest.raises(SystemExit, match="does not begin with a line <!-- x: PART -->, or ends without"):
            pages.filled(page, "x", {"one": str, "two": str})


def test_tables(pages: Any) -> None:
    assert (
        pages.markdown(["a", "b", "c"], [["x", "y", "1"]], 2) == "| a | b | c |\n| --- | --- | ---: |\n| x | y | 1 |\n"
    )


def test_the_page_shows_what_the_files_of_blocks_hold(tmp_path: Path) -> None:
    """As a program, which prints the tables too."""
    files = [ROOT / "benchmarks" / "results" / "gpu_block.json"]
    page = Path(shutil.copy(ROOT / "docs" / "performance.md", tmp_path / "page.md"))
    command = [sys.executable, str(FOLDER / "block_tables.py"), *map(str, files)]
    run = subprocess.run([*command, "--docs", str(page)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert page.read_text() == (ROOT / "docs" / "performance.md").read_text()
    assert page.read_text().count("<!-- blocks: end -->") == 2
    table = run.stdout.split("\n\n")[0]
    assert table in page.read_text() and table.count("\n") == 2 + 8 - 1
    run = subprocess.run([*command, str(tmp_path / "none.json")], capture_output=True, text=True)
    assert run.returncode == 2 and "none.json is not there" in run.stderr


def test_what_is_compared_was_timed_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A later file's kinds are not divided into an earlier one's bf16; what was not timed is named."""
    monkeypatch.syspath_prepend(str(FOLDER))
    block_tables = import_module("block_tables")
    time = {"median": 2.0, "p10": 1.0, "p90": 3.0}
    row = {"model": "m", "setting": "decode, batch 1", "microseconds": time, "block_bytes": 2e6, "peak_bytes": 3e6}
    files = [tmp_path / "all.json", tmp_path / "one.json"]
    for path, kinds in zip(files, (block_tables.KINDS, ["default"]), strict=True):
        path.write_text(json.dumps({"rows": [row | {"kind": kind} for kind in kinds]}))
    rows = block_tables.stored(files[:1])
    expected = "| m | decode, batch 1 | 2 (1-3) |" + " 2 (1-3); 1.00 |" * 4
    assert block_tables.times(rows).splitlines()[2] == expected
    with pytest.raises(SystemExit, match="nothing of m, prefill 2048, bf16"):
        block_tables.memory(rows)
    with pytest.raises(SystemExit, match="nothing of m, decode, batch 1, bf16"):
        block_tables.times(block_tables.stored(files))
