"""Layer error and stored bits for weight groups whose scales are stored in float32, float16 or bfloat16.

Errors are relative to the full-precision output, on held-out calibration tokens of the bundled model. Prints a table.

    python benchmarks/scale_precision.py [--schemes W3A16,W4A16] [--recipes rtn,gptq,quant-experts]
"""

from __future__ import annotations

import argparse

import torch
from recipe_search import changed, layer_error

from quant_experts.checkpoint import schema
from quant_experts.config import RECIPES, Recipe
from quant_experts.demo.questions import questions

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
VARIANTS = {"quant-experts without expert": changed(RECIPES["quant-experts"], shared_rank=0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="W3A16,W4A16")
    parser.add_argument("--recipes", default=f"rtn,gptq,quant-experts,{','.join(VARIANTS)}")
    arguments = parser.parse_args()
    samples: list[tuple[object, str, str]] = [(q.image, q.question, q.answer) for q in questions("calibration", 128)]
    print(f"| scheme | recipe | {' | '.join(f'{name(dtype)} | bits' for dtype in DTYPES)} |")
    print("| --- | --- |" + " --- | --- |" * len(DTYPES))
    for scheme in arguments.schemes.split(","):
        for recipe in arguments.recipes.split(","):
            cells = (cell(dtype, (RECIPES | VARIANTS)[recipe], scheme, samples) for dtype in DTYPES)
            print(f"| {scheme} | {recipe} | {' | '.join(cells)} |", flush=True)


def name(dtype: torch.dtype) -> str:
    """As it is written: bfloat16."""
    return str(dtype).removeprefix("torch.")


def cell(dtype: torch.dtype, recipe: Recipe, scheme: str, samples: list[tuple[object, str, str]]) -> str:
    """Layer error and bits of the recipe where scales are stored in the dtype."""
    schema.GROUP_SCALE_DTYPE = dtype
    found = layer_error(recipe, scheme, samples)
    return f"{found['error'] * found['rtn_error']:.3e} | {found['bits']:.3f}"


if __name__ == "__main__":
    main()
