"""README's table from what `quant-experts demo --json` prints.

Several files are merged; full precision is taken from the first.

quant-experts demo --schemes W4A6,W4A8,W3A16,W4A4 --questions 2000 --split test --json > demo.json
python benchmarks/demo_table.py demo.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def cell(score: dict[str, float], digits: int = 1, scale: float = 100) -> str:
    """mean (low-high)"""
    mean, low, high = (f"{scale * score[key]:.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low}-{high})"


def line(row: dict[str, Any]) -> str:
    """One row of Markdown."""
    bits = "16" if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
    kl = "-" if row["kl"] is None else cell(row["kl"], 4, 1)
    accuracy, nll = cell(row["accuracy"]["average"]), cell(row["nll"], 4, 1)
    return f"| {row['scheme'] or '-'} | {row['method']} | {accuracy} | {kl} | {nll} | {bits} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    parser.add_argument("--kinds", action="store_true", help="exact match by kind of question instead")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.files]
    rows = [row for i, result in enumerate(results) for row in result["rows"] if row["scheme"] or i == 0]
    if arguments.kinds:
        kinds = [kind for kind in rows[0]["accuracy"] if kind != "average"]
        print(f"| scheme | method | {' | '.join(kinds)} |\n|{' --- |' * (2 + len(kinds))}")
        for row in rows:
            scores = " | ".join(f"{100 * row['accuracy'][kind]['mean']:.1f}" for kind in kinds)
            print(f"| {row['scheme'] or '-'} | {row['method']} | {scores} |")
        return
    print("| scheme | method | exact match, % | KL, nats per token | NLL, nats per token | stored bits per weight |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(line(row) for row in rows))


if __name__ == "__main__":
    main()
