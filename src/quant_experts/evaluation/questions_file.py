"""Reads the questions on which a model is compared with its quantized form: one JSON object a line.

`{"image": "a.png", "question": "...", "answer": "..."}`; `image` may be left out or be a list (also as `images`),
`answers` may list several accepted ones, `kind` names a group for the table, `scorer` one of `SCORERS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from PIL.Image import Image

from quant_experts.artifacts import Sample
from quant_experts.calibration.images import ImageReader
from quant_experts.calibration.samples import number_as_text, read_json_lines
from quant_experts.config import MAX_PIXELS
from quant_experts.demo.questions import Split, questions
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.scorers import SCORERS

KEYS = ("image", "images", "question", "answer", "answers", "kind", "scorer")


@dataclass(frozen=True)
class EvaluationItem:
    """One question, the answers that count as right, and how they are compared."""

    question: str
    answers: tuple[str, ...]
    images: tuple[Image, ...] = ()
    kind: str = "all"
    scorer: str = "exact_match"

    def as_sample(self) -> Sample:
        """The question with its first answer, for teacher-forced measures."""
        return Sample(self.question, self.answers[0], self.images)


def read_questions(
    path: str | Path,
    *,
    limit: int | None = None,
    images: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    default_scorer: str = "exact_match",
) -> list[EvaluationItem]:
    """The first `limit` questions of a JSONL file.

    Args:
        images: folder at which relative image paths start, by default the file's folder.
        default_scorer: compares the answers of lines that name no scorer.

    Raises:
        QuantExpertsError: naming the line, for a missing file, bad JSON, wrong or unknown keys, a bad image, or no
            question.
    """
    if limit is not None and limit < 1:
        raise QuantExpertsError(f"The number of questions is limited to {limit}: ask for at least one.")
    path = Path(path).expanduser()
    reader = ImageReader(Path(images) if images is not None else path.parent, max_pixels)
    lines = islice(read_json_lines(path), limit)
    items = [_read_item(record, where, reader, default_scorer) for where, record in lines]
    if not items:
        raise QuantExpertsError(f"'{path}' has no questions: write one JSON object a line, with question and answer.")
    return items


def demo_items(split: Split, count: int) -> list[EvaluationItem]:
    """The demo's first `count` questions of a split, for exact match."""
    return [
        EvaluationItem(each.question, (each.answer,), (each.image,) if each.image else (), each.kind)
        for each in questions(split, count)
    ]


def _read_item(record: Any, where: str, reader: ImageReader, default_scorer: str) -> EvaluationItem:
    if not isinstance(record, dict) or not isinstance(record.get("question"), str) or not record["question"].strip():
        raise QuantExpertsError(f"{where} has no question: write an object with question and answer.")
    unknown = sorted(set(record) - set(KEYS))
    if unknown:
        raise QuantExpertsError(f"{where} has the unknown key '{unknown[0]}': use {', '.join(KEYS)}.")
    answers = [number_as_text(answer) for answer in _listed(record, "answers", "answer")]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise QuantExpertsError(f"{where} needs an answer as text, or a list of texts under answers.")
    kind, scorer = record.get("kind", "all"), record.get("scorer", default_scorer)
    if not isinstance(kind, str) or scorer not in SCORERS:
        raise QuantExpertsError(f"{where}: kind must be text and scorer one of {', '.join(SCORERS)}.")
    pictures = tuple(reader.read(image, where) for image in _listed(record, "images", "image"))
    return EvaluationItem(record["question"], tuple(answers), pictures, kind, scorer)


def _listed(record: dict[str, Any], many: str, one: str) -> list[Any]:
    value = record.get(many, record.get(one))
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
