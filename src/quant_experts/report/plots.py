"""Figures as SVG text.

They hold axes only: legends are HTML, which wraps and can be read aloud. Backgrounds are always light.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from quant_experts.evaluation.comparison import Score
from quant_experts.report.canvas import drawing
from quant_experts.report.columns import finite
from quant_experts.report.palette import TOKEN_STYLES, Style

_INK = "#1F2933"


def accuracy_svg(
    points: Mapping[str, tuple[float, Score]],
    reference: Score | None,
    styles: Mapping[str, Style],
    limits: tuple[float, float],
    *,
    name: str,
    description: str,
) -> str:
    """Average exact match over stored bits per weight, by method; the reference is a line with its interval as a band.

    limits: lowest and highest share on the y axis, so that figures side by side can be compared.
    """

    def draw(axes: Axes) -> None:
        if reference is not None:
            axes.axhline(reference.mean, color=_INK, linewidth=1.2)
            if finite(reference.low) and finite(reference.high):
                axes.axhspan(reference.low, reference.high, color=_INK, alpha=0.10, linewidth=0)
        for method, (bits, score) in points.items():
            style = styles[method]
            if finite(score.low) and finite(score.high):
                axes.plot([bits, bits], [score.low, score.high], color=style.color, alpha=0.55, linewidth=1.6)
            axes.plot([bits], [score.mean], color=style.color, markeredgecolor="white", **_marker(style, 8.0))
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel("exact match, average")
        axes.set_ylim(*limits)
        axes.margins(x=0.12)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))

    return drawing(draw, name, description)


def front_svg(
    points: Mapping[str, tuple[float, Score]],
    front: Sequence[str],
    styles: Mapping[str, Style],
    labels: tuple[str, str],
    *,
    name: str,
    description: str,
) -> str:
    """Error on a log scale over cost, by method, and the front: the least error that each cost buys.

    front: names of points by rising cost. labels: of the x axis (cost) and the y axis (error).
    """

    def draw(axes: Axes) -> None:
        edges = [points[method] for method in front]
        right = max(x for x, _ in points.values())
        across = [x for x, _ in edges] + [right]
        axes.step(across, [y.mean for _, y in edges] + [edges[-1][1].mean], where="post", color="#9AA5B1", zorder=1)
        for method, (x, y) in points.items():
            style = styles[method]
            if finite(y.low) and finite(y.high) and y.low > 0:
                axes.plot([x, x], [y.low, y.high], color=style.color, alpha=0.55, linewidth=1.6)
            axes.plot([x], [y.mean], color=style.color, markeredgecolor="white", **_marker(style, 7.5))
        axes.set_yscale("log")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        axes.margins(x=0.08, y=0.1)
        _log_ticks(axes, axes.get_ylim())
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))

    return drawing(draw, name, description)


def layer_error_svg(
    lines: Mapping[str, Sequence[float | None]],
    blocks: Sequence[str],
    styles: Mapping[str, Style],
    limits: tuple[float, float],
    *,
    name: str,
    description: str,
) -> str:
    """Relative output error of every block on a log scale, one line a method; what is no positive number is a gap."""

    def draw(axes: Axes) -> None:
        positions = range(len(blocks))
        for method, values in lines.items():
            style = styles[method]
            axes.plot(
                positions,
                [value if value is not None and finite(value) and value > 0 else math.nan for value in values],
                color=style.color,
                linestyle=(0, style.dash) if style.dash else "-",
                **_marker(style, 5.0),
                markeredgecolor="white",
                markeredgewidth=0.4,
                markevery=max(1, math.ceil(len(blocks) / 14)),
            )
        axes.set_yscale("log")
        axes.set_ylim(*limits)
        axes.set_xlabel("block, from input to output")
        axes.set_ylabel("relative output error")
        _log_ticks(axes, limits)
        _position_ticks(axes, blocks)

    return drawing(draw, name, description)


def channel_curve_svg(curves: Mapping[str, Sequence[float]], width: int, *, name: str, description: str) -> str:
    """Share of tokens for which a channel is important, channels in one common order; at most `width` channels."""

    def draw(axes: Axes) -> None:
        for kind, curve in curves.items():
            style = TOKEN_STYLES.get(kind, TOKEN_STYLES["all"])
            axes.plot(
                range(1, min(width, len(curve)) + 1),
                curve[:width],
                color=style.color,
                linestyle="-" if style.line else "",
                zorder=3 if style.line else 2,
                clip_on=style.line,
                markeredgewidth=0,
                **(_marker(style, 3.2) if style.marker else {}),
            )
        axes.set_xlabel("channel, most often important first")
        axes.set_ylabel("share of tokens")
        axes.set_ylim(0, 1.03)
        axes.set_xlim(1, max(2, width))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    return drawing(draw, name, description, (3.8, 2.3))


def channel_map_svg(tokens: Sequence[Sequence[int]], width: int, color: str, *, name: str, description: str) -> str:
    """A dot for each important channel of each token: channels across in one common order, tokens down."""
    spots = [(place + 1, row) for row, places in enumerate(tokens) for place in places if place < width]

    def draw(axes: Axes) -> None:
        across, down = [x for x, _ in spots], [y for _, y in spots]
        axes.plot(across, down, linestyle="", marker="s", color=color, markersize=2.6, markeredgewidth=0)
        axes.grid(False)
        axes.set_xlim(0, width + 1)
        axes.set_ylim(len(tokens), -1)
        axes.set_yticks([])
        axes.set_xlabel("channel, most often important first")
        axes.set_ylabel("tokens")

    return drawing(draw, name, description, (3.8, 1.9))


def similarity_svg(shares: Sequence[Sequence[int]], clusters: Sequence[int], *, name: str, description: str) -> str:
    """Similarities in percent as a heat map, channels in the order of their clusters, which lines set apart."""
    edges = [i - 0.5 for i in range(1, len(clusters)) if clusters[i] != clusters[i - 1]]

    def draw(axes: Axes) -> None:
        colors, scale = matplotlib.colormaps["Blues"], Normalize(0, 1)
        axes.imshow([[value / 100 for value in row] for row in shares], cmap=colors, norm=scale, interpolation="none")
        axes.grid(False)
        for edge in edges:
            axes.axhline(edge, color=_INK, linewidth=0.5)
            axes.axvline(edge, color=_INK, linewidth=0.5)
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("channel, by cluster")
        axes.set_ylabel("channel, by cluster")
        bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)

    return drawing(draw, name, description, (3.8, 3.2))


def embedding_svg(
    points: Sequence[tuple[float, float]],
    clusters: Sequence[int],
    styles: Sequence[Style],
    *,
    name: str,
    description: str,
) -> str:
    """One mark a channel, alike for the channels of a cluster."""

    def draw(axes: Axes) -> None:
        for cluster in dict.fromkeys(clusters):
            style = styles[cluster % len(styles)]
            members = [point for point, label in zip(points, clusters, strict=True) if label == cluster]
            axes.plot(
                [x for x, _ in members],
                [y for _, y in members],
                linestyle="",
                color=style.color,
                markeredgecolor="white",
                markeredgewidth=0.3,
                **_marker(style, 5.0),
            )
        axes.set_xticks([])
        axes.set_yticks([])
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.margins(0.08)

    return drawing(draw, name, description, (3.8, 3.2))


def expert_use_svg(
    shares: Sequence[Sequence[float]], blocks: Sequence[str], highest: float, *, name: str, description: str
) -> str:
    """A heat map: experts down, groups across, the darker the larger the share of tokens.

    highest: the share that gets the darkest colour, so that heat maps side by side can be compared.
    """

    def draw(axes: Axes) -> None:
        _expert_map(axes, shares, highest)
        axes.set_xlabel("block, from input to output")
        _position_ticks(axes, blocks)

    return drawing(draw, name, description, (3.8, 1.9))


def expert_place_svg(shares: Sequence[Sequence[float]], highest: float, *, name: str, description: str) -> str:
    """As `expert_use_svg`, with equal parts of the sequence across."""

    def draw(axes: Axes) -> None:
        _expert_map(axes, shares, highest)
        axes.set_xlabel("place in the sequence, from its first token to its last")
        quarters = range(0, 101, 25)
        axes.set_xticks([len(shares) * share / 100 - 0.5 for share in quarters], [f"{share}%" for share in quarters])

    return drawing(draw, name, description, (3.8, 1.9))


def _expert_map(axes: Axes, shares: Sequence[Sequence[float]], highest: float) -> None:
    """shares: one list a column, one share an expert; NaN, and what a shorter list leaves out, is grey."""
    experts = max(map(len, shares))
    rows = [[column[i] if i < len(column) else math.nan for column in shares] for i in range(experts)]
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="#D9D9D9")
    scale = Normalize(0, highest)
    axes.imshow(rows, cmap=colors, norm=scale, aspect="auto", interpolation="none")
    axes.grid(False)
    axes.set_ylabel("expert, in order")
    axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value + 1:.0f}"))
    bar = axes.figure.colorbar(ScalarMappable(scale, colors), ax=axes, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.outline.set_visible(False)


def _marker(style: Style, size: float) -> dict[str, Any]:
    """The method's shape. Matplotlib scales outlines to one extent, which would make squares larger than diamonds."""
    extent = max(max(abs(x), abs(y)) for x, y in style.outline)
    return {"marker": [*style.outline, style.outline[0]], "markersize": size * extent}


def _log_ticks(axes: Axes, limits: tuple[float, float]) -> None:
    """Plain numbers; between the powers of ten only where the axis is short."""
    decades = math.log10(limits[1] / limits[0])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.2 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _position_ticks(axes: Axes, labels: Sequence[str]) -> None:
    """Label the first position of each block, as many as fit."""
    starts = [i for i, label in enumerate(labels) if i == 0 or label != labels[i - 1]]
    kept = starts[:: max(1, math.ceil(len(starts) / 12))]
    axes.set_xticks(kept, [labels[i] for i in kept])
