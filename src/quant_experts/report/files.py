"""The report's figures as files, for documents and slides. Needs the optional libraries."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.comparison import Comparison
from quant_experts.report.answers import encoded
from quant_experts.report.figures import Figure
from quant_experts.report.page import Legend, fill, sections

LETTER = 4.6
"""Width of a letter in the drawing's units, on average: nothing here can measure text."""


def write_figures(comparison: Comparison, folder: Path) -> list[Path]:
    """Write every figure of the report to `folder` as an SVG file of its own, legend included, and the images of the
    example answers; returns the files.

    Raises `QuantExpertsError` if they cannot be written.
    """
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for figure, legend in drawn(sections(comparison)):
            path = folder / f"{figure.name}.svg"
            path.write_text(svg_document(figure, legend), encoding="utf-8", errors="replace")
            written.append(path)
        for number, example in enumerate(comparison.answers):
            if example.image is not None:
                kind, content = encoded(example.image)
                path = folder / f"question{number}.{kind}"
                path.write_bytes(content)
                written.append(path)
    except OSError as error:
        raise QuantExpertsError(f"Figures cannot be written to '{folder}': {error.strerror or error}.") from error
    return written


def drawn(content: dict[str, Any]) -> Iterator[tuple[Figure, Legend]]:
    """Every figure among the page's sections, in their order, with its legend; empty where it needs none."""
    errors, channels = content["errors"], content["channels"]
    parts: list[tuple[list[Figure], Legend]] = [
        (content["accuracy"], content["accuracy_legend"]),
        (content["fronts"], content["front_legend"]),
        (errors.figures if errors else [], content["error_legend"]),
        (content["modality_errors"], content["modality_legend"]),
        (channels.get("figures", []), channels.get("legend", [])),
        (channels.get("maps", []), []),
        (content["clusters"].get("figures", []), []),
        *((entry["figures"] + entry["places"], []) for entry in content["experts"]),
    ]
    for figures, legend in parts:
        yield from ((figure, legend) for figure in figures)


def svg_document(figure: Figure, legend: Legend) -> str:
    """The figure under its title and beside its legend, on white, as a document that stands alone."""
    found = re.match(r'<svg (viewBox="0 0 ([\d.]+) ([\d.]+)".*)', figure.svg, re.DOTALL)
    assert found is not None
    width, height = float(found[2]), float(found[3])
    beside = 36 + LETTER * max(len(name) for name, _ in legend) if legend else 0
    return fill(
        "figure.svg",
        dict(
            figure=figure,
            drawing=Markup(found[1]),
            drawing_width=width,
            drawing_height=height,
            legend=legend,
            width=round(max(width + beside, 12 + 1.1 * LETTER * len(figure.title))),
            height=round(max(height + 24, 30 + 13 * len(legend))),
        ),
    )
