"""Pictures of a run as SVG text, by matplotlib, in the colours of the page that holds them."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import Polygon

from slmreason.evaluate.bootstrap import Estimate
from slmreason.evaluate.compare import ArmResult
from slmreason.evaluate.curves import MEAN, Curves

INK = "#123456"
"""Stands for the page's text colour, light or dark."""
PALETTE = ("#4878b0", "#d1793d", "#4f9d69", "#b8547d", "#8a79c0", "#a08a3c", "#4aa3a8")
BAND_COLOURS = {"simple": "#4f9d69", "medium": "#d9a441", "hard": "#c25b56", "unknown": "#9a9a9a"}
Points = Sequence[tuple[float, float]]
LINES = ("-", "--", ":")
"""Of arms whose colours are used up."""
FLOW_COLUMNS = 12
"""Most columns of the flow picture: a phone shows no more."""


def as_svg(figure: Figure) -> str:
    """The figure's SVG element, as wide as its place, its ink that of the page."""
    text = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": "slmreason"}
    with rc_context(settings):  # type: ignore[arg-type]
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return re.sub(r'<svg ([^>]*?)height="[^"]*"([^>]*?)width="[^"]*"', r'<svg role="img" \1\2', svg, count=1)


def _axes(figure: Figure, *place: int, **options: Any) -> Any:
    axes = figure.add_subplot(*place, **options)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(INK)
    axes.tick_params(colors=INK, labelsize=8)
    axes.grid(axis="y", alpha=0.25)
    axes.title.set_color(INK)
    return axes


def accuracy(stages: Sequence[str], scores: Mapping[str, Sequence[tuple[float, float, float] | None]]) -> str:
    """Accuracy in % of each benchmark after each stage, with intervals.

    Args:
        scores: benchmark -> (value, low, high) in shares of 1, or None where it was not run, for each stage.
    """
    columns = min(3, len(scores)) or 1
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.3 * rows), layout="constrained")
    for number, (name, values) in enumerate(scores.items(), start=1):
        axes = _axes(figure, rows, columns, number)
        run = [(place, value) for place, value in enumerate(values) if value is not None]
        places, middle = [place for place, _ in run], [100 * value[0] for _, value in run]
        axes.fill_between(
            places, [100 * v[1] for _, v in run], [100 * v[2] for _, v in run], alpha=0.2, color=PALETTE[0]
        )
        axes.plot(places, middle, "o-", color=PALETTE[0], markersize=4)
        axes.set_title(name, fontsize=9)
        axes.set_xticks(range(len(stages)), stages, rotation=40, ha="right", fontsize=7)
    return as_svg(figure)


def against_tokens(tokens: Sequence[int], scores: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """Accuracy in % of each benchmark against the tokens of one run, with intervals.

    Args:
        tokens: where it was measured.
        scores: benchmark -> (value, low, high) in shares of 1, at each of these.
    """
    columns = min(3, len(scores)) or 1
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.1 * rows), layout="constrained")
    for number, (name, values) in enumerate(scores.items(), start=1):
        axes = _axes(figure, rows, columns, number)
        estimates = [Estimate(*value) for value in values]
        _with_interval(axes, [count / 1e6 for count in tokens], estimates, {"color": PALETTE[0]})
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("million tokens", fontsize=7, color=INK)
    return as_svg(figure)


def curves(lines: Mapping[str, Mapping[str, Points]]) -> str:
    """Small pictures side by side: title -> stage -> points."""
    columns = min(3, len(lines)) or 1
    rows = -(-len(lines) // columns)
    figure = Figure(figsize=(3.3 * columns, 2.1 * rows), layout="constrained")
    for number, (title, stages) in enumerate(lines.items(), start=1):
        axes = _axes(figure, rows, columns, number)
        for colour, (stage, points) in zip(PALETTE * len(stages), stages.items(), strict=False):
            axes.plot(
                [x for x, _ in points], [y for _, y in points], color=colour, label=stage, linewidth=1.2,
                marker="." if len(points) < 3 else None,
            )  # fmt: skip
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("optimizer step", fontsize=7, color=INK)
        if len(stages) > 1:
            axes.legend(fontsize=7, frameon=False, labelcolor=INK)
    return as_svg(figure)


def bars(stages: Sequence[str], kinds: Mapping[str, Sequence[float]], unit: str) -> str:
    """One stacked bar a stage."""
    figure = Figure(figsize=(9, 0.32 * len(stages) + 0.9), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    left = [0.0] * len(stages)
    for colour, (kind, values) in zip(PALETTE, kinds.items(), strict=False):
        axes.barh(range(len(stages)), values, left=left, color=colour, label=kind, height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.set_yticks(range(len(stages)), stages)
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.set_xlabel(unit, fontsize=8, color=INK)
    if len(kinds) > 1:
        axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    return as_svg(figure)


def flow(columns: Sequence[tuple[str, Mapping[str, int]]], moves: Sequence[Mapping[tuple[str, str], int]]) -> str:
    """How the problems move between the bands: a stack of bands for each point in time, ribbons between them.

    Args:
        columns: (label, band -> problems).
        moves: between each column and the next, (from, to) -> problems, those that stay among them.
    """
    figure = Figure(figsize=(max(4.0, 1.05 * len(columns)), 3.4), layout="constrained")
    axes = _axes(figure, 1, 1, 1)
    axes.grid(visible=False)
    bands, half = list(BAND_COLOURS), 0.13
    bottoms = []
    for place, (_, counts) in enumerate(columns):
        bottom, here = 0, {}
        for band in reversed(bands):
            count = counts.get(band, 0)
            here[band] = bottom
            if count:
                axes.bar(place, count, bottom=bottom, width=2 * half, color=BAND_COLOURS[band])
                axes.text(place, bottom + count / 2, str(count), ha="center", va="center", fontsize=7, color="white")
            bottom += count
        bottoms.append(here)
    for place, between in enumerate(moves):
        out, into = dict(bottoms[place]), dict(bottoms[place + 1])
        for (start, end), count in sorted(
            between.items(), key=lambda m: (-bands.index(m[0][0]), -bands.index(m[0][1]))
        ):
            low, high = out[start], into[end]
            out[start] += count
            into[end] += count
            corners = [(place + half, low), (place + half, low + count), (place + 1 - half, high + count),
                       (place + 1 - half, high)]  # fmt: skip
            axes.add_patch(Polygon(corners, color=BAND_COLOURS[start], alpha=0.35, linewidth=0))
    axes.set_xticks(range(len(columns)), [label for label, _ in columns], rotation=40, ha="right", fontsize=7)
    axes.set_ylabel("problems", fontsize=8, color=INK)
    return as_svg(figure)


def arms(results: Sequence[ArmResult]) -> Figure:
    """Accuracy of each arm of a comparison, and how far the first is ahead of it, with intervals."""
    figure = Figure(figsize=(9, 0.36 * len(results) + 1.1), layout="constrained")
    left, right = _axes(figure, 1, 2, 1), _axes(figure, 1, 2, 2)
    for axes, estimates, title in (
        (left, [result.mean for result in results], "accuracy, mean of the benchmarks, %"),
        (right, [result.ahead for result in results], f"{results[0].arm} ahead by, points"),
    ):
        for place, estimate in enumerate(estimates):
            if estimate is not None:
                axes.plot([100 * estimate.low, 100 * estimate.high], [place, place], color=PALETTE[0], linewidth=2)
                axes.plot([100 * estimate.mean], [place], "o", color=PALETTE[0])
        axes.set_title(title, fontsize=9)
        axes.grid(axis="x", alpha=0.25)
        axes.set_ylim(len(results) - 0.5, -0.5)
    right.axvline(0, color=INK, linewidth=0.8)
    left.set_yticks(range(len(results)), [result.arm for result in results])
    right.set_yticks([])
    return figure


def budgets(curves: Curves) -> Figure:
    """Accuracy of each arm against tokens, and how far the first arm lies above each other one, with intervals."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = _axes(figure, 1, 2, 1), _axes(figure, 1, 2, 2)
    first, tokens = curves.arms[0].arm, [budget / 1e6 for budget in curves.budgets]
    for number, arm in enumerate(curves.arms):
        style = {"color": PALETTE[number % len(PALETTE)], "label": arm.arm,
                 "linestyle": LINES[number // len(PALETTE) % len(LINES)]}  # fmt: skip
        _with_interval(left, tokens, arm.accuracy, style)
        if arm.lead is not None:
            _with_interval(right, tokens, arm.lead.points, style)
    right.axhline(0, color=INK, linewidth=0.8)
    name = "mean of the benchmarks" if curves.of == MEAN else curves.of
    for axes, title in ((left, f"{name}, %"), (right, f"{first} ahead by, points")):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("million tokens", fontsize=8, color=INK)
        axes.set_xlim(0, tokens[-1])
    left.legend(fontsize=7, frameon=False, labelcolor=INK)
    return figure


def _with_interval(axes: Any, x: Sequence[float], estimates: Sequence[Estimate], style: Mapping[str, str]) -> None:
    low, high = [100 * each.low for each in estimates], [100 * each.high for each in estimates]
    axes.fill_between(x, low, high, alpha=0.12, color=style["color"], linewidth=0)
    axes.plot(x, [100 * each.mean for each in estimates], marker=".", linewidth=1.4, **style)
