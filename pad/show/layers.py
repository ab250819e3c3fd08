"""The matching loss layer by layer over a run (arXiv 2408.03360, figure 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pad.show.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS = 50  # of a curve, at most: each is the mean of as many iterations


def plot_layers(events: Sequence[Mapping]) -> Figure:
    """The curves of each layer from shallow (light) to deep (dark), of the ``match`` events of a run's metrics.

    Each event has "iteration" and "layers": by name (what the layer adds to the loss, what it would add at the start).
    Left: the loss of a layer by itself, the one by the other. Right: what it adds to the loss. Layers of which nothing
    is matched are left out, and so are numbers that are not finite. Each point is a mean of neighbouring iterations.
    """
    import matplotlib

    names = list(events[0]["layers"])
    values = np.array([[each["layers"][name] for name in names] for each in events], dtype=float)  # None becomes NaN
    at = np.array([each["iteration"] for each in events])
    matched = [i for i in range(len(names)) if (values[:, i, 1] > 0).any()]
    figure = new_figure(11, 4.5)
    own, added = figure.subplots(1, 2)
    colours = matplotlib.colormaps["viridis_r"](np.linspace(0.05, 1, len(matched)))
    for colour, i in zip(colours, matched):
        finite = np.isfinite(values[:, i]).all(axis=1) & (values[:, i, 1] > 0)
        for axes, curve in ((own, values[finite, i, 0] / values[finite, i, 1]), (added, values[finite, i, 0])):
            parts = np.array_split(np.arange(finite.sum()), min(POINTS, max(1, finite.sum())))
            points = [(at[finite][part].mean(), curve[part].mean()) for part in parts if len(part)]
            axes.plot(*zip(*points), color=colour, label=names[i], marker="." if len(points) == 1 else None)
    own.set_title("Loss of each layer by itself")
    added.set_title("What each layer adds to the matching loss")
    for axes in (own, added):
        axes.set_xlabel("iteration")
        axes.set_ylim(bottom=0)
    figure.legend(*own.get_legend_handles_labels(), loc="outside right upper", title="shallow to deep", fontsize=8)
    return figure
