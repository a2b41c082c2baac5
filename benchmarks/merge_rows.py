"""The final test, put together from rows that calls of `benchmarks/scoreboard.py` finished one by one.

Calls were stopped by time limits. Their rows, one number a question, are kept in
benchmarks/results/scoreboard_test_MACHINE_rows.json; this reads them (a row of a later machine in the list replaces an
earlier one of the same method and scheme), adds intervals and paired differences, writes
benchmarks/results/scoreboard_test.json and prints tables.

    python benchmarks/merge_rows.py
    python benchmarks/merge_rows.py --collect scoreboard-output --machine cpu --about "2 cores"    keep a call's rows
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from demo_table import main as print_tables

from quant_experts.evaluation.bootstrap import difference_interval, mean_interval
from quant_experts.evaluation.comparison import FULL_PRECISION
from quant_experts.evaluation.questions_file import demo_items

RESULTS = Path(__file__).parent / "results"
MACHINES = ("cpu",)
SCHEMES = ("", "W4A6", "W4A8", "W3A16", "W4A4")
METHODS = (FULL_PRECISION, "rtn", "gptq", "aser", "paper", "quant-experts")
QUESTIONS = 2000


def rows_file(machine: str) -> Path:
    """Where a machine's rows are kept."""
    return RESULTS / f"scoreboard_test_{machine}_rows.json"


def collect(folder: Path, machine: str, about: str) -> None:
    """Add the scored rows of a scoreboard's output folder to a machine's file; those of the same name are replaced."""
    file = rows_file(machine)
    kept: dict[str, Any] = dict(about=about, questions=QUESTIONS, rows=[])
    if file.exists():
        kept = json.loads(file.read_text())
    rows = {(row["scheme"], row["method"]): row for row in kept["rows"]}
    for path in sorted(folder.glob("*.json")):
        saved = json.loads(path.read_text())
        scores = saved.get("scores")
        if scores and len(scores["points"]) == QUESTIONS:
            method, _, scheme = path.stem.rpartition("-") if path.stem != "full-precision" else (FULL_PRECISION, "", "")
            numbers = {key: [round(v, 7) for v in scores[key]] for key in ("nll", "kl") if scores[key]}
            bits = saved["facts"]["bits_per_weight"] if scheme else None
            points = [float(v) for v in scores["points"]]
            rows[scheme, method] = dict(method=method, scheme=scheme, bits_per_weight=bits, points=points, **numbers)
    kept["rows"] = list(rows.values())
    file.write_text(json.dumps(kept) + "\n")


def row(saved: dict[str, Any], kinds: dict[str, list[int]], full: dict[str, Any], plain: dict[str, Any]) -> Any:
    """A row of the table from one number a question; full precision's and plain rounding's rows to compare with."""
    points = saved["points"]
    accuracy = {"average": mean_interval(points).to_json()}
    accuracy |= {kind: mean_interval([points[i] for i in indices]).to_json() for kind, indices in kinds.items()}
    return dict(
        method=saved["method"],
        scheme=saved["scheme"],
        machine=saved["machine"],
        bits_per_weight=saved["bits_per_weight"],
        accuracy=accuracy,
        nll=mean_interval(saved["nll"]).to_json(),
        kl=mean_interval(saved["kl"]).to_json() if saved.get("kl") else None,
        over_rtn=difference_interval(points, plain["points"]).to_json(),
        below_full_precision=difference_interval(full["points"], points).to_json(),
    )


def merge() -> Path:
    """Write the table's rows as JSON."""
    files = {machine: json.loads(rows_file(machine).read_text()) for machine in MACHINES if rows_file(machine).exists()}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    full: dict[str, dict[str, Any]] = {}
    for machine, saved in files.items():
        for each in saved["rows"]:
            found[each["scheme"], each["method"]] = each | dict(machine=machine)
            if not each["scheme"]:
                full[machine] = each
    items = demo_items("test", QUESTIONS)
    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(index)
    chosen = [found[key] for key in ((s, m) for s in SCHEMES for m in METHODS) if key in found]
    rows = [row(each, kinds, full[each["machine"]], found.get((each["scheme"], "rtn"), each)) for each in chosen]
    about = {machine: {k: v for k, v in saved.items() if k != "rows"} for machine, saved in files.items()}
    file = RESULTS / "scoreboard_test.json"
    file.write_text(json.dumps(dict(machines=about, rows=rows), indent=1) + "\n", encoding="utf-8")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="an output folder of benchmarks/scoreboard.py")
    parser.add_argument("--machine", choices=MACHINES, default="cpu")
    parser.add_argument("--about", default="", help="what a new file says of the machine and the command")
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect, arguments.machine, arguments.about)
    file = merge()
    for table in ([], ["--kinds"]):
        sys.argv = ["demo_table.py", str(file), *table]
        print_tables()
        print()
    print("| scheme | method | measured on | points below full precision | share of rtn's loss recovered, % |")
    print("| --- | --- | --- | --- | --- |")
    for r in json.loads(file.read_text())["rows"]:
        if r["scheme"]:
            below, gain = r["below_full_precision"], r["over_rtn"]["mean"]
            interval = f"{100 * below['mean']:.1f} ({100 * below['low']:.1f} to {100 * below['high']:.1f})"
            share = 100 * gain / (gain + below["mean"])
            print(f"| {r['scheme']} | {r['method']} | {r['machine']} | {interval} | {share:.0f} |")


if __name__ == "__main__":
    main()
