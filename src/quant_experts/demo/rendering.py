"""The drawing surface of the demo questions: Pillow only, with its built-in scalable font: no downloads.

Every picture is a ``SIDE`` x ``SIDE`` RGB image. Contrast, glyph size and noise vary from picture to picture on
purpose: a task that a model solves with a wide margin everywhere cannot show what quantization costs.
"""

from functools import cache
from random import Random

from PIL import Image, ImageDraw, ImageFont

SIDE = 168

Color = tuple[int, int, int]

COLORS: dict[str, Color] = {
    "red": (205, 40, 40),
    "blue": (45, 70, 205),
    "green": (30, 125, 50),
    "pink": (235, 130, 180),
    "cyan": (50, 190, 205),
    "gold": (215, 170, 40),
    "gray": (125, 125, 125),
    "lime": (140, 215, 70),
}


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's built-in font at ``size`` pixels."""
    face = ImageFont.load_default(size)
    if not isinstance(face, ImageFont.FreeTypeFont):
        raise RuntimeError("the demo questions need a Pillow built with FreeType (its wheels are)")
    return face


def fitting_font(text: str, size: int, width: float) -> ImageFont.FreeTypeFont:
    """The built-in font at the largest size up to ``size`` at which ``text`` is at most ``width`` pixels wide."""
    while font(size).getlength(text) > width:
        size -= 1
    return font(size)


def jittered(rng: Random, color: Color, amount: int) -> Color:
    """``color`` with each channel moved by at most ``amount``."""
    red, green, blue = (min(255, max(0, channel + rng.randint(-amount, amount))) for channel in color)
    return red, green, blue


class Page:
    """A picture being drawn: a plain background, an ink of chosen contrast, and noise over all at the end."""

    def __init__(self, rng: Random, *, contrast: tuple[int, int], noise: float) -> None:
        """Choose paper and ink whose grey levels differ by ``contrast`` (least, most); noise up to ``noise`` of 1."""
        self._rng = rng
        self._noise = rng.uniform(0.0, noise)
        depth = rng.randint(*contrast)
        paper = rng.randint(depth, 245) if depth < 245 else 245
        tint = jittered(rng, (paper, paper, paper), 10)
        self.ink: Color = (max(0, tint[0] - depth), max(0, tint[1] - depth), max(0, tint[2] - depth))
        if depth < 120 and rng.random() < 0.3:  # light on dark
            tint, self.ink = self.ink, tint
        self.faint: Color = (
            (2 * tint[0] + self.ink[0]) // 3,
            (2 * tint[1] + self.ink[1]) // 3,
            (2 * tint[2] + self.ink[2]) // 3,
        )
        self._image = Image.new("RGB", (SIDE, SIDE), tint)
        self.draw = ImageDraw.Draw(self._image)

    def scratch(self, count: int) -> None:
        """Draw ``count`` faint lines across the page."""
        for _ in range(count):
            ends = [(0, self._rng.randrange(SIDE)), (SIDE, self._rng.randrange(SIDE))]
            self.draw.line(ends, fill=self.faint, width=1)

    def finish(self) -> Image.Image:
        """The picture with its noise."""
        grain = Image.frombytes("L", (SIDE, SIDE), self._rng.randbytes(SIDE * SIDE))
        return Image.blend(self._image, Image.merge("RGB", (grain, grain, grain)), self._noise)
