"""The default recipe against GPTQ and static adapters over it, at equal stored bits, on the bundled model.

Every family of recipes gets the largest rank that fits each number of bits. Where a row of the default ties in exact
match, its layer error and KL decide, and operations stand beside them. A call that was stopped goes on where it was.
Writes benchmarks/results/equal_bits.json and prints its table.

    python benchmarks/equal_bits.py [--schemes W4A6,W4A8,W3A16] [--questions 280] [--only routed]
"""

from __future__ import annotations

import tempfile
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bundled_rows import run
from demo_table import bits_table

from quant_experts.checkpoint.schema import CheckpointConfig, GroupSpec, group_stored_bits
from quant_experts.checkpoint.source import read_json
from quant_experts.config import RECIPES, QuantizationConfig, Recipe, Scheme
from quant_experts.evaluation.bench import Contender
from quant_experts.evaluation.task import Task
from quant_experts.pipeline import quantize

BITS = (4.5, 5.0, 6.0)
"""At 4-bit weights; each weight bit less or more moves them as much."""
STRONG_GPTQ = dict(base="gptq", act_order=True, clip=True)
TOKENS = dict(routed="tokens", router="fitted", shared_reads="values")


def changed(recipe: Recipe, **fields: Any) -> Recipe:
    """The recipe with other fields, checked."""
    return Recipe.from_json(recipe.to_json() | fields)


FAMILIES: dict[str, Recipe] = {
    "gptq + static": changed(RECIPES["gptq"], **STRONG_GPTQ, shared_rank=64, factor_bits=8),
    "gptq exempt + static": changed(RECIPES["aser"], **STRONG_GPTQ, factor_bits=8),
    "quant-experts": RECIPES["quant-experts"],
    "quant-experts, routed": changed(RECIPES["quant-experts"], routed_rank=32, shared_rank=32, **TOKENS),
}
"""Recipes, with ranks at width 1536, whose rank follows the bits: the routed experts' where there are any, else the
shared expert's. All factors are int8, which serves GPTQ's adapters as well as ours."""

Sizes = list[tuple[tuple[int, int], GroupSpec]]
"""Stacked shape (N, K) of each group, and what its linears are."""


def group_sizes(task: Task) -> Sizes:
    """Groups of the model, from plain rounding of it."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        result = quantize(task.model, task.samples[:2], out, QuantizationConfig.of("W4A6", "rtn"), device="cpu")
        groups = CheckpointConfig.read(read_json(out / "config.json")["quantization_config"]).groups
    return [(record.shape, spec) for record, spec in zip(result.records, groups, strict=True)]


def with_bits(recipe: Recipe, scheme: Scheme, bits: float, sizes: Sizes) -> Recipe | None:
    """The recipe with the largest rank that stores at most `bits` per weight; None where none does."""
    weights = sum(n * k for (n, k), _ in sizes)

    follows = "routed_rank" if recipe.routed_rank else "shared_rank"

    def stored(rank: int) -> float:
        spec = dict(
            smooth=recipe.smoothing != "none",
            rotation=recipe.rotation,
            factor_bits=recipe.factor_bits,
            experts=recipe.num_experts if recipe.routed_rank else 0,
            shared_rank=recipe.shared_rank,
            routed_rank=recipe.routed_rank,
        ) | {follows: rank}
        total = sum(group_stored_bits(each.model_copy(update=spec), scheme, (n,), k) for (n, k), each in sizes)
        return total / weights

    ranks = range(1, min(min(shape) for shape, _ in sizes) + 1)
    fitting = bisect_right(ranks, bits, key=stored)
    return changed(recipe, **{follows: ranks[fitting - 1]}) if fitting else None


def contenders(task: Task, schemes: list[str], samples: int) -> Iterator[Contender]:
    """Every family at every number of bits; plain rounding and GPTQ always."""
    sizes = group_sizes(task)
    scaled = {name: changed(recipe, scale_with_width=True) for name, recipe in FAMILIES.items()}
    families = {name: recipe.at_width(task.width) for name, recipe in scaled.items()}
    for text in schemes:
        scheme = Scheme.parse(text)
        rows = {
            "rtn": RECIPES["rtn"],
            "gptq": RECIPES["gptq"],
            "gptq, act-order, clip": changed(RECIPES["gptq"], **STRONG_GPTQ),
        }
        for target in BITS:
            bits = target + scheme.weight_bits - 4
            found = {name: with_bits(recipe, scheme, bits, sizes) for name, recipe in families.items()}
            rows |= {f"{bits:.1f} bits: {name}": recipe for name, recipe in found.items() if recipe}
        for row, recipe in rows.items():
            yield Contender(row, QuantizationConfig.of(scheme, recipe, samples=samples), str(scheme))


if __name__ == "__main__":
    run(
        "equal_bits",
        __doc__,
        "GPTQ, static adapters over it and the default recipe at equal stored bits",
        "W4A6,W4A8,W3A16",
        contenders,
        bits_table,
    )
