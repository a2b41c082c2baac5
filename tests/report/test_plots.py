"""Figures: repeatable, well-formed, and without traces in the process."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import matplotlib
import pytest

from quant_experts.evaluation.comparison import Score
from quant_experts.report.palette import method_styles
from quant_experts.report.plots import (
    accuracy_svg,
    channel_curve_svg,
    channel_map_svg,
    embedding_svg,
    expert_place_svg,
    expert_use_svg,
    front_svg,
    layer_error_svg,
    similarity_svg,
)

STYLES = method_styles(["rtn", "$a_1$", "_b<"])


def accuracy(name: str = "f") -> str:
    points = {"rtn": (4.0, Score(0.5, 0.4, 0.6)), "$a_1$": (4.5, Score(0.7, math.nan, math.nan))}
    reference = Score(0.8, 0.7, 0.9)
    return accuracy_svg(points, reference, STYLES, (0.3, 1.0), name=name, description='a "<b>"')


def errors() -> str:
    lines = {"rtn": [0.1, None, 0.2], "_b<": [math.nan, 0.0, 0.01]}
    return layer_error_svg(lines, ["0", "1", "$2"], STYLES, (0.005, 0.5), name="f", description="d")


def channels() -> str:
    return channel_curve_svg({"all": [1.0, 0.5], "image": [0.9]}, 2, name="f", description="d")


def experts() -> str:
    return expert_use_svg([[0.5, 0.5], [1.0]], ["0", "0"], 1.0, name="f", description="d")


def places() -> str:
    return expert_place_svg([[0.5, 0.5], [math.nan, math.nan]], 1.0, name="f", description="d")


def fronts() -> str:
    points = {"rtn": (4.0, Score(0.5, 0.4, 0.6)), "$a_1$": (4.5, Score(0.7, 0.0, math.nan))}
    return front_svg(points, ["rtn"], STYLES, ("$x$", "y"), name="f", description="d")


def maps() -> str:
    return channel_map_svg([[0, 3, 9], []], 5, "#000000", name="f", description="d")


def similarities() -> str:
    return similarity_svg([[100, 20, 0], [20, 100, 5], [0, 5, 100]], [0, 0, 2], name="f", description="d")


def embedding() -> str:
    points = [(0.0, 1.0), (1.0, 0.5), (0.2, math.pi)]
    return embedding_svg(points, [0, 0, 2], list(STYLES.values()), name="f", description="d")


DRAWINGS = [accuracy, errors, channels, experts, places, fronts, maps, similarities, embedding]


@pytest.mark.parametrize("draw", DRAWINGS)
def test_figures_are_repeatable_xml_with_a_description(draw: object) -> None:
    svg = draw()  # type: ignore[operator]
    assert svg == draw()  # type: ignore[operator]
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.attrib["aria-label"] and root.attrib["role"] == "img"
    assert "width" not in root.attrib and "http" not in svg


def test_coordinates_are_short_and_labels_whole() -> None:
    svg = layer_error_svg({"rtn": [0.1, 0.2]}, ["0", "1"], STYLES, (0.00005, 0.5), name="f", description="d")
    texts = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag == "text"]
    assert "0.0001" in texts and "0.001" in texts
    assert not re.search(r'[ "]\d+\.\d{3,}', svg)


def test_ids_are_the_figures_own() -> None:
    ids = [{e.attrib["id"] for e in ElementTree.fromstring(accuracy(n)).iter() if "id" in e.attrib} for n in "fg"]
    assert ids[0] and not ids[0] & ids[1]


def test_the_settings_of_the_process_neither_matter_nor_change() -> None:
    expected = accuracy()
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black"}):
        before = dict(matplotlib.rcParams)
        assert accuracy() == expected
        assert dict(matplotlib.rcParams) == before


def test_every_method_looks_different_and_plain_rounding_always_the_same() -> None:
    styles = method_styles([f"m{i}" for i in range(30)] + ["rtn"])
    assert len(set(styles.values())) == 31
    assert styles["rtn"] == STYLES["rtn"]
