"""The search for the default recipe, in the open: layer error of many recipes on one model, over plain rounding's.

Each recipe quantizes the bundled model; errors are those of held-out calibration tokens, so no question of any split is
looked at. Results that are in the file already are not made again. Prints a table and writes
benchmarks/results/recipe_search.json.

    python benchmarks/recipe_search.py [--schemes W4A6,W4A8,W3A16] [--only rotation]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quant_experts.config import RECIPES, QuantizationConfig, Recipe
from quant_experts.demo import model_path
from quant_experts.demo.questions import questions
from quant_experts.pipeline import quantize

RESULTS = Path(__file__).parent / "results" / "recipe_search.json"
DEFAULT = RECIPES["quant-experts"]
TOKENS = dict(routed="tokens", router="fitted")
VALUES = dict(shared_reads="values")
NO_ADAPTER = dict(shared_rank=0)


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other fields, checked."""
    return Recipe.from_json(recipe.to_json() | fields)


VARIANTS: dict[str, Recipe] = {
    "paper": RECIPES["paper"],
    "paper, experts fitted to tokens": changed(RECIPES["paper"], **TOKENS),
    "aser": RECIPES["aser"],
    "gptq": RECIPES["gptq"],
    "gptq, clip": changed(RECIPES["gptq"], clip=True, act_order=True),
    "gptq + static 64": changed(RECIPES["gptq"], shared_rank=64, factor_bits=8, act_order=True),
    "gptq exempt + static 64": changed(RECIPES["aser"], base="gptq", act_order=True, factor_bits=8),
    "smoothing alone": Recipe(name="x", smoothing="balanced"),
    "rotation alone": Recipe(name="x", rotation=64),
    "smoothing + rotation": Recipe(name="x", smoothing="balanced", rotation=64),
    "smoothing + gptq": changed(DEFAULT, rotation=0, clip=False, **NO_ADAPTER),
    "rotation + gptq": changed(DEFAULT, smoothing="none", clip=False, **NO_ADAPTER),
    "smoothing + rotation + gptq": changed(DEFAULT, clip=False, **NO_ADAPTER),
    "smoothing + rotation + gptq + clip": changed(DEFAULT, **NO_ADAPTER),
    "default without rotation": changed(DEFAULT, rotation=0),
    "default without smoothing": changed(DEFAULT, smoothing="none"),
    "default without error feedback": changed(DEFAULT, base="rtn"),
    "default without act-order": changed(DEFAULT, act_order=False),
    "default, blocks of 16": changed(DEFAULT, rotation=16),
    "default, blocks of 128": changed(DEFAULT, rotation=128),
    "default, rank 32": changed(DEFAULT, shared_rank=32),
    "default": DEFAULT,
    "default, expert reads values": changed(DEFAULT, **VALUES),
    "default, rank 128": changed(DEFAULT, shared_rank=128),
    "default, fp16 factors": changed(DEFAULT, factor_bits=16, **VALUES),
    "default, 32 shared + 8 x 32 routed": changed(DEFAULT, shared_rank=32, routed_rank=32, **TOKENS, **VALUES),
    "default, rank 288 (bytes of 32 + 8 x 32)": changed(DEFAULT, shared_rank=32 + 8 * 32),
}
"""Ranks are those at width 1536 and follow the model's."""


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def layer_error(recipe: Recipe, scheme: str, samples: list[Any]) -> dict[str, float]:
    """Geometric means over groups of the output error over plain rounding's and of plain rounding's relative to the
    output, stored bits and seconds."""
    config = QuantizationConfig.of(scheme, recipe, scale_with_width=True)
    with tempfile.TemporaryDirectory() as scratch:
        result = quantize(model_path(), samples, Path(scratch) / "out", config, device="cpu")
    rounding = geometric_mean(record.rtn_error["all"] for record in result.records)
    return dict(
        error=geometric_mean(record.error["all"] for record in result.records) / rounding,
        rtn_error=rounding,
        bits=result.bits_per_weight,
        seconds=result.seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="W4A6,W4A8,W3A16")
    parser.add_argument("--only", default="", help="variants whose name holds this text")
    arguments = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    samples = [(q.image, q.question, q.answer) for q in questions("calibration", 128)]
    for scheme in arguments.schemes.split(","):
        for name, recipe in VARIANTS.items():
            if arguments.only in name and scheme not in results.get(name, {}):
                found = layer_error(recipe, scheme, samples)
                results.setdefault(name, {})[scheme] = found
                RESULTS.write_text(json.dumps(results, indent=1) + "\n")
                print(f"{scheme} {name}: {found['error']:.4f} at {found['bits']:.2f} bits", flush=True)
    schemes = arguments.schemes.split(",")
    print("| recipe | " + " | ".join(f"{scheme} | bits" for scheme in schemes) + " |")
    print("| --- |" + " --- | --- |" * len(schemes))
    for name in VARIANTS:
        cells = [results.get(name, {}).get(scheme) for scheme in schemes]
        if any(cells):
            texts = [f"{cell['error']:.4f} | {cell['bits']:.2f}" if cell else "- | -" for cell in cells]
            print(f"| {name} | " + " | ".join(texts) + " |")


if __name__ == "__main__":
    main()
