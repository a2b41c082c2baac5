"""Two schemes compared method by method, from the folder that `quant-experts compare` left.

Layer errors are relative to the output, geometric means over groups on held-out calibration tokens, so that they can be
compared between schemes; differences are paired by question, and positive where the first scheme is better.

    python benchmarks/scheme_pairs.py compare-output W4Afp8 W4A8 [W4Afp8 W4A6 ...]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from recipe_search import geometric_mean

from quant_experts.checkpoint.inspection import read_report
from quant_experts.evaluation.bootstrap import difference_interval


def layer_error(checkpoint: Path) -> float:
    """Squared error over the output's energy, geometric mean over groups."""
    return geometric_mean(group["error"]["all"] for group in read_report(checkpoint)["groups"])


def scores(checkpoint: Path) -> dict[str, Any]:
    """Each question's scores."""
    found: dict[str, Any] = json.loads(checkpoint.with_name(f"{checkpoint.name}.json").read_text())["scores"]
    return found


def interval(better: list[float], worse: list[float], scale: float, digits: int) -> str:
    """Mean difference with its 95% bootstrap interval."""
    found = difference_interval(better, worse)
    mean, low, high = (f"{scale * value:+.{digits}f}" for value in (found.mean, found.low, found.high))
    return f"{mean} ({low} to {high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("schemes", nargs="+", help="pairs: FIRST SECOND ...")
    arguments = parser.parse_args()
    if len(arguments.schemes) % 2:
        parser.error("schemes come in pairs")
    print("| method | schemes | layer error | exact match, points better | KL, nats less |")
    print("| --- | --- | --- | --- | --- |")
    for first, second in zip(arguments.schemes[::2], arguments.schemes[1::2], strict=True):
        for checkpoint in sorted(arguments.folder.glob(f"*-{first}")):
            method = checkpoint.name.removesuffix(f"-{first}")
            other = arguments.folder / f"{method}-{second}"
            if not other.is_dir():
                continue
            ours, theirs = scores(checkpoint), scores(other)
            points = interval(ours["points"], theirs["points"], 100, 1)
            nats = interval(theirs["kl"], ours["kl"], 1, 4)
            errors = f"{layer_error(checkpoint):.2e}, {layer_error(other):.2e}"
            print(f"| {method} | {first}, {second} | {errors} | {points} | {nats} |")


if __name__ == "__main__":
    main()
