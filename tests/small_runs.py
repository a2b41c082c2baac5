"""Small quantization runs: a recipe for tiny models, samples in memory and on disk, and comparing folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tiny_models import VISION_FAMILIES, tiny_image

from quant_experts import Recipe
from quant_experts.artifacts import CalibrationBatch, Sample
from quant_experts.calibration.batches import make_batches
from quant_experts.calibration.streaming import BlockStream
from quant_experts.runtime.loading import model_class, read_config
from quant_experts.runtime.processor import load_processor

SMALL = Recipe(
    name="paper",
    smoothing="exempt",
    exempt="frequency",
    important_channels=8,
    shared_rank=4,
    routed_rank=4,
    num_experts=4,
    group_inputs=False,
)
"""The paper's recipe at a size that fits layers of width 64."""


def small_samples(family: str, count: int = 4) -> list[Sample]:
    """Questions with images of different sizes, or without images for a text-only family."""
    images = [(tiny_image(84 + 28 * (i % 3), 84, seed=i),) if family in VISION_FAMILIES else () for i in range(count)]
    return [Sample(f"What is on picture {i}?", f"{i + 2} things", image) for i, image in enumerate(images)]


def write_samples(folder: Path, samples: Sequence[Sample], name: str = "samples.jsonl") -> Path:
    """The samples as a file with its images beside it."""
    lines = []
    for i, sample in enumerate(samples):
        line = {"question": sample.question, "answer": sample.answer}
        if sample.images:
            sample.images[0].save(folder / f"{i}.png")
            line["image"] = f"{i}.png"
        lines.append(json.dumps(line))
    (folder / name).write_text("\n".join(lines))
    return folder / name


def mixed_samples(family: str, count: int = 4) -> list[Sample]:
    """As `small_samples`, after one without an image."""
    return [Sample("What is on no picture?", "nothing"), *small_samples(family, count)]


def small_batches(
    family: str, folder: Path, count: int = 4, make: Callable[[str, int], list[Sample]] = small_samples
) -> list[CalibrationBatch]:
    """The samples as the model takes them."""
    return make_batches(make(family, count), load_processor(folder), read_config(folder))[0]


@contextmanager
def block_stream(folder: Path, batches: Sequence[CalibrationBatch], **options: Any) -> Iterator[BlockStream]:
    """A stream over a full-precision model, closed at the end."""
    config = read_config(folder)
    cpu = torch.device("cpu")
    stream = BlockStream(folder, model_class(config), config, batches, cpu, torch.float32, **options)
    try:
        yield stream
    finally:
        stream.close()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included, by its relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def python(code: str | Path, *arguments: str | Path, flags: Sequence[str] = (), **environment: str) -> Any:
    """Run code or a script in a fresh interpreter -> the finished process, with its output as text."""
    command = [sys.executable, *flags, *((str(code),) if isinstance(code, Path) else ("-c", code))]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)} | environment
    return subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=880
    )
