"""How much of each recipe's gain is due to the bundled model's uneven channels: layer errors at other unevenness.

The bundled model computes the same function whatever its channels' spread (quant_experts/demo/channels.py): 0 is as it
was trained, 0.3 as it is stored. Prints a table of the layer error over plain rounding's, and writes
benchmarks/results/channel_spread.json; what is in that file already is not measured again.

    python benchmarks/channel_spread.py [--schemes W4A6,W3A16] [--spreads 0,0.3,0.6]
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from quant_experts.config import RECIPES, QuantizationConfig, Recipe
from quant_experts.demo import model_path
from quant_experts.demo.channels import spread_channels
from quant_experts.demo.questions import questions
from quant_experts.demo.warm_start import as_trained
from quant_experts.pipeline import quantize

RESULTS = Path(__file__).parent / "results" / "channel_spread.json"
SAMPLES = 128
DEFAULT = RECIPES["quant-experts"]
COMPARED: dict[str, Recipe] = {name: RECIPES[name] for name in ("smoothquant", "gptq", "aser", "paper")} | {
    "rotation + gptq": Recipe.from_json(DEFAULT.to_json() | dict(smoothing="none", shared_rank=0)),
    "quant-experts without smoothing": Recipe.from_json(DEFAULT.to_json() | dict(smoothing="none")),
    "quant-experts": DEFAULT,
}


def write_model(folder: Path, spread: float) -> Path:
    """The bundled model with channels of another spread, everything else copied."""
    shutil.copytree(model_path(), folder)
    model = as_trained(model_path())
    spread_channels(model, spread)
    model.save_pretrained(folder)
    return folder


def measure(model: Path, samples: list[Any], scheme: str, recipe: Recipe) -> dict[str, float]:
    """Geometric means over groups: the error over plain rounding's, and plain rounding's relative to the output."""
    config = QuantizationConfig.of(scheme, recipe, scale_with_width=True)
    with tempfile.TemporaryDirectory() as scratch:
        records = quantize(model, samples, Path(scratch) / "out", config, device="cpu").records
    plain = geometric_mean(record.rtn_error["all"] for record in records)
    return dict(over_rtn=geometric_mean(record.error["all"] for record in records) / plain, rtn=plain)


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="W4A6,W3A16")
    parser.add_argument("--spreads", default="0,0.3,0.6")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schemes, spreads = arguments.schemes.split(","), arguments.spreads.split(",")
    found: dict[str, dict[str, float]] = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    samples = [(q.image, q.question, q.answer) for q in questions("calibration", SAMPLES)]
    with tempfile.TemporaryDirectory() as scratch:
        for spread in spreads:
            model = write_model(Path(scratch) / spread, float(spread))
            for scheme in schemes:
                for name, recipe in COMPARED.items():
                    key = f"{scheme}, spread {spread}: {name}"
                    if key not in found:
                        found[key] = measure(model, samples, scheme, recipe)
                        arguments.results.write_text(json.dumps(found, indent=1) + "\n")
                        print(key, found[key], flush=True)
    columns = [f"{scheme}, spread {spread}" for scheme in schemes for spread in spreads]
    print(f"| | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    plain = [f"{found[f'{column}: {next(iter(COMPARED))}']['rtn']:.4f}" for column in columns]
    print(f"| rtn, relative to the output | {' | '.join(plain)} |")
    for name in COMPARED:
        errors = [f"{found[f'{column}: {name}']['over_rtn']:.3f}" for column in columns]
        print(f"| {name} | {' | '.join(errors)} |")


if __name__ == "__main__":
    main()
