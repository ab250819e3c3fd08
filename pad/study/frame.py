"""What a study's file says of its report: what it is of, what was published, and which rows make curves."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from pad.errors import InputError
from pad.study.grid import Grid
from pad.study.published import NOTHING, Published, number, read_published


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What a report says around what came out.

    heading, note: its first lines, in a report with published values or of a scale. points: curve and x, by row and
    size. x: what the points' x are. costs: whether the report says what distilling took.
    """

    heading: str = ""
    note: str = ""
    published: Published = NOTHING
    points: Mapping[tuple[str, int], tuple[str, float]] = field(default_factory=dict)
    x: str = "x"
    costs: bool = False

    def begins(self, method: str, ipc: int) -> str | None:
        """The row that the curve of a row begins with, at its smallest x; None for a row of no curve."""
        curve, _ = self.points.get((method, ipc), (None, 0))
        own = {row: x for (row, size), (name, x) in self.points.items() if (name, size) == (curve, ipc)}
        return min(own, key=lambda row: own[row]) if own else None


PLAIN = Frame()


def frame_of(grid: Grid) -> Frame:
    """The frame of a study's report. Raises InputError for published values or points that are none."""
    published = _published(grid)
    heading = _heading(grid) if grid.scale or published.rows else ""
    return Frame(heading=heading, note=grid.note, published=published, points=_points(grid), x=grid.x, costs=grid.costs)


def _heading(grid: Grid) -> str:
    """At which scale the study is run, on what, and how often."""
    common, scored = grid.common, grid.scored(grid.sizes[0], grid.seeds[0])
    images = f"{common.train_per_class or 'all'} training images per class"
    data = ", ".join([common.dataset, images, str(scored.model), *["ZCA"] * common.zca])
    pool = f", of each of {', '.join(scored.pool)}" * (len(scored.pool) > 1)
    sentences = [
        f"Scale {grid.scale}: {data}" if grid.scale else data,
        f"Seeds {', '.join(map(str, grid.seeds))}",
        f"{scored.num_eval} networks per set{pool}",
        *(f"{ours} stands for {theirs}" for ours, theirs in grid.stands_for.items() if ours in scored.pool),
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def _published(grid: Grid) -> Published:
    rows = {
        method: read_published(entry["published"], f"{grid.where}: {method}: published")
        for method, entry in grid.methods.items()
        if "published" in entry
    }
    first = grid.scored(grid.sizes[0], grid.seeds[0]).pool[0]
    published = Published(rows=rows, stands_for=grid.stands_for, first=first)
    published.refuse_unmatched(grid.where, grid.sizes)
    return published


def _points(grid: Grid) -> dict[tuple[str, int], tuple[str, float]]:
    """Curve and x of each row at each size that has them."""
    found = {}
    for method, ipc in itertools.product(grid.methods, grid.sizes):
        about = f"{grid.where}: {method}"
        entry = grid.given(grid.methods[method], about, ipc)
        if not {"curve", "x"} & {*entry}:
            continue
        curve, x = entry.get("curve"), number(entry.get("x"))
        if not isinstance(curve, str) or x is None:
            raise InputError(f"{about}: curve: {curve!r} and x: {entry.get('x')!r} are not a name and a number")
        found[method, ipc] = curve, x
    return found
