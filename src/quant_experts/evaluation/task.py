"""What methods are compared on: a model, calibration samples and questions; the bundled ones or a user's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast, get_args

from quant_experts import __version__
from quant_experts.artifacts import CalibrationBatch, Event, Sample
from quant_experts.calibration.batches import make_batches
from quant_experts.calibration.samples import load_samples
from quant_experts.checkpoint.source import spot_check, weight_files
from quant_experts.config import MAX_PIXELS
from quant_experts.demo import KINDS, model_path
from quant_experts.demo.questions import Split, questions
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.questions_file import EvaluationItem, demo_items, read_questions
from quant_experts.runtime.loading import check_device, read_config, resolve
from quant_experts.runtime.processor import load_processor

DEMO = "demo"
DEMO_QUESTIONS = 280
PACKAGE = Path(__file__).parents[1]
_UNRELATED = ("report", "demo", "cli")
"""Parts of the package that decide no figure of a row."""


@dataclass(frozen=True)
class Task:
    """One model with the samples that calibrate it and the questions that score it."""

    model: Path
    name: str
    """How a report calls the model."""
    samples: list[Sample]
    items: list[EvaluationItem]
    device: str
    batch_size: int = 32
    max_new_tokens: int = 24
    events: tuple[Event, ...] = ()
    """What could not be read as given."""

    @property
    def width(self) -> int:
        """The model's hidden size, which ranks scale with."""
        return int(read_config(self.model).get_text_config().hidden_size)

    def without_images(self) -> Task:
        """The same task, calibrated on the samples' text alone."""
        return replace(self, samples=[replace(sample, images=()) for sample in self.samples])

    def batches(self) -> list[CalibrationBatch]:
        """The questions with their first reference answers, for teacher forcing."""
        samples = [item.as_sample() for item in self.items]
        batches, events = make_batches(samples, load_processor(self.model), read_config(self.model))
        if events:
            raise QuantExpertsError(f"The questions could not all be read: {events[0].what}.")
        return batches

    @cached_property
    def calibration_key(self) -> dict[str, Any]:
        """What decides a checkpoint, besides its configuration."""
        return dict(
            model={path.name: spot_check(path) for path in weight_files(self.model)},
            samples=_digest((sample.question, sample.answer, *sample.images) for sample in self.samples),
            device=self.device,
            versions=library_versions() | {"source": _source_digest()},
        )

    @cached_property
    def question_key(self) -> dict[str, Any]:
        """What decides a model's scores, besides the model."""
        items = _digest((item.question, *item.answers, item.kind, item.scorer, *item.images) for item in self.items)
        return dict(questions=items, max_new_tokens=self.max_new_tokens)


def open_task(
    model: str,
    *,
    samples: str | None = None,
    questions: Path | None = None,
    sample_limit: int = 128,
    question_limit: int | None = None,
    split: str = "tuning",
    device: str | None = None,
    batch_size: int = 32,
    max_new_tokens: int = 24,
) -> Task:
    """The bundled task for the name `demo`, or a model with the user's samples and questions.

    Args:
        samples: anything `load_samples` reads. questions: a JSONL file as `eval` reads.
        split: which of the demo's questions; a model of the user's has its own.

    Raises:
        QuantExpertsError: for anything that is missing or cannot be read.
    """
    import torch

    device = str(check_device(device or ("cuda" if torch.cuda.is_available() else "cpu")))
    limits: dict[str, Any] = dict(device=device, batch_size=batch_size, max_new_tokens=max_new_tokens)
    if model == DEMO and not Path(model).exists():
        count = DEMO_QUESTIONS if question_limit is None else question_limit
        given = _demo_task(samples, questions, sample_limit, count, split)
    else:
        if samples is None or questions is None:
            raise QuantExpertsError(
                f"'{model}' has no samples or questions of its own: give --samples to calibrate with and --questions "
                "to score."
            )
        loaded, events = load_samples(samples, limit=sample_limit, max_pixels=MAX_PIXELS)
        items = read_questions(questions, limit=question_limit)
        given = dict(model=resolve(model), name=model, samples=loaded, items=items, events=tuple(events))
    return Task(**given, **limits)


def _demo_task(samples: str | None, file: Path | None, sample_limit: int, count: int, split: str) -> dict[str, Any]:
    if split not in get_args(Split):
        raise QuantExpertsError(f"Unknown split '{split}': choose one of {', '.join(get_args(Split))}.")
    if count < len(KINDS) and file is None:
        raise QuantExpertsError(f"{count} questions do not cover the {len(KINDS)} kinds: ask for more.")
    rendered = [(q.image, q.question, q.answer) for q in questions("calibration", sample_limit)]
    loaded, events = load_samples(samples or rendered, limit=sample_limit, max_pixels=MAX_PIXELS)
    return dict(
        model=model_path(),
        name="the bundled demo model (a test bed, not a claim about real models)",
        samples=loaded,
        items=read_questions(file, limit=count) if file else demo_items(cast(Split, split), count),
        events=tuple(events),
    )


def library_versions() -> dict[str, str]:
    """The versions that figures depend on."""
    import torch
    import transformers

    return {"quant_experts": __version__, "torch": torch.__version__, "transformers": transformers.__version__}


def _source_digest() -> str:
    """Of the package's own code, so that a developer's change is not answered with an old figure."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE).parts[0] not in _UNRELATED:
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(records: Any) -> str:
    """Of tuples of texts and images."""
    digest = hashlib.sha256()
    for record in records:
        for value in record:
            if isinstance(value, str):
                digest.update(b"t" + value.encode("utf-8", errors="replace") + b"\0")
            else:
                digest.update(f"i{value.size}{value.mode}".encode() + value.tobytes())
        digest.update(b"\n")
    return digest.hexdigest()[:16]
