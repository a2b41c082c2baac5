"""Questions about charts: ``bar_chart`` and ``line_chart``. Values are integers, read off an axis to the unit."""

from random import Random

from quant_experts.demo.rendering import COLORS, SIDE, Color, Page, font, jittered
from quant_experts.demo.scenes import Drawn

# The larger the axis, the fewer pixels a unit has: from about six down to 1.3.
AXES = (20, 40, 60, 80, 100)
_LEFT, _TOP, _BOTTOM = 24, 12, SIDE - 18


def _axis(page: Page, rng: Random) -> int:
    """Draw a value axis with four intervals; return its highest value."""
    top = rng.choice(AXES)
    for step in range(5):
        y = _height(top * step / 4, top)
        page.draw.line([(_LEFT, y), (SIDE - 4, y)], fill=page.faint)
        page.draw.text((_LEFT - 3, y), str(top * step // 4), font=font(9), fill=page.ink, anchor="rm")
    page.draw.line([(_LEFT, _TOP), (_LEFT, _BOTTOM)], fill=page.ink)
    return top


def _height(value: float, top: int) -> float:
    """The y of ``value`` on an axis from 0 to ``top``."""
    return _BOTTOM - (_BOTTOM - _TOP) * value / top


def _series(page: Page, rng: Random) -> tuple[list[float], dict[str, list[int]], int]:
    """Axes and two named series of values: the positions on the page, the values by color name, the axis' top."""
    top = _axis(page, rng)
    count = rng.randint(5, 6)
    xs = [_LEFT + 8 + index * (SIDE - 20 - _LEFT) / (count - 1) for index in range(count)]
    for index, x in enumerate(xs):
        page.draw.text((x, SIDE - 9), str(index + 1), font=font(11), fill=page.ink, anchor="mm")
    names = rng.sample(("red", "blue", "green", "gold"), 2)
    return xs, {name: [rng.randint(0, top) for _ in range(count)] for name in names}, top


def _asked(page: Page, rng: Random, series: dict[str, list[int]]) -> Drawn:
    """The finished page with a question for two values of one series."""
    name = rng.choice(sorted(series))
    first, second = rng.sample(range(len(series[name])), 2)
    question = f"Values of {name} at {first + 1} and {second + 1}?"
    return page.finish(), question, f"{series[name][first]} {series[name][second]}"


def _dot(page: Page, x: float, y: float, color: Color) -> None:
    page.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)


def bar_chart(rng: Random) -> Drawn:
    """Two series of thin bars, each ending in a dot, over five or six positions: two values of one series."""
    page = Page(rng, contrast=(130, 220), noise=0.12)
    xs, series, top = _series(page, rng)
    strength = rng.uniform(0.4, 0.8)
    for name, values in series.items():
        color = jittered(rng, COLORS[name], 15)
        red, green, blue = (
            round((1 - strength) * back + strength * front) for back, front in zip(page.faint, color, strict=True)
        )
        for x, value in zip(xs, values, strict=True):
            y = _height(value, top)
            page.draw.line([(x, y), (x, _BOTTOM)], fill=(red, green, blue))
            _dot(page, x, y, color)
    return _asked(page, rng, series)


def line_chart(rng: Random) -> Drawn:
    """Two lines over five or six positions: two values of one line."""
    page = Page(rng, contrast=(130, 220), noise=0.12)
    xs, series, top = _series(page, rng)
    for name, values in series.items():
        points = [(x, _height(value, top)) for x, value in zip(xs, values, strict=True)]
        color = jittered(rng, COLORS[name], 15)
        page.draw.line(points, fill=color, width=rng.randint(1, 2))
        for x, y in points:
            _dot(page, x, y, color)
    return _asked(page, rng, series)
