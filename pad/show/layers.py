"""The matching loss layer by layer over a run (arXiv 2408.03360, figure 5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pad.show.figures import new_figure
from pad.show.names import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 50  # of a curve, at most: each is the mean of as many iterations
FEW = 10  # where panels are small


def plot_layers(events: Sequence[Mapping]) -> Figure:
    """The curves of each layer from shallow (light) to deep (dark), of the ``match`` events of a run's metrics.

    Each event has "iteration" and "layers": by name (what the layer adds to the loss, what it would add at the start).
    Left: the loss of a layer by itself, the one by the other. Right: what it adds to the loss. Layers of which nothing
    is matched are left out, and so are numbers that are not finite. Each point is a mean of neighbouring iterations.
    """
    figure = new_figure(11, 4.5)
    own, added = figure.subplots(1, 2)
    for name, colour, at, share, loss in _curves(events):
        _draw(own, at, share, POINTS, color=colour, label=name)
        _draw(added, at, loss, POINTS, color=colour, label=name)
    own.set_title("Loss of each layer by itself")
    added.set_title("What each layer adds to the matching loss")
    for axes in (own, added):
        _finish(axes)
    figure.legend(*own.get_legend_handles_labels(), loc="outside right upper", title="shallow to deep", fontsize=8)
    return figure


def plot_layers_of(runs: Mapping[str, Sequence[Mapping]]) -> Figure:
    """The loss of each layer by itself, as :func:`plot_layers` has it, a panel for each of ``runs`` under its title."""
    figure = new_figure(3.8 * len(runs) + 1.5, 3.6)
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (title, events) in zip(panels, runs.items()):
        for name, colour, at, share, _ in _curves(events):
            _draw(axes, at, share, FEW, color=colour, label=name)
        axes.set_title(short(title, 40), fontsize=10, parse_math=False)
        _finish(axes)
    panels[0].set_ylabel("matching loss of a layer by itself")
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend([*lines.values()], [*lines], loc="outside right upper", title="shallow to deep", fontsize=8)
    return figure


def _curves(events: Sequence[Mapping]) -> Iterator[tuple[str, Any, np.ndarray, np.ndarray, np.ndarray]]:
    """Each layer of which something is matched: name, colour, iterations, loss by itself, what it adds to the loss."""
    import matplotlib

    names = list(events[0]["layers"])
    values = np.array([[each["layers"][name] for name in names] for each in events], dtype=float)  # None becomes NaN
    at = np.array([each["iteration"] for each in events])
    matched = [i for i in range(len(names)) if (values[:, i, 1] > 0).any()]
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.05, 1, len(matched)))
    for colour, i in zip(colours, matched):
        finite = np.isfinite(values[:, i]).all(axis=1) & (values[:, i, 1] > 0)
        yield names[i], colour, at[finite], values[finite, i, 0] / values[finite, i, 1], values[finite, i, 0]


def _draw(axes: Axes, at: np.ndarray, curve: np.ndarray, most: int, **style: Any) -> None:
    """At most so many points, each the mean of neighbouring iterations."""
    parts = np.array_split(np.arange(len(at)), min(most, max(1, len(at))))
    points = [(at[part].mean(), curve[part].mean()) for part in parts if len(part)]
    axes.plot(*zip(*points), marker="." if len(points) == 1 else None, **style)


def _finish(axes: Axes) -> None:
    axes.set_xlabel("iteration")
    axes.set_ylim(bottom=0)
