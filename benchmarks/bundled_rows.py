"""What benchmarks with rows of their own share: the bundled model, its tuning questions, a file of rows, a table."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from transformers.utils import logging

from quant_experts.evaluation.bench import Contender
from quant_experts.evaluation.scoreboard import PLAIN_ROUNDING, compare
from quant_experts.evaluation.task import DEMO, Task, open_task
from quant_experts.report.html import write_report
from quant_experts.report.text import comparison_json

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def run(
    name: str,
    about: str | None,
    title: str,
    schemes: str,
    contenders: Callable[[Task, list[str], int], Iterable[Contender]],
    table: Callable[[Rows], Iterator[str]],
) -> None:
    """The command `benchmarks/NAME.py`: make the rows (task, schemes, samples) -> contenders, keep and print them.

    A call that was stopped goes on where it was. Writes benchmarks/results/NAME.json, and report.html beside the
    checkpoints.
    """
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schemes", default=schemes)
    parser.add_argument("--questions", type=int, default=280)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--only", default="", help="rows whose name matches this pattern, and plain rounding")
    parser.add_argument("--output", type=Path, default=Path(f"{name}-output"), help="checkpoints, rows, report.html")
    parser.add_argument("--results", type=Path, default=RESULTS / f"{name}.json")
    arguments = parser.parse_args()
    logging.disable_progress_bar()
    task = open_task(DEMO, sample_limit=arguments.samples, question_limit=arguments.questions, device="cpu")
    rows = contenders(task, arguments.schemes.split(","), arguments.samples)
    chosen = [row for row in rows if row.method == PLAIN_ROUNDING or re.search(arguments.only, row.method)]
    command = shlex.join(["python", f"benchmarks/{name}.py", *sys.argv[1:]])
    comparison = compare(task, chosen, arguments.output, title=title, command=command, progress=_show())
    write_report(comparison, arguments.output / "report.html")
    found = comparison_json(comparison)
    kept = {key: found[key] for key in ("title", "command", "questions", "rows", "versions")}
    arguments.results.parent.mkdir(exist_ok=True)
    arguments.results.write_text(json.dumps(kept, indent=1) + "\n")
    print("\n".join(table(kept["rows"])))


def _show() -> Callable[[int, int, str], None]:
    """Prints each step once."""
    shown = ""

    def progress(done: int, total: int, what: str) -> None:
        nonlocal shown
        if what != shown:
            shown = what
            print(f"{100 * done // total:3d}% {what}", flush=True)

    return progress
