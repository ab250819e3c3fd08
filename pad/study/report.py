"""The report of a study: tables, as Markdown and as CSV, and one plot."""

import csv
import io
import math
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from pad.show.figures import BLUE, GREY, draw_figure, new_figure
from pad.show.names import short, widest
from pad.show.results import SCORES, plus_minus, title
from pad.show.tables import standard_error
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
    results: list[dict] | None = None  # of stage 3, where there are several: each of a network and a training set
    metrics: Mapping[str, Mapping] | None = None  # of the first network, where there are rows for them
    distilling: Mapping[str, float | None] | None = None  # what making the set took (:func:`pad.store.run.costs`)

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
    costs: tuple[float, float]  # of distilling: seconds, and peak memory in MB; means over the seeds, NaN where unknown

    @property
    def mean(self) -> float:
        return statistics.mean(self.values.values())

    @property
    def error(self) -> float:
        return standard_error(list(self.values.values()))


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A figure of one method at one size, of each seed that has it: mean accuracies in %, or scores.

    column: what it is of, beside the method. own: accuracies on the training images, in %, where they are known. last:
    those after the last epoch, where the best one counts. rates: learning rates.
    """

    method: str
    ipc: int
    column: str
    values: list[float]
    own: list[float]
    last: list[float]
    rates: list[float]

    @property
    def mean(self) -> float:
        return statistics.mean(self.values)

    @property
    def error(self) -> float:
        return standard_error(self.values)

    @property
    def mean_own(self) -> float:
        return statistics.mean(self.own)


@dataclass(frozen=True, kw_only=True)
class Crossed:
    """A table of methods x networks, training sets or scores, for each size."""

    title: str  # in Markdown
    column: str  # and in CSV
    entries: list[Entry]
    note: str = "Accuracy in %: mean ± standard error over n seeds; in brackets that on the images trained on."
    form: str = ".2f"

    def markdown(self) -> Iterator[str]:
        """Its parts, size by size."""
        columns = list(dict.fromkeys(each.column for each in self.entries))
        for ipc in dict.fromkeys(each.ipc for each in self.entries):
            cells = {(each.method, each.column): each for each in self.entries if each.ipc == ipc}
            lines = []
            for method in dict.fromkeys(method for method, _ in cells):
                own = [cells.get((method, column)) for column in columns]
                n = max(len(each.values) for each in own if each)
                lines.append([_in_markdown(method), *(self._shown(each, n) for each in own), str(n)])
            yield f"## {_size(ipc)}: {self.title}"
            yield self.note
            yield _table(["method", *map(_in_markdown, columns), "n"], lines)

    def _shown(self, entry: Entry | None, n: int) -> str:
        if entry is None:
            return "-"
        said = [f"{entry.mean_own:{self.form}}"] if entry.own else []
        said += [f"last epoch {statistics.mean(entry.last):{self.form}}"] if entry.last else []
        said += [f"n = {len(entry.values)}"] if len(entry.values) < n else []
        return plus_minus(entry.mean, entry.error, form=self.form) + (f" ({'; '.join(said)})" if said else "")

    def comma_separated(self) -> str:
        """One line per method, size and column."""
        lines = [["method", "ipc", self.column, "mean", "standard_error", "n", "on_its_own_images", "last_epoch", "lr"]]
        for each in self.entries:
            figures = [_text(value, ".4f") for value in (each.mean, each.error)]
            more = [f"{statistics.mean(values):.4g}" if values else "" for values in (each.own, each.last, each.rates)]
            lines.append([each.method, str(each.ipc), each.column, *figures, str(len(each.values)), *more])
        return _csv(lines)


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
        spent = [[(o.distilling or {}).get(name) for o in own] for name in ("seconds", "peak_memory")]
        seconds, peak = (_mean([each for each in every if each is not None]) for every in spent)
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
                costs=(seconds, peak / 1e6),
            )
        )
    return rows


def crossed(outcomes: Sequence[Outcome]) -> dict[str, Crossed]:
    """What stage 3 found beside the first network on the set as it is, by the name of its CSV file.

    Networks are compared on that set, training sets by the first network; scores are the first network's.
    """
    results = [(outcome, result) for outcome in outcomes for result in outcome.results or ()]
    metrics = [(outcome, *item) for outcome in outcomes for item in (outcome.metrics or {}).items()]
    network, row = (results[0][1]["network"], results[0][1]["set"]) if results else ("", "")
    networks = [
        (each, f"{found['network']}{', tuned' * bool(found.get('tuned'))}", found)
        for each, found in results
        if found["set"] == row and len({other["network"] for _, other in results}) > 1
    ]
    sets = [(each, title(found), found) for each, found in results if found["network"] == network]
    scores = [(each, SCORES[name][0] if name in SCORES else name, found) for each, name, found in metrics]
    tables = {
        "networks.csv": Crossed(title="networks", column="network", entries=_entries(networks)),
        "rows.csv": Crossed(title="training sets", column="training_set", entries=_entries(sets)),
    }
    tables = {name: each for name, each in tables.items() if len({entry.column for entry in each.entries}) > 1}
    note = "Fractions: mean ± standard error over n seeds."
    of_scores = Crossed(title="scores", column="score", entries=_entries(scores, 1), note=note, form=".3f")
    return tables | ({"metrics.csv": of_scores} if scores else {})


def _entries(found: Iterable[tuple[Outcome, str, Mapping]], scale: float = 100) -> list[Entry]:
    """By size, and in order otherwise."""
    by_key: dict[tuple[int, str, str], list[Mapping]] = {}
    for outcome, column, figures in found:
        by_key.setdefault((outcome.ipc, outcome.method, column), []).append(figures)
    entries = []
    for ipc, method, column in sorted(by_key, key=lambda key: key[0]):
        every = by_key[ipc, method, column]
        values = [scale * each["mean"] for each in every]
        own = [scale * each["train"] for each in every if each.get("train") is not None]
        last = [scale * each["last"]["mean"] for each in every if "last" in each]
        rates = [each["lr"] for each in every if "lr" in each]
        entries.append(Entry(method=method, ipc=ipc, column=column, values=values, own=own, last=last, rates=rates))
    return entries


def write_report(
    folder: Path, outcomes: Sequence[Outcome], reference: str | None = None, *, costs: bool = False
) -> None:
    """Write ``results.md`` and ``results.csv``, print the tables, then draw ``results.png``, if that can be drawn.

    Where cells have several results, also what :func:`crossed` makes of them. ``reference``: a method that others are
    compared with. ``costs``: the table also says what distilling took.
    """
    rows, tables = summarise(outcomes, reference), crossed(outcomes)
    text = markdown(rows, reference, [part for table in tables.values() for part in table.markdown()], costs=costs)
    write_text(folder / "results.md", text)
    write_text(folder / "results.csv", comma_separated(rows, costs=costs))
    for name in ("networks.csv", "rows.csv", "metrics.csv"):
        if name in tables:
            write_text(folder / name, tables[name].comma_separated())
        else:  # of an earlier form of the study
            (folder / name).unlink(missing_ok=True)
    print(f"\n{text}", flush=True)
    if any(row.values for row in rows):
        draw_figure(folder / "results.png", plot, rows)


def markdown(
    rows: Sequence[Row], reference: str | None = None, more: Iterable[str] = (), *, costs: bool = False
) -> str:
    """A table for each size, best first, ``more`` parts, and what failed. ``costs``: with those of distilling."""
    compared = any(row.difference for row in rows)
    minus = [f"minus {_in_markdown(reference)}, by seed"] * compared
    spent = ["seconds", "peak memory, MB"] * costs
    head = ["method", "accuracy %", "standard error", "n", *minus, "networks each", *spent]
    parts = []
    for ipc in dict.fromkeys(row.ipc for row in rows):
        mine = sorted((row for row in rows if row.ipc == ipc), key=lambda row: -row.mean if row.values else 1)
        lines = []
        for row in mine:
            figures = [_text(row.mean, ".2f", "-"), _text(row.error, ".2f", "-")] if row.values else ["-", "-"]
            forms = zip(row.difference or (), ("+.2f", ".2f"))
            pair = [" ± ".join(_text(value, form, "-") for value, form in forms)] * compared
            n = str(len(row.values)) if len(row.values) == row.seeds else f"{len(row.values)} of {row.seeds}"
            spent = [_text(each, form, "-") for each, form in zip(row.costs, (".1f", ".0f"))] * costs
            lines.append([_in_markdown(row.method), *figures, n, *pair, str(row.networks), *spent])
        parts += [f"## {_size(ipc)}", _table(head, lines)]
    parts += more
    failed = [f"- {_in_markdown(f'{row.method}, ipc {row.ipc}, {why}')}" for row in rows for why in row.failed]
    if failed:
        parts += ["## Failed", "\n".join(failed)]
    return "\n\n".join(parts) + "\n"


def _size(ipc: int) -> str:
    return f"{ipc} image{'s' * (ipc > 1)} per class"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|") for cell in line] for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _in_markdown(text: object) -> str:
    """``text`` on one line, with nothing that Markdown or HTML reads as more than text; a | is for tables to mind."""
    at_an_edge = r"(?<![^\W_])_|_(?![^\W_])"
    return re.sub(rf"[\\`*<>&~$\[\]]|{at_an_edge}", r"\\\g<0>", " ".join(str(text).split()))


def comma_separated(rows: Sequence[Row], *, costs: bool = False) -> str:
    """One line per method and size. ``costs``: with those of distilling."""
    lines = ["method ipc accuracy standard_error n networks difference difference_error seconds failed".split()]
    lines[0] += ["distilling_seconds", "peak_memory_mb"] * costs
    for row in rows:
        figures = [_text(row.mean, ".4f"), _text(row.error, ".4f")] if row.values else ["", ""]
        pair = [_text(value, ".4f") for value in row.difference] if row.difference else ["", ""]
        rest = [f"{row.seconds:.1f}", "; ".join(row.failed)]
        rest += [_text(each, ".1f") for each in row.costs] * costs
        lines.append([row.method, str(row.ipc), *figures, str(len(row.values)), str(row.networks), *pair, *rest])
    return _csv(lines)


def _csv(lines: Sequence[Sequence[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue()


def _mean(values: Sequence[float]) -> float:
    return statistics.mean(values) if values else math.nan


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
        panel.set_title(_size(ipc), fontsize=10)
        panel.set_xlabel("test accuracy, %: mean, standard error, seeds")
        panel.set_yticks(range(len(methods)), names, parse_math=False)
        panel.grid(axis="x", alpha=0.3)
    panels[0].invert_yaxis()
    return figure
