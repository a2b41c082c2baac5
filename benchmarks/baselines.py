"""Layer error of the field's methods over plain rounding's: the geometric mean over groups of the bundled model.

Errors are those of held-out calibration tokens. Adapters' ranks follow the model's width. Results that are in the file
already are not made again. Prints a line a run and writes benchmarks/results/baselines.json.

    python benchmarks/baselines.py [--schemes W4A6,W3A16] [--recipes awq,mbq]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch

from quant_experts.artifacts import GroupRecord, Sample
from quant_experts.config import QuantizationConfig
from quant_experts.demo import model_path
from quant_experts.demo.questions import questions
from quant_experts.pipeline import quantize

RESULTS = Path(__file__).parent / "results" / "baselines.json"
SAMPLES = 128
RECIPES = "smoothquant,awq,mbq,lqer,lqer-r64,qera-approx,qera-approx-r64,qera,qera-r64,svdquant,paper,paper-refined"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--schemes", default="W4A6,W3A16")
    parser.add_argument("--recipes", default=RECIPES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    samples = [Sample(q.question, q.answer, (q.image,) if q.image else ()) for q in questions("calibration", SAMPLES)]
    for scheme in arguments.schemes.split(","):
        for recipe in arguments.recipes.split(","):
            if not any(row["scheme"] == scheme and row["recipe"] == recipe for row in rows):
                rows.append(dict(scheme=scheme, recipe=recipe) | measure(samples, scheme, recipe))
                print(json.dumps(rows[-1]), flush=True)
                RESULTS.write_text(json.dumps(rows, indent=1) + "\n")


def measure(samples: list[Sample], scheme: str, recipe: str) -> dict[str, Any]:
    """Error over plain rounding's, of all groups and by a group's first linear, and stored bits per weight."""
    config = QuantizationConfig.of(scheme, recipe, scale_with_width=True)
    with tempfile.TemporaryDirectory() as folder:
        result = quantize(model_path(), samples, Path(folder) / "out", config, device="cpu")
    by_linear: dict[str, list[GroupRecord]] = {}
    for record in result.records:
        by_linear.setdefault(record.linears[0].rpartition(".")[2], []).append(record)
    return dict(
        over_rtn=over_rtn(list(result.records)),
        bits=round(result.bits_per_weight, 2),
        by_linear={name: over_rtn(records) for name, records in by_linear.items()},
    )


def over_rtn(records: list[GroupRecord]) -> float:
    """Geometric mean of error / RTN's error."""
    logarithms = [math.log(record.error["all"] / record.rtn_error["all"]) for record in records]
    return round(math.exp(sum(logarithms) / len(logarithms)), 3)


if __name__ == "__main__":
    main()
