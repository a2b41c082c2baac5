"""A page's tables of what `gpu_block.py` has timed, from its files, on any machine.

    python benchmarks/kernels/block_tables.py FILE.json ... [--docs docs/performance.md]

prints tables, of a model and setting from the last file that has it. Between `<!-- blocks: times -->` or
`<!-- blocks: memory -->` and `<!-- blocks: end -->` of a page goes what is named there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from pages import filled, markdown

KINDS = {
    "bf16": "bf16",
    "default": "default recipe",
    "experts": "experts",
    "no-experts": "no experts",
    "fp8-experts": "experts, W4Afp8",
}
PEAKS = ("decode, batch 1", "prefill 2048")
Rows = dict[tuple[str, str], dict[str, dict[str, Any]]]
"""By model and setting, and then by kind."""


def stored(paths: Iterable[Path]) -> Rows:
    """Of a model and setting all kinds from the last file that has it: what is compared was timed together. Models come
    in the order of their first files."""
    rows: Rows = {}
    for path in paths:
        mine: Rows = {}
        for row in json.loads(path.read_text())["rows"]:
            mine.setdefault((row["model"], row["setting"]), {})[row["kind"]] = row
        rows |= mine
    return rows


def found(rows: Rows, model: str, setting: str, kind: str) -> dict[str, Any]:
    """Ends the program with a sentence where it was not timed."""
    if kind not in rows.get((model, setting), {}):
        sys.exit(f"These files have nothing of {model}, {setting}, {KINDS[kind]}, which the tables show.")
    return rows[model, setting][kind]


def times(rows: Rows) -> str:
    """Microseconds, median (10% to 90% of the replays), and bf16's time over that."""

    def cell(model: str, setting: str, kind: str) -> str:
        time, whole = (found(rows, model, setting, one)["microseconds"] for one in (kind, "bf16"))
        text = f"{time['median']:.0f} ({time['p10']:.0f}-{time['p90']:.0f})"
        return text if kind == "bf16" else f"{text}; {whole['median'] / time['median']:.2f}"

    lines = [[model, setting, *(cell(model, setting, kind) for kind in KINDS)] for model, setting in rows]
    return markdown(["model", "setting", *KINDS.values()], lines, 2)


def memory(rows: Rows) -> str:
    """Megabytes of a block, and at most while it runs."""
    lines = []
    for model in dict.fromkeys(model for model, _ in rows):
        sizes = [found(rows, model, PEAKS[0], kind)["block_bytes"] for kind in KINDS]
        lines.append([f"{model}, MB of a block", *(f"{size / 1e6:.0f}" for size in sizes)])
        for setting in PEAKS:
            peaks = [found(rows, model, setting, kind)["peak_bytes"] for kind in KINDS]
            lines.append([f"{model}, peak in {setting}", *(f"{peak / 1e6:.0f}" for peak in peaks)])
    return markdown(["", *KINDS.values()], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what gpu_block.py has written")
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="a page whose tables are made anew")
    arguments = parser.parse_args()
    for path in (*arguments.files, *filter(None, [arguments.docs])):
        if not path.is_file():
            parser.error(f"{path} is not there")
    rows = stored(arguments.files)
    parts = {"times": partial(times, rows), "memory": partial(memory, rows)}
    print(*(part() for part in parts.values()), sep="\n")
    if arguments.docs:
        arguments.docs.write_text(filled(arguments.docs.read_text(), "blocks", parts))


if __name__ == "__main__":
    main()
