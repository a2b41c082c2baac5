"""The final test on the H200, put together from rows that `benchmarks/scoreboard.py` finished one by one.

That call was stopped by a time limit before its last step. Its rows, one number a question, are kept in
benchmarks/results/scoreboard_test_h200_rows.json; this reads them, adds intervals and paired differences, writes
benchmarks/results/scoreboard_test_h200.json and prints tables.

    python benchmarks/merge_rows.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from demo_table import main as print_tables

from quant_experts.evaluation.bootstrap import difference_interval, mean_interval
from quant_experts.evaluation.questions_file import demo_items

RESULTS = Path(__file__).parent / "results"


def row(saved: dict[str, Any], kinds: dict[str, list[int]], full: dict[str, Any], plain: dict[str, Any]) -> Any:
    """A row of the table from one number a question; full precision's and plain rounding's rows to compare with."""
    points = saved["points"]
    accuracy = {"average": mean_interval(points).to_json()}
    accuracy |= {kind: mean_interval([points[i] for i in indices]).to_json() for kind, indices in kinds.items()}
    return dict(
        method=saved["method"],
        scheme=saved["scheme"],
        bits_per_weight=saved["bits_per_weight"],
        accuracy=accuracy,
        nll=mean_interval(saved["nll"]).to_json(),
        kl=mean_interval(saved["kl"]).to_json() if saved["kl"] else None,
        over_rtn=difference_interval(points, plain["points"]).to_json(),
        below_full_precision=difference_interval(full["points"], points).to_json(),
    )


def main() -> None:
    saved = json.loads((RESULTS / "scoreboard_test_h200_rows.json").read_text(encoding="utf-8"))
    items = demo_items("test", saved["questions"])
    kinds: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        kinds.setdefault(item.kind, []).append(index)
    full, *others = saved["rows"]
    plain = {r["scheme"]: r for r in others if r["method"] == "rtn"}
    rows = [row(r, kinds, full, plain.get(r["scheme"], full)) for r in saved["rows"]]
    about = {key: value for key, value in saved.items() if key != "rows"}
    file = RESULTS / "scoreboard_test_h200.json"
    file.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    for table in ([], ["--kinds"]):
        sys.argv = ["demo_table.py", str(file), *table]
        print_tables()
        print()
    print("| scheme | method | points below full precision | share of rtn's loss recovered, % |")
    print("| --- | --- | --- | --- |")
    for r in rows[1:]:
        below, gain = r["below_full_precision"], r["over_rtn"]["mean"]
        interval = f"{100 * below['mean']:.1f} ({100 * below['low']:.1f} to {100 * below['high']:.1f})"
        print(f"| {r['scheme']} | {r['method']} | {interval} | {100 * gain / (gain + below['mean']):.0f} |")


if __name__ == "__main__":
    main()
