"""The report of a study: one table, as Markdown and as CSV, and one plot."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from pad.show.figures import BLUE, GREY, draw_figure, new_figure
from pad.show.names import short, widest
from pad.store.files import write_text


@dataclass(frozen=True)
class Outcome:
    """What came out of one cell: the accuracies (0..1) of the networks trained on its set, or why there are none."""

    method: str
    ipc: int
    seed: int
    accuracies: list[float] | None
    failed: str | None = None
    _: KW_ONLY
    seconds: float | None = None
    made: str | None = None  # the set's file, relative to the study's folder

    @property
    def percent(self) -> float:
        """Mean accuracy of its networks in %."""
        return 100 * statistics.mean(self.accuracies or [])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one size: mean over the seeds, in %, and its standard error, that of independent seeds.

    ``difference``: to the reference method, the mean over the seeds that both have, and its standard error.
    """

    method: str
    ipc: int
    values: dict[int, float]  # by seed
    seeds: int  # asked for
    networks: int  # per seed
    seconds: float
    failed: list[str]
    difference: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def error(self) -> float:
        return standard_error(list(self.values.values()))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values: their sample standard deviation over sqrt(n); NaN for one."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")


def summarise(outcomes: Sequence[Outcome], reference: str | None = None) -> list[Row]:
    """One row per method and size, by size and in the order of the outcomes."""

    def values(method: str | None, ipc: int) -> dict[int, float]:
        return {o.seed: o.percent for o in outcomes if (o.method, o.ipc) == (method, ipc) and o.accuracies}

    rows = []
    for ipc, method in sorted({(o.ipc, o.method): None for o in outcomes}, key=lambda key: key[0]):
        own = [o for o in outcomes if (o.ipc, o.method) == (ipc, method)]
        found, other = values(method, ipc), values(reference, ipc)
        pairs = [found[seed] - other[seed] for seed in found if seed in other]
        difference = (statistics.mean(pairs), standard_error(pairs)) if pairs and method != reference else None
        networks = max((len(o.accuracies) for o in own if o.accuracies), default=0)
        failed = [f"seed {o.seed}: {o.failed}" for o in own if o.failed]
        rows.append(
            Row(
                method=method,
                ipc=ipc,
                values=found,
                seeds=len(own),
                networks=networks,
                seconds=sum(o.seconds or 0 for o in own),
                failed=failed,
                difference=difference,
            )
        )
    return rows


def write_report(folder: Path, outcomes: Sequence[Outcome], reference: str | None = None) -> None:
    """Write ``results.md`` and ``results.csv``, print the table, then draw ``results.png``, if that can be drawn.

    ``reference``: a method that others are compared with.
    """
    rows = summarise(outcomes, reference)
    text = markdown(rows, reference)
    write_text(folder / "results.md", text)
    write_text(folder / "results.csv", comma_separated(rows))
    print(f"\n{text}", flush=True)
    if any(row.values for row in rows):
        draw_figure(folder / "results.png", plot, rows)


def markdown(rows: Sequence[Row], reference: str | None = None) -> str:
    """A table for each size, best first, and what failed."""
    compared = any(row.difference for row in rows)
    minus = [f"minus {_in_markdown(reference)}, by seed"] * compared
    head = ["method", "accuracy %", "standard error", "n", *minus, "networks each"]
    parts = []
    for ipc in dict.fromkeys(row.ipc for row in rows):
        mine = sorted((row for row in rows if row.ipc == ipc), key=lambda row: -row.mean if row.values else 1)
        lines = []
        for row in mine:
            figures = [_text(row.mean, ".2f", "-"), _text(row.error, ".2f", "-")] if row.values else ["-", "-"]
            forms = zip(row.difference or (), ("+.2f", ".2f"))
            pair = [" ± ".join(_text(value, form, "-") for value, form in forms)] * compared
            n = str(len(row.values)) if len(row.values) == row.seeds else f"{len(row.values)} of {row.seeds}"
            lines.append([_in_markdown(row.method), *figures, n, *pair, str(row.networks)])
        cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
        table = [f"| {' | '.join(line)} |" for line in cells]
        parts.append(f"## {ipc} image{'s' * (ipc > 1)} per class\n\n" + "\n".join(table))
    failed = [f"- {_in_markdown(f'{row.method}, ipc {row.ipc}, {why}')}" for row in rows for why in row.failed]
    if failed:
        parts.append("## Failed\n\n" + "\n".join(failed))
    return "\n\n".join(parts) + "\n"


def _in_markdown(text: object) -> str:
    """``text`` on one line, with nothing that Markdown or HTML reads as more than text; a | is for tables to mind."""
    at_an_edge = r"(?<![^\W_])_|_(?![^\W_])"
    return re.sub(rf"[\\`*<>&~$\[\]]|{at_an_edge}", r"\\\g<0>", " ".join(str(text).split()))


def comma_separated(rows: Sequence[Row]) -> str:
    """One line per method and size."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    columns = "method ipc accuracy standard_error n networks difference difference_error seconds failed"
    writer.writerow(columns.split())
    for row in rows:
        figures = [_text(row.mean, ".4f"), _text(row.error, ".4f")] if row.values else ["", ""]
        pair = [_text(value, ".4f") for value in row.difference] if row.difference else ["", ""]
        rest = [f"{row.seconds:.1f}", "; ".join(row.failed)]
        writer.writerow([row.method, row.ipc, *figures, len(row.values), row.networks, *pair, *rest])
    return file.getvalue()


def _text(value: float, form: str, unknown: str = "") -> str:
    return unknown if math.isnan(value) else format(value, form)


def plot(rows: Sequence[Row]):
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
            error = row.error if len(row.values) > 1 else 0
            panel.errorbar(row.mean, y, xerr=error, fmt="o", color=BLUE, markersize=5, capsize=3)
        panel.set_title(f"{ipc} image{'s' * (ipc > 1)} per class", fontsize=10)
        panel.set_xlabel("test accuracy, %: mean, standard error, seeds")
        panel.set_yticks(range(len(methods)), names, parse_math=False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure
