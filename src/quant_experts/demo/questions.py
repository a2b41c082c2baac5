"""The demo's questions: rendered when asked for, always the same, different in each split.

Question ``i`` of a split is drawn by a random generator seeded with the text ``"<seed of the split>/<i>"`` and by
nothing else, so a longer list begins with a shorter one, and questions can be rendered in parallel in any order. The
kinds take turns: question ``i`` has kind ``KINDS[i % len(KINDS)]``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Final, Literal

from PIL import Image

from quant_experts.demo.charts import bar_chart, line_chart
from quant_experts.demo.scenes import Drawn, color_position, counting, ocr
from quant_experts.demo.writing import document, text

Split = Literal["train", "calibration", "tuning", "test"]

SEEDS: Final[dict[Split, str]] = {
    "train": "quant-experts demo train 1",
    "calibration": "quant-experts demo calibration 2",
    "tuning": "quant-experts demo tuning 3",
    "test": "quant-experts demo test 4",
}

_DRAWN: Final[dict[str, Callable[[Random], Drawn]]] = {
    "ocr": ocr,
    "counting": counting,
    "color_position": color_position,
    "bar_chart": bar_chart,
    "line_chart": line_chart,
    "document": document,
}

KINDS: Final[tuple[str, ...]] = (*_DRAWN, "text")


@dataclass(frozen=True)
class Question:
    """A question with its one right answer, compared as text; ``image`` is None where the question needs no picture."""

    kind: str
    image: Image.Image | None
    question: str
    answer: str


def question(split: Split, index: int) -> Question:
    """Question ``index`` of ``split``."""
    rng = Random(f"{SEEDS[split]}/{index}")
    kind = KINDS[index % len(KINDS)]
    if kind == "text":
        return Question(kind, None, *text(rng))
    return Question(kind, *_DRAWN[kind](rng))


def questions(split: Split, count: int) -> list[Question]:
    """The first ``count`` questions of ``split``."""
    return [question(split, index) for index in range(count)]
