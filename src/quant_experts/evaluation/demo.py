"""The demo: the bundled model, quantized by a few recipes, scored against its full precision on rendered questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quant_experts.evaluation.bench import Progress
from quant_experts.evaluation.comparison import Comparison
from quant_experts.evaluation.scoreboard import compare, contenders
from quant_experts.evaluation.task import DEMO, open_task


def run_demo(
    output: Path,
    *,
    schemes: Sequence[str],
    recipes: Sequence[str],
    questions: int,
    split: str,
    samples: int,
    seed: int,
    progress: Progress,
) -> Comparison:
    """Quantize the bundled model with each recipe at each scheme into `output`, and score all of them.

    Ranks and channel counts are the paper's, scaled to the model's width. A row that an earlier call with the same
    settings finished is used again. Raises `QuantExpertsError` for unknown names.
    """
    rows = contenders(recipes, schemes, scale_with_width=True, seed=seed, samples=samples)
    task = open_task(DEMO, sample_limit=samples, question_limit=questions, split=split, device="cpu")
    title = "Quant Experts on the bundled vision-language model"
    options = [f"--schemes {','.join(schemes)}", f"--recipes {','.join(recipes)}", f"--questions {questions}"]
    command = " ".join(["quant-experts demo", *options, f"--split {split} --samples {samples} --seed {seed}"])
    return compare(task, rows, output, title=title, command=command, progress=progress)
