"""The paper's ablations (its tables 4, 5, 6, 11, 12 and 13) redone on the bundled model, with its tuning questions.

Ranks, k and N_r stand in the paper's proportion to the width: k 4-64 at width 1536 are 1-16 here. Every row is the
`paper` recipe with one thing changed; those of table 12 quantize the merger, the vision encoder or both as well, by
`paper` and by plain rounding. A call that was stopped goes on where it was; finished rows are read back.
Writes benchmarks/results/ablations.json and prints its table (again: python benchmarks/demo_table.py FILE --ablations).

    python benchmarks/ablations.py [--schemes W4A6,W3A16] [--questions 280] [--only N_r]
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from demo_table import ablation_table
from transformers.utils import logging

from quant_experts.config import DEFAULT_SCOPES, RECIPES, SCOPES, QuantizationConfig, Recipe, Scheme
from quant_experts.evaluation.bench import Contender
from quant_experts.evaluation.scoreboard import compare
from quant_experts.evaluation.task import DEMO, Task, open_task
from quant_experts.report.html import write_report
from quant_experts.report.text import comparison_json

RESULTS = Path(__file__).parent / "results" / "ablations.json"
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


def contenders(task: Task, schemes: list[str], only: str, samples: int) -> Iterator[Contender]:
    """Every variant at every scheme; plain rounding always, because others are measured against it."""
    recipes = variants(task.width)
    rows: dict[str, tuple[Recipe, tuple[str, ...]]] = {
        name: (recipe, DEFAULT_SCOPES) for name, recipe in recipes.items()
    }
    for method in ("rtn", "paper"):
        rows |= {f"{method}, {label}": (recipes[method], scopes) for label, scopes in MORE_SCOPES.items()}
    for scheme in schemes:
        for name, (recipe, scopes) in rows.items():
            if re.search(only, name) or name == "rtn":
                config = QuantizationConfig.of(scheme, recipe, samples=samples, scopes=scopes)
                yield Contender(name, config, str(Scheme.parse(scheme)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default="W4A6")
    parser.add_argument("--questions", type=int, default=280)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", default="", help="rows whose name matches this pattern")
    parser.add_argument("--output", type=Path, default=Path("ablations-output"), help="checkpoints, rows, report.html")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    task = open_task(DEMO, sample_limit=arguments.samples, question_limit=arguments.questions, device="cpu")
    rows = list(contenders(task, arguments.schemes.split(","), arguments.only, arguments.samples))
    shown = ""

    def progress(done: int, total: int, what: str) -> None:
        nonlocal shown
        if what != shown:
            shown = what
            print(f"{100 * done // total:3d}% {what}", flush=True)

    options = f"--schemes {arguments.schemes} --questions {arguments.questions} --samples {arguments.samples}"
    comparison = compare(
        task,
        rows,
        arguments.output,
        title="The paper's ablations on the bundled model",
        command=f"python benchmarks/ablations.py {options}",
        progress=progress,
    )
    write_report(comparison, arguments.output / "report.html")
    found = comparison_json(comparison)
    kept = {key: found[key] for key in ("title", "command", "questions", "rows", "versions")}
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(ablation_table(kept["rows"])))


if __name__ == "__main__":
    main()
