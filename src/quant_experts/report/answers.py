"""The example answers as a reader sees them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quant_experts.evaluation.comparison import AnswerExample

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 640
"""Images are shrunk to this many pixels: a report is sent around by mail."""


@dataclass(frozen=True)
class ShownAnswer:
    """One method's answer."""

    label: str
    text: str
    right: bool


@dataclass(frozen=True)
class ShownExample:
    """One question with its answers."""

    question: str
    reference: str
    image: str | None
    """A data URI."""
    answers: tuple[ShownAnswer, ...]


def shown(example: AnswerExample) -> ShownExample:
    """Mark each answer right or wrong and encode the image."""
    answers = tuple(
        ShownAnswer(label, text, same_answer(text, example.reference)) for label, text in example.answers.items()
    )
    image = None if example.image is None else data_uri(example.image)
    return ShownExample(example.question, example.reference, image, answers)


def same_answer(answer: str, reference: str) -> bool:
    """Exact match but for white space around, as the table counts it."""
    return answer.strip() == reference.strip()


def data_uri(image: Image) -> str:
    """The image as part of a page."""
    kind, content = encoded(image)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encoded(image: Image) -> tuple[str, bytes]:
    """The image on white, in the smaller of "png" (drawings) and "jpeg" (photos), and which of them that is."""
    import PIL.Image

    small = image.convert("RGBA")
    small.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    flat = PIL.Image.new("RGB", small.size, "white")
    flat.paste(small, mask=small.getchannel("A"))
    found = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        flat.save(buffer, format=kind, **options)
        found.append((len(buffer.getvalue()), kind, buffer.getvalue()))
    _, kind, content = min(found)
    return kind, content
