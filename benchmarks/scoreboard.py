"""The scoreboard of the bundled model, its rows made side by side in processes of their own.

The same rows as `quant-experts compare demo` makes one after the other, with the same settings; the last step is that
command's own, which reads them all. Prints Markdown tables and writes benchmarks/results/scoreboard_SPLIT.json.

    python benchmarks/scoreboard.py --schemes W4A6,W4A8 --methods rtn,paper,quant-experts --split test --limit 2000
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from demo_table import main as print_tables

RESULTS = Path(__file__).parent / "results"


def board(method_and_scheme: tuple[str, str], output: Path, settings: dict[str, Any]) -> Any:
    """Rows of some methods (comma-separated) at some schemes."""
    import torch

    from quant_experts.config import DEFAULT_SCOPES
    from quant_experts.evaluation.scoreboard import run_comparison

    torch.set_num_threads(1)
    methods, schemes = (text.split(",") if text else [] for text in method_and_scheme)
    return run_comparison(
        "demo",
        output,
        methods=methods,
        schemes=schemes,
        controls=[],
        control_of=None,
        scale_with_width=True,
        seed=0,
        progress=lambda *_: None,
        sample_limit=128,
        scopes=DEFAULT_SCOPES,
        **settings,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="rtn,gptq,aser,paper,quant-experts")
    parser.add_argument("--schemes", default="W4A6,W4A8,W3A16,W4A4")
    parser.add_argument("--split", default="tuning")
    parser.add_argument("--limit", type=int, default=280)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("scoreboard-output"))
    parser.add_argument("--results", type=Path, help="folder of the JSON; benchmarks/results by default")
    arguments = parser.parse_args()
    settings = dict(
        question_limit=arguments.limit, split=arguments.split, device=arguments.device, batch_size=arguments.batch_size
    )
    make = partial(board, output=arguments.output, settings=settings)
    make((arguments.methods.split(",")[0], arguments.schemes.split(",")[0]))  # full precision, before all others
    rows = [(method, scheme) for scheme in arguments.schemes.split(",") for method in arguments.methods.split(",")]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        for row, _ in zip(rows, pool.map(make, rows), strict=True):
            print("made", *row, file=sys.stderr, flush=True)

    from quant_experts.report.text import comparison_json

    comparison = make((arguments.methods, arguments.schemes))
    folder = arguments.results or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"scoreboard_{arguments.split}.json"
    file.write_text(json.dumps(comparison_json(comparison), indent=1) + "\n", encoding="utf-8")
    for table in ([], ["--kinds"], ["--costs"], ["--gains"]):
        sys.argv = ["demo_table.py", str(file), *table]
        print_tables()
        print()


if __name__ == "__main__":
    main()
