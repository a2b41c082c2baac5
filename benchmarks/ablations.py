"""The paper's ablations (its tables 4, 5, 6, 11, 12 and 13) redone on the bundled model, with its tuning questions.

Ranks, k and N_r stand in the paper's proportion to the width: k 4-64 at width 1536 are 1-16 here. Every row is the
`paper` recipe with one thing changed; those of table 12 quantize the merger, the vision encoder or both as well, by
`paper` and by plain rounding. A call that was stopped goes on where it was; finished rows are read back.
Writes benchmarks/results/ablations.json and prints its table (again: python benchmarks/demo_table.py FILE --ablations).

    python benchmarks/ablations.py [--schemes W4A6,W3A16] [--questions 280] [--only N_r]
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bundled_rows import run
from demo_table import ablation_table

from quant_experts.config import DEFAULT_SCOPES, RECIPES, SCOPES, QuantizationConfig, Recipe, Scheme
from quant_experts.evaluation.bench import Contender
from quant_experts.evaluation.task import Task

NO_SHARED = dict(shared_rank=0, exempt="none", smoothing="none")
MORE_SCOPES = {
    "language + merger": ("merger", "language"),
    "language + vision": ("vision", "language"),
    "all scopes": SCOPES,
}


def variants(width: int) -> dict[str, Recipe]:
    """What a row is called -> its recipe, with absolute numbers for a model of that width."""
    paper = RECIPES["paper"].model_copy(update=dict(scale_with_width=True)).at_width(width)
    rank = paper.shared_rank

    def changed(**fields: Any) -> Recipe:
        return Recipe.from_json(paper.to_json() | fields)

    found = {
        "rtn": RECIPES["rtn"],
        "paper": paper,
        "shared expert only": changed(routed_rank=0),
        "shared expert only, equal active rank": changed(routed_rank=0, shared_rank=2 * rank),
        "routed experts only": changed(**NO_SHARED),
        "routed experts only, equal active rank": changed(**NO_SHARED, routed_rank=2 * rank),
        "random routing": changed(router="random"),
        "random clusters": changed(routed="random"),
        "refined": changed(refine=True),
    }
    found |= {f"N_r = {count}": changed(num_experts=count) for count in (2, 4, 16)}
    found |= {f"k = {k}": changed(important_channels=k) for k in (1, 2, 4, 16)}
    return found


def contenders(task: Task, schemes: list[str], samples: int) -> Iterator[Contender]:
    """Every variant at every scheme."""
    recipes = variants(task.width)
    rows: dict[str, tuple[Recipe, tuple[str, ...]]] = {
        name: (recipe, DEFAULT_SCOPES) for name, recipe in recipes.items()
    }
    for method in ("rtn", "paper"):
        rows |= {f"{method}, {label}": (recipes[method], scopes) for label, scopes in MORE_SCOPES.items()}
    for scheme in schemes:
        for name, (recipe, scopes) in rows.items():
            config = QuantizationConfig.of(scheme, recipe, samples=samples, scopes=scopes)
            yield Contender(name, config, str(Scheme.parse(scheme)))


if __name__ == "__main__":
    run("ablations", __doc__, "The paper's ablations on the bundled model", "W4A6", contenders, ablation_table)
