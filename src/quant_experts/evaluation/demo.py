"""The demo: the bundled model, quantized by several recipes, scored against its full precision on rendered
questions.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor

from quant_experts import __version__
from quant_experts.artifacts import CalibrationBatch, Event, GroupRecord
from quant_experts.calibration.batches import make_batches
from quant_experts.checkpoint.inspection import read_report
from quant_experts.config import QuantizationConfig
from quant_experts.demo import KINDS, model_path
from quant_experts.demo.questions import Split, questions
from quant_experts.errors import QuantExpertsError
from quant_experts.evaluation.comparison import FULL_PRECISION, AnswerExample, Comparison, MethodRow
from quant_experts.evaluation.fidelity import answer_kl, answer_log_probs, answer_nll
from quant_experts.evaluation.generation import generate_answers
from quant_experts.evaluation.questions_file import EvaluationItem, demo_items
from quant_experts.evaluation.scores import score_answers
from quant_experts.evaluation.scoring import open_model
from quant_experts.pipeline import quantize

EXAMPLES = 3
BATCH_SIZE = 32
MAX_NEW_TOKENS = 24

Progress = Callable[[int, int, str], None]


@dataclass
class _Bench:
    """What every method is measured on."""

    items: list[EvaluationItem]
    batches: list[CalibrationBatch]
    reference: list[Tensor] | None = None
    """Full precision's log-probabilities at each answer token."""

    def measure(self, folder: Path, method: str, scheme: str, **extra: Any) -> tuple[MethodRow, list[str]]:
        """A row of the table, and the answers."""
        started = time.perf_counter()
        model, processor = open_model(folder, device="cpu")
        answers = generate_answers(model, processor, self.items, batch_size=BATCH_SIZE, max_new_tokens=MAX_NEW_TOKENS)
        log_probs = answer_log_probs(model, self.batches)
        kl = answer_kl(self.reference, log_probs).tolist() if self.reference is not None else None
        scores = score_answers(self.items, answers, nll=answer_nll(log_probs, self.batches).tolist(), kl=kl)
        if self.reference is None:
            self.reference = log_probs
        assert scores.average.nll is not None
        row = MethodRow(
            method=method,
            scheme=scheme,
            accuracy={"average": scores.average.score, **{kind: row.score for kind, row in scores.kinds.items()}},
            nll=scores.average.nll,
            kl=scores.average.kl,
            evaluate_seconds=time.perf_counter() - started,
            **extra,
        )
        return row, answers


def run_demo(
    output: Path,
    *,
    schemes: Sequence[str],
    recipes: Sequence[str],
    questions: int,
    split: str,
    samples: int,
    seed: int,
    command: str,
    progress: Progress,
) -> Comparison:
    """Quantize the bundled model with each recipe at each scheme into `output`, and score all of them.

    Ranks and channel counts are the paper's, scaled to the model's width. A checkpoint that an earlier call with the
    same settings finished is used again. Raises `QuantExpertsError` for unknown names.
    """
    if split not in get_args(Split):
        raise QuantExpertsError(f"Unknown split '{split}': choose one of {', '.join(get_args(Split))}.")
    if questions < len(KINDS):
        raise QuantExpertsError(f"{questions} questions do not cover the {len(KINDS)} kinds: ask for more.")
    configs = [
        QuantizationConfig.of(scheme, recipe, scale_with_width=True, seed=seed, samples=samples)
        for scheme in schemes
        for recipe in recipes
    ]
    steps = 1 + 2 * len(configs)
    progress(0, steps, FULL_PRECISION)
    bench = _make_bench(questions, cast(Split, split))
    row, full_answers = bench.measure(model_path(), FULL_PRECISION, "")
    rows, layers, events = [row], {}, {}
    answers = {FULL_PRECISION: full_answers}
    for number, config in enumerate(configs):
        label = f"{config.recipe.name} {config.scheme}"
        progress(1 + 2 * number, steps, f"quantizing {label}")
        folder = output / label.replace(" ", "-")
        facts = _quantize_once(folder, config)
        progress(2 + 2 * number, steps, f"scoring {label}")
        row, answers[label] = bench.measure(folder, config.recipe.name, str(config.scheme), **facts)
        rows.append(row)
        report = read_report(folder)
        layers[label] = tuple(GroupRecord(**group) for group in report["groups"])
        events[label] = tuple(Event(**event) for event in report["events"])
    progress(steps, steps, "done")
    return Comparison(
        title="Quant Experts on the bundled vision-language model",
        model="the bundled demo model (a test bed, not a claim about real models)",
        command=command,
        questions=len(bench.items),
        rows=tuple(rows),
        layers=layers,
        answers=_examples(bench.items, answers),
        events=events,
        versions=_versions(),
    )


def _make_bench(count: int, split: Split) -> _Bench:
    from quant_experts.runtime.loading import read_config
    from quant_experts.runtime.processor import load_processor

    items = demo_items(split, count)
    folder = model_path()
    batches, events = make_batches([item.as_sample() for item in items], load_processor(folder), read_config(folder))
    if events:
        raise QuantExpertsError(f"The demo's questions could not all be read: {events[0].what}.")
    return _Bench(items, batches)


def _quantize_once(folder: Path, config: QuantizationConfig) -> dict[str, Any]:
    """Quantize unless it was done with this configuration. -> bits, seconds and peak memory of the run that did it."""
    facts_file = folder.with_name(folder.name + ".json")
    if facts_file.is_file() and folder.is_dir():
        facts: dict[str, Any] = json.loads(facts_file.read_text(encoding="utf-8"))
        if facts.pop("config", None) == config.to_json():
            return facts
    samples = [(q.image, q.question, q.answer) for q in questions("calibration", config.samples)]
    result = quantize(model_path(), samples, folder, config, device="cpu")
    facts = dict(bits_per_weight=result.bits_per_weight, quantize_seconds=result.seconds, peak_bytes=result.peak_bytes)
    facts_file.write_text(json.dumps({"config": config.to_json(), **facts}), encoding="utf-8")
    return facts


def _examples(items: Sequence[EvaluationItem], answers: dict[str, list[str]]) -> tuple[AnswerExample, ...]:
    """One image question of each of the first kinds, preferring those on which the methods disagree."""
    examples: dict[str, AnswerExample] = {}
    pictured = [i for i, item in enumerate(items) if item.images]
    pictured.sort(key=lambda i: len({given[i] for given in answers.values()}) == 1)  # stable: disagreement first
    for i in pictured:
        item = items[i]
        if item.kind not in examples and len(examples) < EXAMPLES:
            given = {label: all_answers[i] for label, all_answers in answers.items()}
            examples[item.kind] = AnswerExample(item.question, item.answers[0], item.images[0], given)
    return tuple(examples.values())


def _versions() -> dict[str, str]:
    import transformers

    return {
        "quant_experts": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
