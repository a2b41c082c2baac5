"""Makes one row after another: quantize, then score against full precision. What is finished is not done again.

Beside each checkpoint `LABEL` lies `LABEL.json` with what decided it and what was measured on it. A row whose settings
are the same is read back; one whose settings changed is made again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from quant_experts.artifacts import CalibrationBatch, Event, GroupRecord
from quant_experts.checkpoint.inspection import read_report
from quant_experts.checkpoint.run_folder import REPORT_NAME
from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec
from quant_experts.checkpoint.source import read_json
from quant_experts.config import QuantizationConfig
from quant_experts.evaluation.comparison import FULL_PRECISION
from quant_experts.evaluation.fidelity import answer_kl, answer_log_probs, answer_nll
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.scorers import SCORERS
from quant_experts.evaluation.scoring import open_model
from quant_experts.evaluation.task import Task
from quant_experts.pipeline import quantize

Progress = Callable[[int, int, str], None]
STEPS = 20
"""Steps of the progress bar for each row: half of them for quantizing, half for scoring."""


@dataclass(frozen=True)
class Contender:
    """A row to be made."""

    method: str
    config: QuantizationConfig
    scheme: str
    """Under which it is listed; a control may be stored at another one."""
    text_only: bool = False
    """Calibrated without the samples' images."""

    @property
    def label(self) -> str:
        """The row's name in figures: "paper W4A6"."""
        return f"{self.method} {self.scheme}"


@dataclass(frozen=True)
class Outcome:
    """What was measured: one number and one answer for each question, and the checkpoint's own records."""

    method: str
    scheme: str
    answers: list[str]
    points: list[float]
    nll: list[float]
    kl: list[float] | None
    evaluate_seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    """`bits_per_weight`, `quantize_seconds` and `peak_bytes`; empty for full precision."""
    records: tuple[GroupRecord, ...] = ()
    groups: tuple[GroupSpec, ...] = ()
    """In the order of the records."""
    events: tuple[Event, ...] = ()
    contender: Contender | None = None
    """None for full precision."""

    @property
    def label(self) -> str:
        """As the contender's."""
        return f"{self.method} {self.scheme}".strip()


class Bench:
    """A task, a folder for checkpoints and rows, and full precision to compare with."""

    def __init__(self, task: Task, output: Path, rows: int, progress: Progress) -> None:
        """rows: how many will be asked for, full precision included, to tell the time left."""
        self.task, self.output = task, output
        self._total, self._done, self._progress = STEPS * rows, 0, progress
        self._batches: list[CalibrationBatch] = []
        self._reference: list[Tensor] | None = None
        """Full precision's log-probabilities, one (n, V) for each question; made when a row first needs them."""

    def full_precision(self) -> Outcome:
        """The row that the others are measured against."""
        saved = self._read(FULL_PRECISION)
        key = dict(model=self.task.calibration_key["model"], versions=self.task.calibration_key["versions"])
        if saved.get("made") != key or saved.get("scored") != self.task.question_key:
            scores = self._score(self.task.model, FULL_PRECISION, reference=True)
            saved = dict(made=key, scored=self.task.question_key, scores=scores)
            self._write(FULL_PRECISION, saved)
        self._done += STEPS
        self._progress(self._done, self._total, FULL_PRECISION)
        return Outcome(FULL_PRECISION, "", **saved["scores"])

    def outcome(self, contender: Contender) -> Outcome:
        """Quantize and score, or read what an earlier call with the same settings found."""
        saved = self._quantized(contender)
        folder = self._folder(contender.label)
        if saved.get("scored") != self.task.question_key:
            self._load_reference()
            self._tick(STEPS // 2, 0, 1, f"scoring {contender.label}")
            saved["scores"] = self._score(folder, contender.label)
            saved["scored"] = self.task.question_key
            self._write(contender.label, saved)
        self._done += STEPS
        self._progress(self._done, self._total, contender.label)
        report = read_report(folder)
        checkpoint = CheckpointConfig.read(read_json(folder / "config.json")["quantization_config"])
        return Outcome(
            contender.method,
            contender.scheme,
            **saved["scores"],
            facts=saved["facts"],
            records=tuple(GroupRecord(**group) for group in report["groups"]),
            groups=checkpoint.groups,
            events=tuple(Event(**event) for event in report["events"]),
            contender=contender,
        )

    def _quantized(self, contender: Contender) -> dict[str, Any]:
        """What is known of the contender's checkpoint, which is made unless it is there."""
        task = self.task.without_images() if contender.text_only else self.task
        key = task.calibration_key | {"config": contender.config.to_json()}
        folder, saved = self._folder(contender.label), self._read(contender.label)
        if saved and saved.get("made") == key and (folder / REPORT_NAME).is_file():
            return saved
        if saved and (folder / REPORT_NAME).is_file():  # ours, of other settings; never a folder that is not ours
            shutil.rmtree(folder)
        self._file(contender.label).unlink(missing_ok=True)
        what = f"quantizing {contender.label}"
        result = quantize(
            task.model,
            task.samples,
            folder,
            contender.config,
            device=task.device,
            progress=lambda done, total, _: self._tick(0, done, total, what),
        )
        facts = dict(
            bits_per_weight=result.bits_per_weight, quantize_seconds=result.seconds, peak_bytes=result.peak_bytes
        )
        saved = dict(made=key, facts=facts)
        self._write(contender.label, saved)
        return saved

    def _score(self, folder: Path, label: str, *, reference: bool = False) -> dict[str, Any]:
        """Greedy answers and teacher-forced measures of one model; with `reference` it becomes what others are measured
        against."""
        started = time.perf_counter()
        task, what = self.task, f"scoring {label}"
        self._batches = self._batches or task.batches()
        model, processor = open_model(folder, device=task.device)
        answers = generate_answers(
            model,
            processor,
            task.items,
            batch_size=task.batch_size,
            max_new_tokens=task.max_new_tokens,
            progress=lambda done, total: self._tick(STEPS // 2, done, total, what),
        )
        log_probs = answer_log_probs(model, self._batches)
        if reference:
            self._reference = log_probs
        assert self._reference is not None
        points = zip(task.items, answers, strict=True)
        return dict(
            answers=answers,
            points=[SCORERS[item.scorer](answer, item.answers) for item, answer in points],
            nll=answer_nll(log_probs, self._batches).tolist(),
            kl=None if reference else answer_kl(self._reference, log_probs).tolist(),
            evaluate_seconds=time.perf_counter() - started,
        )

    def _load_reference(self) -> None:
        """Full precision's log-probabilities, where its scores were read from an earlier call."""
        if self._reference is None:
            self._batches = self.task.batches()
            model, _ = open_model(self.task.model, device=self.task.device)
            self._reference = answer_log_probs(model, self._batches)

    def _tick(self, first: int, done: int, total: int, what: str) -> None:
        """Report `done` of `total` of one half of a row, whose steps begin at `first`."""
        self._progress(self._done + first + STEPS // 2 * done // max(1, total), self._total, what)

    def _folder(self, label: str) -> Path:
        return self.output / re.sub(r"[^\w.]+", "-", label).strip("-")

    def _file(self, label: str) -> Path:
        folder = self._folder(label)
        return folder.with_name(folder.name + ".json")

    def _read(self, label: str) -> dict[str, Any]:
        """The row's file; empty where there is none that can be read."""
        try:
            saved = json.loads(self._file(label).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return saved if isinstance(saved, dict) else {}

    def _write(self, label: str, saved: dict[str, Any]) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        file = self._file(label)
        temporary = file.with_name(file.name + ".tmp")
        temporary.write_text(json.dumps(saved), encoding="utf-8")
        os.replace(temporary, file)
