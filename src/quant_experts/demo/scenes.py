"""Questions about strings and coloured shapes: ``ocr``, ``counting``, ``color_position``."""

from random import Random

from PIL import Image, ImageDraw

from quant_experts.demo.rendering import COLORS, SIDE, Color, Page, fitting_font, jittered

# Without I and O, which the font draws too much like 1 and 0 at ten pixels.
GLYPHS = "ABCDEFGHJKLMNPQRSTUVWXYZ0123456789"
SHAPES = ("circles", "squares", "triangles")

Drawn = tuple[Image.Image, str, str]


def ocr(rng: Random) -> Drawn:
    """A random string of 12 to 16 characters, small and often of low contrast."""
    text = "".join(rng.choices(GLYPHS, k=rng.randint(12, 16)))
    page = Page(rng, contrast=(70, 220), noise=0.22)
    face = fitting_font(text, rng.randint(10, 17), SIDE - 6)
    _, top, right, bottom = face.getbbox(text)
    page.scratch(rng.randint(0, 2))
    corner = (rng.uniform(2, SIDE - right - 2), rng.uniform(2 - top, SIDE - bottom - 2))
    page.draw.text(corner, text, font=face, fill=page.ink)
    return page.finish(), "What does the text say?", text


def _shape(draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, color: Color) -> None:
    """Draw one shape centred at (x, y)."""
    if shape == "circles":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
    elif shape == "squares":
        half = 0.88 * radius  # about the circle's area, so that size alone tells nothing
        draw.rectangle((x - half, y - half, x + half, y + half), fill=color)
    else:
        reach = 1.15 * radius
        draw.polygon([(x, y - reach), (x - reach, y + radius), (x + reach, y + radius)], fill=color)


def counting(rng: Random) -> Drawn:
    """Circles, squares and triangles of several colours: count the three shapes of one colour."""
    names = rng.sample(sorted(COLORS), 3)
    page = Page(rng, contrast=(150, 220), noise=0.25)
    cells, side = 5, SIDE / 5
    counts = dict.fromkeys(SHAPES, 0)
    for cell in rng.sample(range(cells * cells), rng.randint(7, 18)):
        name, shape, radius = rng.choice([names[0], *names]), rng.choice(SHAPES), rng.uniform(5.5, 11)
        slack = side / 2 - radius
        x = (cell % cells + 0.5) * side + rng.uniform(-slack, slack)
        y = (cell // cells + 0.5) * side + rng.uniform(-slack, slack)
        _shape(page.draw, shape, x, y, radius, jittered(rng, COLORS[name], 22))
        counts[shape] += name == names[0]
    return page.finish(), f"Count {names[0]} circles, squares, triangles.", " ".join(map(str, counts.values()))


_ORDERS = ("left to right", "right to left", "top to bottom")


def color_position(rng: Random) -> Drawn:
    """Four discs of different colours: name the colours in an order of their places, which may differ by 4 pixels."""
    count, gap, radius = 4, 4, rng.uniform(6, 10)
    page = Page(rng, contrast=(150, 220), noise=0.3)
    names = rng.sample(sorted(COLORS), count)
    spread = rng.randint(24, 130) - gap * (count - 1)
    start = rng.uniform(12, SIDE - 12 - spread - gap * (count - 1))
    offsets = sorted(rng.uniform(0, spread) for _ in range(count))
    bands = rng.sample(range(6), count)
    places: list[tuple[float, float, str]] = []
    for index, (offset, band, name) in enumerate(zip(offsets, bands, names, strict=True)):
        x, y = start + offset + gap * index, 14 + 28 * band + rng.uniform(-4, 4)
        _shape(page.draw, "circles", x, y, radius, jittered(rng, COLORS[name], 25))
        places.append((x, y, name))
    order = rng.choice(_ORDERS)
    ranked = sorted(places, key=lambda place: place[1] if order == "top to bottom" else place[0])
    if order == "right to left":
        ranked.reverse()
    return page.finish(), f"Colors from {order}?", " ".join(name for _, _, name in ranked)
