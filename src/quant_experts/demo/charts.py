"""Questions about charts: ``bar_chart`` and ``line_chart``. Values are integers read off against an axis, to the unit."""

from random import Random

from quant_experts.demo.rendering import COLORS, SIDE, Page, font, jittered
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


def bar_chart(rng: Random) -> Drawn:
    """Four to six labelled bars: the values of two of them."""
    page = Page(rng, contrast=(130, 220), noise=0.12)
    top = _axis(page, rng)
    labels = rng.sample("ABCDEFGHKMPRSTVWXYZ", rng.randint(4, 6))
    values = {label: rng.randint(1, top) for label in labels}
    step = (SIDE - 4 - _LEFT) / len(labels)
    width = step * rng.uniform(0.3, 0.75)
    color = jittered(rng, COLORS[rng.choice(("blue", "green", "red", "gray", "cyan"))], 25)
    for index, (label, value) in enumerate(values.items()):
        x = _LEFT + (index + 0.5) * step
        page.draw.rectangle((x - width / 2, _height(value, top), x + width / 2, _BOTTOM), fill=color)
        page.draw.text((x, SIDE - 9), label, font=font(12), fill=page.ink, anchor="mm")
    first, second = rng.sample(labels, 2)
    return page.finish(), f"Values of {first} and {second}?", f"{values[first]} {values[second]}"


def line_chart(rng: Random) -> Drawn:
    """Two lines over five or six positions: the values of one of them at two positions."""
    page = Page(rng, contrast=(130, 220), noise=0.12)
    top = _axis(page, rng)
    count = rng.randint(5, 6)
    xs = [_LEFT + 8 + index * (SIDE - 20 - _LEFT) / (count - 1) for index in range(count)]
    for index, x in enumerate(xs):
        page.draw.text((x, SIDE - 9), str(index + 1), font=font(11), fill=page.ink, anchor="mm")
    lines: dict[str, list[int]] = {}
    for name in rng.sample(("red", "blue", "green", "gold"), 2):
        lines[name] = [rng.randint(0, top) for _ in range(count)]
        points = [(x, _height(value, top)) for x, value in zip(xs, lines[name], strict=True)]
        color = jittered(rng, COLORS[name], 15)
        page.draw.line(points, fill=color, width=rng.randint(1, 2))
        for x, y in points:
            page.draw.ellipse((x - 2, y - 2, x + 2, y + 2), fill=color)
    name = rng.choice(sorted(lines))
    first, second = rng.sample(range(count), 2)
    question = f"Values of {name} at {first + 1} and {second + 1}?"
    return page.finish(), question, f"{lines[name][first]} {lines[name][second]}"
