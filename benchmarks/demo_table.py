"""Tables in Markdown from what `quant-experts demo --json` and `quant-experts compare --json` print.

Several files are merged; full precision is taken from the first.

quant-experts compare demo --schemes W4A6,W4A8,W3A16 --split test --limit 2000 --json > board.json
python benchmarks/demo_table.py board.json             accuracy, KL and NLL with intervals, stored bits
python benchmarks/demo_table.py board.json --kinds     exact match by kind of question
python benchmarks/demo_table.py board.json --costs     layer errors, bits, operations, bytes, time, memory
python benchmarks/demo_table.py board.json --gains     paired with rtn: gain, share of its loss recovered, ties
python benchmarks/demo_table.py FILE --ablations       what benchmarks/ablations.py writes
python benchmarks/demo_table.py FILE --bits            what benchmarks/equal_bits.py writes
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def cell(score: dict[str, float] | None, digits: int = 1, scale: float = 100, sign: str = "") -> str:
    """mean (low-high), with "to" between bounds that may be negative."""
    if score is None:
        return "-"
    mean, low, high = (f"{scale * score[key]:{sign}.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})" if sign else f"{mean} ({low}-{high})"


def number(value: float | None, digits: int = 2, scale: float = 1) -> str:
    """A figure, or a dash where there is none."""
    return "-" if value is None else f"{value * scale:.{digits}f}"


def lines(header: str, rows: list[Row], write: Callable[[Row], list[str]]) -> Iterator[str]:
    """A table: scheme, method, then the header's columns."""
    columns = ["scheme", "method", *header.split(" | ")]
    yield f"| {' | '.join(columns)} |"
    yield f"|{' --- |' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join([row['scheme'] or '-', row['method'], *write(row)])} |"


def accuracy_table(rows: list[Row]) -> Iterator[str]:
    """Exact match and closeness to full precision, with 95% intervals."""
    header = "exact match, % | KL, nats per token | NLL, nats per token | stored bits per weight"

    def write(row: Row) -> list[str]:
        bits = "16" if row["bits_per_weight"] is None else number(row["bits_per_weight"])
        return [cell(row["accuracy"]["average"]), cell(row["kl"], 4, 1), cell(row["nll"], 4, 1), bits]

    return lines(header, rows, write)


def kinds_table(rows: list[Row]) -> Iterator[str]:
    """Exact match by kind of question."""
    kinds = [kind for kind in rows[0]["accuracy"] if kind != "average"]
    return lines(" | ".join(kinds), rows, lambda row: [f"{100 * row['accuracy'][kind]['mean']:.1f}" for kind in kinds])


def costs_table(rows: list[Row]) -> Iterator[str]:
    """What a row costs, and its layer errors."""
    header = (
        "layer error over rtn's | with the best routing | held-out over calibration error | stored bits per weight | "
        "operations over full precision's | bytes read a token, MB | quantization, s | peak memory, MB"
    )

    def write(row: Row) -> list[str]:
        return [
            number(row["layer_error"], 3),
            number(row["oracle_layer_error"], 3),
            number(row.get("overfit")),
            number(row["bits_per_weight"]),
            number(1 + row["repair_flops"] / row["base_flops"] if row["base_flops"] else None, 3),
            number(row["token_bytes"], 2, 1e-6),
            number(row["quantize_seconds"], 0),
            number(row["peak_bytes"], 0, 1e-6),
        ]

    return lines(header, [row for row in rows if row["scheme"]], write)


def gains_table(rows: list[Row]) -> Iterator[str]:
    """Differences paired by question."""
    header = "points over rtn | rtn's loss recovered, % | points behind the best | tie with the best"
    means = {(row["scheme"], row["method"]): row["accuracy"]["average"]["mean"] for row in rows}
    full = rows[0]["accuracy"]["average"]["mean"]

    def write(row: Row) -> list[str]:
        plain = means.get((row["scheme"], "rtn"))
        loss = full - plain if plain is not None else 0
        recovered = (row["accuracy"]["average"]["mean"] - plain) / loss if plain is not None and loss > 0 else None
        behind = row["behind_best"].get("accuracy")
        tie = "best" if behind is None else "yes" if behind["low"] <= 0 else "no"
        gain = cell(row["over_rtn"].get("accuracy"), sign="+")
        return [gain, number(recovered, 0, 100), cell(behind, sign="+"), tie]

    return lines(header, [row for row in rows if row["scheme"]], write)


def ablation_table(rows: list[Row]) -> Iterator[str]:
    """The figures that the paper's ablations are about, and text-only questions (its language benchmark)."""
    header = "exact match, % | text questions, % | points over rtn | KL, nats per token | layer error over rtn's | bits"

    def write(row: Row) -> list[str]:
        text = row["accuracy"].get("text")
        return [
            number(row["accuracy"]["average"]["mean"], 1, 100),
            number(text and text["mean"], 1, 100),
            cell(row["over_rtn"].get("accuracy"), sign="+"),
            cell(row["kl"], 4, 1),
            number(row["layer_error"], 3),
            number(row["bits_per_weight"]),
        ]

    return lines(header, rows, write)


def bits_table(rows: list[Row]) -> Iterator[str]:
    """What is kept for how many bits and operations."""
    header = (
        "stored bits per weight | layer error over rtn's | KL, nats per token | exact match, % | "
        "operations over full precision's | held-out over calibration error"
    )

    def write(row: Row) -> list[str]:
        return [
            number(row["bits_per_weight"]),
            number(row["layer_error"], 3),
            cell(row["kl"], 4, 1),
            cell(row["accuracy"]["average"]),
            number(1 + row["repair_flops"] / row["base_flops"], 3),
            number(row.get("overfit")),
        ]

    return lines(header, [row for row in rows if row["scheme"]], write)


TABLES = dict(kinds=kinds_table, costs=costs_table, gains=gains_table, ablations=ablation_table, bits=bits_table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="JSON")
    for name, table in TABLES.items():
        parser.add_argument(f"--{name}", dest="table", action="store_const", const=table, help=table.__doc__)
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.files]
    rows = [row for i, result in enumerate(results) for row in result["rows"] if row["scheme"] or i == 0]
    print("\n".join((arguments.table or accuracy_table)(rows)))


if __name__ == "__main__":
    main()
