"""Figures of matplotlib: how they are made and written, and their colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pad.show.pictures import unless_it_fails
from pad.store.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that do not depend on telling red from green (Okabe and Ito)
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#8C8C8C"
COLOURS = (BLUE, ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", GREY)  # of curves


def draw_figure(path: Path, draw: Callable[..., Figure], *arguments: Any) -> None:
    """Write the figure ``draw(*arguments)`` as a PNG file, atomically; equal figures give equal bytes.

    The style is matplotlib's own, whatever the user's matplotlibrc says of fonts and LaTeX: the names in a figure are
    checked for that font, and so are the sizes of what stands around them. Of a figure that fails a warning is logged.
    """
    with unless_it_fails(path):
        from matplotlib import style

        with style.context("default"), atomic_file(path) as file:
            draw(*arguments).savefig(file, format="png", dpi=100, metadata={"Software": None})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that no global state of matplotlib's knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
