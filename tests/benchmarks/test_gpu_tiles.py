"""What is said of stored times of tiles, and what the times in the repository say of the tiles that are chosen."""

import json
import sys
from importlib import import_module
from math import log
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "kernels"))
    return import_module("gpu_tiles")


def test_losses_are_those_of_the_tile_that_is_chosen(tiles: Any) -> None:
    from quant_experts.kernels.gpu.hopper_tiles import TileTimes

    class Order(TileTimes):
        """Of two tiles, and all others after them."""

        def estimated(self, tile: Any, *shape: int) -> float:
            return {(128, 64, False): 1.0, (128, 128, True): 2.0}.get(tile, 3.0)

    order = Order({(128, 64): 1.0, (128, 128): 1.0, (256, 128): 1.0}, *[1.0] * 6)
    rows = [
        {"n": 1, "k": 128, "tokens": 128, "times": {"128x64": 4.0, "128x128 shared": 2.0}},
        {"n": 1, "k": 128, "tokens": 128, "times": {"128x128 shared": 2.0, "256x128": 1.0}},
    ]
    assert tiles.losses(rows, order) == pytest.approx([log(2), log(2)])


@pytest.mark.parametrize(
    ("arguments", "file", "most"),
    [([], "gpu_tiles.json", 0.35), (["--weight-only"], "gpu_tiles_weight_only.json", 0.13)],
)
def test_chosen_tiles_are_near_the_best_of_those_measured(
    tiles: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], file: str,
    most: float,
) -> None:  # fmt: skip
    results = ROOT / "benchmarks" / "results"
    monkeypatch.setattr(sys, "argv", ["gpu_tiles.py", "--stored", *arguments, "--out", str(results)])
    tiles.main()
    rows = json.loads((results / file).read_text())["rows"]
    said = capsys.readouterr().out
    assert f"in the mean of {len(rows)} shapes" in said
    found = tiles.losses(rows, tiles.launches(bool(arguments)).TIMES)
    assert 0 < mean(found) < 0.015 and max(found) < most


def test_times_that_are_not_there(tiles: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_tiles.py", "--stored", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"gpu_tiles\.json is not there: leave out --stored"):
        tiles.main()
