"""Pictures of difficulty rankings: scores, images, how far methods agree, and what a curriculum makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pad.difficulty.ranking import Ranking
from pad.experts.curriculum import Curriculum
from pad.show.figures import BLUE, GREY, ORANGE, draw_figure, new_figure
from pad.show.names import short, widest
from pad.show.pictures import image_grid, unless_it_fails
from pad.store.files import save_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = 20  # classes that have a histogram each; more are shown by their quantiles
NAMES = 60  # class names that fit under one axis
CLASSES = 20  # of which images are shown
METHOD = 40  # characters of a method's name
EXTREMES = 8  # images of a class that are shown from either end


def plot_all(
    folder: Path,
    rankings: dict[str, Ranking],
    images: Tensor,
    class_names: Sequence[str],
    curriculum: Curriculum,
    epochs: int,
) -> None:
    """Write every picture there is to make of ``rankings`` (method -> ranking) as PNG files.

    ``scores_<method>.png`` where there are scores, ``images_<method>.png``, ``correlation.png`` of two or more methods,
    and ``curriculum.png``, of the ``curriculum`` over ``epochs`` epochs in the largest class. Of one that fails a
    warning is logged.
    images uint8 ``[N, C, H, W]`` by data-set index; all rankings are of these images and of the named classes.
    """
    for method, ranking in rankings.items():
        if ranking.scores is not None:
            draw_figure(folder / f"scores_{method}.png", plot_scores, ranking, class_names, method)
        path = folder / f"images_{method}.png"
        with unless_it_fails(path):
            save_picture(path, extremes(ranking, images, class_names, method))
    if len(rankings) > 1:
        draw_figure(folder / "correlation.png", plot_correlation, rank_correlation(rankings), list(rankings))
    largest = max(len(row) for ranking in rankings.values() for row in ranking.rows)
    draw_figure(folder / "curriculum.png", plot_curriculum, curriculum, epochs, largest)


def plot_scores(ranking: Ranking, class_names: Sequence[str], method: str) -> Figure:
    """How a ranking's scores are distributed in each class: up to 20 classes as histograms, more by their quantiles.

    The scale is logarithmic where the scores are positive and span more than two decades. The ranking must have scores.
    """
    assert ranking.scores is not None, method
    scores = [ranking.scores[row].numpy() for row in ranking.rows]
    everything = np.concatenate(scores)
    low, high = np.quantile(everything, (0.01, 0.99))
    scale = "log" if everything.min() > 0 and high > 100 * low else "linear"
    draw = _histograms if len(scores) <= PANELS else _quantiles
    return draw(scores, everything, scale, class_names, method)


def _histograms(
    scores: list[np.ndarray], everything: np.ndarray, scale: str, class_names: Sequence[str], method: str
) -> Figure:
    columns = min(5, len(scores))
    rows = math.ceil(len(scores) / columns)
    figure = new_figure(max(7, 2.6 * columns), 1.2 + 1.9 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    edges = _edges(everything, scale)
    median = np.median(everything)
    for panel, values, name in zip(panels, scores, class_names):
        panel.hist(values, edges, color=BLUE)
        of_all = panel.axvline(median, color=GREY, linestyle=":", linewidth=1.5)
        of_class = panel.axvline(np.median(values), color=ORANGE, linewidth=1.5)
        panel.set_title(short(name, 22), fontsize=10, parse_math=False)
        panel.set_xscale(scale)
        panel.set_xlim(edges[0], edges[-1])
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[len(scores) :]:
        panel.set_visible(False)
    for panel in panels[len(scores) - columns : len(scores)]:  # the lowest of each column
        panel.tick_params(labelbottom=True)
    figure.supxlabel(_score_label(method, scale), fontsize=10, parse_math=False)
    figure.supylabel("images per bar", fontsize=10)
    figure.suptitle(_title(method), x=0.01, ha="left", parse_math=False)
    lines = [of_class, of_all]
    figure.legend(lines, ["median of the class", "median of all"], loc="outside upper right", ncols=2, frameon=False)
    return figure


def _edges(everything: np.ndarray, scale: str) -> np.ndarray:
    """Borders of the bars: one bar per value of counts, else 40 equal ones on the axis."""
    low = everything.min()
    high = everything.max()
    if np.array_equal(everything, everything.round()) and high - low < 60:
        return np.arange(low, high + 2) - 0.5
    if scale == "log":
        return np.geomspace(low, high, 41)
    return np.histogram_bin_edges(everything, 40)


def _quantiles(
    scores: list[np.ndarray], everything: np.ndarray, scale: str, class_names: Sequence[str], method: str
) -> Figure:
    levels = np.stack([np.quantile(values, (0.05, 0.25, 0.5, 0.75, 0.95)) for values in scores])  # [classes, 5]
    order = levels[:, 2].argsort(kind="stable")
    levels = levels[order]
    places = np.arange(len(order))
    figure = new_figure(min(16, max(8, 0.16 * len(order))), 6)
    axes = figure.subplots()
    for low, high, alpha, label in ((0, 4, 0.25, "5 to 95 % of its images"), (1, 3, 0.6, "25 to 75 %")):
        axes.bar(places, levels[:, high] - levels[:, low], 1.0, levels[:, low], color=BLUE, alpha=alpha, label=label)
    axes.hlines(levels[:, 2], places - 0.5, places + 0.5, color=ORANGE, linewidth=2, label="median")
    axes.use_sticky_edges = False  # leave room below, where a median may be 0
    axes.set_yscale(scale)
    axes.set_xlim(-0.5, len(order) - 0.5)
    step = math.ceil(len(order) / NAMES)
    named = places[::step]
    labels = [short(class_names[order[place]], 16) for place in named]
    axes.set_xticks(named, labels, rotation=90, fontsize=8, parse_math=False)
    ordinal = {2: "2nd", 3: "3rd"}.get(step, f"{step}th")
    which = "" if step == 1 else f", every {ordinal} named"
    axes.set_xlabel(f"{len(order)} classes, by their median{which}")
    axes.set_ylabel(_score_label(method, scale), parse_math=False)
    axes.set_title(_title(method), parse_math=False)
    axes.legend(loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _title(method: str) -> str:
    return f"{short(method, METHOD)}: scores of each class"


def _score_label(method: str, scale: str) -> str:
    return f"{short(method, METHOD)} score, low = easy" + (", logarithmic" if scale == "log" else "")


def extremes(ranking: Ranking, images: Tensor, class_names: Sequence[str], method: str) -> np.ndarray:
    """The easiest (first) 8 images of each class on the left, its 8 hardest on the right, easiest first in both.

    images ``[N, 1 or 3, H, W]`` uint8 by data-set index. At most 20 classes are shown, evenly chosen, as the caption
    says. A class with fewer than 16 images has some on both sides.
    Returns uint8 ``[height, width, 3]``. Raises InputError when there are neither 1 nor 3 channels.
    """
    total = len(ranking.rows)
    shown = torch.linspace(0, total - 1, min(CLASSES, total)).round().long().tolist()
    first, last = ("easiest", "hardest") if ranking.scores is not None else ("first", "last")  # an order, or not known
    of_all = f" ({len(shown)} of {total} classes, evenly chosen)" if total > len(shown) else ""
    sides = {f"{method}: {first} of each class": slice(None, EXTREMES)}
    sides[f"{method}: {last} of each class{of_all}"] = slice(-EXTREMES, None)
    blocks = []
    for caption, side in sides.items():
        rows = [ranking.rows[c][side] for c in shown]
        pixels = images[torch.cat(rows)].float() / 255
        classes = torch.tensor(shown).repeat_interleave(torch.tensor([len(row) for row in rows]))
        blocks.append(image_grid(pixels, classes, class_names, caption=caption))
    return np.concatenate(blocks, axis=1)


def rank_correlation(rankings: dict[str, Ranking]) -> Tensor:
    """How far methods agree on the order within a class: ``[m, m]`` float64, symmetric, in -1..1, 1 on the diagonal.

    The mean over classes of Spearman's correlation of the images' places in their rows; classes of one image, which
    have no order, do not count (NaN when no class has two). All rankings are of the same images.
    """
    total = torch.zeros(len(rankings), len(rankings), dtype=torch.float64)
    classes = 0
    for rows in zip(*(ranking.rows for ranking in rankings.values())):
        if len(rows[0]) > 1:
            # argsort turns "which image is in this place" into "which place has this image", a rank without ties
            places = torch.stack([row.argsort() for row in rows]).double()
            total += torch.corrcoef(places).reshape(total.shape)
            classes += 1
    return total / classes


def plot_correlation(correlation: Tensor, names: Sequence[str]) -> Figure:
    """A matrix of rank correlations (:func:`rank_correlation`) ``[m, m]`` with the numbers in its cells."""
    names = [short(name, METHOD) for name in names]
    count = len(names)
    side = max(3.5, 0.55 * count)  # inches
    margin = widest(names)
    figure = new_figure(side + margin + 1.3, side + margin + 0.6)
    axes = figure.subplots()
    picture = axes.imshow(correlation.numpy(), cmap="PuOr", vmin=-1, vmax=1)
    for i in range(count):
        for j in range(count):
            value = round(float(correlation[i, j]), 2) + 0.0  # no -0.00
            colour = "white" if abs(value) > 0.6 else "black"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(count), names, rotation=90, parse_math=False)
    axes.set_yticks(range(count), names, parse_math=False)
    axes.set_title("Rank correlation within classes", fontsize=11)
    figure.colorbar(picture, ax=axes, shrink=0.8, label="Spearman's correlation, mean over classes")
    return figure


def plot_curriculum(curriculum: Curriculum, epochs: int, n: int) -> Figure:
    """Which part of a class of ``n`` images, by difficulty, each of ``epochs`` epochs uses, and how many images."""
    windows = np.array([curriculum.window(epoch, n) for epoch in range(epochs)])  # [epochs, 2]
    edges = np.arange(epochs + 1) - 0.5
    figure = new_figure(8, 5.5)
    which, number = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    which.stairs(windows[:, 1] / n, edges, baseline=windows[:, 0] / n, fill=True, color=BLUE)
    which.set_ylim(0, 1)
    which.set_ylabel("difficulty quantile of the class\n(0 easiest, 1 hardest)")
    which.set_title("The curriculum: images used in each epoch")
    number.stairs(windows[:, 1] - windows[:, 0], edges, fill=True, color=BLUE)
    number.set_ylim(0, n * 1.05)
    number.axhline(n, color=GREY, linestyle=":")
    number.set_ylabel(f"images used, of {n}")
    number.set_xlabel("epoch")
    number.set_xlim(edges[0], edges[-1])
    for axes in (which, number):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
