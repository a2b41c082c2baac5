"""Tables and a picture of what `gpu_linear.py` has timed, from its files, on any machine.

    python benchmarks/kernels/linear_tables.py FILE.json ... [--out benchmarks/results] [--docs docs/performance.md]

writes gpu_linear.md and gpu_linear.png, of a model and size the last file's times; with --docs also what such a page
has of them: between `<!-- linears: tables -->` and `<!-- linears: end -->` goes what is named there, `tables`,
`summary`, `goals` or `costs`. Times are medians of rounds, ratios medians of the ratios in a round.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from kinds import BASELINES, EXPERTS, FP8_LAYERS, HEADS, LAYERS, OURS, SHAPES
from pages import filled, markdown

Row = dict[str, Any]
"""Times of a model's block on a number of tokens: microseconds by kind."""
MODEL, LARGE = "Qwen2-VL-7B", "Qwen2-VL-72B"
"""The model that goals were set for, and one whose groups are larger."""
GOALS = {1: 2.5, 16: 2.5, 128: 1.8, 2048: 1.2, 8192: 1.2}
"""bf16's time over ours with experts, by tokens."""
FP8_GOALS = {2048: 1.4, 8192: 1.4}
COSTS = {1: 20, 4: 20, 16: 20, 128: None, 512: 12, 2048: 12, 8192: 12}
"""Percent of the time without experts that experts may cost, by tokens, where there is a goal."""
SUMMARY = (1, 4, 16, 128, 2048, 8192)


def stored(paths: Iterable[Path]) -> list[Row]:
    """Rows of such files by model and tokens, each from the last file that has it."""
    found = {(row["model"], row["tokens"]): row for path in paths for row in json.loads(path.read_text())["rows"]}
    models = dict.fromkeys((*SHAPES, *(model for model, _ in found)))
    return sorted(found.values(), key=lambda row: (list(models).index(row["model"]), row["tokens"]))


def over(row: Row, kind: str, other: str) -> float:
    """A kind's time over another's: the median over rounds, in which kinds take turns, so that both meet the same chip.
    (From 2,048 tokens on it has a faster and a slower state, and two kinds' medians may be of different ones.)"""
    return median(float(times[kind] / times[other]) for times in row.get("rounds", [row]))


def ratio(row: Row, kind: str) -> float:
    """bf16's time over ours."""
    return over(row, "bf16", kind)


def cost(row: Row, kind: str) -> str:
    """Percent of the time without experts, for kinds of either format."""
    alone = "fp8_without_experts" if kind.startswith("fp8_") else "without_experts"
    return f"{100 * (over(row, kind, alone) - 1):.0f}%"


def tables(rows: list[Row]) -> str:
    """A table a model with integer activations, and one of all with fp8; columns of what was timed."""
    text = ""
    for model in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == model]
        kinds = [kind for kind in (*BASELINES, *LAYERS) if any(kind in row for row in mine)]
        if set(kinds) & set(LAYERS) or not any(set(row) & set(FP8_LAYERS) for row in mine):
            text += f"\n**{model}**, W4A{mine[0]['bits']}\n\n" + times(mine, kinds, ["tokens"])
    fp8 = [row for row in rows if set(row) & set(FP8_LAYERS)]
    if fp8:
        kinds = ["bf16", *(kind for kind in FP8_LAYERS if any(kind in row for row in fp8))]
        text += "\n**fp8 activations**, W4Afp8\n\n" + times(fp8, kinds, ["model", "tokens"])
    return text.lstrip()


def times(rows: list[Row], kinds: list[str], names: list[str]) -> str:
    """Microseconds of each kind, the bound, and ratios of ours."""
    ours = [kind for kind in kinds if kind in OURS]
    heads = [*names, *(HEADS[kind] for kind in kinds), "bound", *(f"bf16 / {HEADS[kind]}" for kind in ours)]
    lines = [
        [
            *(str(row[name]) for name in names),
            *(f"{row[kind]:.0f}" if kind in row else "-" for kind in (*kinds, "bound")),
            *(f"{ratio(row, kind):.2f}" if kind in row else "-" for kind in ours),
        ]
        for row in rows
    ]
    return markdown(heads, lines, len(names) - 1)


def summary(rows: list[Row]) -> str:
    """bf16's time over ours, of the model that goals were set for."""
    heads = ["bf16's time over ours", "default recipe", f"{EXPERTS} routed experts and a shared one", "no experts"]
    lines = [
        [f"linears of a block, {m:,} token{'s' * (m > 1)}"]
        + [f"{ratio(row, kind):.2f}" for kind in ("default", "with_experts", "without_experts")]
        for m in SUMMARY
        for row in (row_of(rows, MODEL, m),)
    ]
    return markdown(heads, lines)


def goals(rows: list[Row]) -> str:
    """Ratios beside those that were asked for; bold where they are reached."""
    heads = ["tokens", "goal", "with experts", "without experts", "default recipe", f"{LARGE} with experts"]
    wanted = [(m, goal, "") for m, goal in GOALS.items()] + [(m, goal, "fp8_") for m, goal in FP8_GOALS.items()]

    def cell(model: str, m: int, prefix: str, kind: str, goal: float) -> str:
        reached = ratio(row_of(rows, model, m, prefix), prefix + kind)
        return f"**{reached:.2f}**" if kind == "with_experts" and reached >= goal else f"{reached:.2f}"

    return markdown(
        heads,
        [
            [f"{m:,}{', fp8' * bool(prefix)}", str(goal)]
            + [cell(MODEL, m, prefix, kind, goal) for kind in ("with_experts", "without_experts", "default")]
            + [cell(LARGE, m, prefix, "with_experts", goal)]
            for m, goal, prefix in wanted
        ],
    )


def costs(rows: list[Row]) -> str:
    """What experts cost over the same linears without them, with integer activations and with fp8."""
    heads = ["tokens", "goal", "experts", "default", f"{LARGE}, experts", f"{LARGE}, default"]
    heads += ["fp8, experts", "fp8, default"]
    lines = []
    for m, goal in COSTS.items():
        mine, large = row_of(rows, MODEL, m), row_of(rows, LARGE, m)
        kinds = ("with_experts", "default")
        cells = [cost(row, kind) for row in (mine, large) for kind in kinds]
        cells += [cost(mine, f"fp8_{kind}") if f"fp8_{kind}" in mine else "-" for kind in kinds]
        lines.append([f"{m:,}", "-" if goal is None else f"{goal}%", *cells])
    return markdown(heads, lines)


def row_of(rows: list[Row], model: str, m: int, prefix: str = "") -> Row:
    """With all three layers, in one format. Ends the program with a sentence where they were not timed."""
    for row in rows:
        if (row["model"], row["tokens"]) == (model, m) and {prefix + kind for kind in LAYERS} <= set(row):
            return row
    what = ", ".join(HEADS[prefix + kind] for kind in LAYERS)
    sys.exit(f"These files do not have {what} of {model} on {m} token{'s' * (m > 1)}, which the page shows.")


PARTS: dict[str, Callable[[list[Row]], str]] = dict(tables=tables, summary=summary, goals=goals, costs=costs)


def picture(rows: list[Row], path: Path) -> None:
    """bf16's time over ours against tokens, one line a model, broken with fp8 activations; none where ours were not
    timed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {layers: title for layers, title in LAYERS.items() if any({layers, f"fp8_{layers}"} & set(r) for r in rows)}
    if not shown:
        return
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4), sharey=True, squeeze=False)
    axes = axes[0]
    for axis, (layers, title) in zip(axes, shown.items(), strict=True):
        for i, model in enumerate(dict.fromkeys(row["model"] for row in rows)):
            for kind, style, label in ((layers, "-", model), (f"fp8_{layers}", "--", f"{model}, fp8")):
                mine = [row for row in rows if row["model"] == model and kind in row]
                if mine:
                    ratios = [ratio(row, kind) for row in mine]
                    axis.plot([row["tokens"] for row in mine], ratios, style, marker="o", color=f"C{i}", label=label)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xscale="log", xlabel="tokens")
        axis.set_title(title, fontsize=9)
    axes[0].set_ylabel("bf16 time / our time")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(rows: list[Row], folder: Path, page: Path | None = None) -> None:
    """gpu_linear.md and gpu_linear.png, and a page's parts. Nothing is written where the page cannot be filled."""
    parts = {name: partial(part, rows) for name, part in PARTS.items()}
    new = None if page is None else filled(page.read_text(), "linears", parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu_linear.md").write_text("Microseconds for the four groups of a block.\n\n" + tables(rows))
    picture(rows, folder / "gpu_linear.png")
    if page is not None and new is not None:
        page.write_text(new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="what gpu_linear.py has written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="a page whose tables are made anew")
    arguments = parser.parse_args()
    for path in (*arguments.files, *filter(None, [arguments.docs])):
        if not path.is_file():
            parser.error(f"{path} is not there")
    write(stored(arguments.files), arguments.out, arguments.docs)


if __name__ == "__main__":
    main()
