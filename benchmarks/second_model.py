"""The scoreboard of the second trained model: InternVL-like, in benchmarks/second_model.

Quantizes it by each method at each scheme, ranks scaled with its width, and scores it on the demo's questions. Rows
that an earlier call finished are read back. Prints tables and writes benchmarks/results/second_model.json.

    python benchmarks/second_model.py --schemes W4A6 --limit 280
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from demo_table import main as print_tables

from quant_experts.evaluation.scoreboard import compare, contenders
from quant_experts.evaluation.task import open_task
from quant_experts.report.text import comparison_json

HERE = Path(__file__).parent
MODEL = "second_model"
SAMPLES = 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="rtn,gptq,aser,paper,quant-experts")
    parser.add_argument("--schemes", default="W4A6")
    parser.add_argument("--split", default="tuning")
    parser.add_argument("--limit", type=int, default=280)
    parser.add_argument("--model", type=Path, default=HERE / MODEL)
    parser.add_argument("--output", type=Path, default=Path("second-model-output"))
    parser.add_argument("--results", type=Path, default=HERE / "results" / f"{MODEL}.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    # The demo's samples and questions, for another model.
    demo = open_task("demo", sample_limit=SAMPLES, question_limit=chosen.limit, split=chosen.split, device="cpu")
    task = replace(demo, model=chosen.model, name="the second trained model, InternVL-like (a test bed)")
    methods, schemes = chosen.methods.split(","), chosen.schemes.split(",")
    rows = contenders(methods, schemes, scale_with_width=True, seed=0, samples=SAMPLES)
    options = f"--methods {chosen.methods} --schemes {chosen.schemes} --split {chosen.split} --limit {chosen.limit}"
    command = f"python benchmarks/{Path(__file__).name} {options}"
    comparison = compare(task, rows, chosen.output, title="The second model", command=command, progress=show)
    summary = comparison_json(comparison)
    del summary["layers"]  # rows are enough to keep
    chosen.results.write_text(json.dumps(summary, indent=1) + "\n")
    for table in ([], ["--kinds"], ["--costs"]):
        sys.argv = ["demo_table.py", str(chosen.results), *table]
        print_tables()


def show(done: int, total: int, what: str) -> None:
    """One line a step."""
    print(f"{done}/{total} {what}", flush=True)


if __name__ == "__main__":
    main()
