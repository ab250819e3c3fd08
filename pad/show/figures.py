"""Figures of matplotlib: how they are made and written, and their colours."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pad.store.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that do not depend on telling red from green (Okabe and Ito)
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREY = "#8C8C8C"


def save_figure(path: Path | str, figure: Figure) -> None:
    """Write a figure as a PNG file, atomically; equal figures give equal bytes."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=100, metadata={"Software": None})


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, sizes in inches, that no global state of matplotlib's knows of."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")
