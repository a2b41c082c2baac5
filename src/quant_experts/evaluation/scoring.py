"""Scores one model: on a file of questions, on items against full precision, or by asking a single question."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quant_experts.calibration.images import ImageReader
from quant_experts.config import MAX_PIXELS
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.questions_file import EvaluationItem, read_questions
from quant_experts.evaluation.scorers import SCORERS
from quant_experts.evaluation.scores import score_answers
from quant_experts.runtime.loading import load, resolve
from quant_experts.runtime.processor import load_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int, str], None]


def open_model(model: str | Path, *, device: str | None = None) -> tuple[PreTrainedModel, Any]:
    """A model and its processor, on a device ("cuda" if there is one, by default)."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = resolve(model)
    processor = load_processor(folder)
    return load(folder, device_map=device), processor


def score_file(
    model: str | Path,
    questions: Path,
    *,
    scorer: str = "exact_match",
    limit: int | None = None,
    batch_size: int = 16,
    max_new_tokens: int = 32,
    device: str | None = None,
    predictions: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Answer a JSONL file of questions and score the answers by kind.

    scorer applies to lines that name none. With `predictions`, each answer and its score go to that JSONL file. Raises
    `QuantExpertsError` for bad input.
    """
    if scorer not in SCORERS:
        raise QuantExpertsError(f"Unknown scorer '{scorer}': choose one of {', '.join(SCORERS)}.")
    items = read_questions(questions, limit=limit, default_scorer=scorer)
    opened, processor = open_model(model, device=device)
    answers = generate_answers(
        opened,
        processor,
        items,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=None if progress is None else lambda done, total: progress(done, total, ""),
    )
    scores = score_answers(items, answers)
    if predictions is not None:
        _write_predictions(predictions, items, answers, scores.per_question)
    rows = {**scores.kinds, "average": scores.average}
    return dict(
        model=str(model),
        questions=len(items),
        scores={kind: dict(count=row.count, **row.score.to_json()) for kind, row in rows.items()},
    )


def _write_predictions(
    path: Path, items: Sequence[EvaluationItem], answers: Sequence[str], points: Sequence[float]
) -> None:
    """One JSON line a question, written whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for item, answer, score in zip(items, answers, points, strict=True):
                line = dict(
                    question=item.question, answers=item.answers, prediction=answer, score=score, kind=item.kind
                )
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise QuantExpertsError(f"Cannot write predictions to '{path}': {error.strerror}.") from error


def ask_model(
    model: str | Path,
    question: str,
    images: Sequence[Path],
    *,
    max_new_tokens: int = 128,
    device: str | None = None,
) -> str:
    """One greedy answer. Raises `QuantExpertsError` for a bad model or image."""
    reader = ImageReader(Path.cwd(), MAX_PIXELS)
    item = EvaluationItem(question, ("",), tuple(reader.read(str(image), "--image") for image in images))
    opened, processor = open_model(model, device=device)
    return generate_answers(opened, processor, [item], max_new_tokens=max_new_tokens)[0]
