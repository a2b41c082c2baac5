"""The report's figures as files: whole documents, as many as the page has."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from xml.etree import ElementTree

import pytest
from PIL import Image
from report import made_up

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.comparison import Comparison
from quant_experts.report.files import drawn, write_figures
from quant_experts.report.page import sections

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """A small one that has every kind of figure."""
    whole = made_up.comparison(blocks=2)
    return dataclasses.replace(whole, layers={name: whole.layers[name] for name in ("rtn W4A6", "paper W4A6")})


@pytest.fixture(scope="module")
def files(comparison: Comparison, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_figures(comparison, tmp_path_factory.mktemp("figures") / "new")


def test_every_figure_and_every_image_has_a_file(files: list[Path]) -> None:
    names = [path.name for path in files]
    assert len(names) == len(set(names)) and all(path.stat().st_size > 500 for path in files)
    clusters = ["similarity.svg", "embedding.svg"]
    kinds = ("text", "image", "answer")
    experts = [f"{what}1-{kind}.svg" for what in ("experts", "places") for kind in kinds]
    assert {"accuracy0.svg", "front0-0-1.svg", "errors0.svg", "kinds1.svg", "channels1.svg"} <= set(names)
    assert {*clusters, *experts, *(f"map-{kind}.svg" for kind in kinds)} <= set(names)
    images = [path for path in files if path.suffix != ".svg"]
    assert [path.stem for path in images] == ["question0", "question1", "question3"]
    assert {Image.open(io.BytesIO(path.read_bytes())).size for path in images} == {(280, 168)}


def test_a_file_stands_alone_with_title_and_legend(files: list[Path]) -> None:
    path = next(path for path in files if path.name == "errors0.svg")
    root = ElementTree.fromstring(path.read_bytes())
    assert root.tag == f"{SVG}svg" and float(root.attrib["width"]) > float(root.attrib["viewBox"].split()[2])
    own = [element.text for element in root.iter(f"{SVG}text")]
    assert own[0] == "W4A6" and own[-2:] == ["rtn", "paper"]
    signs = [element.tag.removeprefix(SVG) for element in root.findall(f"{SVG}g/*")]
    assert signs == ["line", "polygon", "text"] * 2
    for other in (path for path in files if path.suffix == ".svg"):
        assert ElementTree.fromstring(other.read_bytes()).tag == f"{SVG}svg" and "http:" not in other.read_text()[40:]


def test_names_are_the_figures_own_and_begin_their_ids(comparison: Comparison) -> None:
    for figure, _ in drawn(sections(comparison)):
        assert f'id="{figure.name}-figure_1"' in figure.svg


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    row = made_up.rows(methods=("rtn",))[1]
    bad = dataclasses.replace(row, method='<script>"&', scheme="<b>")
    paths = write_figures(Comparison("t", "m", "c", 1, (bad,)), tmp_path)
    assert [path.name for path in paths] == ["accuracy0.svg"]
    texts = [element.text for element in ElementTree.fromstring(paths[0].read_bytes()).iter(f"{SVG}text")]
    assert texts[0] == "<b>" and texts[-1] == '<script>"&'


def test_nothing_to_draw_and_nowhere_to_write(tmp_path: Path) -> None:
    assert write_figures(Comparison("t", "m", "c", 0, ()), tmp_path / "new") == []
    (tmp_path / "file").touch()
    with pytest.raises(QuantExpertsError, match="cannot be written"):
        write_figures(Comparison("t", "m", "c", 0, ()), tmp_path / "file" / "figures")
