"""The plots of a study's report. Legends get their names outright: labels that begin with _ would be left out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pad.show.figures import BLUE, COLOURS, GREY, new_figure
from pad.show.names import short, widest
from pad.study.published import Published
from pad.study.rows import Row, in_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def plot(rows: Sequence[Row]) -> Figure:
    """Mean and standard error of each method, a panel for each size; small dots are seeds."""
    sizes = list(dict.fromkeys(row.ipc for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    names = [short(method, 40) for method in methods]
    margin = max(2, 0.6 + widest(names))
    figure = new_figure(margin + 3.5 * len(sizes), 1 + 0.3 * len(methods))
    panels = figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0]
    for panel, ipc in zip(panels, sizes):
        for row in (row for row in rows if row.ipc == ipc and row.values):
            y = methods.index(row.method)
            panel.plot(list(row.values.values()), [y] * len(row.values), ".", color=GREY, markersize=4)
            panel.errorbar(row.mean, y, xerr=row.error, fmt="o", color=BLUE, markersize=5, capsize=3)
        panel.set_title(in_words(ipc), fontsize=10)
        panel.set_xlabel("test accuracy, %: mean, standard error, seeds")
        panel.set_yticks(range(len(methods)), names, parse_math=False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure


def plot_curves(
    rows: Sequence[Row], points: Mapping[tuple[str, int], tuple[str, float]], label: str, published: Published
) -> Figure:
    """Each curve over x, a panel for each size: accuracy, and below it what a row adds to the first of its curve.

    Both are means with standard errors. At the bottom stands what was published of the accuracy.

    ``points``: by row and size, its curve and x. ``label``: what the x are.
    """
    shown = [row for row in rows if (row.method, row.ipc) in points]
    sizes = list(dict.fromkeys(row.ipc for row in shown))
    curves = list(dict.fromkeys(curve for curve, _ in points.values()))
    compared = any(row.difference for row in shown)
    below = any(row.published is not None for row in shown)
    figure = new_figure(4 * len(sizes) + 1.5, 3.4 * (1 + compared + below))
    panels = figure.subplots(1 + compared + below, len(sizes), sharex=True, squeeze=False)
    for column, ipc in enumerate(sizes):
        for curve, colour in zip(curves, itertools.cycle(COLOURS)):
            style = {"color": colour, "marker": "o", "markersize": 5}
            own = [(points[row.method, ipc][1], row) for row in shown if row.ipc == ipc]
            own = sorted((each for each in own if points[each[1].method, ipc][0] == curve), key=lambda each: each[0])
            _with_errors(panels[0, column], [(x, row.mean, row.error) for x, row in own if row.values], style)
            if compared:
                _with_errors(panels[1, column], [(x, *row.difference) for x, row in own if row.difference], style)
            known = [(x, row.published) for x, row in own if row.published is not None]
            if known:
                panels[-1, column].plot(*zip(*known), linestyle=":", **style)
        panels[0, column].set_title(in_words(ipc), fontsize=10)
        if below:
            panels[-1, column].set_title(f"published: {in_words(published.size(ipc))}", fontsize=10)
        panels[-1, column].set_xlabel(label, parse_math=False)
    for panel in panels.flat:
        panel.set_ylabel("test accuracy, %", fontsize=9)
        panel.grid(alpha=0.3)
    if compared:
        for panel in panels[1]:
            panel.axhline(0, color=GREY, linewidth=1)
            panel.set_ylabel("minus the curve's first, points", fontsize=9)
    names = [short(curve, 24) for curve in curves]
    legend = figure.legend([bar[0] for bar in panels[0, 0].containers], names, loc="outside right upper", fontsize=9)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def _with_errors(panel: Axes, found: Sequence[tuple[float, float, float]], style: Mapping) -> None:
    """Draw points of x, y and the error of y, which is not a number where it is unknown."""
    panel.errorbar(*(zip(*found) if found else ((), (), ())), capsize=3, **style)


def by_bits(rows: Sequence[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows that have accuracies and bits, by the method and size that the sets are of; the fewest bits first."""
    lines: dict[tuple[str, int], list[Row]] = {}
    for row in (row for row in rows if row.values and row.bits):
        lines.setdefault((row.of, row.ipc), []).append(row)
    return {key: sorted(line, key=lambda row: row.bits or 0) for key, line in lines.items()}


def plot_bits(rows: Sequence[Row]) -> Figure:
    """Mean and standard error over the bits of a class, a line for each method and size with those made of its sets."""
    lines = by_bits(rows)
    sizes = {ipc for _, ipc in lines}
    names = [f"{in_words(ipc)}: " * (len(sizes) > 1) + short(method, 40) for method, ipc in lines]
    figure = new_figure(6 + widest(names), max(4, 1 + 0.25 * len(lines)))
    axes = figure.subplots()
    bars = []
    for i, line in enumerate(lines.values()):
        bits, means, errors = zip(*((row.bits or 0, row.mean, row.error) for row in line))
        style = ("-", "--", ":")[i // 10 % 3]  # there are 10 colours
        bars.append(axes.errorbar(bits, means, errors, marker="o", linestyle=style, markersize=4, capsize=3))
    axes.set_title(", ".join(map(in_words, sizes)) if len(sizes) == 1 else "", fontsize=10)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bits per class, images and labels")
    axes.set_ylabel("test accuracy, %: mean, standard error")
    axes.grid(alpha=0.3)
    legend = figure.legend([bar[0] for bar in bars], names, loc="outside right center")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
