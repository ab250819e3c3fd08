"""Curves of a run, from its events."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pad.show.figures import BLUE, new_figure
from pad.show.html import Markup, plot
from pad.show.names import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 400  # of a curve, at most


def curves(events: Sequence[Mapping]) -> dict[str, Markup]:
    """Plots by their captions: loss, accuracy of evaluations, learning rate, iterations that changed nothing.

    Those of which ``events``, as a run records them, say nothing are left out.
    """
    steps = [event for event in events if event["event"] == "match"]
    every = math.ceil(len(steps) / POINTS)
    of = f", mean of {every} iterations" if every > 1 else ""
    end = max((event["iteration"] for event in events), default=0)
    found = {}
    for key, caption in (("loss", f"Matching loss{of}"), ("lr", f"Learned learning rate{of}")):
        if any(_number(step.get(key)) is not None for step in steps):
            found[caption] = plot(key, _line, end, *_means(steps, key, every), may_be_logarithmic=key == "loss")
    if any(event["event"] == "evaluation" for event in events):
        found["Test accuracy while distilling, %"] = plot("accuracy", _accuracies, end, events)
    if steps:
        caption = f"Iterations that changed nothing, so far{of}"
        found[caption] = plot("skipped", _line, end, *_means(steps, "skipped", every), whole=True)
    return found


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e300 else None  # NaN is not


def _means(steps: Sequence[Mapping], key: str, every: int) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and the values of ``key``, each the mean of ``every`` in a row; what is no number does not count."""
    known = [(step["iteration"], value) for step in steps if (value := _number(step.get(key))) is not None]
    parts = [np.array(known[first : first + every]).mean(axis=0) for first in range(0, len(known), every)]
    return (*np.array(parts).reshape(-1, 2).T,)  # type: ignore[return-value]


def _panel(end: int) -> tuple[Figure, Axes]:
    figure = new_figure(5.4, 3)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("iteration")
    axes.set_xlim(-0.03 * end - 0.5, 1.03 * end + 0.5)
    axes.locator_params(axis="x", integer=True)
    return figure, axes


def _line(end: int, iterations: np.ndarray, values: np.ndarray, *, may_be_logarithmic=False, whole=False) -> Figure:
    figure, axes = _panel(end)
    if whole:
        axes.locator_params(axis="y", integer=True)
    axes.plot(iterations, values, color=BLUE, linewidth=1.4, marker="." if len(values) == 1 else "")
    if may_be_logarithmic and values.min() > 0 and values.max() > 100 * values.min():
        axes.set_yscale("log")
    return figure


def _accuracies(end: int, events: Sequence[Mapping]) -> Figure:
    """Of each network, with the standard deviation where several were trained."""
    figure, axes = _panel(end)
    found = [event for event in events if event["event"] == "evaluation" and _number(event.get("accuracy")) is not None]
    for network in dict.fromkeys(str(event.get("network")) for event in found):
        own = [event for event in found if str(event.get("network")) == network]
        iterations = [event["iteration"] for event in own]
        means, stds = ([100 * (_number(event.get(key)) or 0) for event in own] for key in ("accuracy", "std"))
        label = short(network, 24)
        axes.errorbar(iterations, means, stds if any(stds) else None, marker="o", markersize=4, capsize=3, label=label)
    for text in axes.legend(frameon=False, fontsize=9).get_texts():
        text.set_parse_math(False)
    return figure
