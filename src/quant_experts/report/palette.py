"""One look for each method in every figure and legend: colour, marker and dash: colour is never the only sign."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from quant_experts.report.columns import PLAIN_ROUNDING

# Dark enough to be read on white, and told apart under the common kinds of colour blindness.
_COLORS = ("#0072B2", "#D55E00", "#008060", "#AA4499", "#332288", "#997700", "#882255", "#44739E")
_SHAPES = ((24, 0.0), (4, 45.0), (3, 0.0), (4, 0.0), (3, 180.0), (5, 0.0), (6, 0.0))
# Shapes of one radius differ in area: a circle looks larger than a triangle.
_RADIUS = {24: 0.85, 3: 1.15}
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.5, 1.5), (5, 1.5, 1.5, 1.5))


@dataclass(frozen=True)
class Style:
    """How a line or point is drawn."""

    color: str
    sides: int = 24
    angle: float = 0.0
    dash: tuple[float, ...] = ()
    """Lengths on and off, in line widths; empty: solid."""
    line: bool = True
    marker: bool = True

    @property
    def outline(self) -> list[tuple[float, float]]:
        """Corners of the marker, y upwards."""
        turns = [math.radians(90 + self.angle + 360 * corner / self.sides) for corner in range(self.sides)]
        radius = _RADIUS.get(self.sides, 1.0)
        return [(round(radius * math.cos(turn), 4), round(radius * math.sin(turn), 4)) for turn in turns]

    @property
    def points(self) -> str:
        """The same as the `points` of an SVG polygon of radius 4 about (16, 6)."""
        return " ".join(f"{16 + 4 * x:.2f},{6 - 4 * y:.2f}" for x, y in self.outline)


FULL_PRECISION_STYLE = Style("#1F2933", marker=False)
RTN_STYLE = Style("#5F6B7A", sides=4, angle=0.0, dash=(2.5, 1.5))

TOKEN_STYLES = {
    "all": Style("#1F2933", marker=False),
    "text": Style("#0072B2", line=False),
    "image": Style("#D55E00", sides=3, line=False),
    "answer": Style("#008060", sides=4, line=False),
}


def method_styles(methods: Iterable[str]) -> dict[str, Style]:
    """A style for each name; plain rounding always looks the same."""
    names = list(dict.fromkeys(methods))
    styles: dict[str, Style] = {}
    for index, name in enumerate(name for name in names if name != PLAIN_ROUNDING):
        sides, angle = _SHAPES[index % len(_SHAPES)]
        dash = _DASHES[index // len(_COLORS) % len(_DASHES)]
        styles[name] = Style(_COLORS[index % len(_COLORS)], sides, angle, dash)
    return {name: styles.get(name, RTN_STYLE) for name in names}
