"""Pareto pictures: the error that a method leaves, over what it costs to store and over what it costs to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from quant_experts.evaluation.comparison import Comparison, MethodRow, Score
from quant_experts.report.columns import active_flops, as_score, by_scheme
from quant_experts.report.figures import Figure
from quant_experts.report.palette import Style
from quant_experts.report.plots import front_svg

Points = dict[str, tuple[float, Score]]
Value = Callable[[MethodRow], Score | float | None]


@dataclass(frozen=True)
class Axis:
    """One quantity of a row."""

    title: str
    label: str
    value: Value


ERRORS = (
    Axis("KL", "KL to full precision, nats per token", lambda row: row.kl),
    Axis("Layer error", "layer error over rtn's", lambda row: row.layer_error),
)
COSTS = (
    Axis("stored bits", "stored bits per weight", lambda row: row.bits_per_weight),
    Axis("operations", "operations a token, over full precision's", active_flops),
)


def fronts(comparison: Comparison, styles: Mapping[str, Style]) -> list[Figure]:
    """One picture for each scheme, error and cost; none for fewer than two points, which make no front."""
    result = []
    for number, (scheme, rows) in enumerate(by_scheme(comparison.rows).items()):
        for error in ERRORS:
            for cost in COSTS:
                found = points(rows, cost.value, error.value)
                if len(found) < 2 or len({x for x, _ in found.values()}) < 2:
                    continue
                best = ", ".join(front(found))
                title = f"{error.title} over {cost.title}{f', {scheme}' if scheme else ''}"
                name = f"front{number}-{ERRORS.index(error)}-{COSTS.index(cost)}"
                svg = front_svg(
                    found,
                    front(found),
                    styles,
                    (cost.label, error.label),
                    name=name,
                    description=f"{title}. No method is better on both than: {best}.",
                )
                result.append(Figure(name, title, Markup(svg)))
    return result


def points(rows: Sequence[MethodRow], cost: Value, error: Value) -> Points:
    """Method -> (cost, error), for rows that have both and an error above zero, which a log scale can show."""
    found: Points = {}
    for row in rows:
        x, y = as_score(cost(row)), as_score(error(row))
        if x and y and y.mean > 0:
            found[row.method] = (x.mean, y)
    return found


def front(found: Points) -> list[str]:
    """The methods that none is at least as good as on both axes and better on one, by rising cost."""
    best: list[str] = []
    for name, (_, score) in sorted(found.items(), key=lambda item: (item[1][0], item[1][1].mean)):
        if not best or score.mean < found[best[-1]][1].mean:
            best.append(name)
    return best
